"""A step served whole: each op once per layer, sizes known on the host, nothing read back.

A pure decode step writes, seals and reads in kernels whose launches depend on the number of rows
only, so a CUDA graph can hold it. Sealing then runs beside attention on a second stream: a tile is
complete at least G tokens before its record is first read and is sealed within that time, so no
row of the step reads what the step seals. With prefills in the step that no longer holds, and
everything runs in one order on one stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvarn_core.ops.decode import decode
from kvarn_core.ops.store import append, seal, write_sink
from kvarn_vllm.prefill import prefill
from kvarn_vllm.streams import beside
from kvarn_vllm.warm_up import warm_up

if TYPE_CHECKING:
    import torch

    from kvarn_core import Recipe, RecordLayout
    from kvarn_vllm.flash import FlashAttention
    from kvarn_vllm.metadata import KVarNMetadata
    from kvarn_vllm.workspace import Workspace


@dataclass(frozen=True)
class Batched:
    """Serves the steps of a layer.

    Parameters
    ----------
    layout : RecordLayout
        Byte layout of the preset.
    recipe : Recipe
        How records are filled.
    scale : float
        Factor on scores before the softmax.
    engine : str
        Engine of `kvarn_core` that runs the ops.
    attention : FlashAttention
        For the prefill rows.
    workspace : Workspace
        Scratch memory.
    """

    layout: RecordLayout
    recipe: Recipe
    scale: float
    engine: str
    attention: FlashAttention
    workspace: Workspace

    def warm_up(self, query: torch.Tensor) -> None:
        """Reserve all scratch memory; load every kernel if no layer of this kind has yet."""
        self.workspace.reserve(query)
        warm_up(self, query.dtype, query.device)

    def serve(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        step: KVarNMetadata,
        output: torch.Tensor,
        *,
        layer: int,
    ) -> None:
        """Store the new rows of a step and attend; see `KVarNImpl.forward` for the tensors."""
        common: dict[str, Any] = {
            "layout": self.layout,
            "max_query_len": step.max_query_len,
            "engine": self.engine,
        }

        def seal_all() -> None:
            seal(key, value, cache, *step.everything, recipe=self.recipe, layer=layer, **common)

        if step.prefill is None:
            with beside(seal_all, query.device):
                append(key, value, cache, *step.everything, **common)
                self._decode(query, cache, *step.everything[:2], output)
            return

        write_sink(key, value, cache, *step.prefills, **common)
        seal_all()
        if step.num_decodes:
            append(key, value, cache, *step.decodes, **{**common, "max_query_len": 1})
            self._decode(query, cache, *step.decodes[:2], output)
        new = slice(step.prefill.first_token, step.num_tokens)
        prefill(
            query[new], key[new], value[new], cache, step.prefills[0], step.prefill, output[new],
            layout=self.layout, attention=self.attention, workspace=self.workspace,
            engine=self.engine,
        )  # fmt: skip
        append(key, value, cache, *step.prefills, **common)  # last: prefill read the old ring

    def _decode(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Attend the rows at the front, one query each."""
        rows = slice(0, len(seq_lens))
        workspace, lse = self.workspace.decode(len(seq_lens))
        decode(
            query[rows], cache, page_table, seq_lens, layout=self.layout, sm_scale=self.scale,
            out=output[rows], lse=lse, workspace=workspace, engine=self.engine,
        )  # fmt: skip

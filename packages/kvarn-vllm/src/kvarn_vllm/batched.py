"""A step served whole: each op once per layer, sizes known on the host, nothing read back.

A pure decode step writes, seals and reads in kernels whose launches depend on the number of rows
only, so a CUDA graph can hold it. Sealing then runs beside attention on a second stream: a tile is
complete at least G tokens before its record is first read and is sealed within that time, so no
row of the step reads what the step seals. With prefills in the step that no longer holds, and
everything runs in one order on one stream, outside of graphs: what the host does per layer is then
as long as what the GPU does, so all that can be is done once per step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvarn_core.ops import decode, store
from kvarn_vllm.prefill import prefill
from kvarn_vllm.streams import beside
from kvarn_vllm.warm_up import warm_up

if TYPE_CHECKING:
    import torch

    from kvarn_core import Recipe, RecordLayout
    from kvarn_core.ops.decode import Decode
    from kvarn_core.ops.store import Write
    from kvarn_vllm.flash import FlashAttention
    from kvarn_vllm.metadata import KVarNMetadata, Rows
    from kvarn_vllm.workspace import Workspace


@dataclass(frozen=True)
class Launches:
    """Ops of a step, prepared for all layers of a kind.

    Parameters
    ----------
    seal : callable
        For all rows.
    append, decode : callable
        For the rows with one new token.
    decodes : slice
        Where those are.
    prefills : tuple of callable, optional
        `write_sink` and `append` for the others, if there are any.
    """

    seal: Write
    append: Write
    decode: Decode
    decodes: slice
    prefills: tuple[Write, Write] | None


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
        kind = (
            query.shape, query.stride(), key.stride(), value.stride(), cache.shape, cache.stride(),
            output.stride(), query.dtype, self.scale,
        )  # fmt: skip
        launches = step.launches.get(kind)
        if launches is None:
            launches = self._prepare(query, key, value, cache, step, output)
            step.launches[kind] = launches
        decodes = launches.decodes
        if step.prefill is None or launches.prefills is None:
            with beside(lambda: launches.seal(key, value, cache, layer), query.device):
                launches.append(key, value, cache)
                launches.decode(query[decodes], cache, output[decodes])
            return

        write_sink, append = launches.prefills
        write_sink(key, value, cache)
        launches.seal(key, value, cache, layer)
        if step.num_decodes:
            launches.append(key, value, cache)
            launches.decode(query[decodes], cache, output[decodes])
        new = slice(step.prefill.first_token, step.num_tokens)
        table = step.page_table[step.num_decodes :]
        prefill(
            query[new], key[new], value[new], cache, table, step.prefill, output[new],
            layout=self.layout, attention=self.attention, workspace=self.workspace,
            engine=self.engine,
        )  # fmt: skip
        append(key, value, cache)  # last: prefill read the old ring

    def _prepare(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        step: KVarNMetadata,
        output: torch.Tensor,
    ) -> Launches:
        """What every layer with tensors of these shapes and strides launches."""

        def write(op: str, requests: Rows, most: int) -> Write:
            return store.prepare(
                op, key, value, cache, *requests,
                layout=self.layout, recipe=self.recipe, max_query_len=most, engine=self.engine,
            )  # fmt: skip

        longest = step.max_query_len
        requests = step.decodes if step.prefill else step.everything
        decodes = slice(0, len(requests[1]))
        scratch, lse = self.workspace.decode(max(decodes.stop, 1))
        sink_and_ring = None
        if step.prefill:
            prefills = step.prefills, longest
            sink_and_ring = write("write_sink", *prefills), write("append", *prefills)
        return Launches(
            seal=write("seal", step.everything, longest),
            append=write("append", requests, 1 if step.prefill else longest),
            decode=decode.prepare(
                query[decodes], cache, *requests[:2], layout=self.layout, sm_scale=self.scale,
                out=output[decodes], lse=lse[decodes], workspace=scratch, engine=self.engine,
            ),
            decodes=decodes,
            prefills=sink_and_ring,
        )  # fmt: skip

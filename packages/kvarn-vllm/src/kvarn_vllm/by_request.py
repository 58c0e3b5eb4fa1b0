"""A step served request by request: the definition, in plain torch.

Serves where there are no kernels (vLLM's CPU engine, the debug presets) and in prefill mode
``sealed``, where every token sees exactly what a decode step at its position would, so that a
result does not depend on how a prompt is cut into chunks. Reads lengths on the host; slow on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from kvarn_core.ops.decode import attend, decode
from kvarn_core.ops.gather import gather
from kvarn_core.ops.store import append, seal, write_sink
from kvarn_core.rotation import rotate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvarn_core import Recipe, RecordLayout
    from kvarn_vllm.metadata import KVarNMetadata

QUERY_BLOCK = 256  # bounds the score matrix of a prefill


@dataclass(frozen=True)
class ByRequest:
    """Serves the steps of a layer, one prefill row after the other.

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
    sealed : bool
        Prefill mode ``sealed``; otherwise ``chunk``.
    """

    layout: RecordLayout
    recipe: Recipe
    scale: float
    engine: str
    sealed: bool

    def warm_up(self, query: torch.Tensor) -> None:
        """Nothing to prepare."""

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
        write_sink(key, value, cache, *step.everything, layout=self.layout, engine=self.engine)
        seal(
            key, value, cache, *step.everything,
            layout=self.layout, recipe=self.recipe, layer=layer, engine=self.engine,
        )  # fmt: skip
        append(key, value, cache, *step.decodes, layout=self.layout, engine=self.engine)
        table, lens, _ = step.decodes
        rows = slice(0, step.num_decodes)
        output[rows], _ = decode(
            query[rows], cache, table, lens,
            layout=self.layout, sm_scale=self.scale, engine=self.engine,
        )  # fmt: skip
        prefill = self._prefill_sealed if self.sealed else self._prefill_chunk
        for tokens, page_table, length in _prefills(step):
            output[tokens] = prefill(
                query[tokens], key[tokens], value[tokens], cache, page_table, length
            )

    def _prefill_chunk(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        page_table: torch.Tensor,
        length: int,
    ) -> torch.Tensor:
        """New rows of one request see each other raw and the context as a decode would."""
        context = length - len(query)
        old_key, old_value = self._gather(cache, page_table, context, context)
        keys = torch.cat((old_key, rotate(key)))
        values = torch.cat((old_value, rotate(value)))
        out = self._attend(rotate(query), keys, values)
        self._append(key, value, cache, page_table, length)
        return out.to(query.dtype)

    def _prefill_sealed(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        page_table: torch.Tensor,
        length: int,
    ) -> torch.Tensor:
        """New rows of one request, tile by tile: queries of one tile see the same records."""
        first, group = length - len(query), self.layout.group
        cuts = [first, *range((first // group + 1) * group, length, group), length]
        parts = []
        for start, stop in pairwise(cuts):
            part = slice(start - first, stop - first)
            self._append(key[part], value[part], cache, page_table, stop)
            keys, values = self._gather(cache, page_table, stop, stop - 1)
            parts.append(self._attend(rotate(query[part]), keys, values))
        return torch.cat(parts).to(query.dtype)

    def _append(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        page_table: torch.Tensor,
        length: int,
    ) -> None:
        """Write new rows of one request, which has `length` tokens then, to its ring."""
        lens, cu_seqlens_q = _int32([length], cache), _int32([0, len(key)], cache)
        append(
            key, value, cache, page_table, lens, cu_seqlens_q,
            layout=self.layout, engine=self.engine,
        )  # fmt: skip

    def _gather(
        self, cache: torch.Tensor, page_table: torch.Tensor, count: int, position: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """First tokens of one request as a query at `position` sees them, rotated, fp32."""
        lens, positions = _int32([count], cache), _int32([position], cache)
        key, value, _ = gather(
            cache, page_table, lens, positions, layout=self.layout, engine=self.engine
        )
        return key, value

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal attention in rotated space [Q, Hq, D] fp32, rotated back, a block at a time."""
        context = len(key) - len(query)
        blocks = []
        for start in range(0, len(query), QUERY_BLOCK):
            queries = query[start : start + QUERY_BLOCK]
            visible = slice(0, context + start + len(queries))
            out, _ = attend(queries, key[visible], value[visible], sm_scale=self.scale)
            blocks.append(out)
        return rotate(torch.cat(blocks))


def _int32(values: list[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=like.device)


def _prefills(step: KVarNMetadata) -> Iterator[tuple[slice, torch.Tensor, int]]:
    """Yield (new tokens, page table [1, columns], length) of rows with more than one new token."""
    starts = step.cu_seqlens_q.tolist()
    for row in range(step.num_decodes, len(step.seq_lens)):
        length = int(step.seq_lens[row])
        if length and starts[row + 1] > starts[row]:
            yield slice(starts[row], starts[row + 1]), step.page_table[row : row + 1], length

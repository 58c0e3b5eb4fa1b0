"""Random but valid page tables, poison, and the steps of a serving engine, for tests.

Pages of a request are scattered over the cache with holes between them; columns behind the used
ones name pages of other requests, as stale columns of a real engine do.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st

from kvarn_core.layout import HEAD_DIMS, HIT_COLUMN, RING_COLUMN, SINK_COLUMN, RecordLayout
from kvarn_core.ops.store import append, seal, write_sink
from kvarn_core.spec import PRESETS, Recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

NULL_PAGE = 0
POISONS = (0xFF, 0x3C, 0x7C)  # fp16 NaN; finite, about 1; near infinity


@dataclass
class Paging:
    """A cache and the page tables of some requests.

    Attributes
    ----------
    cache : Tensor [P, Hkv, record_bytes], uint8
    page_table : Tensor [B, max_pages], int32
    layout : RecordLayout
    capacities : list of int
        Tokens each request has pages for.
    hits : list of int
        Tiles each request shares with its donor.
    """

    cache: torch.Tensor
    page_table: torch.Tensor
    layout: RecordLayout
    capacities: list[int]
    hits: list[int]

    def used_pages(self, request: int) -> list[int]:
        """Pages the request may read: sink, ring, records."""
        columns = self.layout.columns(self.capacities[request])
        return self.page_table[request, SINK_COLUMN:columns].tolist()

    def own_pages(self, request: int) -> list[int]:
        """Pages the request may write: all it reads except null and shared record pages."""
        header = self.layout.header_columns
        row = self.page_table[request].tolist()
        records = row[header + self.hits[request] : self.layout.columns(self.capacities[request])]
        pages = row[SINK_COLUMN:header] + records
        return [page for page in pages if page != NULL_PAGE]

    def poison_unused(self, byte: int) -> None:
        """Fill every page that no request reads, the null page included, with `byte`."""
        used = {page for row in range(len(self.capacities)) for page in self.used_pages(row)}
        unused = sorted(set(range(self.cache.shape[0])) - used | {NULL_PAGE})
        self.cache[unused] = byte


def allocate(
    layout: RecordLayout,
    capacities: Sequence[int],
    *,
    num_kv_heads: int = 2,
    hits: Sequence[int] | None = None,
    donors: Sequence[int] | None = None,
    sink: bool = True,
    spare_columns: int = 3,
    seed: int = 0,
    fill: int = 0xFF,
) -> Paging:
    """Scatter the pages of some requests over a cache.

    Parameters
    ----------
    layout : RecordLayout
        Byte layout of the preset.
    capacities : sequence of int
        Tokens each request needs pages for.
    num_kv_heads : int
        KV heads of the cache.
    hits, donors : sequence of int, optional
        Request i takes its first ``hits[i]`` record pages from request ``donors[i]``, which comes
        before it. A request with hits has no sink page.
    sink : bool
        Whether cold requests get a sink page.
    spare_columns : int
        Columns behind the longest request; they and all unused ones name random pages.
    seed : int
        Decides the order of pages and the holes.
    fill : int
        Byte that all pages hold at first.

    Returns
    -------
    Paging
    """
    shuffle = random.Random(seed)  # noqa: S311 - test data, not a secret
    hits = list(hits or [0] * len(capacities))
    donors = list(donors or [0] * len(capacities))
    width = max(layout.columns(capacity) for capacity in capacities) + spare_columns
    count = sum(layout.columns(capacity) for capacity in capacities)
    total = count + count // 3 + 2  # a quarter are holes
    free = list(range(1, total))
    shuffle.shuffle(free)
    table: list[list[int]] = []
    for request, capacity in enumerate(capacities):
        row = [shuffle.randrange(total) for _ in range(width)]
        row[HIT_COLUMN] = hits[request]
        row[SINK_COLUMN] = free.pop() if sink and not hits[request] else NULL_PAGE
        for column in range(RING_COLUMN, layout.columns(capacity)):
            tile = column - layout.header_columns
            shared = 0 <= tile < hits[request]
            row[column] = table[donors[request]][column] if shared else free.pop()
        table.append(row)
    shape = (total, num_kv_heads, layout.record_bytes)
    return Paging(
        torch.full(shape, fill, dtype=torch.uint8),
        torch.tensor(table, dtype=torch.int32),
        layout,
        list(capacities),
        hits,
    )


def step(
    paging: Paging,
    chunks: Sequence[tuple[torch.Tensor, torch.Tensor]],
    lengths: Sequence[int],
    *,
    recipe: Recipe = Recipe.KVARN,
    layer: int = 0,
) -> None:
    """Store one step of a serving engine: sink rows, due records, then ring rows of all requests.

    Parameters
    ----------
    paging : Paging
        Cache written in place.
    chunks : sequence of (key, value), Tensor [q, Hkv, D]
        New rows of each request; q = 0 for a request that does not run.
    lengths : sequence of int
        Tokens of each request after the step; 0 marks a padded row.
    recipe : Recipe
        How records are filled.
    layer : int
        Enters the seal phase.
    """
    key, value = (torch.cat(rows) for rows in zip(*chunks, strict=True))
    starts = torch.tensor([0, *(len(rows) for rows, _ in chunks)]).cumsum(0).int()
    where = (paging.cache, paging.page_table, torch.tensor(lengths, dtype=torch.int32), starts)
    write_sink(key, value, *where, layout=paging.layout)
    seal(key, value, *where, layout=paging.layout, recipe=recipe, layer=layer)
    append(key, value, *where, layout=paging.layout)


def store_sequence(
    paging: Paging,
    request: int,
    key: torch.Tensor,
    value: torch.Tensor,
    chunks: Sequence[int],
    *,
    start: int = 0,
    recipe: Recipe = Recipe.KVARN,
    layer: int = 0,
) -> None:
    """Store rows [N, Hkv, D] of one request in pieces, from position `start` on.

    Parameters
    ----------
    paging : Paging
        Cache written in place.
    request : int
        Row of the page table; all others are padded.
    key, value : Tensor [N, Hkv, D]
        Rows after RoPE.
    chunks : sequence of int
        Sizes of the pieces; their sum is N.
    start : int
        Position of the first row.
    recipe : Recipe
        How records are filled.
    layer : int
        Enters the seal phase.
    """
    empty = key[:0], value[:0]
    batch, done = len(paging.capacities), 0
    for size in chunks:
        rows = slice(done, done + size)
        done += size
        parts, lengths = [empty] * batch, [0] * batch
        parts[request], lengths[request] = (key[rows], value[rows]), start + done
        step(paging, parts, lengths, recipe=recipe, layer=layer)


# --- hypothesis strategies ------------------------------------------------------------------------


def layouts() -> st.SearchStrategy[RecordLayout]:
    """Every public preset with every head dimension."""
    return st.builds(
        RecordLayout, st.sampled_from(list(PRESETS.values())), st.sampled_from(HEAD_DIMS)
    )


@st.composite
def lengths(draw: st.DrawFn, group: int, most: int) -> int:
    """Token counts from 1 to `most`, often next to a multiple of `group`."""
    if draw(st.booleans()):
        return draw(st.integers(1, most))
    near = group * draw(st.integers(0, most // group)) + draw(st.integers(-1, 1))
    return min(max(near, 1), most)


@st.composite
def chunkings(draw: st.DrawFn, total: int, group: int) -> list[int]:
    """Ways to cut `total` tokens into pieces of 1 to 4 G + 1 tokens."""
    pieces: list[int] = []
    while (left := total - sum(pieces)) > 0:
        size = draw(st.sampled_from((1, 17, group - 1, group, group + 1, 2 * group, 4 * group + 1)))
        repeat = draw(st.integers(1, 20)) if size == 1 else 1
        for _ in range(repeat):
            if sum(pieces) < total:
                pieces.append(min(size, total - sum(pieces)))
        assert left
    return pieces

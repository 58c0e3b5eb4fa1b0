"""Steps of a serving engine, stored by an engine under test and by the reference.

Every comparison covers the whole cache, so a byte written anywhere else fails it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from kvarn_core.ops.store import append, seal, write_sink
from kvarn_core.rotation import exact_rows
from kvarn_core.spec import Recipe
from kvarn_core.testing.compare import assert_same_bits
from kvarn_core.testing.inputs import draw
from kvarn_core.testing.paging import allocate
from kvarn_core.testing.records import assert_equivalent_records

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvarn_core.layout import RecordLayout
    from kvarn_core.testing.paging import Paging

FILL = 0x3C  # an unwritten record is a valid one: scales of about 1

Rows = tuple[torch.Tensor, torch.Tensor]


def new_rows(layout: RecordLayout, count: int, *, seed: int = 0, heads: int = 2) -> Rows:
    """K and V [count, heads, D] of one request."""
    shape = (count, heads, layout.head_dim)
    key, value = (draw("gaussian", shape, seed=2 * seed + i) for i in (0, 1))
    return key, value


def store(
    paging: Paging,
    rows: Sequence[Rows],
    lengths: Sequence[int],
    news: Sequence[int],
    engine: str,
    device: torch.device,
    **seal_options: Any,
) -> None:
    """One step: the last `news` of the first `lengths` rows of each request.

    The reference always runs on the CPU, where it is the definition.
    """
    device = torch.device("cpu") if engine == "reference" else device
    parts = [[x[n - q : n] for x in kv] for kv, n, q in zip(rows, lengths, news, strict=True)]
    key, value = (torch.cat(part).to(device) for part in zip(*parts, strict=True))
    cache, table = paging.cache.to(device), paging.page_table.to(device)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    starts = torch.tensor([0, *news]).cumsum(0).int().to(device)
    where = (key, value, cache, table, seq_lens, starts)
    common: dict[str, Any] = {"layout": paging.layout, "engine": engine}
    if max(news) == 1:  # a decode step, in the order of serving
        append(*where, **common, max_query_len=1)
        seal(*where, **common, **seal_options, max_query_len=1)
    else:
        write_sink(*where, **common)
        seal(*where, **common, **seal_options)
        append(*where, **common)
    paging.cache = cache.cpu()


def assert_a_thousand_runs_agree(layout: RecordLayout, engine: str, device: torch.device) -> None:
    """Store prompts of four requests a thousand times; every run leaves the same bytes."""
    total = 700
    rows = [new_rows(layout, total, seed=i, heads=8) for i in range(4)]
    paging = allocate(layout, [total] * 4, num_kv_heads=8, seed=11, fill=FILL)
    key, value = (torch.cat(part).to(device) for part in zip(*rows, strict=True))
    empty, table = paging.cache.to(device), paging.page_table.to(device)
    lens = torch.full((4,), total, dtype=torch.int32, device=device)
    starts = torch.arange(5, dtype=torch.int32, device=device) * total
    first = None
    for _ in range(1000):
        cache = empty.clone()
        where = (key, value, cache, table, lens, starts)
        for write in (write_sink, seal, append):
            write(*where, layout=layout, max_query_len=total, engine=engine)
        first = cache if first is None else first
        assert torch.equal(cache, first)


def step(
    paging: Paging,
    rows: Sequence[Rows],
    lengths: Sequence[int],
    news: Sequence[int],
    engine: str,
    device: torch.device,
    **seal_options: Any,
) -> None:
    """Store a step with an engine and the reference, compare, keep the cache of the reference."""
    ours = dataclasses.replace(paging, cache=paging.cache.clone())
    store(ours, rows, lengths, news, engine, device, **seal_options)
    store(paging, rows, lengths, news, "reference", device, **seal_options)
    assert_same_cache(ours.cache, paging, rows, seal_options.get("recipe", Recipe.KVARN))


def assert_same_cache(
    got: torch.Tensor, paging: Paging, rows: Sequence[Rows], recipe: Recipe = Recipe.KVARN
) -> None:
    """Check records by what they may differ in, everything else by its bits."""
    layout, want = paging.layout, paging.cache
    pairs, tiles = [], []  # records that differ, and what both encoded
    for request, row in enumerate(paging.page_table.tolist()):
        pages = row[layout.header_columns : layout.columns(paging.capacities[request])]
        exact = [exact_rows(x, layout).transpose(0, 1) for x in rows[request]]  # [Hkv, n, D]
        for tile in range(paging.hits[request], len(pages)):
            page, tokens = pages[tile], slice(tile * layout.group, (tile + 1) * layout.group)
            differs = (got[page] != want[page]).any(1)
            if differs.any():
                pairs.append((got[page, differs], want[page, differs]))
                tiles.append([x[differs, tokens] for x in exact])
                got[page] = want[page]
    if pairs:
        records, encoded = (
            [torch.cat(x) for x in zip(*found, strict=True)] for found in (pairs, tiles)
        )
        assert_equivalent_records(*records, *encoded, layout, recipe)
    assert_same_bits(got, want)


def sealed(paging: Paging, request: int) -> list[bool]:
    """Whether each record half of a request was written; tile, head, half in this order."""
    layout, cut = paging.layout, paging.layout.key_bytes
    columns = slice(layout.header_columns, layout.columns(paging.capacities[request]))
    records = paging.cache[paging.page_table[request, columns].long()]
    halves = (records[..., :cut] != FILL).any(-1), (records[..., cut:] != FILL).any(-1)
    found: list[bool] = torch.stack(halves, -1).flatten().tolist()
    return found

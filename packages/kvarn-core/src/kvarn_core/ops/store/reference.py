"""The definition of storing, in plain torch: one request after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvarn_core.exact import read_rows, ring_pages, write_rows
from kvarn_core.layout import HIT_COLUMN, RING_COLUMN, SINK_COLUMN, seal_phase
from kvarn_core.ops.quantize import quantize_key, quantize_value
from kvarn_core.rotation import exact_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvarn_core.layout import RecordLayout
    from kvarn_core.spec import Recipe


def write_sink(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    layout: RecordLayout,
) -> None:
    """See `kvarn_core.ops.store.write_sink`."""
    for row, start, new, length in _requests(seq_lens, cu_seqlens_q):
        first = length - new
        stop = min(length, layout.sink_rows)
        if first < stop:
            rows = slice(start, start + stop - first)
            _write_sink_rows(key[rows], value[rows], cache, page_table[row], first, layout)


def seal(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    layout: RecordLayout,
    recipe: Recipe,
    layer: int,
) -> None:
    """See `kvarn_core.ops.store.seal`."""
    for row, start, new, length in _requests(seq_lens, cu_seqlens_q):
        table, first = page_table[row], length - new
        fresh = slice(start, start + new)
        oldest = max(int(table[HIT_COLUMN]), first // layout.group - 1)  # a phase is below G
        for tile in range(oldest, (length - 1) // layout.group):
            due = _due_halves(tile, first, length, table, cache.shape[1], layer, layout)
            if due:
                page = int(table[layout.header_columns + tile])
                tiles = _tile_rows(tile, first, key[fresh], value[fresh], cache, table, layout)
                _write_record(cache[page], due, *tiles, layout, recipe)


def append(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    layout: RecordLayout,
) -> None:
    """See `kvarn_core.ops.store.append`."""
    for row, start, new, length in _requests(seq_lens, cu_seqlens_q):
        table, kept = page_table[row], min(new, layout.ring_rows)
        first, end = length - kept, start + new
        rows = slice(end - kept, end)
        positions = torch.arange(first, length, device=cache.device)
        write_rows(
            cache, ring_pages(table, layout), positions % layout.ring_rows,
            exact_rows(key[rows], layout), exact_rows(value[rows], layout), layout,
        )  # fmt: skip
        stop = min(length, layout.sink_rows)
        if first < stop:
            rows = slice(end - kept, end - length + stop)
            _write_sink_rows(key[rows], value[rows], cache, table, first, layout)


def _write_sink_rows(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor,
    first: int,
    layout: RecordLayout,
) -> None:
    """Write rows of positions `first` and up to the sink page, if the request has one."""
    if int(table[SINK_COLUMN]):
        tokens = torch.arange(first, first + len(key), device=cache.device)
        write_rows(
            cache, table[SINK_COLUMN : SINK_COLUMN + 1], tokens,
            exact_rows(key, layout), exact_rows(value, layout), layout,
        )  # fmt: skip


def _requests(
    seq_lens: torch.Tensor, cu_seqlens_q: torch.Tensor
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (row, first index of its new tokens, new tokens, total tokens) of non-empty rows."""
    starts = cu_seqlens_q.tolist()
    for row, length in enumerate(seq_lens.tolist()):
        new = starts[row + 1] - starts[row]
        if 0 < new <= length:
            yield row, starts[row], new, length


def _due_halves(
    tile: int,
    first: int,
    length: int,
    table: torch.Tensor,
    heads: int,
    layer: int,
    layout: RecordLayout,
) -> list[tuple[int, bool]]:
    """(head, is_value) of the record halves whose deadline is among the new tokens."""
    ring_page, complete = int(table[RING_COLUMN]), (tile + 1) * layout.group
    halves = [(head, is_value) for head in range(heads) for is_value in (False, True)]
    phase = {
        half: seal_phase(ring_page, layer, half[0], is_value=half[1], group=layout.group)
        for half in halves
    }
    return [half for half in halves if first <= complete + phase[half] < length]


def _tile_rows(
    tile: int,
    first: int,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor,
    layout: RecordLayout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact K and V [G, Hkv, D] of a tile: ring rows before position `first`, new rows after."""
    begin, end = tile * layout.group, (tile + 1) * layout.group
    split = min(max(first, begin), end)
    old = torch.arange(begin, split, device=cache.device) % layout.ring_rows
    old_key, old_value = read_rows(cache, ring_pages(table, layout), old, layout)
    new = slice(split - first, end - first) if end > split else slice(0, 0)
    return (
        torch.cat((old_key, exact_rows(key[new], layout))),
        torch.cat((old_value, exact_rows(value[new], layout))),
    )


def _write_record(
    page: torch.Tensor,
    due: list[tuple[int, bool]],
    key: torch.Tensor,
    value: torch.Tensor,
    layout: RecordLayout,
    recipe: Recipe,
) -> None:
    """Encode the due K and V halves of one tile [G, Hkv, D] into `page` [Hkv, record_bytes]."""
    key_heads = [head for head, is_value in due if not is_value]
    value_heads = [head for head, is_value in due if is_value]
    if key_heads:
        tiles = key[:, key_heads].transpose(0, 1)
        page[key_heads, : layout.key_bytes] = quantize_key(
            tiles, layout, recipe, engine="reference"
        )
    if value_heads:
        tiles = value[:, value_heads].transpose(0, 1)
        page[value_heads, layout.key_bytes :] = quantize_value(
            tiles, layout, recipe, engine="reference"
        )

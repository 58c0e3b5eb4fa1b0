"""The definition of storing, in plain torch: one request after the other.

Exact rows lie in pages as D elements of K, then D of V, with the 16-byte pieces of each half
permuted by `exact_piece`. `read_rows` and `write_rows` are the only code that knows this.
"""

from __future__ import annotations

from functools import cache as memoize
from typing import TYPE_CHECKING

import torch

from kvarn_core.layout import (
    HIT_COLUMN,
    RING_COLUMN,
    SINK_COLUMN,
    exact_piece,
    seal_phase,
)
from kvarn_core.ops.quantize import quantize_key, quantize_value
from kvarn_core.rotation import exact_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvarn_core.layout import RecordLayout
    from kvarn_core.spec import Recipe


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
        sink = int(table[SINK_COLUMN])
        if first < layout.sink_rows and sink:
            stop = min(length, layout.sink_rows)
            rows = slice(start, start + stop - first)
            write_rows(
                cache, table[SINK_COLUMN : SINK_COLUMN + 1], torch.arange(first, stop),
                exact_rows(key[rows], layout), exact_rows(value[rows], layout), layout,
            )  # fmt: skip
        for tile in range(int(table[HIT_COLUMN]), (length - 1) // layout.group):
            due = [
                (head, is_value)
                for head in range(cache.shape[1])
                for is_value in (False, True)
                if first <= _due_position(tile, table, layer, head, is_value, layout) < length
            ]
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
        kept = min(new, layout.ring_rows)
        rows = slice(start + new - kept, start + new)
        positions = torch.arange(length - kept, length)
        write_rows(
            cache, ring_pages(page_table[row], layout), positions % layout.ring_rows,
            exact_rows(key[rows], layout), exact_rows(value[rows], layout), layout,
        )  # fmt: skip


def ring_pages(table: torch.Tensor, layout: RecordLayout) -> torch.Tensor:
    """Ring pages of one page table row."""
    return table[RING_COLUMN : layout.header_columns]


def read_rows(
    cache: torch.Tensor, pages: torch.Tensor, rows: torch.Tensor, layout: RecordLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact rows `rows` (int64 [n], counted over `pages`): K and V [n, Hkv, D], row dtype."""
    page, row = rows // layout.rows_per_page, rows % layout.rows_per_page
    per_page = _rows_view(cache, layout)  # [P, Hkv, R, 2, pieces, elements]
    stored = per_page[pages.long()[page], :, row]  # [n, Hkv, 2, pieces, elements]
    order = _piece_order(stored.shape[3])[row & 7]
    pieces = stored.gather(3, order[:, None, None, :, None].expand_as(stored))
    key, value = pieces.flatten(3).unbind(2)
    return key, value


def write_rows(
    cache: torch.Tensor,
    pages: torch.Tensor,
    rows: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: RecordLayout,
) -> None:
    """Write K and V [n, Hkv, D] of the row dtype as exact rows `rows` of `pages`."""
    page, row = rows // layout.rows_per_page, rows % layout.rows_per_page
    per_page = _rows_view(cache, layout)
    pieces = torch.stack((key, value), dim=2).unflatten(3, per_page.shape[4:])
    order = _piece_order(pieces.shape[3])[row & 7]  # its own inverse
    pieces = pieces.gather(3, order[:, None, None, :, None].expand_as(pieces))
    per_page[pages.long()[page], :, row] = pieces


def _rows_view(cache: torch.Tensor, layout: RecordLayout) -> torch.Tensor:
    """View pages as exact rows [P, Hkv, R, 2, pieces, elements of a piece], without a copy."""
    pages, heads = cache.shape[:2]
    used = cache[:, :, : layout.rows_per_page * layout.row_bytes]
    dtype = torch.float32 if layout.preset.is_debug else torch.float16
    elements = 16 // layout.exact_itemsize
    shape = (layout.rows_per_page, 2, layout.head_dim // elements, elements)
    return used.view(dtype).unflatten(2, shape)


@memoize
def _piece_order(pieces: int) -> torch.Tensor:
    """Piece permutations [8, pieces] by page row modulo 8."""
    return exact_piece(torch.arange(pieces)[None, :], torch.arange(8)[:, None])


def _requests(
    seq_lens: torch.Tensor, cu_seqlens_q: torch.Tensor
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (row, first index of its new tokens, new tokens, total tokens) of non-empty rows."""
    starts = cu_seqlens_q.tolist()
    for row, length in enumerate(seq_lens.tolist()):
        new = starts[row + 1] - starts[row]
        if new and length:
            yield row, starts[row], new, length


def _due_position(
    tile: int, table: torch.Tensor, layer: int, head: int, is_value: bool, layout: RecordLayout
) -> int:
    ring_page = int(table[RING_COLUMN])
    phase = seal_phase(ring_page, layer, head, is_value=is_value, group=layout.group)
    return (tile + 1) * layout.group + phase


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
    old = torch.arange(begin, split) % layout.ring_rows
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
        page[key_heads, : layout.key_bytes] = quantize_key(tiles, layout, recipe)
    if value_heads:
        tiles = value[:, value_heads].transpose(0, 1)
        page[value_heads, layout.key_bytes :] = quantize_value(tiles, layout, recipe)

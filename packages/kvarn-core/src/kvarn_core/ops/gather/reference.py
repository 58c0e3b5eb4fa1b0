"""The definition of what a query sees, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvarn_core.layout import HIT_COLUMN, SINK_COLUMN
from kvarn_core.ops.quantize import dequantize
from kvarn_core.ops.store.reference import read_rows, ring_pages

if TYPE_CHECKING:
    from kvarn_core.layout import RecordLayout


def gather_request(
    cache: torch.Tensor,
    table: torch.Tensor,
    length: int,
    position: int,
    layout: RecordLayout,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [length, Hkv, D] of one request as the query at `position` sees them."""
    heads, dim, group = cache.shape[1], layout.head_dim, layout.group
    packed = layout.packed_tiles(position, int(table[HIT_COLUMN]))
    pages = table[layout.header_columns : layout.header_columns + packed].long()
    records = cache[pages].flatten(0, 1)  # [tiles * Hkv, record_bytes]
    tiles = dequantize(records, layout, dtype)
    exact = torch.arange(packed * group, length) % layout.ring_rows
    recent = read_rows(cache, ring_pages(table, layout), exact, layout)

    result = []
    for tile, rows in zip(tiles, recent, strict=True):
        old = tile.view(packed, heads, group, dim).transpose(1, 2).reshape(-1, heads, dim)
        result.append(torch.cat((old[:length], rows.to(dtype))))
    key, value = result
    if packed and int(table[SINK_COLUMN]):
        count = min(layout.sink_rows, length)
        sink = table[SINK_COLUMN : SINK_COLUMN + 1]
        key[:count], value[:count] = read_rows(cache, sink, torch.arange(count), layout)
    return key, value

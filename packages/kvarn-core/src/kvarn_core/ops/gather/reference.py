"""The definition of what a query sees, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvarn_core.exact import read_rows, ring_pages
from kvarn_core.layout import HIT_COLUMN, SINK_COLUMN
from kvarn_core.ops.quantize import dequantize

if TYPE_CHECKING:
    from kvarn_core.layout import RecordLayout


def gather_request(
    cache: torch.Tensor,
    table: torch.Tensor,
    position: int,
    layout: RecordLayout,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Fill `key` and `value` [length, Hkv, D] of one request as the query at `position` sees it."""
    length, heads, dim = key.shape
    packed = layout.packed_tiles(position, int(table[HIT_COLUMN]))
    split = min(packed * layout.group, length)  # first exact token behind the records
    tiles = -(-split // layout.group)
    pages = table[layout.header_columns : layout.header_columns + tiles].long()
    records = dequantize(cache[pages].flatten(0, 1), layout, key.dtype)
    ring = torch.arange(split, length) % layout.ring_rows
    recent = read_rows(cache, ring_pages(table, layout), ring, layout)
    for out, old, new in zip((key, value), records, recent, strict=True):
        by_token = old.view(tiles, heads, layout.group, dim).transpose(1, 2)
        for tile, rows in enumerate(out[:split].split(layout.group)):
            rows.copy_(by_token[tile, : len(rows)])
        out[split:] = new

    if packed and int(table[SINK_COLUMN]):
        count = min(layout.sink_rows, length)
        sink = table[SINK_COLUMN : SINK_COLUMN + 1]
        key[:count], value[:count] = read_rows(cache, sink, torch.arange(count), layout)

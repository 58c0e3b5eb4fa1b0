"""The definition of what a query sees, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvarn_core.exact import read_rows, ring_pages
from kvarn_core.layout import HIT_COLUMN, SINK_COLUMN
from kvarn_core.ops.quantize import dequantize

if TYPE_CHECKING:
    from kvarn_core.layout import RecordLayout

TILES_AT_ONCE = 8  # bounds the workspace, and keeps it in the processor's cache


def gather_request(
    cache: torch.Tensor,
    table: torch.Tensor,
    position: int,
    layout: RecordLayout,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Fill `key` and `value` [length, Hkv, D] of one request as the query at `position` sees it."""
    (length, heads, dim), group = key.shape, layout.group
    packed = layout.packed_tiles(position, int(table[HIT_COLUMN]))
    split = min(packed * group, length)  # first exact token behind the records
    for start in range(0, split, TILES_AT_ONCE * group):
        stop = min(start + TILES_AT_ONCE * group, split)
        columns = slice(layout.header_columns + start // group, layout.columns(stop) + 1)
        pages = table[columns]
        records = cache.index_select(0, pages).flatten(0, 1)  # [tiles * Hkv, record_bytes]
        for out, tiles in zip((key, value), dequantize(records, layout, key.dtype), strict=True):
            rows = tiles.view(-1, heads, group, dim).transpose(1, 2).reshape(-1, heads, dim)
            out[start:stop] = rows[: stop - start]

    ring = torch.arange(split, length, device=cache.device) % layout.ring_rows
    recent = read_rows(cache, ring_pages(table, layout), ring, layout)
    key[split:], value[split:] = recent
    if packed and int(table[SINK_COLUMN]):
        count = min(layout.sink_rows, length)
        sink = table[SINK_COLUMN : SINK_COLUMN + 1]
        key[:count], value[:count] = read_rows(
            cache, sink, torch.arange(count, device=cache.device), layout
        )

"""The definition of what a query sees, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvarn_core import rotation
from kvarn_core.exact import read_rows, ring_pages
from kvarn_core.layout import HIT_COLUMN, SINK_COLUMN
from kvarn_core.ops.quantize import dequantize

if TYPE_CHECKING:
    from kvarn_core.layout import RecordLayout

TILES_AT_ONCE = 8  # bounds the workspace, and keeps it in the processor's cache


def gather(
    cache: torch.Tensor,
    page_table: torch.Tensor,
    starts: torch.Tensor | None,
    context_lens: torch.Tensor,
    positions: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    layout: RecordLayout,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """See `kvarn_core.ops.gather.gather`; fills `key` and `value`."""
    firsts = [0] * len(positions) if starts is None else starts.tolist()
    rows = zip(
        page_table, positions.tolist(), firsts, cu_seqlens_k.tolist(), context_lens.tolist(),
        strict=False,
    )  # fmt: skip
    for table, position, first, row, length in rows:
        if length:
            here = slice(row, row + length)
            _gather_request(cache, table, position, first, layout, key[here], value[here])


def _gather_request(
    cache: torch.Tensor,
    table: torch.Tensor,
    position: int,
    first: int,
    layout: RecordLayout,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Fill `key` and `value` [n, Hkv, D] with tokens `first` .. `first` + n - 1 of one request."""
    (length, heads, dim), group = key.shape, layout.group
    stop = first + length
    packed = layout.packed_tiles(position, int(table[HIT_COLUMN]))
    split = min(max(packed * group, first), stop)  # first exact token behind the records
    begins = range(first // group * group, split, TILES_AT_ONCE * group)
    for begin in begins if split > first else ():
        end = min(begin + TILES_AT_ONCE * group, split)
        columns = slice(layout.header_columns + begin // group, layout.columns(end) + 1)
        records = cache.index_select(0, table[columns]).flatten(0, 1)  # [tiles * Hkv, record_bytes]
        inside = slice(max(first - begin, 0), end - begin)
        decoded = dequantize(records, layout, key.dtype, engine="reference")
        for out, tiles in zip((key, value), decoded, strict=True):
            rows = tiles.view(-1, heads, group, dim).transpose(1, 2).reshape(-1, heads, dim)
            out[begin + inside.start - first : end - first] = rows[inside]

    ring = torch.arange(split, stop, device=cache.device) % layout.ring_rows
    recent = read_rows(cache, ring_pages(table, layout), ring, layout)
    for out, rows in zip((key, value), recent, strict=True):
        out[split - first :] = rotation.cast(rows, out.dtype)
    if packed and int(table[SINK_COLUMN]) and first < layout.sink_rows:
        tokens = torch.arange(first, min(layout.sink_rows, stop), device=cache.device)
        page = table[SINK_COLUMN : SINK_COLUMN + 1]
        sinks = read_rows(cache, page, tokens, layout)
        for out, rows in zip((key, value), sinks, strict=True):
            out[: len(tokens)] = rotation.cast(rows, out.dtype)


def rotate_rows(x: torch.Tensor, out: torch.Tensor) -> None:
    """See `kvarn_core.ops.gather.rotate_rows`; fills `out`."""
    out.copy_(rotation.cast(rotation.rotate(x), x.dtype))

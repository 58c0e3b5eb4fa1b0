"""Storing as Triton kernels: exact rows as they come, and whole tiles when they are due.

Nothing is decided on the host: grids follow from the batch, the largest number of new tokens and
the heads, and a program that finds no work returns. Writing a row costs its bytes and a rotation in
registers. Sealing costs one program per tile and half (`ops.quantize.triton`), which reads
2 * G * D bytes of ring, or rotates new rows itself; it is bound by arithmetic, not by memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from kvarn_core.butterfly import rotate, sanitise, to_fp16
from kvarn_core.dispatch import on
from kvarn_core.layout import (
    HEAD_DIMS,
    HIT_COLUMN,
    RING_COLUMN,
    SINK_COLUMN,
    RecordLayout,
)
from kvarn_core.ops.quantize.triton import (
    launch_options,
    layout_of,
    layout_text,
    recipe_of,
    recipe_text,
    write_key,
    write_value,
)
from kvarn_core.spec import PRESETS, Recipe
from kvarn_core.variants import Variant

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from kvarn_core.ops.store import Write

HIT, SINK, RING = (tl.constexpr(column) for column in (HIT_COLUMN, SINK_COLUMN, RING_COLUMN))
PREFILL_ROWS = 16  # rows per program where a request has several new tokens
SIZES = ("key_stride", "value_stride", "page_stride", "table_stride")
INDICES = ("p_table", "p_lens", "p_starts")  # slices of larger tensors: any 4-byte alignment


def prepare(
    op: str,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    layout: RecordLayout,
    recipe: Recipe,
    max_query_len: int,
) -> Write:
    """See `kvarn_core.ops.store.prepare`."""
    requests = page_table, seq_lens, cu_seqlens_q
    strides = key.stride(0), value.stride(0), cache.stride(0), page_table.stride(0)
    batch, heads = len(seq_lens), cache.shape[1]
    if op == "seal":
        raw = max_query_len > 1  # else every row of a complete tile is in the ring
        slots = triton.cdiv(max_query_len, layout.group)
        # one new token is the deadline of at most one head in G
        columns = heads if raw else triton.cdiv(heads, layout.group)
        grid = (batch * slots, columns, 2)
        constants = {
            "LAYOUT": layout_text(layout), "RECIPE": recipe_text(recipe), "RAW": raw,
            **launch_options(layout),
        }  # fmt: skip
    else:
        to_ring = op == "append"
        most = min(max_query_len, layout.ring_rows if to_ring else layout.sink_rows)
        rows = 1 if most == 1 else PREFILL_ROWS
        blocks = triton.cdiv(most, rows)
        grid = (batch * blocks, heads, 1)
        constants = {
            "LAYOUT": layout_text(layout), "ROWS": rows, "TO_RING": to_ring,
            "num_warps": _row_warps(rows), "num_stages": 1,
        }  # fmt: skip

    def run(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, layer: int = 0) -> None:
        if not grid[0]:
            return
        inputs = key, value, cache, *requests, *strides
        with on(cache.device):
            if op == "seal":
                _seal[grid](*inputs, slots, heads, layer, **constants)
            else:
                _write_rows[grid](*inputs, blocks, **constants)

    return run


def variants() -> Iterator[Variant]:
    """Yield every form of the kernels that can run."""
    for preset in PRESETS.values():
        for dim in HEAD_DIMS:
            layout = RecordLayout(preset, dim)
            text = layout_text(layout)
            for dtype in ("fp16", "bf16"):
                name = f"{preset.name}-d{dim}-{dtype}"
                for rows in (1, PREFILL_ROWS):
                    for to_ring in (False, True):
                        what = "append" if to_ring else "sink"
                        yield Variant(
                            name=f"{what}-{name}-rows{rows}",
                            kernel=_write_rows,
                            signature=_signature(dtype, "blocks"),
                            constexprs={"LAYOUT": text, "ROWS": rows, "TO_RING": to_ring},
                            num_warps=_row_warps(rows),
                            num_stages=1,
                        )
                for recipe in (Recipe.KVARN, Recipe.PAPER):
                    for raw in (False, True):
                        yield Variant(
                            name=f"seal-{name}-{recipe.name}-{'raw' if raw else 'ring'}",
                            kernel=_seal,
                            signature=_signature(dtype, "slots", "heads", "layer"),
                            constexprs={
                                "LAYOUT": text,
                                "RECIPE": recipe_text(recipe),
                                "RAW": raw,
                            },
                            **launch_options(layout),
                        )


def _signature(dtype: str, *integers: str) -> dict[str, str]:
    types = {"p_key": f"*{dtype}", "p_value": f"*{dtype}", "p_cache": "*u8"}
    types |= dict.fromkeys(INDICES, "*i32")
    return types | dict.fromkeys((*SIZES, *integers), "i32")


def _row_warps(rows: int) -> int:
    return 1 if rows == 1 else 4


# --- exact rows --------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*SIZES, "blocks"], do_not_specialize_on_alignment=INDICES)
def _write_rows(  # type: ignore[no-untyped-def]
    p_key,
    p_value,
    p_cache,
    p_table,
    p_lens,
    p_starts,
    key_stride,
    value_stride,
    page_stride,
    table_stride,
    blocks,
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
    TO_RING: tl.constexpr,
):
    """Write ROWS new rows of one head to the ring (if they are the last 2 G) and the sink."""
    layout: tl.constexpr = layout_of(LAYOUT)
    i_request, i_block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    i_head = tl.program_id(1)
    start = tl.load(p_starts + i_request)
    new = tl.load(p_starts + i_request + 1) - start
    length = tl.load(p_lens + i_request)
    first = length - new
    begin = tl.maximum(first, length - layout.ring_rows) if TO_RING else first
    begin += i_block * ROWS
    end = length if TO_RING else tl.minimum(length, layout.sink_rows)
    if (new <= 0) | (first < 0) | (begin >= end):
        return
    position = begin + tl.arange(0, ROWS)
    mask = position < end
    token = (start - first + position).to(tl.int64)
    p_table += i_request.to(tl.int64) * table_stride
    sink = tl.load(p_table + SINK)
    to_sink = mask & (position < layout.sink_rows) & (sink != 0)
    for is_value in tl.static_range(2):
        p_new, stride = (p_value, value_stride) if is_value else (p_key, key_stride)
        x = _new_rows(p_new, stride, token, i_head, mask, layout, ROWS)
        if TO_RING:
            p_ring = _ring_rows(
                p_cache, page_stride, p_table, position, i_head, is_value, mask, layout
            )
            tl.store(p_ring, x, mask=mask[:, None])
        page = tl.full([ROWS], sink, tl.int64)
        p_sink = _exact_rows(p_cache, page_stride, page, position, i_head, is_value, layout)
        tl.store(p_sink, x, mask=to_sink[:, None])


@triton.jit
def _new_rows(p_new, stride, token, i_head, mask, LAYOUT: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load and rotate new rows of one head, fp16 [ROWS, D]; 0 where masked."""
    D: tl.constexpr = LAYOUT.head_dim
    p_rows = p_new + token * tl.multiple_of(stride, 8) + i_head * D
    x = tl.load(p_rows[:, None] + tl.arange(0, D)[None, :], mask=mask[:, None], other=0.0)
    return to_fp16(rotate(sanitise(x), ROWS, D))


@triton.jit
def _ring_rows(  # type: ignore[no-untyped-def]
    p_cache, page_stride, p_table, position, i_head, is_value, mask, LAYOUT: tl.constexpr
):
    """Pointers [n, D] to the fp16 elements of ring rows, by position."""
    row = position % LAYOUT.ring_rows
    page = tl.load(p_table + RING + row // LAYOUT.rows_per_page, mask=mask, other=0)
    row = row % LAYOUT.rows_per_page
    return _exact_rows(p_cache, page_stride, page.to(tl.int64), row, i_head, is_value, LAYOUT)


@triton.jit
def _exact_rows(p_cache, page_stride, page, row, i_head, is_value, LAYOUT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pointers [n, D] to the fp16 elements of exact rows; see `kvarn_core.exact`."""
    D: tl.constexpr = LAYOUT.head_dim
    begin = page * tl.multiple_of(page_stride // 2, 8) + i_head * (LAYOUT.record_bytes // 2)
    begin += row * (2 * D) + is_value * D
    # 8 elements are a piece: `layout.exact_piece`
    channel = tl.arange(0, D)[None, :] ^ ((row & 7) * 8)[:, None]
    channel = tl.max_contiguous(tl.multiple_of(channel, (1, 8)), (1, 8))
    p_exact = tl.multiple_of(p_cache.to(tl.pointer_type(tl.float16)), 16)
    return p_exact + begin[:, None] + channel


# --- records -----------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=[*SIZES, "slots", "heads", "layer"], do_not_specialize_on_alignment=INDICES
)
def _seal(  # type: ignore[no-untyped-def]
    p_key,
    p_value,
    p_cache,
    p_table,
    p_lens,
    p_starts,
    key_stride,
    value_stride,
    page_stride,
    table_stride,
    slots,
    heads,
    layer,
    LAYOUT: tl.constexpr,
    RECIPE: tl.constexpr,
    RAW: tl.constexpr,
):
    """Encode the K or V tile of a request whose deadline is the i_slot-th among its new tokens.

    RAW: tiles may contain new rows. Without it all rows come from the ring.
    """
    layout: tl.constexpr = layout_of(LAYOUT)
    recipe: tl.constexpr = recipe_of(RECIPE)
    G: tl.constexpr = layout.group
    i_request, i_slot = tl.program_id(0) // slots, tl.program_id(0) % slots
    is_value = tl.program_id(2)
    start = tl.load(p_starts + i_request)
    new = tl.load(p_starts + i_request + 1) - start
    length = tl.load(p_lens + i_request)
    first = length - new
    if (new <= 0) | (first < 0):
        return
    p_table += i_request.to(tl.int64) * table_stride
    hits = tl.load(p_table + HIT)
    # layout.seal_phase of head 0; head i adds 13 i
    phase = 29 * tl.load(p_table + RING) + 37 * layer + G // 2 * is_value
    i_head = tl.program_id(1)
    if not RAW:  # at most one head in G has its deadline at the only new token; 69 * 13 % 128 == 1
        i_head = i_head * G + 69 * (first % G + G - phase % G) % G
    deadline = first + ((phase + 13 * i_head) % G + G - first % G) % G + i_slot * G
    i_tile = deadline // G - 1
    if (i_head >= heads) | (deadline >= length) | (i_tile < hits):
        return
    rows = p_cache, page_stride, p_table, first, start, i_tile, i_head
    page = tl.load(p_table + layout.header_columns + i_tile)
    if is_value:
        x = _tile(p_value, value_stride, *rows, 1, layout, RAW)
        p_values = p_cache + layout.key_bytes
        write_value(x, p_values, page * heads + i_head, layout.record_bytes, layout, recipe)
    else:
        x = _tile(p_key, key_stride, *rows, 0, layout, RAW)
        write_key(x, p_cache, page * heads + i_head, layout.record_bytes, layout, recipe)


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    p_new,
    stride,
    p_cache,
    page_stride,
    p_table,
    first,
    start,
    i_tile,
    i_head,
    is_value,
    LAYOUT: tl.constexpr,
    RAW: tl.constexpr,
):
    """Rotated rows of a tile, fp32 [G, D]: of the ring before position `first`, then new ones."""
    position = i_tile * LAYOUT.group + tl.arange(0, LAYOUT.group)
    is_old = position < first
    p_ring = _ring_rows(p_cache, page_stride, p_table, position, i_head, is_value, is_old, LAYOUT)
    x = 0.0
    if RAW:
        token = (start - first + position).to(tl.int64)
        x = _new_rows(p_new, stride, token, i_head, ~is_old, LAYOUT, LAYOUT.group)
    x = tl.load(p_ring, mask=is_old[:, None], other=x)
    return x.to(tl.float32)

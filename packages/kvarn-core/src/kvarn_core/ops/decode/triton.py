"""Decode attention in Triton: split KV, one warp per program, codes straight into tensor cores.

A program owns a slice of the units of one (request, KV head, block of 8 query heads). A unit is a
record or 32 exact rows: about the same bytes. The fragment order of a record is the register order
of `mma.m16n8k16`, so with one warp the words that a lane loads *are* its operands: unpacking is an
AND, because a b-bit field of an otherwise empty half word is the fp16 number code * 2^(s - 24).
Scales are folded into the query (K) and the probabilities (V); nothing is dequantised.

What limits it: 12 warps per SM, by registers. Traded away: a prefetch across units, and batch
invariance, because the number of splits follows from the batch.

Bytes per unit: `layout.record_bytes`. Source: docs/explanation/algorithm.md (folded attention).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from kvarn_core.butterfly import cast, rotate
from kvarn_core.dispatch import on
from kvarn_core.layout import HEAD_DIMS, HIT_COLUMN, RING_COLUMN, SINK_COLUMN, RecordLayout
from kvarn_core.spec import PRESETS
from kvarn_core.variants import Variant

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvarn_core.ops.decode import Decode

HEADS = tl.constexpr(8)  # query heads per program: the N of the mma
LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
REGISTERS = {(4, 2): 176, (4, 4): 168, (2, 2): 176}  # limits by bits of K and V; no spills
MAX_SPLITS = 64  # best for one request of 16K tokens; 128 for one of 128K


@triton.jit(
    do_not_specialize=["table_stride", "query_stride", "num_q_heads", "num_kv_heads", "splits"],
    do_not_specialize_on_alignment=["p_table", "p_lens"],
)
def _decode_kernel(
    p_query, p_cache, p_table, p_lens, p_partial, p_state,
    scale, table_stride, query_stride, num_q_heads, num_kv_heads, splits,
    RATIO: tl.constexpr, D: tl.constexpr, G: tl.constexpr, EXACT: tl.constexpr,
    K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, RECORD: tl.constexpr,
    K_SCALE: tl.constexpr, K_ZERO: tl.constexpr, K_TOKEN_SCALE: tl.constexpr,
    V_CODES: tl.constexpr, V_CHANNEL_SCALE: tl.constexpr, V_SCALE: tl.constexpr,
    V_ZERO: tl.constexpr, PAGE_ROWS: tl.constexpr, SINK_ROWS: tl.constexpr, HEADER: tl.constexpr,
    HIT: tl.constexpr, SINK: tl.constexpr, RING: tl.constexpr, SINK_UNITS: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Grid (head blocks * Hkv, splits, B): partial outputs and their (max, sum) per split."""
    HEAD_BLOCKS: tl.constexpr = (RATIO + HEADS - 1) // HEADS
    i_kv = tl.program_id(0) // HEAD_BLOCKS
    i_split, i_row = tl.program_id(1), tl.program_id(2)
    length = tl.load(p_lens + i_row)
    p_row = p_table + i_row.to(tl.int64) * table_stride
    sink = tl.load(p_row + SINK)
    packed, units = _units(length, tl.load(p_row + HIT), sink, G, EXACT, SINK_UNITS)
    share = tl.cdiv(units, splits)
    start = i_split * share
    stop = tl.minimum(start + share, units)
    if start >= stop:
        return

    # [N] query heads of this program; those beyond the GQA ratio are zero
    o_n = (tl.program_id(0) % HEAD_BLOCKS) * HEADS + tl.arange(0, HEADS)
    m_n = o_n < RATIO
    o_head = i_kv * RATIO + o_n
    o_d = tl.arange(0, D)
    p_q = p_query + i_row.to(tl.int64) * query_stride + o_head[:, None] * D + o_d[None, :]
    b_q = tl.load(p_q, mask=m_n[:, None], other=0.0).to(tl.float32)
    b_q = cast(rotate(b_q, HEADS, D) * scale, tl.float16).trans(1, 0)  # [D, N], log2 units

    p_head = p_cache + i_kv.to(tl.int64) * RECORD
    page_bytes = num_kv_heads.to(tl.int64) * RECORD
    b_max = tl.full((HEADS,), float("-inf"), tl.float32)
    b_sum = tl.zeros((HEADS,), tl.float32)
    b_out = tl.zeros((V_WIDTH, HEADS), tl.float32)
    b_out1 = tl.zeros((V_WIDTH, HEADS), tl.float32)
    first = tl.where((sink != 0) & (packed > 0), SINK_ROWS, 0)  # token that records begin with

    for i_tile in range(start, tl.minimum(stop, packed)):
        p_record = p_head + tl.load(p_row + HEADER + i_tile).to(tl.int64) * page_bytes
        p_half = p_record.to(tl.pointer_type(tl.float16))
        p_word = p_record.to(tl.pointer_type(tl.int32))
        # scores [G, N] = t * (codes @ (q * a) + q @ zero)
        if K_WIDTH == D:
            b_s = _scores(p_word, p_half, b_q, 0, D, D, G, K_BITS, K_SCALE, K_ZERO)
        else:
            b_q0, b_q1 = _halves(b_q)
            b_s = _scores(p_word, p_half, b_q0, 0, K_WIDTH, D, G, K_BITS, K_SCALE, K_ZERO)
            b_s += _scores(p_word, p_half, b_q1, K_WIDTH, K_WIDTH, D, G, K_BITS, K_SCALE, K_ZERO)
        b_s *= _load_m_order(p_half + K_TOKEN_SCALE // 2, G)[:, None]
        o_token = i_tile * G + tl.arange(0, G)
        b_s = tl.where((o_token >= first)[:, None], b_s, float("-inf"))
        b_p, b_alpha, b_max, b_sum = _softmax_step(b_s, b_max, b_sum)
        # out [D, N] += c * (codes @ (p * u) + p @ zero)
        b_u = _load_m_order(p_half + V_SCALE // 2, G)
        b_zero = tl.sum(b_p * _load_m_order(p_half + V_ZERO // 2, G)[:, None], 0)
        b_x = (b_p * b_u[:, None]).to(tl.float16)
        p_v = p_word + V_CODES // 4
        p_c = p_half + V_CHANNEL_SCALE // 2
        b_out = _add_values(b_out, b_alpha, p_v, p_c, b_x, b_zero, V_WIDTH, G, V_BITS)
        if V_WIDTH < D:
            p_v += V_WIDTH * G * V_BITS // 32
            b_out1 = _add_values(
                b_out1, b_alpha, p_v, p_c + V_WIDTH, b_x, b_zero, V_WIDTH, G, V_BITS
            )

    ring_units = tl.cdiv(length - packed * G, EXACT)
    for i_unit in range(tl.maximum(start, packed) - packed, stop - packed):
        is_sink = i_unit >= ring_units
        o_row = (i_unit - tl.where(is_sink, ring_units, 0)) * EXACT + tl.arange(0, EXACT)
        o_ring = (packed * G + o_row) % (2 * G)
        m_row = o_row < tl.where(is_sink, SINK_ROWS, length - packed * G)
        o_column = tl.where(is_sink, SINK, RING + o_ring // PAGE_ROWS)
        o_page_row = tl.where(is_sink, o_row, o_ring % PAGE_ROWS)
        b_page = tl.load(p_row + o_column, mask=m_row, other=0).to(tl.int64)
        p_rows = (p_head + b_page * page_bytes + o_page_row * (4 * D)).to(
            tl.pointer_type(tl.float16)
        )
        b_k = _load_exact(p_rows, o_page_row, m_row, 0, EXACT, K_WIDTH)
        if K_WIDTH == D:
            b_s = tl.dot(b_k, b_q)
        else:
            b_q0, b_q1 = _halves(b_q)
            b_s = tl.dot(b_k, b_q0)
            b_s = tl.dot(_load_exact(p_rows, o_page_row, m_row, K_WIDTH, EXACT, K_WIDTH), b_q1, b_s)
        b_s = tl.where(m_row[:, None], b_s, float("-inf"))
        b_p, b_alpha, b_max, b_sum = _softmax_step(b_s, b_max, b_sum)
        b_p = b_p.to(tl.float16)
        b_v = _load_exact(p_rows + D, o_page_row, m_row, 0, EXACT, V_WIDTH)
        b_out = b_out * b_alpha[None, :] + tl.dot(b_v.trans(1, 0), b_p)
        if V_WIDTH < D:
            b_v = _load_exact(p_rows + D, o_page_row, m_row, V_WIDTH, EXACT, V_WIDTH)
            b_out1 = b_out1 * b_alpha[None, :] + tl.dot(b_v.trans(1, 0), b_p)

    # partial [B, Hq, splits, D], state [B, Hq, splits, 2]
    o_slot = (i_row.to(tl.int64) * num_q_heads + o_head) * splits + i_split
    p_o = p_partial + o_slot[None, :] * D + tl.arange(0, V_WIDTH)[:, None]
    tl.store(p_o, b_out, mask=m_n[None, :])
    if V_WIDTH < D:
        tl.store(p_o + V_WIDTH, b_out1, mask=m_n[None, :])
    tl.store(p_state + o_slot * 2, b_max, mask=m_n)
    tl.store(p_state + o_slot * 2 + 1, b_sum, mask=m_n)


@triton.jit(
    do_not_specialize=["table_stride", "out_stride", "num_q_heads", "splits"],
    do_not_specialize_on_alignment=["p_table", "p_lens", "p_lse"],
)
def _combine_kernel(
    p_partial, p_state, p_table, p_lens, p_out, p_lse,
    table_stride, out_stride, num_q_heads, splits,
    D: tl.constexpr, G: tl.constexpr, EXACT: tl.constexpr, HIT: tl.constexpr, SINK: tl.constexpr,
    SINK_UNITS: tl.constexpr, BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Grid (Hq, B): merge the splits of one query head, rotate back."""
    i_head, i_row = tl.program_id(0), tl.program_id(1)
    o_d = tl.arange(0, D)
    p_o = p_out + i_row.to(tl.int64) * out_stride + i_head * D + o_d
    p_l = p_lse + i_row.to(tl.int64) * num_q_heads + i_head
    length = tl.load(p_lens + i_row)
    if length == 0:
        tl.store(p_o, tl.zeros((D,), tl.float32).to(p_out.dtype.element_ty))
        tl.store(p_l, float("-inf"))
        return
    p_row = p_table + i_row.to(tl.int64) * table_stride
    _, units = _units(length, tl.load(p_row + HIT), tl.load(p_row + SINK), G, EXACT, SINK_UNITS)
    used = tl.cdiv(units, tl.cdiv(units, splits))

    slot = (i_row.to(tl.int64) * num_q_heads + i_head) * splits
    top = float("-inf")
    total = 0.0
    b_out = tl.zeros((D,), tl.float32)
    for i_block in range(0, tl.cdiv(used, BLOCK)):
        o_s = i_block * BLOCK + tl.arange(0, BLOCK)
        m_s = o_s < used
        b_max = tl.load(p_state + (slot + o_s) * 2, mask=m_s, other=float("-inf"))
        b_sum = tl.load(p_state + (slot + o_s) * 2 + 1, mask=m_s, other=0.0)
        p_o_s = p_partial + (slot + o_s)[:, None] * D + o_d[None, :]
        b_o = tl.load(p_o_s, mask=m_s[:, None], other=0.0)
        new_top = tl.maximum(top, tl.max(b_max, 0))
        old = tl.exp2(top - new_top)
        b_weight = tl.exp2(b_max - new_top)
        total = total * old + tl.sum(b_sum * b_weight, 0)
        b_out = b_out * old + tl.sum(b_o * b_weight[:, None], 0)
        top = new_top
    b_out = rotate((b_out / total).reshape(1, D), 1, D).reshape(D)
    tl.store(p_o, cast(b_out, p_out.dtype.element_ty))
    tl.store(p_l, LN_2 * (top + tl.log2(total)))


@triton.jit
def _units(  # type: ignore[no-untyped-def]
    length, hits, sink, G: tl.constexpr, EXACT: tl.constexpr, SINK_UNITS: tl.constexpr
):
    """Tiles read as records (`RecordLayout.packed_tiles`) and units of a request."""
    # a server may warm up with made-up tables: hits beyond the request would leave its row
    hits = tl.minimum(hits, tl.maximum(length - 1, 0) // G)
    packed = tl.maximum(tl.maximum((length - 1) // G - 1, hits), 0)
    ring = tl.cdiv(length - packed * G, EXACT)
    exact = ring + tl.where((sink != 0) & (packed > 0), SINK_UNITS, 0)
    return packed, tl.where(length > 0, packed + exact, 0)


@triton.jit
def _scores(
    p_word, p_half, b_q, START: tl.constexpr, K: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    K_BITS: tl.constexpr, K_SCALE: tl.constexpr, K_ZERO: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Product codes @ (q * a) + q @ zero [G, N] over K channels from START on; q [K, N]."""
    FK: tl.constexpr = 2 if K_BITS == 2 and G == 64 else 1
    b_a = _load_k_order(p_half + K_SCALE // 2 + START, K)
    b_z = _load_k_order(p_half + K_ZERO // 2 + START, K)
    b_zero = tl.max(tl.dot(b_z[None, :].broadcast_to(16, K), b_q), 0)  # 16 equal rows
    p_first = p_word + START // 16 // FK * 128
    return _codes_dot(p_first, b_q * b_a[:, None], G, K, D, K_BITS) + b_zero[None, :]


@triton.jit
def _add_values(
    b_out, b_alpha, p_v, p_c, b_x, b_zero, M: tl.constexpr, G: tl.constexpr, V_BITS: tl.constexpr
):  # type: ignore[no-untyped-def]
    """New out: out * alpha + c * (codes @ x + zero) for M channels [M, N]; x [G, N]."""
    b_o = _codes_dot(p_v, b_x, M, G, G, V_BITS)
    return b_out * b_alpha[None, :] + _load_m_order(p_c, M)[:, None] * (b_o + b_zero[None, :])


@triton.jit
def _halves(b_q):  # type: ignore[no-untyped-def]
    """First and second half of the rows of a block [K, N]."""
    b_0, b_1 = tl.split(b_q.reshape(2, b_q.shape[0] // 2, HEADS).trans(1, 2, 0))
    return b_0, b_1


@triton.jit
def _softmax_step(b_s, b_max, b_sum):  # type: ignore[no-untyped-def]
    """Online softmax over rows of scores [rows, N] in log2 units."""
    b_new = tl.maximum(b_max, tl.max(b_s, 0))
    b_alpha = tl.exp2(b_max - b_new)
    b_p = tl.exp2(b_s - b_new[None, :])
    return b_p, b_alpha, b_new, b_sum * b_alpha + tl.sum(b_p, 0)


@triton.jit
def _load_exact(
    p_rows, o_page_row, m_row, START: tl.constexpr, EXACT: tl.constexpr, WIDTH: tl.constexpr
):  # type: ignore[no-untyped-def]
    """WIDTH channels of exact rows from START on, fp16; pieces are permuted (`exact_piece`)."""
    o_piece = (START // 8 + tl.arange(0, WIDTH // 8)[None, :]) ^ (o_page_row & 7)[:, None]
    p = p_rows[:, None, None] + o_piece[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    return tl.load(p, mask=m_row[:, None, None], other=0.0).reshape(EXACT, WIDTH)


@triton.jit
def _load_k_order(p, LENGTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Vector stored in `k_order`, in natural order, fp16."""
    b = tl.load(p + tl.arange(0, LENGTH)).reshape(LENGTH // 32, 4, 2, 2, 2)
    return b.trans(0, 2, 3, 1, 4).reshape(LENGTH)


@triton.jit
def _load_m_order(p, LENGTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Vector stored in `m_order`, in natural order, fp32."""
    b = tl.load(p + tl.arange(0, LENGTH)).reshape(LENGTH // 64, 8, 4, 2)
    return b.trans(0, 2, 3, 1).reshape(LENGTH).to(tl.float32)


@triton.jit
def _codes_dot(
    p_words, b_x, M: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr
):  # type: ignore[no-untyped-def]
    """Multiply K columns of codes [M, WIDTH], packed as by `code_index`, with x [K, N] fp16.

    Field f of every half word belongs to row block m // 16 = f mod FM (and to column block
    f // FM mod FK), so each field is one matrix product, and the products are interleaved.
    """
    FIELDS: tl.constexpr = 16 // BITS
    FM: tl.constexpr = M // 16 if M // 16 < FIELDS else FIELDS
    FK: tl.constexpr = FIELDS // FM
    COLS: tl.constexpr = K // 16 // FK  # chunks along k
    PARTS: tl.constexpr = M // 16 // FM  # chunks along m, one at a time: bounds the registers
    STEP: tl.constexpr = WIDTH // 16 // FK * 128  # words of a row of chunks
    if FK == 2:  # even and odd column blocks of x
        b_x0, b_x1 = tl.split(b_x.reshape(COLS, 2, 16, HEADS).trans(0, 2, 3, 1))
        b_x0, b_x1 = b_x0.reshape(COLS * 16, HEADS), b_x1.reshape(COLS * 16, HEADS)
    else:
        b_x0, b_x1 = b_x, b_x
    b_y0 = _part_dot(p_words, b_x0, b_x1, COLS, BITS, FM, FK)
    if PARTS == 1:
        b_y = b_y0
    else:
        b_y1 = _part_dot(p_words + STEP, b_x0, b_x1, COLS, BITS, FM, FK)
        if PARTS == 2:
            b_y = tl.join(b_y0, b_y1).trans(2, 0, 1)
        else:
            b_y2 = _part_dot(p_words + 2 * STEP, b_x0, b_x1, COLS, BITS, FM, FK)
            b_y3 = _part_dot(p_words + 3 * STEP, b_x0, b_x1, COLS, BITS, FM, FK)
            b_y = _join4(b_y0, b_y1, b_y2, b_y3).trans(2, 0, 1)
    return b_y.reshape(M, HEADS)


@triton.jit
def _part_dot(
    p_words, b_x0, b_x1,
    COLS: tl.constexpr, BITS: tl.constexpr, FM: tl.constexpr, FK: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Product of one row of chunks: [FM * 16, N] fp32."""
    o_word = tl.arange(0, COLS)[:, None, None] * 128 + tl.arange(0, 32)[None, :, None] * 4
    b_w = tl.load(p_words + o_word + tl.arange(0, 4)[None, None, :])
    # [chunk, grp, tid, r1, r0] -> [r0, grp][chunk, r1, tid]: rows and column pairs of a fragment
    b_w = b_w.reshape(COLS, 8, 4, 2, 2).trans(4, 1, 0, 3, 2).reshape(16, COLS * 8)
    b_y0 = _field_dot(b_w, b_x0, b_x1, 0, COLS, BITS, FM, FK)
    b_y1 = _field_dot(b_w, b_x0, b_x1, 1, COLS, BITS, FM, FK)
    b_y2 = _field_dot(b_w, b_x0, b_x1, 2, COLS, BITS, FM, FK)
    b_y3 = _field_dot(b_w, b_x0, b_x1, 3, COLS, BITS, FM, FK)
    if FM == 4:
        b_y = _join4(b_y0, b_y1, b_y2, b_y3)
    else:
        b_y4 = _field_dot(b_w, b_x0, b_x1, 4, COLS, BITS, FM, FK)
        b_y5 = _field_dot(b_w, b_x0, b_x1, 5, COLS, BITS, FM, FK)
        b_y6 = _field_dot(b_w, b_x0, b_x1, 6, COLS, BITS, FM, FK)
        b_y7 = _field_dot(b_w, b_x0, b_x1, 7, COLS, BITS, FM, FK)
        b_y = tl.join(_join4(b_y0, b_y2, b_y4, b_y6), _join4(b_y1, b_y3, b_y5, b_y7))
        b_y = b_y.reshape(16, HEADS, 8)
    return b_y.trans(2, 0, 1).reshape(FM * 16, HEADS)


@triton.jit
def _field_dot(
    b_w, b_x0, b_x1, ROW_BLOCK: tl.constexpr,
    COLS: tl.constexpr, BITS: tl.constexpr, FM: tl.constexpr, FK: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Product of the fields of one row block with x: [16, N] fp32."""
    unit: tl.constexpr = 16777216.0 / (1 << (BITS * (ROW_BLOCK % (8 // BITS))))
    b_y = tl.dot(_field(b_w, ROW_BLOCK, COLS, BITS), b_x0)
    if FK == 2:
        b_y = tl.dot(_field(b_w, ROW_BLOCK + FM, COLS, BITS), b_x1, b_y)
    return b_y * unit


@triton.jit
def _field(b_w, FIELD: tl.constexpr, COLS: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One field of all half words as fp16 [16, COLS * 16], in units of 2^(shift - 24)."""
    HALF: tl.constexpr = 8 // BITS
    MASK: tl.constexpr = ((1 << BITS) - 1) << (BITS * (FIELD % HALF))
    if FIELD >= HALF:
        b_w = b_w >> 8
    b_low = (b_w & MASK).to(tl.int16).to(tl.float16, bitcast=True)
    b_high = ((b_w >> 16) & MASK).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.join(b_low, b_high).reshape(16, COLS * 16)


@triton.jit
def _join4(a, b, c, d):  # type: ignore[no-untyped-def]
    """Stack four blocks along a new last dimension [..., 4]."""
    joined = tl.join(tl.join(a, c), tl.join(b, d))
    return joined.reshape(a.shape[0], a.shape[1], 4)


# --- launch ------------------------------------------------------------------------------------


@cache
def workspace_bytes(batch: int, num_q_heads: int, num_kv_heads: int, layout: RecordLayout) -> int:
    """See `kvarn_core.ops.decode.workspace_bytes`."""
    sizes = range(1, batch + 1)
    slots = max((n * _splits(layout, n, num_q_heads, num_kv_heads) for n in sizes), default=0)
    return slots * num_q_heads * (layout.head_dim + 2) * 4


def prepare(
    query: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    layout: RecordLayout,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    workspace: torch.Tensor | None,
) -> Decode:
    """See `kvarn_core.ops.decode.prepare`."""
    batch, num_q_heads, dim = query.shape
    num_kv_heads = cache.shape[1]
    ratio = num_q_heads // num_kv_heads
    splits = _splits(layout, batch, num_q_heads, num_kv_heads) if batch else 0
    slots = batch * num_q_heads * splits
    if workspace is None:
        nbytes = slots * (dim + 2) * 4
        workspace = torch.empty(nbytes, dtype=torch.uint8, device=query.device)
    partial = workspace[: slots * dim * 4].view(torch.float32)
    state = workspace[slots * dim * 4 : slots * (dim + 2) * 4].view(torch.float32)

    def run(query: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> None:
        if not batch:
            return
        with on(cache.device):
            _decode_kernel[(num_kv_heads * -(-ratio // HEADS.value), splits, batch)](
                query, cache, page_table, seq_lens, partial, state,
                sm_scale * LOG2_E, page_table.stride(0), query.stride(0), num_q_heads,
                num_kv_heads, splits, RATIO=ratio, **_decode_constants(layout),
                **_decode_options(layout),
            )  # fmt: skip
            _combine_kernel[(num_q_heads, batch)](
                partial, state, page_table, seq_lens, out, lse,
                page_table.stride(0), out.stride(0), num_q_heads, splits,
                **_combine_constants(layout), num_warps=4, num_stages=1,
            )  # fmt: skip

    return run


def resident_programs(layout: RecordLayout) -> int:
    """Programs that one processor holds at once, by their registers and shared memory."""
    if layout.head_dim == 256:
        return 4
    if layout.head_dim == 128 and layout.preset.name in ("kvarn_k2v2_g64", "kvarn_k4v4_g128"):
        return 9
    return 12


def _splits(layout: RecordLayout, batch: int, num_q_heads: int, num_kv_heads: int) -> int:
    """Splits of each request: as many programs as are resident at once, whatever the lengths."""
    head_blocks: int = num_kv_heads * -(-(num_q_heads // num_kv_heads) // HEADS.value)
    wanted = resident_programs(layout) * _processors() // (batch * head_blocks)
    return min(max(wanted, 1), MAX_SPLITS)


@cache
def _processors() -> int:
    """Streaming multiprocessors of the current GPU; 1 in Triton's interpreter."""
    if not torch.cuda.is_available():
        return 1
    return torch.cuda.get_device_properties().multi_processor_count


@cache
def _decode_constants(layout: RecordLayout) -> dict[str, int]:
    fields = layout.fields
    exact = 32 if layout.head_dim <= 128 else 16  # rows of about the bytes of a record
    return {
        "D": layout.head_dim,
        "K_WIDTH": max(layout.head_dim // 2, 64),  # channels at a time: bounds the registers
        "V_WIDTH": min(layout.head_dim, 128),
        "G": layout.group,
        "EXACT": exact,
        "SINK_UNITS": -(-layout.sink_rows // exact),
        "K_BITS": layout.preset.key_bits,
        "V_BITS": layout.preset.value_bits,
        "RECORD": layout.record_bytes,
        "K_SCALE": fields["k_scale"].offset,
        "K_ZERO": fields["k_zero"].offset,
        "K_TOKEN_SCALE": fields["k_token_scale"].offset,
        "V_CODES": fields["v_codes"].offset,
        "V_CHANNEL_SCALE": fields["v_channel_scale"].offset,
        "V_SCALE": fields["v_scale"].offset,
        "V_ZERO": fields["v_zero"].offset,
        "PAGE_ROWS": layout.rows_per_page,
        "SINK_ROWS": layout.sink_rows,
        "HEADER": layout.header_columns,
        "HIT": HIT_COLUMN,
        "SINK": SINK_COLUMN,
        "RING": RING_COLUMN,
    }


def _decode_options(layout: RecordLayout) -> dict[str, Any]:
    if layout.head_dim == 256:
        return {"num_warps": 2, "num_stages": 2, "maxnreg": None}
    bits = layout.preset.key_bits, layout.preset.value_bits
    limit = None if bits == (2, 2) and layout.group == 64 else REGISTERS[bits]
    return {"num_warps": 1, "num_stages": 2, "maxnreg": limit}


@cache
def _combine_constants(layout: RecordLayout) -> dict[str, int]:
    names = ("D", "G", "EXACT", "SINK_UNITS", "HIT", "SINK")
    return {name: _decode_constants(layout)[name] for name in names} | {"BLOCK": 32}


def variants() -> Iterator[Variant]:
    """Every compiled form of these kernels; see `kvarn_core.variants`."""
    for layout, ratio, dtype in _forms():
        name = f"{layout.preset.name[6:]}-d{layout.head_dim}-gqa{ratio}-{dtype}"
        yield Variant(
            f"decode-{name}",
            _decode_kernel,
            {
                "p_query": f"*{dtype}",
                "p_cache": "*u8",
                "p_table": "*i32",
                "p_lens": "*i32",
                "p_partial": "*fp32",
                "p_state": "*fp32",
                "scale": "fp32",
                **dict.fromkeys(("table_stride", "query_stride"), "i32"),
                **dict.fromkeys(("num_q_heads", "num_kv_heads", "splits"), "i32"),
            },
            {"RATIO": ratio, **_decode_constants(layout)},
            **_decode_options(layout),
        )
        if ratio == 8:
            yield Variant(
                f"combine-{name}",
                _combine_kernel,
                {
                    "p_partial": "*fp32",
                    "p_state": "*fp32",
                    "p_table": "*i32",
                    "p_lens": "*i32",
                    "p_out": f"*{dtype}",
                    "p_lse": "*fp32",
                    **dict.fromkeys(("table_stride", "out_stride"), "i32"),
                    **dict.fromkeys(("num_q_heads", "splits"), "i32"),
                },
                dict(_combine_constants(layout)),
                num_warps=4,
                num_stages=1,
            )


def _forms() -> Iterator[tuple[RecordLayout, int, str]]:
    """Layouts, GQA ratios and dtypes; the ratio only moves a mask, so one layout has several."""
    for preset in PRESETS.values():
        for dim in HEAD_DIMS:
            yield RecordLayout(preset, dim), 8, "fp16"
    main = RecordLayout(PRESETS["kvarn_k4v2_g128"], 128)
    yield main, 8, "bf16"
    for ratio in (1, 5, 16):
        yield main, ratio, "fp16"

"""Gathering in Triton: pages to contiguous keys and values, and rotation of rows.

One program reads 64 tokens of one request and KV head, either from half or all of a record or from
exact rows, and writes them as rows of K and V. 64 tokens because that is what one field group of
the fragment order holds: a lane loads 16 bytes of codes, keeps the fields of its tokens, and the
tile passes shared memory once, in the result's dtype, to be stored in whole rows.

Bytes for k4v2, G 128, D 128, fp16: 6.9 kB in, 32.8 kB out per program; writing limits it. Traded
away: nothing is prefetched, other programs of the processor hide the latency.

Source: docs/explanation/record-layout.md.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from kvarn_core.butterfly import cast, rotate
from kvarn_core.dispatch import on
from kvarn_core.layout import HEAD_DIMS, HIT_COLUMN, RING_COLUMN, SINK_COLUMN, RecordLayout
from kvarn_core.spec import PRESETS
from kvarn_core.variants import Variant

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

TOKENS = tl.constexpr(64)  # per program
ROTATED_ROWS = 8  # per program of one warp, which then needs no barriers
WARPS = {64: 4, 128: 8, 256: 16}  # by head dimension: 32 elements per thread
STAGES = 1  # no loops to pipeline


@triton.jit(
    do_not_specialize=["table_stride", "page_chunks"],
    do_not_specialize_on_alignment=["p_table", "p_starts", "p_lens", "p_positions", "p_cu_lens"],
)
def _gather_kernel(
    p_cache, p_table, p_starts, p_lens, p_positions, p_cu_lens, p_key, p_value,
    table_stride, page_chunks,
    G: tl.constexpr, D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    RECORD: tl.constexpr, K_SCALE: tl.constexpr, K_ZERO: tl.constexpr,
    K_TOKEN_SCALE: tl.constexpr, V_CODES: tl.constexpr, V_CHANNEL_SCALE: tl.constexpr,
    V_SCALE: tl.constexpr, V_ZERO: tl.constexpr, PAGE_ROWS: tl.constexpr,
    SINK_ROWS: tl.constexpr, HEADER: tl.constexpr, HIT: tl.constexpr, SINK: tl.constexpr,
    RING: tl.constexpr,
):  # fmt: skip
    """Grid (Hkv, blocks of 64 tokens, B): one block of one head of one request."""
    i_head, i_row = tl.program_id(0), tl.program_id(2)
    start = 0 if p_starts is None else tl.load(p_starts + i_row)
    length = tl.load(p_lens + i_row)
    stop = start + length
    first = (start // TOKENS + tl.program_id(1)) * TOKENS
    if (length == 0) | (first >= stop):
        return

    p_row = p_table + i_row.to(tl.int64) * table_stride
    position, hits, sink = tl.load(p_positions + i_row), tl.load(p_row + HIT), tl.load(p_row + SINK)
    packed = tl.maximum(tl.maximum(position // G - 1, hits), 0)  # RecordLayout.packed_tiles
    sink_stop = tl.where(sink != 0, SINK_ROWS, 0)  # matters where tokens lie in records only

    o_token = first + tl.arange(0, TOKENS)
    o_row = tl.load(p_cu_lens + i_row).to(tl.int64) + (o_token - start)
    o_out = (o_row[:, None] * tl.num_programs(0) + i_head) * D + tl.arange(0, D)[None, :]
    m_token = (o_token >= start) & (o_token < stop)
    m_sink = m_token & (o_token < sink_stop)
    p_head = p_cache + i_head * RECORD
    page_stride = page_chunks.to(tl.int64) * 16  # the compiler then knows that 16 bytes align
    if first < packed * G:
        page = tl.load(p_row + HEADER + first // G)
        p_record = p_head + page.to(tl.int64) * page_stride
        m_record = (m_token & (o_token >= sink_stop))[:, None]
        i_block = first // TOKENS % (G // TOKENS)
        b_key = _key_block(p_record, i_block, G, D, K_BITS, K_SCALE, K_ZERO, K_TOKEN_SCALE)
        tl.store(p_key + o_out, cast(b_key, p_key.dtype.element_ty), mask=m_record)
        b_value = _value_block(
            p_record + V_CODES, i_block, G, D, V_BITS,
            V_CHANNEL_SCALE - V_CODES, V_SCALE - V_CODES, V_ZERO - V_CODES,
        )  # fmt: skip
        tl.store(p_value + o_out, cast(b_value, p_value.dtype.element_ty), mask=m_record)
        if first < sink_stop:
            p_sink = p_head + sink.to(tl.int64) * page_stride + o_token * (4 * D)
            _copy_rows(p_sink, o_token, p_key + o_out, p_value + o_out, m_sink, D)
    else:
        o_ring = o_token % (2 * G)
        b_page = tl.load(p_row + RING + o_ring // PAGE_ROWS, mask=m_token, other=0)
        o_page_row = o_ring % PAGE_ROWS
        p_ring = p_head + b_page.to(tl.int64) * page_stride + o_page_row * (4 * D)
        _copy_rows(p_ring, o_page_row, p_key + o_out, p_value + o_out, m_token, D)


@triton.jit(
    do_not_specialize=["num_rows", "num_heads", "x_token", "x_head", "out_token", "out_head"]
)
def _rotate_kernel(
    p_x, p_out, num_rows, num_heads, x_token, x_head, out_token, out_head,
    ROWS: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows,): rows [T * Hq, D] of both tensors; strides are in UNIT elements."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i_token, i_head = o_row // num_heads, o_row % num_heads
    m_row = (o_row < num_rows)[:, None]
    o_x = (i_token * x_token + i_head * x_head) * UNIT
    o_out = (i_token * out_token + i_head * out_head) * UNIT
    o_d = tl.arange(0, D)[None, :]
    b_x = tl.load(p_x + o_x[:, None] + o_d, mask=m_row, other=0.0).to(tl.float32)
    tl.store(
        p_out + o_out[:, None] + o_d, cast(rotate(b_x, ROWS, D), p_out.dtype.element_ty), mask=m_row
    )


@triton.jit
def _key_block(
    p_record, i_block, G: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
    SCALE: tl.constexpr, ZERO: tl.constexpr, TOKEN_SCALE: tl.constexpr,
):  # fmt: skip
    """K of 64 tokens [64, D], fp32: (code * scale[d] + zero[d]) * token_scale[g].

    m is the token: four row blocks, so four fields of each half word, and all column blocks.
    """
    FM: tl.constexpr = min(16 // BITS, G // 16)  # row blocks that share a half word
    FK: tl.constexpr = 16 // BITS // FM  # column blocks that share one
    COLS: tl.constexpr = D // 16 // FK  # chunks along k
    chunk = i_block * 4 // FM * COLS
    b_words = tl.load(_words(p_record) + chunk * 128 + tl.arange(0, COLS * 128))
    if FM == 8:
        b_words = (b_words >> (i_block * 4 * BITS)) & 0x00FF00FF
    b_codes = _unpack(b_words, BITS, 4 * FK)  # [words, 2 * FK * 4]
    # [ks, grp, tid, r1, r0, e, fk, fm] to [fm, r0, grp, ks, fk, r1, tid, e]
    b_codes = b_codes.reshape(COLS, 8, 4, 2, 2, 2, FK, 4).trans(7, 4, 1, 0, 6, 3, 2, 5)
    b_codes = b_codes.reshape(TOKENS, D).to(tl.float32)
    b_scale = _load_k_order(p_record + SCALE, D)[None, :]
    b_zero = _load_k_order(p_record + ZERO, D)[None, :]
    b_token_scale = _load_m_order(p_record + TOKEN_SCALE + i_block * 128, TOKENS)[:, None]
    return (b_codes * b_scale + b_zero) * b_token_scale


@triton.jit
def _value_block(
    p_record, i_block, G: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
    CHANNEL_SCALE: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """V of 64 tokens [64, D], fp32: (code * scale[g] + zero[g]) * channel_scale[d].

    m is the channel: all row blocks, so all fields of a half word, and four column blocks.
    """
    FM: tl.constexpr = min(16 // BITS, D // 16)
    FK: tl.constexpr = 16 // BITS // FM
    COLS: tl.constexpr = G // 16 // FK
    BLOCK: tl.constexpr = 4 // FK  # chunks along k of 64 tokens
    ROWS: tl.constexpr = D // 16 // FM  # chunks along m
    o_word = tl.arange(0, ROWS)[:, None] * (COLS * 128) + tl.arange(0, BLOCK * 128)[None, :]
    b_words = tl.load(_words(p_record) + i_block * BLOCK * 128 + o_word)
    b_codes = _unpack(b_words.reshape(ROWS * BLOCK * 128), BITS, 16 // BITS)
    # [mg, ks, grp, tid, r1, r0, e, fk, fm] to [ks, fk, r1, tid, e, mg, fm, r0, grp]
    b_codes = b_codes.reshape(ROWS, BLOCK, 8, 4, 2, 2, 2, FK, FM).trans(1, 7, 4, 3, 6, 0, 8, 5, 2)
    b_codes = b_codes.reshape(TOKENS, D).to(tl.float32)
    b_scale = _load_m_order(p_record + SCALE + i_block * 128, TOKENS)[:, None]
    b_zero = _load_m_order(p_record + ZERO + i_block * 128, TOKENS)[:, None]
    b_channel_scale = _load_m_order(p_record + CHANNEL_SCALE, D)[None, :]
    return (b_codes * b_scale + b_zero) * b_channel_scale


@triton.jit
def _words(p):
    return p.to(tl.pointer_type(tl.uint32))


@triton.jit
def _unpack(b_words, BITS: tl.constexpr, FIELDS: tl.constexpr):
    """Words to their codes [words, 2 * FIELDS] of the low, then of the high half word."""
    b = tl.join(b_words & 0xFFFF, b_words >> 16)
    if FIELDS * BITS == 16:
        b = tl.join(b & 0xFF, b >> 8)
    b = tl.join(b & 0xF, b >> 4)
    if BITS == 2:
        b = tl.join(b & 3, b >> 2)
    return b


@triton.jit
def _load_k_order(p, LENGTH: tl.constexpr):
    """fp16 vector stored in `k_order`, in natural order, fp32."""
    b = tl.load(p.to(tl.pointer_type(tl.float16)) + tl.arange(0, LENGTH))
    return b.reshape(LENGTH // 32, 4, 2, 2, 2).trans(0, 2, 3, 1, 4).reshape(LENGTH).to(tl.float32)


@triton.jit
def _load_m_order(p, LENGTH: tl.constexpr):
    """fp16 vector stored in `m_order`, in natural order, fp32."""
    b = tl.load(p.to(tl.pointer_type(tl.float16)) + tl.arange(0, LENGTH))
    return b.reshape(LENGTH // 64, 8, 4, 2).trans(0, 2, 3, 1).reshape(LENGTH).to(tl.float32)


@triton.jit
def _copy_rows(p_rows, page_row, p_key, p_value, m_row, D: tl.constexpr):
    """Exact rows to rows; the 16-byte pieces of each half lie permuted (`exact_piece`)."""
    o_piece = tl.arange(0, D // 8)[None, :] ^ (page_row & 7)[:, None]
    o_stored = o_piece[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    p = p_rows.to(tl.pointer_type(tl.float16))[:, None, None] + o_stored
    b_key = tl.load(p, mask=m_row[:, None, None]).reshape(TOKENS, D)
    tl.store(p_key, b_key.to(p_key.dtype.element_ty), mask=m_row[:, None])
    b_value = tl.load(p + D, mask=m_row[:, None, None]).reshape(TOKENS, D)
    tl.store(p_value, b_value.to(p_value.dtype.element_ty), mask=m_row[:, None])


# --- launch ------------------------------------------------------------------------------------


def gather(
    cache: torch.Tensor,
    page_table: torch.Tensor,
    starts: torch.Tensor | None,
    context_lens: torch.Tensor,
    positions: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_context_len: int,
    layout: RecordLayout,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """See `kvarn_core.ops.gather.gather`; fills `key` and `value`."""
    batch, heads = len(context_lens), cache.shape[1]
    blocks = -(-max_context_len // TOKENS.value) + (starts is not None)  # a start may be unaligned
    if not batch or not max_context_len:
        return
    with on(cache.device):
        _gather_kernel[(heads, blocks, batch)](
            cache, page_table, starts, context_lens, positions, cu_seqlens_k, key, value,
            page_table.stride(0), cache.stride(0) // 16, **_constants(layout),
            num_warps=WARPS[layout.head_dim], num_stages=STAGES,
        )  # fmt: skip


def rotate_rows(x: torch.Tensor, out: torch.Tensor) -> None:
    """See `kvarn_core.ops.gather.rotate_rows`; fills `out`."""
    tokens, heads, dim = x.shape
    unit = 16 // x.element_size()
    strides = (x.stride(0), x.stride(1), out.stride(0), out.stride(1))
    blocks = -(-tokens * heads // ROTATED_ROWS)
    if not blocks:
        return
    with on(x.device):
        _rotate_kernel[(blocks,)](
            x, out, tokens * heads, heads, *(stride // unit for stride in strides),
            ROWS=ROTATED_ROWS, D=dim, UNIT=unit, num_warps=1, num_stages=STAGES,
        )  # fmt: skip


@cache
def _constants(layout: RecordLayout) -> dict[str, int]:
    fields = layout.fields
    return {
        "G": layout.group,
        "D": layout.head_dim,
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


def variants() -> Iterator[Variant]:
    """Every preset and head dimension in fp16; the default preset in the other dtypes."""
    default = PRESETS["kvarn_k4v2_g128"]
    for preset, dim, dtype in product(PRESETS.values(), HEAD_DIMS, ("fp16", "bf16", "fp32")):
        if dtype == "fp16" or preset == default:
            yield _gather_variant(RecordLayout(preset, dim), dtype)
    yield _gather_variant(RecordLayout(default, 128), "fp16", starts=False)
    for dim, dtype in product(HEAD_DIMS, ("fp16", "bf16", "fp32")):
        yield Variant(
            name=f"rotate_rows-d{dim}-{dtype}",
            kernel=_rotate_kernel,
            signature={"p_x": f"*{dtype}", "p_out": f"*{dtype}"}
            | dict.fromkeys(("num_rows", "num_heads"), "i32")
            | {f"{x}_{axis}": "i32" for x in ("x", "out") for axis in ("token", "head")},
            constexprs={"ROWS": ROTATED_ROWS, "D": dim, "UNIT": 4 if dtype == "fp32" else 8},
            num_warps=1,
            num_stages=STAGES,
        )


def _gather_variant(layout: RecordLayout, dtype: str, *, starts: bool = True) -> Variant:
    lists = ["p_table", "p_lens", "p_positions", "p_cu_lens", *(["p_starts"] if starts else [])]
    signature = {"p_cache": "*u8", "p_key": f"*{dtype}", "p_value": f"*{dtype}"}
    signature |= dict.fromkeys(lists, "*i32")
    signature |= {"table_stride": "i32", "page_chunks": "i32"}
    absent: dict[str, object] = {} if starts else {"p_starts": None}
    return Variant(
        name=f"gather-{layout.preset.name[6:]}-d{layout.head_dim}-{dtype}"
        + "-from-0" * (not starts),
        kernel=_gather_kernel,
        signature=signature,
        constexprs=_constants(layout) | absent,
        num_warps=WARPS[layout.head_dim],
        num_stages=STAGES,
    )

"""Tile to record as a Triton kernel: one program encodes one tile of K or of V.

The tile stays in registers; every step is a reduction along its rows or its columns, so a pass of
the normalisation costs five instructions per element and no division. What is traded away against
the reference: sums run in another order and reciprocals replace divisions, so a code on the edge
may, rarely, fall to the other side, and the factor that is fitted to it moves with it. The names
are those of the reference: T [ROWS, COLS] has a scale and a zero per row and a factor per column.

`write_key` and `write_value` are the device functions that `ops.store` seals with.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from kvarn_core.butterfly import to_fp16
from kvarn_core.dispatch import on
from kvarn_core.layout import HEAD_DIMS, RecordLayout
from kvarn_core.spec import PRESETS, Preset, Recipe
from kvarn_core.variants import Variant

if TYPE_CHECKING:
    from collections.abc import Iterator

# Triton's interpreter calls a combining function of our own once per element: minutes
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
GAUSSIAN_STEP = tl.constexpr(0.9957)  # as in the reference
FACTOR_RANGE = tl.constexpr(4.0)  # as there


def encode_key(key: torch.Tensor, layout: RecordLayout, recipe: Recipe) -> torch.Tensor:
    """K tiles [N, G, D] to bytes [N, key_bytes]."""
    return _encode(key, layout, recipe, is_value=False)


def encode_value(value: torch.Tensor, layout: RecordLayout, recipe: Recipe) -> torch.Tensor:
    """V tiles [N, G, D] to bytes [N, record_bytes - key_bytes]."""
    return _encode(value, layout, recipe, is_value=True)


def launch_options(layout: RecordLayout) -> dict[str, Any]:
    """Launch so that a tile takes 32 registers of each thread, the largest one 128."""
    elements = layout.group * layout.head_dim
    if elements == 32768:
        return {"num_warps": 8, "num_stages": 1, "maxnreg": None}
    return {"num_warps": elements // 1024, "num_stages": 1, "maxnreg": 128}


def layout_text(layout: RecordLayout) -> str:
    """A layout as a compile-time argument: text, because compilation hooks serialise arguments."""
    return " ".join(str(number) for number in (*astuple(layout.preset), layout.head_dim))


def recipe_text(recipe: Recipe) -> str:
    """A recipe as a compile-time argument; booleans as 0 and 1."""
    name, *numbers = astuple(recipe)
    return " ".join((name, *(str(int(number)) for number in numbers)))


def variants() -> Iterator[Variant]:
    """Yield every form of the kernel that can run."""
    for preset in PRESETS.values():
        for dim in HEAD_DIMS:
            layout = RecordLayout(preset, dim)
            for recipe in (Recipe.KVARN, Recipe.PAPER):
                for is_value in (False, True):
                    half = "value" if is_value else "key"
                    yield Variant(
                        name=f"quantize-{half}-{preset.name}-d{dim}-{recipe.name}",
                        kernel=_encode_tiles,
                        signature={"p_tiles": "*fp16", "p_parts": "*u8"},
                        constexprs={
                            "LAYOUT": layout_text(layout),
                            "RECIPE": recipe_text(recipe),
                            "IS_VALUE": is_value,
                        },
                        **launch_options(layout),
                    )


def _encode(
    tiles: torch.Tensor, layout: RecordLayout, recipe: Recipe, *, is_value: bool
) -> torch.Tensor:
    nbytes = layout.record_bytes - layout.key_bytes if is_value else layout.key_bytes
    parts = torch.empty(len(tiles), nbytes, dtype=torch.uint8, device=tiles.device)
    if len(tiles):
        with on(tiles.device):
            _encode_tiles[(len(tiles),)](
                tiles.contiguous(), parts, layout_text(layout), recipe_text(recipe), is_value,
                **launch_options(layout),
            )  # fmt: skip
    return parts


@triton.jit
def _encode_tiles(  # type: ignore[no-untyped-def]
    p_tiles, p_parts, LAYOUT: tl.constexpr, RECIPE: tl.constexpr, IS_VALUE: tl.constexpr
):
    layout: tl.constexpr = layout_of(LAYOUT)
    G: tl.constexpr = layout.group
    D: tl.constexpr = layout.head_dim
    i_tile = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, G)[:, None] * D + tl.arange(0, D)[None, :]
    x = tl.load(p_tiles + i_tile * G * D + o).to(tl.float32)
    if IS_VALUE:
        nbytes: tl.constexpr = layout.record_bytes - layout.key_bytes
        write_value(x, p_parts, i_tile, nbytes, layout, recipe_of(RECIPE))
    else:
        write_key(x, p_parts, i_tile, layout.key_bytes, layout, recipe_of(RECIPE))


# --- one half of a record ----------------------------------------------------------------------


@triton.constexpr_function
def layout_of(text):  # type: ignore[no-untyped-def]
    """Inverse of `layout_text`."""
    key_bits, value_bits, group, head_dim = text.split()
    return RecordLayout(Preset(int(key_bits), int(value_bits), int(group)), int(head_dim))


@triton.constexpr_function
def recipe_of(text):  # type: ignore[no-untyped-def]
    """Inverse of `recipe_text`."""
    name, relative, iterations, range_refits, factor_refits, restore_norm = text.split()
    return Recipe(
        name,
        relative == "1",
        int(iterations),
        int(range_refits),
        int(factor_refits),
        restore_norm == "1",
    )


@triton.constexpr_function
def offset(layout, name, base=0):  # type: ignore[no-untyped-def]
    """Byte offset of a record field, counted from `base`."""
    return layout.fields[name].offset - base


@triton.jit
def write_key(  # type: ignore[no-untyped-def]
    x, p_parts, i_part, STRIDE: tl.constexpr, LAYOUT: tl.constexpr, RECIPE: tl.constexpr
):
    """Encode rotated keys, fp32 [G, D], into a K part at `p_parts + i_part * STRIDE`."""
    G: tl.constexpr = LAYOUT.group
    D: tl.constexpr = LAYOUT.head_dim
    BITS: tl.constexpr = LAYOUT.preset.key_bits
    t = tl.trans(x)
    codes, scale, zero, factor = quantize_rows(t, D, G, BITS, RECIPE, IS_VALUE=False)
    p_part = p_parts + i_part.to(tl.int64) * STRIDE  # here, so that no register keeps it till now
    channel, token = k_order(tl.arange(0, D)), m_order(tl.arange(0, G))
    _store_vector(p_part + offset(LAYOUT, "k_token_scale"), factor, token)
    _store_vector(p_part + offset(LAYOUT, "k_scale"), scale, channel)
    _store_vector(p_part + offset(LAYOUT, "k_zero"), zero, channel)
    _store_codes(p_part + offset(LAYOUT, "k_codes"), codes, D, G, BITS)


@triton.jit
def write_value(  # type: ignore[no-untyped-def]
    x, p_parts, i_part, STRIDE: tl.constexpr, LAYOUT: tl.constexpr, RECIPE: tl.constexpr
):
    """Encode rotated values, fp32 [G, D], into a V part at `p_parts + i_part * STRIDE`."""
    G: tl.constexpr = LAYOUT.group
    D: tl.constexpr = LAYOUT.head_dim
    BITS: tl.constexpr = LAYOUT.preset.value_bits
    BASE: tl.constexpr = LAYOUT.key_bytes
    codes, scale, zero, factor = quantize_rows(x, G, D, BITS, RECIPE, IS_VALUE=True)
    p_part = p_parts + i_part.to(tl.int64) * STRIDE
    channel, token = m_order(tl.arange(0, D)), m_order(tl.arange(0, G))
    _store_vector(p_part + offset(LAYOUT, "v_channel_scale", BASE), factor, channel)
    _store_vector(p_part + offset(LAYOUT, "v_scale", BASE), scale, token)
    _store_vector(p_part + offset(LAYOUT, "v_zero", BASE), zero, token)
    _store_codes(p_part + offset(LAYOUT, "v_codes", BASE), codes, G, D, BITS)


@triton.jit
def k_order(d):  # type: ignore[no-untyped-def]
    """`kvarn_core.layout.k_order`."""
    return (d >> 5) * 32 + ((d >> 1) & 3) * 8 + ((d >> 4) & 1) * 4 + ((d >> 3) & 1) * 2 + (d & 1)


@triton.jit
def m_order(i):  # type: ignore[no-untyped-def]
    """`kvarn_core.layout.m_order`."""
    return (i >> 6) * 64 + (i & 7) * 8 + ((i >> 4) & 3) * 2 + ((i >> 3) & 1)


@triton.jit
def _store_vector(p_field, vector, order):  # type: ignore[no-untyped-def]
    """Store fp16 elements at their places in the record."""
    tl.store(p_field.to(tl.pointer_type(tl.float16)) + order, vector)


@triton.jit
def _store_codes(p_field, codes, K: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store codes [K, M] in the order of `kvarn_core.layout.code_index`, 32 bits at a time."""
    FIELDS: tl.constexpr = 16 // BITS
    FM: tl.constexpr = min(FIELDS, M // 16)
    FK: tl.constexpr = FIELDS // FM
    k, m = tl.arange(0, K)[:, None], tl.arange(0, M)[None, :]
    field = (m >> 4) % FM + FM * ((k >> 4) % FK)
    words = codes << (16 * (k & 1) + BITS * field)
    # k = (chunk, field, register >> 1, lane & 3, half); m = (chunk, field, register & 1, lane >> 2)
    words = words.reshape(K // (16 * FK), FK, 2, 4, 2, M // (16 * FM), FM, 2, 8)
    words = tl.sum(tl.sum(tl.sum(words, 6), 4), 1)  # without fields and half
    words = words.trans(3, 0, 5, 2, 1, 4).reshape(K * M * BITS // 32)
    o = tl.arange(0, K * M * BITS // 32)
    tl.store(p_field.to(tl.pointer_type(tl.int32)) + o, words)


# --- quantisation of one matrix ----------------------------------------------------------------


@triton.jit
def quantize_rows(  # type: ignore[no-untyped-def]
    t,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BITS: tl.constexpr,
    RECIPE: tl.constexpr,
    IS_VALUE: tl.constexpr,
):
    """Quantise T: codes int32 [ROWS, COLS]; fp16 scale and zero [ROWS], factor [COLS].

    y takes the place of t: two tiles would not fit the registers.
    """
    factor = _factor(t, ROWS, COLS, BITS, RECIPE, IS_VALUE)
    factor16 = _stored_factor(factor)
    y = t * (1.0 / (factor16.to(tl.float32) if RECIPE.relative else factor))[None, :]
    for _ in range(RECIPE.factor_refits):
        y, scale, zero, _, _ = _choose_grid(y, COLS, BITS, RECIPE)
        decoded = _round(y, scale, zero, BITS) * scale[:, None] + zero[:, None]
        products, energy = _sums(y * decoded, decoded * decoded, 0)
        ratio = tl.where(energy > 0, products / tl.where(energy > 0, energy, 1.0), 1.0)
        old = factor16.to(tl.float32)
        factor16 = _stored_factor(old * tl.minimum(tl.maximum(ratio, 0.8), 1.25))
        y = y * (old / factor16.to(tl.float32))[None, :]
    y, scale, zero, scale16, zero16 = _choose_grid(y, COLS, BITS, RECIPE)
    codes = _round(y, scale, zero, BITS)
    if IS_VALUE and RECIPE.restore_norm and BITS == 2:
        decoded = codes * scale[:, None] + zero[:, None]
        weight = factor16.to(tl.float32)[None, :]
        wanted, got = _sums((y * weight) * (y * weight), (decoded * weight) * (decoded * weight), 1)
        ratio = tl.sqrt(tl.where(got > 0, wanted / tl.where(got > 0, got, 1.0), 1.0))
        ratio = tl.minimum(tl.maximum(ratio, 0.5), 2.0)
        scale16, zero16 = to_fp16(scale * ratio), to_fp16(zero * ratio)
    return codes.to(tl.int32), scale16, zero16, factor16


@triton.jit
def _factor(  # type: ignore[no-untyped-def]
    t,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BITS: tl.constexpr,
    RECIPE: tl.constexpr,
    IS_VALUE: tl.constexpr,
):
    """Column factors, fp32 [COLS], before any refit."""
    if RECIPE.relative:
        factor = _normalise_relative(t, ROWS, COLS, RECIPE.iterations)
        if IS_VALUE:  # `raise_factors` of the reference
            rms = tl.sqrt(tl.sum(factor * factor, 0) / COLS)
            factor = tl.maximum(factor, rms / FACTOR_RANGE)
    else:
        factor = _normalise_published(t, ROWS, COLS, RECIPE.iterations)
    return _gauge(t, factor, BITS)


@triton.jit
def _stored_factor(factor):  # type: ignore[no-untyped-def]
    return tl.maximum(to_fp16(factor), 2.0**-14)  # smallest normal: division stays safe


@triton.jit
def _choose_grid(y, COLS: tl.constexpr, BITS: tl.constexpr, RECIPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tile again; scale and zero [ROWS] that codes are chosen with, and as fp16 holds them."""
    low, high = _extremes(y, 1)
    scale, zero = (high - low) / (2**BITS - 1), low
    if BITS == 2 and RECIPE.range_refits > 0:
        mean = tl.sum(y, 1) / COLS
        y = y - mean[:, None]
        scale, zero = _least_squares_range(y, low - mean, high - mean, COLS, RECIPE.range_refits)
        zero += mean
    if RECIPE.relative:  # codes for the stored grid
        scale16 = to_fp16(scale)
        middle = zero + scale * (2**BITS - 1) / 2  # of the row's range
        zero16 = to_fp16(tl.where(scale16 == 0, middle, zero))
        scale, zero = scale16.to(tl.float32), zero16.to(tl.float32)
    else:  # codes for the unrounded grid
        scale = tl.maximum(scale, 1e-10)
        scale16, zero16 = to_fp16(scale), to_fp16(zero)
    if BITS == 2 and RECIPE.range_refits > 0:
        y = y + mean[:, None]
    return y, scale, zero, scale16, zero16


@triton.jit
def _normalise_relative(t, ROWS: tl.constexpr, COLS: tl.constexpr, ITERATIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Column factors of recipe `kvarn`."""
    exponent = _rms_exponent(t, ROWS * COLS)
    unit = _exp2(-exponent)  # t * unit has an RMS of about 1; it never takes registers of its own
    measured_cols = _rms_cols(t, ROWS) * unit
    measured_rows = _measure_rows(t, COLS) * unit
    best = _spread(_bounded(measured_cols)) + _spread(_bounded(measured_rows))
    best_factor = tl.full([COLS], 1.0, tl.float32)
    for _ in range(ITERATIONS):
        col = _bounded(measured_cols)
        measured_rows = _measure_rows(t * (unit / col)[None, :], COLS)
        row = _bounded(measured_rows)
        spread_rows = _spread(_bounded(measured_rows / row))
        measured_cols = _rms_cols(t * (unit / row)[:, None], ROWS)
        imbalance = spread_rows + _spread(_bounded(measured_cols / col))
        best_factor = tl.where(imbalance <= best, col, best_factor)
        best = tl.minimum(imbalance, best)
    return best_factor * _exp2(exponent)


@triton.jit
def _rms_cols(x, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.sqrt(tl.sum(x * x, 0) / ROWS)


@triton.jit
def _measure_rows(x, COLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sample standard deviation with a floor of RMS / 8."""
    total, squares = _sums(x, x * x, 1)
    return tl.sqrt(tl.maximum(_variance(total, squares, COLS), squares / (64 * COLS)))


@triton.jit
def _variance(total, squares, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sample variance from moments; loses digits where a mean exceeds many deviations."""
    return (squares - total * total / COUNT) / (COUNT - 1)


@triton.jit
def _bounded(x):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(x, 2.0**-10), 2.0**10)


@triton.jit
def _spread(x):  # type: ignore[no-untyped-def]
    low, high = _extremes(x, 0)
    return high / low


@triton.jit
def _normalise_published(t, ROWS: tl.constexpr, COLS: tl.constexpr, ITERATIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Column factors of recipe `paper`."""
    log_col = tl.full([COLS], 0.0, tl.float32)
    log_row = tl.full([ROWS], 0.0, tl.float32)
    std_cols, std_rows = _std(t, 0, ROWS), _std(t, 1, COLS)
    best = _published_spread(std_cols) + _published_spread(std_rows)
    best_factor = tl.full([COLS], 1.0, tl.float32)
    for _ in range(ITERATIONS):
        log_col = _published_step(log_col, std_cols)
        col = tl.exp(-log_col)
        unscaled_rows = _std(t * col[None, :], 1, COLS)  # a row's own factor only scales this
        log_row = _published_step(log_row, unscaled_rows * tl.exp(-log_row))
        row = tl.exp(-log_row)
        std_cols = _std(t * row[:, None], 0, ROWS) * col
        imbalance = _published_spread(std_cols) + _published_spread(unscaled_rows * row)
        best_factor = tl.where(imbalance <= best, tl.exp(log_col), best_factor)
        best = tl.minimum(imbalance, best)
    return best_factor


@triton.jit
def _std(x, AXIS: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sample standard deviation along an axis."""
    total, squares = _sums(x, x * x, AXIS)
    return tl.sqrt(tl.maximum(_variance(total, squares, COUNT), 0.0))


@triton.jit
def _published_step(log_factor, deviation):  # type: ignore[no-untyped-def]
    log_factor += tl.log(tl.minimum(tl.maximum(deviation, 1e-3), 1e3))
    return tl.minimum(tl.maximum(log_factor, -0.3), 10.0)


@triton.jit
def _published_spread(deviation):  # type: ignore[no-untyped-def]
    low, high = _extremes(deviation, 0)
    return high / tl.maximum(low, 1e-8)


@triton.jit
def _gauge(t, factor, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Factors shifted by a power of two so that all stored numbers fit fp16."""
    TARGET: tl.constexpr = 3 if BITS == 4 else 1
    peak = tl.max(tl.max(tl.abs(t * (1.0 / factor)[None, :]), 1), 0)
    col_exponent = _floor_log2(tl.max(factor, 0))
    shift = tl.minimum(_floor_log2(peak) - TARGET, 14 - col_exponent)
    shift = tl.maximum(shift, -8 - col_exponent)
    return tl.where(peak > 0, factor * _exp2(shift), 1.0)


@triton.jit
def _least_squares_range(y, low, high, COLS: tl.constexpr, ROUNDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scale and zero [ROWS] of 2-bit rows whose mean is 0, so that products lose no digits."""
    deviation = tl.sqrt(tl.sum(y * y, 1) / COLS)
    scale = tl.minimum(GAUSSIAN_STEP * deviation, (high - low) / 3)
    zero = tl.maximum(-1.5 * scale, low)
    for _ in range(ROUNDS):
        codes = _round(y, scale, zero, 2)
        both, products = _sums(codes + 4096.0 * (codes * codes), codes * y, 1)
        squares = tl.floor(both * (1 / 4096.0))
        total = both - 4096.0 * squares
        variance = squares * COLS - total * total  # integers below 2**24: exact
        covariance = products * COLS
        scale = tl.where(variance > 0, covariance / tl.where(variance > 0, variance, 1.0), 0.0)
        zero = -scale * total / COLS
    return scale, zero


@triton.jit
def _round(y, scale, zero, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes as floats; a row with scale 0 gets code 0."""
    inverse = tl.where(scale == 0, 0.0, 1.0 / tl.where(scale == 0, 1.0, scale))
    codes = y * inverse[:, None] - (zero * inverse)[:, None]
    codes = tl.minimum(tl.maximum(codes, 0.0), 2.0**BITS - 1)
    magic: tl.constexpr = (
        1.5 * 2**23
    )  # floats of this size are integers: adding rounds half to even
    return (codes + magic) - magic


@triton.jit
def _sums(a, b, AXIS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of two tiles, in one reduction."""
    if INTERPRETED:
        return tl.sum(a, AXIS), tl.sum(b, AXIS)
    return tl.reduce((a, b), AXIS, _add_pairs)


@triton.jit
def _extremes(x, AXIS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Minimum and maximum along an axis, in one reduction."""
    if INTERPRETED:
        return tl.min(x, AXIS), tl.max(x, AXIS)
    return tl.reduce((x, x), AXIS, _widen)


@triton.jit
def _add_pairs(a0, b0, a1, b1):  # type: ignore[no-untyped-def]
    return a0 + a1, b0 + b1


@triton.jit
def _widen(low0, high0, low1, high1):  # type: ignore[no-untyped-def]
    return tl.minimum(low0, low1), tl.maximum(high0, high1)


@triton.jit
def _rms_exponent(t, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Integer nearest to log2 of the RMS of a tile; 0 for a zero tile."""
    mean_square = tl.sum(tl.sum(t * t, 1), 0) / COUNT
    return tl.where(mean_square > 0, (_floor_log2(mean_square) + 1) >> 1, 0)


@triton.jit
def _floor_log2(x):  # type: ignore[no-untyped-def]
    """Exponent of a positive normal float, from its bits."""
    return ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def _exp2(exponent):  # type: ignore[no-untyped-def]
    """Power of two with an exponent in -126 .. 127, exactly."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)

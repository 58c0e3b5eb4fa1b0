"""The definition of a record in plain torch, batched over tiles, in fp32.

A tile is a matrix T [rows, cols]. Rows get a scale and a zero each, columns one factor w each:
K tiles are transposed (rows = channels, columns = tokens), V tiles are not (rows = tokens,
columns = channels). Encoding is: column factors (`column_factors`, with a power of two that keeps
fp16 in range), round to nearest with a range per row (`choose_codes`), and a few rounds in which
the factors are fitted to the codes (`refit_factor`) and the codes chosen again.

What is traded away: speed. Kernels are compared with this file.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from kvarn_core.layout import code_index, k_order, m_order
from kvarn_core.rotation import cast, to_fp16

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvarn_core.layout import RecordLayout
    from kvarn_core.spec import Recipe

GAUSSIAN_STEP = 0.9957  # optimal step of a uniform 4-level quantiser of a unit Gaussian
FACTOR_RANGE = 4.0  # of values: RMS of the column factors found, over the least one kept


def encode_key(key: torch.Tensor, layout: RecordLayout, recipe: Recipe) -> torch.Tensor:
    """K tiles [N, G, D] to bytes [N, key_bytes]."""
    if layout.preset.is_debug:
        return key.contiguous().view(torch.uint8).flatten(1)
    bits = layout.preset.key_bits
    codes, scale, zero, factor = quantize_rows(key.float().mT, bits, recipe)
    return torch.cat(
        (
            pack_codes(codes.mT, bits),
            vector_bytes(scale, k_order),
            vector_bytes(zero, k_order),
            vector_bytes(factor, m_order),
        ),
        dim=1,
    )


def encode_value(value: torch.Tensor, layout: RecordLayout, recipe: Recipe) -> torch.Tensor:
    """V tiles [N, G, D] to bytes [N, record_bytes - key_bytes]."""
    if layout.preset.is_debug:
        return value.contiguous().view(torch.uint8).flatten(1)
    bits = layout.preset.value_bits
    codes, scale, zero, factor = quantize_rows(value.float(), bits, recipe, is_value=True)
    return torch.cat(
        (
            pack_codes(codes.mT, bits),
            vector_bytes(factor, m_order),
            vector_bytes(scale, m_order),
            vector_bytes(zero, m_order),
        ),
        dim=1,
    )


def decode(
    records: torch.Tensor, layout: RecordLayout, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Records [N, record_bytes] to rotated K and V tiles [N, G, D]."""
    group, dim, preset = layout.group, layout.head_dim, layout.preset
    raw = {name: records[:, f.offset : f.end] for name, f in layout.fields.items()}
    if preset.is_debug:
        tiles = (raw[name].contiguous().view(torch.float32) for name in ("k_codes", "v_codes"))
        key, value = (cast(tile.view(-1, group, dim), dtype) for tile in tiles)
        return key, value

    # key [N, G, D] = (code * k_scale[D] + k_zero[D]) * k_token_scale[G]
    key = unpack_codes(raw["k_codes"], group, dim, preset.key_bits).float()
    key *= read_vector(raw["k_scale"], k_order)[:, None, :]
    key += read_vector(raw["k_zero"], k_order)[:, None, :]
    key *= read_vector(raw["k_token_scale"], m_order)[:, :, None]

    # value [N, G, D] = (code * v_scale[G] + v_zero[G]) * v_channel_scale[D]
    value = unpack_codes(raw["v_codes"], dim, group, preset.value_bits, transpose=True).float()
    value *= read_vector(raw["v_scale"], m_order)[:, :, None]
    value += read_vector(raw["v_zero"], m_order)[:, :, None]
    value *= read_vector(raw["v_channel_scale"], m_order)[:, None, :]
    return cast(key, dtype), cast(value, dtype)


# --- quantisation of one matrix per tile -----------------------------------------------------


def quantize_rows(
    tile: torch.Tensor, bits: int, recipe: Recipe, *, is_value: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise T [N, R, C]: codes uint8 [N, R, C]; fp16 scale and zero [N, R], factor [N, C]."""
    factor = column_factors(tile, bits, recipe, is_value=is_value)
    factor16 = stored_factor(factor)
    y = tile / (factor16.float() if recipe.relative else factor)[:, None, :]
    codes, scale16, zero16 = choose_codes(y, bits, recipe)
    for _ in range(recipe.factor_refits):
        factor16 = refit_factor(y, decoded_rows(codes, scale16, zero16), factor16)
        y = tile / factor16.float()[:, None, :]
        codes, scale16, zero16 = choose_codes(y, bits, recipe)
    if is_value and recipe.restore_norm and bits == 2:
        decoded = decoded_rows(codes, scale16, zero16)
        scale16, zero16 = restore_row_norm(tile, decoded, scale16, zero16, factor16)
    return codes.to(torch.uint8), scale16, zero16, factor16


def column_factors(
    tile: torch.Tensor, bits: int, recipe: Recipe, *, is_value: bool
) -> torch.Tensor:
    """Column factors [N, C] before any refit."""
    normalise = normalise_relative if recipe.relative else normalise_published
    factor = normalise(tile, recipe.iterations)
    if is_value and recipe.relative:
        factor = raise_factors(factor)
    return gauge(tile, factor, bits)


def choose_codes(
    y: torch.Tensor, bits: int, recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes as floats [N, R, C], fp16 scale and zero [N, R], of a tile with balanced columns."""
    round_rows = round_to_stored if recipe.relative else round_published
    low, high = y.amin(2), y.amax(2)
    scale, zero = (high - low) / (2**bits - 1), low
    if bits == 2 and recipe.range_refits:
        scale, zero = least_squares_range(y, low, high, recipe.range_refits)
    return round_rows(y, scale, zero, bits)


def decoded_rows(codes: torch.Tensor, scale16: torch.Tensor, zero16: torch.Tensor) -> torch.Tensor:
    """What a reader sees of y, fp32 [N, R, C], before the column factor."""
    return codes * scale16.float()[:, :, None] + zero16.float()[:, :, None]


def refit_factor(y: torch.Tensor, decoded: torch.Tensor, factor16: torch.Tensor) -> torch.Tensor:
    """Column factors, fp16 [N, C], of least squared error for the codes and ranges at hand.

    Bounded per round, so that the range fp16 leaves after `gauge` is kept.
    """
    energy = decoded.square().sum(1)
    ratio = torch.where(energy > 0, (y * decoded).sum(1) / energy, 1.0).clamp(0.8, 1.25)
    return stored_factor(factor16.float() * ratio)


def stored_factor(factor: torch.Tensor) -> torch.Tensor:
    """Column factors as fp16."""
    return to_fp16(factor).clamp(min=2.0**-14)  # smallest normal: division stays safe


def normalise_relative(tile: torch.Tensor, iterations: int) -> torch.Tensor:
    """Column factors [N, C] that depend on ratios only; recipe `kvarn`.

    Columns are measured by their RMS, because a column has no zero point that could absorb its
    mean; rows by their deviation with a floor of RMS / 8, so that a constant row does not dominate.
    The factors with the smallest spread of all iterations win.
    """
    mean_square = tile.double().square().mean((1, 2))
    exponent = torch.where(mean_square > 0, mean_square.log2().div(2), 0.0).round().int()
    t = torch.ldexp(tile, -exponent[:, None, None])

    def columns(row_factor: torch.Tensor) -> torch.Tensor:
        return rms(t / row_factor[:, :, None], dim=1)

    def rows(col_factor: torch.Tensor) -> torch.Tensor:
        y = t / col_factor[:, None, :]
        return torch.maximum(y.std(2), rms(y, dim=2) / 8)

    def bounded(x: torch.Tensor) -> torch.Tensor:
        return x.clamp(2.0**-10, 2.0**10)

    row = torch.ones_like(t[:, :, 0])
    best_factor = torch.ones_like(t[:, 0, :])
    best = spread(bounded(columns(row))) + spread(bounded(rows(best_factor)))
    for _ in range(iterations):
        col = bounded(columns(row))
        row = bounded(rows(col))
        imbalance = spread(bounded(columns(row) / col)) + spread(bounded(rows(col) / row))
        better = imbalance <= best
        best = torch.where(better, imbalance, best)
        best_factor = torch.where(better[:, None], col, best_factor)
    return torch.ldexp(best_factor, exponent[:, None])


def normalise_published(tile: torch.Tensor, iterations: int) -> torch.Tensor:
    """Column factors [N, C] of the published log-domain iteration; recipe `paper`."""

    def imbalance(x: torch.Tensor) -> torch.Tensor:
        cols, rows = x.std(1), x.std(2)
        ratio_cols = cols.amax(1) / cols.amin(1).clamp(min=1e-8)
        ratio_rows = rows.amax(1) / rows.amin(1).clamp(min=1e-8)
        return ratio_cols + ratio_rows

    def step(log_factor: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
        return (log_factor + deviation.clamp(1e-3, 1e3).log()).clamp(-0.3, 10)

    log_col = torch.zeros_like(tile[:, 0, :])
    log_row = torch.zeros_like(tile[:, :, 0])
    current, best = tile, imbalance(tile)
    best_factor = torch.ones_like(log_col)
    for _ in range(iterations):
        log_col = step(log_col, current.std(1))
        current = tile * (-log_col).exp()[:, None, :] * (-log_row).exp()[:, :, None]
        log_row = step(log_row, current.std(2))
        current = tile * (-log_col).exp()[:, None, :] * (-log_row).exp()[:, :, None]
        measured = imbalance(current)
        better = measured <= best
        best = torch.where(better, measured, best)
        best_factor = torch.where(better[:, None], log_col.exp(), best_factor)
    return best_factor


def raise_factors(factor: torch.Tensor) -> torch.Tensor:
    """Factors [N, C], none far below the others.

    Where the tokens of a tile are alike, factors follow their channels, however small. A token
    unlike them then fills the range of its row in the small channels and pays in the large ones:
    its error can be as many times too large as the RMS of the factors exceeds the least.
    """
    return torch.maximum(factor, rms(factor, dim=1)[:, None] / FACTOR_RANGE)


def gauge(tile: torch.Tensor, factor: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift a power of two between factors [N, C] and rows so that all stored numbers fit fp16.

    Decoded values do not change. Row endpoints land in [8, 16) for 4 bits, in [2, 4) for 2.
    """
    target = 3 if bits == 4 else 1
    peak = (tile / factor[:, None, :]).abs().amax((1, 2))
    row_exponent = _floor_log2(peak)
    col_exponent = _floor_log2(factor.amax(1))
    shift = torch.minimum(row_exponent - target, 14 - col_exponent)
    shift = torch.maximum(shift, -8 - col_exponent)
    shifted = torch.ldexp(factor, shift[:, None])
    return torch.where(peak[:, None] > 0, shifted, 1.0)  # a zero tile: factors 1, the rest 0


def least_squares_range(
    y: torch.Tensor, low: torch.Tensor, high: torch.Tensor, rounds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero [N, R] of a 2-bit row by least squares, from the Gaussian optimum."""
    mean = y.mean(2)
    scale = torch.minimum(GAUSSIAN_STEP * y.std(2, correction=0), (high - low) / 3)
    zero = torch.maximum(mean - 1.5 * scale, low)
    for _ in range(rounds):
        codes = _round(y, scale, zero, 2)
        code_mean = codes.mean(2)
        variance = (codes - code_mean[:, :, None]).square().mean(2)
        covariance = ((codes - code_mean[:, :, None]) * (y - mean[:, :, None])).mean(2)
        scale = torch.where(variance > 0, covariance / variance, 0.0)
        zero = mean - scale * code_mean
    return scale, zero


def round_to_stored(
    y: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round scale and zero to fp16 first, then choose the codes for that grid."""
    scale16, zero16 = to_fp16(scale), to_fp16(zero)
    middle = to_fp16((y.amin(2) + y.amax(2)) / 2)
    zero16 = torch.where(scale16 == 0, middle, zero16)
    return _round(y, scale16.float(), zero16.float(), bits), scale16, zero16


def round_published(
    y: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the codes for the unrounded grid, then round scale and zero to fp16."""
    scale = scale.clamp(min=1e-10)
    return _round(y, scale, zero, bits), to_fp16(scale), to_fp16(zero)


def restore_row_norm(
    tile: torch.Tensor,
    decoded: torch.Tensor,
    scale16: torch.Tensor,
    zero16: torch.Tensor,
    factor16: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stretch each row so that the decoded token has the norm of the original one.

    A grid of least squared error shrinks rows by some per cent, which does not average out when
    attention sums many tokens.
    """
    wanted = tile.square().sum(2)
    got = (decoded * factor16.float()[:, None, :]).square().sum(2)
    ratio = torch.where(got > 0, wanted / got, 1.0).sqrt().clamp(0.5, 2.0)
    return to_fp16(scale16.float() * ratio), to_fp16(zero16.float() * ratio)


def rms(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Root of the mean square along `dim`."""
    return x.square().mean(dim).sqrt()


def spread(x: torch.Tensor) -> torch.Tensor:
    """Largest over smallest element per tile; 1 is perfectly balanced."""
    return x.amax(1) / x.amin(1)


def _round(y: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes as floats; a row with scale 0 gets code 0."""
    scale, zero = scale[:, :, None], zero[:, :, None]
    codes = ((y - zero) / scale).round().clamp(0, 2**bits - 1)
    return torch.where(scale == 0, 0.0, codes)


def _floor_log2(x: torch.Tensor) -> torch.Tensor:
    """Exponent of positive floats as int32, from the bits and not from a logarithm."""
    return torch.frexp(x).exponent - 1


# --- bytes -------------------------------------------------------------------------------------


@cache
def _code_order(rows: int, cols: int, bits: int, device: torch.device) -> torch.Tensor:
    """Stream index of each code of a [rows, cols] matrix."""
    m = torch.arange(rows, device=device)[:, None]
    k = torch.arange(cols, device=device)[None, :]
    order: torch.Tensor = code_index(m, k, rows=rows, cols=cols, bits=bits)
    return order


@cache
def _code_places(
    rows: int, cols: int, bits: int, transpose: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Byte (int64) and shift (uint8) of each code, row-major, of the matrix or its transpose."""
    order = _code_order(rows, cols, bits, device)
    order = (order.T if transpose else order).flatten()
    return order * bits // 8, (order * bits % 8).to(torch.uint8)


@cache
def _vector_order(
    length: int, order: Callable[[torch.Tensor], torch.Tensor], device: torch.device
) -> torch.Tensor:
    return order(torch.arange(length, device=device))


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [N, M, K] < 2**bits to bytes [N, M * K * bits / 8] in fragment order."""
    count, rows, cols = codes.shape
    stream = torch.empty(count, rows * cols, dtype=torch.uint8, device=codes.device)
    order = _code_order(rows, cols, bits, codes.device).flatten()
    stream[:, order] = codes.reshape(count, -1).to(torch.uint8)
    parts = stream.view(count, -1, 8 // bits)
    packed = parts[..., 0].clone()
    for i in range(1, 8 // bits):
        packed |= parts[..., i] << (bits * i)
    return packed


def unpack_codes(
    packed: torch.Tensor, rows: int, cols: int, bits: int, *, transpose: bool = False
) -> torch.Tensor:
    """Bytes in fragment order to codes [N, rows, cols], or [N, cols, rows], uint8."""
    byte, shift = _code_places(rows, cols, bits, transpose, packed.device)
    codes = packed.gather(1, byte.expand(len(packed), -1))  # an index would cost five times as much
    codes.bitwise_right_shift_(shift).bitwise_and_(2**bits - 1)
    return codes.view(-1, *((cols, rows) if transpose else (rows, cols)))


def vector_bytes(
    vector: torch.Tensor, order: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Permute an fp16 vector [N, L] and return its bytes [N, 2 L]."""
    stored = torch.empty_like(vector, memory_format=torch.contiguous_format)
    stored[:, _vector_order(vector.shape[1], order, vector.device)] = vector
    return stored.view(torch.uint8)


def read_vector(data: torch.Tensor, order: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Bytes [N, 2 L] of a permuted fp16 vector back to fp32 [N, L]."""
    stored = data.contiguous().view(torch.float16)
    return stored[:, _vector_order(stored.shape[1], order, data.device)].float()

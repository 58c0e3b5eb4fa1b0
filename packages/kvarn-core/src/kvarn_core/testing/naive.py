"""A second, independent implementation in numpy: one tile, one bit and one token at a time.

It shares no code with the library, not even the layout: offsets, code order, exact rows and the
visibility rule are written out once more, so a slip in either version shows as a difference. Slow
on purpose; symbols are those of the algorithm (T tile, w column factor, s scale, z zero).

Source: arXiv 2606.03458; docs/explanation/algorithm.md.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]
    F16 = NDArray[np.float16]
    U8 = NDArray[np.uint8]
    Int = NDArray[np.int64]

HIGHEST = np.float32(65504.0)


def to_fp16(x: Any) -> F16:
    """Round to fp16, half to even; overflow saturates."""
    return np.clip(np.asarray(x, np.float32), -HIGHEST, HIGHEST).astype(np.float16)


def door(x: F32) -> F16:
    """Sanitise, rotate and round rows [..., D]: a scalar butterfly in fp32, element by element."""
    flat = np.clip(np.nan_to_num(x.astype(np.float32), nan=0.0), -HIGHEST, HIGHEST)
    rows = flat.reshape(-1, x.shape[-1]).copy()
    dim = rows.shape[1]
    h = 1
    while h < dim:
        for start in range(0, dim, 2 * h):
            for i in range(start, start + h):
                a, b = rows[:, i].copy(), rows[:, i + h].copy()
                rows[:, i], rows[:, i + h] = a + b, a - b
        h *= 2
    return to_fp16(rows * np.float32(1 / math.sqrt(dim))).reshape(x.shape)


# --- column factors -------------------------------------------------------------------------------


def factors_kvarn(T: F32, iterations: int = 4, *, keep_best: bool = True) -> F32:
    """Column factors relative to the tile's own magnitude.

    ``keep_best=False`` returns the last pass, a known mistake, for tests that must tell them apart.
    """
    S = np.sqrt(np.mean(T.astype(np.float64) ** 2))
    e0 = int(np.rint(np.log2(S)))
    T = np.ldexp(T, -e0)

    def clamp(v: F32) -> F32:
        return np.asarray(np.clip(v, 2.0**-10, 2.0**10), np.float32)

    def column_rms(X: F32) -> F32:
        return np.asarray(np.sqrt((X * X).mean(0, dtype=np.float32)))

    def row_measure(X: F32) -> F32:
        rms = np.sqrt((X * X).mean(1, dtype=np.float32))
        measure: F32 = np.maximum(X.std(1, ddof=1), rms / 8)
        return measure

    def spread(v: F32) -> float:
        return float(v.max() / v.min())

    best = spread(clamp(column_rms(T))) + spread(clamp(row_measure(T)))
    best_c = np.ones(T.shape[1], np.float32)
    r = np.ones(T.shape[0], np.float32)
    for _ in range(iterations):
        c = clamp(column_rms(T / r[:, None]))
        r = clamp(row_measure(T / c))
        m = spread(clamp(column_rms(T / r[:, None]) / c)) + spread(clamp(row_measure(T / c) / r))
        if m <= best or not keep_best:
            best, best_c = m, c
    return np.ldexp(best_c, e0)


def raise_factors(c: F32) -> F32:
    """Column factors of values: at least a quarter of their RMS."""
    least = math.sqrt(float((c.astype(np.float64) ** 2).mean())) / 4
    return np.asarray(np.maximum(c, np.float32(least)))


def factors_paper(T: F32, iterations: int = 8) -> F32:
    """Column factors of the published recipe: accumulated logarithms with absolute clips."""

    def step(log: F32, std: F32) -> F32:
        grown = log + np.log(np.clip(std, np.float32(1e-3), np.float32(1e3)))
        return np.asarray(np.clip(grown, -0.3, 10), np.float32)

    def imbalance(X: F32) -> float:
        total = 0.0
        for axis in (0, 1):
            std = X.std(axis, ddof=1)
            total += float(std.max() / max(std.min(), np.float32(1e-8)))
        return total

    lc, lr = np.zeros(T.shape[1], np.float32), np.zeros(T.shape[0], np.float32)
    current, best, best_c = T, imbalance(T), np.ones(T.shape[1], np.float32)
    for _ in range(iterations):
        lc = step(lc, current.std(0, ddof=1))
        current = T * np.exp(-lc) * np.exp(-lr)[:, None]
        lr = step(lr, current.std(1, ddof=1))
        current = T * np.exp(-lc) * np.exp(-lr)[:, None]
        m = imbalance(current)
        if m <= best:
            best, best_c = m, np.exp(lc)
    return best_c


def fix_gauge(T: F32, c: F32, bits: int) -> F32:
    """Move powers of two from the columns to the rows so that fp16 holds both."""
    A = float(np.abs(T / c).max())
    e = 0
    if A > 0:
        EA, EC = math.floor(math.log2(A)), math.floor(math.log2(float(c.max())))
        e = max(min(EA - (3 if bits == 4 else 1), 14 - EC), -8 - EC)
    return np.ldexp(c, e)


# --- rows: range, rounding ------------------------------------------------------------------------


def fit_row(y: F32, bits: int, *, recipe: str) -> tuple[Int, Any, Any]:
    """Codes, fp16 scale and fp16 zero of one row y = T[row] / w."""
    top = 2**bits - 1
    low, high = y.min(), y.max()
    if recipe == "paper":
        s = np.maximum((high - low) / np.float32(top), np.float32(1e-10))
        return np.clip(np.rint((y - low) / s), 0, top).astype(np.int64), to_fp16(s), to_fp16(low)

    s, z = (high - low) / np.float32(top), low
    if bits == 2:
        s, z = _least_squares(y)
    s16, z16 = to_fp16(s), to_fp16(z)
    if s16 == 0:
        return np.zeros(y.size, np.int64), s16, to_fp16((low + high) / 2)
    s32, z32 = np.float32(s16), np.float32(z16)
    return np.clip(np.rint((y - z32) / s32), 0, top).astype(np.int64), s16, z16


def _least_squares(y: F32) -> tuple[Any, Any]:
    low, high, mu = y.min(), y.max(), y.mean(dtype=np.float32)
    s = min(np.float32(0.9957) * y.std(), (high - low) / np.float32(3))
    z = max(mu - np.float32(1.5) * s, low)
    for _ in range(2):
        if s == 0:
            return s, z
        k = np.clip(np.rint((y - z) / s), 0, 3)
        variance = (k * k).mean() - k.mean() ** 2
        if variance == 0:
            return np.float32(0), mu
        s = ((k * y).mean() - k.mean() * mu) / variance
        z = mu - s * k.mean()
    return s, z


def encode_tile(T: F32, bits: int, *, recipe: str, is_value: bool) -> tuple[Int, F16, F16, F16]:
    """Codes [R, C], scales [R], zeros [R] and column factors [C] of a tile in row orientation."""
    rows, cols = T.shape
    if not T.any():
        zeros = np.zeros(rows, np.float16)
        return np.zeros((rows, cols), np.int64), zeros, zeros, np.ones(cols, np.float16)
    w = factors_paper(T) if recipe == "paper" else factors_kvarn(T)
    if recipe != "paper" and is_value:
        w = raise_factors(w)
    w = fix_gauge(T, w, bits)
    w16 = np.maximum(to_fp16(w), np.float16(2.0**-14))
    if recipe != "paper":  # the published encoder never looks at what it stores
        w = w16.astype(np.float32)
    codes, scale, zero = fit_rows(np.divide(T, w, dtype=np.float32), bits, recipe)
    for _ in range(0 if recipe == "paper" else 2):
        w16 = refit_columns(T, codes, scale, zero, w16)
        codes, scale, zero = fit_rows(np.divide(T, w16, dtype=np.float32), bits, recipe)
    if recipe != "paper" and bits == 2 and is_value:
        scale, zero = restore_norms(T, codes, scale, zero, w16)
    return codes, scale, zero, w16


def fit_rows(Y: F32, bits: int, recipe: str) -> tuple[Int, F16, F16]:
    """Codes [R, C], scales [R] and zeros [R] of all rows."""
    rows = [fit_row(y, bits, recipe=recipe) for y in Y]
    codes, scale, zero = zip(*rows, strict=True)
    return np.stack(codes), np.array(scale, np.float16), np.array(zero, np.float16)


def refit_columns(T: F32, codes: Int, scale: F16, zero: F16, w16: F16) -> F16:
    """Column factors of least squared error, column by column, at most a fifth or a quarter off."""
    new: F16 = w16.copy()
    for col, w in enumerate(w16.astype(np.float32)):
        X = codes[:, col] * scale.astype(np.float32) + zero.astype(np.float32)
        energy = float((X * X).sum())
        if energy > 0:
            best = np.float32(float((T[:, col] * X).sum()) / energy)
            least, most = w * np.float32(0.8), w * np.float32(1.25)
            new[col] = np.maximum(to_fp16(np.clip(best, least, most)), np.float16(2.0**-14))
    return new


def restore_norms(T: F32, codes: Int, scale: F16, zero: F16, w16: F16) -> tuple[F16, F16]:
    """Scales and zeros with which every decoded row has the norm of T's row."""
    scale, zero = scale.copy(), zero.copy()
    for row in range(len(T)):
        s, z = np.float32(scale[row]), np.float32(zero[row])
        X = (codes[row] * s + z) * w16.astype(np.float32)
        have = float((X * X).sum())
        if have > 0:
            rho = np.float32(min(max(math.sqrt(float((T[row] ** 2).sum()) / have), 0.5), 2.0))
            scale[row], zero[row] = to_fp16(s * rho), to_fp16(z * rho)
    return scale, zero


# --- bytes ----------------------------------------------------------------------------------------


def code_place(m: int, k: int, rows: int, cols: int, bits: int) -> tuple[int, int]:
    """32-bit word and lowest bit of code (m, k) of a [rows, cols] operand."""
    F, Mt, Ks = 16 // bits, rows // 16, cols // 16
    Fm = min(F, Mt)
    Fk = F // Fm
    mt, row, ks, kk = m // 16, m % 16, k // 16, k % 16
    field = (mt % Fm) + Fm * (ks % Fk)
    chunk = (mt // Fm) * (Ks // Fk) + ks // Fk
    lane = (row % 8) * 4 + (kk % 8) // 2
    register = row // 8 + 2 * (kk // 8)
    return (chunk * 32 + lane) * 4 + register, 16 * (kk % 2) + bits * field


@cache
def _places(rows: int, cols: int, bits: int) -> tuple[Int, Int]:
    places = [code_place(m, k, rows, cols, bits) for m in range(rows) for k in range(cols)]
    table = np.array(places, np.int64).reshape(rows, cols, 2)
    return table[..., 0], table[..., 1]


def pack(codes: Int, bits: int) -> U8:
    """Codes [rows, cols] into fragment order, little endian."""
    word, bit = _places(*codes.shape, bits)
    words = np.zeros(codes.size * bits // 32, np.int64)
    for m in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            words[word[m, k]] |= int(codes[m, k]) << int(bit[m, k])
    return words.astype("<u4").view(np.uint8)


def unpack(data: U8, rows: int, cols: int, bits: int) -> Int:
    """Fragment order back into codes [rows, cols]."""
    word, bit = _places(rows, cols, bits)
    words = data.copy().view("<u4").astype(np.int64)
    return np.asarray((words[word] >> bit) & (2**bits - 1))


def k_position(d: int) -> int:
    """Stored place of element d of a vector along the k index."""
    step, pair, half = d // 16, (d // 2) % 4, (d // 8) % 2
    return step // 2 * 32 + pair * 8 + step % 2 * 4 + half * 2 + d % 2


def m_position(i: int) -> int:
    """Stored place of element i of a vector along the m index."""
    block, low, high = i // 16, i % 8, (i // 8) % 2
    return block // 4 * 64 + low * 8 + block % 4 * 2 + high


def _store(vector: F16, position: Any) -> U8:
    stored = np.zeros_like(vector)
    for i, x in enumerate(vector):
        stored[position(i)] = x
    return stored.view(np.uint8)


def _load(data: U8, position: Any) -> F32:
    stored = data.copy().view(np.float16)
    return np.array([stored[position(i)] for i in range(stored.size)], np.float32)


def encode(key: F16, value: F16, *, key_bits: int, value_bits: int, recipe: str) -> U8:
    """One record from rotated tiles [G, D], fields in record order."""
    K, V = key.astype(np.float32), value.astype(np.float32)
    kc, a, zk, t = encode_tile(K.T.copy(), key_bits, recipe=recipe, is_value=False)
    vc, u, zv, c = encode_tile(V, value_bits, recipe=recipe, is_value=True)
    return np.concatenate(
        [
            pack(kc.T, key_bits),
            _store(a, k_position),
            _store(zk, k_position),
            _store(t, m_position),
            pack(vc.T, value_bits),
            _store(c, m_position),
            _store(u, m_position),
            _store(zv, m_position),
        ]
    )


def fields(
    record: U8, *, group: int, dim: int, key_bits: int, value_bits: int
) -> tuple[Int, F32, F32, F32, Int, F32, F32, F32]:
    """Key codes [G, D], a, zk, t, value codes [G, D], c, u, zv of one record."""
    sizes = [
        group * dim * key_bits // 8, 2 * dim, 2 * dim, 2 * group,
        group * dim * value_bits // 8, 2 * dim, 2 * group, 2 * group,
    ]  # fmt: skip
    parts, offset = [], 0
    for size in sizes:
        parts.append(record[offset : offset + size])
        offset += size
    assert offset == record.size
    return (
        unpack(parts[0], group, dim, key_bits),
        _load(parts[1], k_position),
        _load(parts[2], k_position),
        _load(parts[3], m_position),
        unpack(parts[4], dim, group, value_bits).T,
        _load(parts[5], m_position),
        _load(parts[6], m_position),
        _load(parts[7], m_position),
    )


def decode(record: U8, *, group: int, dim: int, key_bits: int, value_bits: int) -> tuple[F32, F32]:
    """Rotated tiles K, V [G, D] of one record, fp32."""
    kc, a, zk, t, vc, c, u, zv = fields(
        record, group=group, dim=dim, key_bits=key_bits, value_bits=value_bits
    )
    # code * scale is exact in fp32, so the sum rounds once, as a fused multiply-add does
    key = (kc.astype(np.float32) * a + zk) * t[:, None]
    value = (vc.astype(np.float32) * u[:, None] + zv[:, None]) * c
    return key, value


# --- pages ----------------------------------------------------------------------------------------


def exact_row(page: U8, row: int, dim: int) -> tuple[F16, F16]:
    """K and V [D] of exact row `row` of one head's share of a page."""
    begin = row * 4 * dim
    halves = []
    for half in range(2):
        pieces = []
        for piece in range(2 * dim // 16):
            at = begin + half * 2 * dim + 16 * (piece ^ (row % 8))
            pieces.append(page[at : at + 16])
        halves.append(np.concatenate(pieces).view(np.float16))
    return halves[0], halves[1]


def view(
    cache: U8, table: Int, length: int, position: int, *,
    group: int, dim: int, key_bits: int, value_bits: int,
) -> tuple[F32, F32]:  # fmt: skip
    """K and V [length, Hkv, D] of one request as the query at `position` sees them, by token.

    `cache` is [P, Hkv, record bytes], `table` one row of the page table.
    """
    rows_per_page = cache.shape[2] // (4 * dim)
    header = 2 + math.ceil(2 * group / rows_per_page)
    sink_rows = min(rows_per_page, 27)
    packed = max(int(table[0]), position // group - 1, 0)
    shape = (length, cache.shape[1], dim)
    key, value = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for head in range(cache.shape[1]):
        for tile in range(-(-min(packed * group, length) // group)):
            record = cache[int(table[header + tile]), head]
            stop = min((tile + 1) * group, length)
            tiles = decode(record, group=group, dim=dim, key_bits=key_bits, value_bits=value_bits)
            for result, rows in zip((key, value), tiles, strict=True):
                result[tile * group : stop, head] = rows[: stop - tile * group]
        for token in range(length):
            if token >= packed * group:
                ring = token % (2 * group)
                page, row = int(table[2 + ring // rows_per_page]), ring % rows_per_page
            elif token < sink_rows and table[1]:
                page, row = int(table[1]), token
            else:
                continue
            key[token, head], value[token, head] = exact_row(cache[page, head], row, dim)
    return key, value

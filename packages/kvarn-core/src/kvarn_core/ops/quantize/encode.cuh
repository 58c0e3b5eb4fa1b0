// One half of a record from a tile in shared memory: column factors, a range and codes per row,
// factors fitted to the codes, the norm of 2-bit values, bytes in fragment order.
//
// Estimate at D = G = 128, 256 threads of 64 elements: K at 4 bits 55 instructions per element,
// V at 2 bits 110; nothing but the tile and the half touches global memory. What is traded
// away against the reference: sums run in another order and reciprocals replace divisions, so a code
// on the edge may fall to the other side.
//
// Defines besides those of normalise.cuh: RANGE_REFITS, FACTOR_REFITS, RESTORE_NORM, SHARED_BYTES.
#pragma once
#include "normalise.cuh"

constexpr float GAUSSIAN_STEP = 0.9957f;  // as in the reference
constexpr float MAGIC = 12582912.0f;       // 1.5 * 2^23: adding it rounds to an integer, half to even

struct Range {  // of a row, as codes are chosen with it
    float scale, zero;
};

DEVICE float as_stored(float x) {  // rounded to fp16, saturating
    return half_to_float(float_to_half(bounded(x, -65504.0f, 65504.0f)));
}
DEVICE float stored_factor(float x) {  // at least the smallest normal: division stays safe
    return fmaxf(as_stored(x), 0x1p-14f);
}

// The code of an element that lies `above` the zero of its row, plus MAGIC. `inverse` is that of
// the range of all codes, so saturation clamps.
template <int BITS>
DEVICE float code_and_magic(float above, float inverse) {
    return fmaf(mul_saturating(above, inverse), float((1 << BITS) - 1), MAGIC);
}
template <int BITS>
DEVICE float inverse_range(float scale) {
    return scale > 0 ? 1.0f / (scale * float((1 << BITS) - 1)) : 0.0f;
}

// Least squares over the own row: codes for a range, then the range for the codes.
template <class Half>
DEVICE Range fit_range(const typename Tile<Half>::Elements& y, Range range, float mean) {
    using T = Tile<Half>;
    float zero[T::HELD], inverse[T::HELD];
    to_places(range.zero, zero);
    to_places(inverse_range<T::BITS>(range.scale), inverse);
    float codes[T::HELD], squares[T::HELD], products[T::HELD];
#pragma unroll
    for (int a = 0; a < T::HELD; a++) {
        codes[a] = squares[a] = products[a] = 0;
#pragma unroll
        for (int b = 0; b < T::BLOCKS; b++) {
            const float above = y[a][b] - zero[a];
            const float code = code_and_magic<T::BITS>(above, inverse[a]) - MAGIC;
            codes[a] += code;
            squares[a] = fmaf(code, code, squares[a]);
            products[a] = fmaf(code, above, products[a]);
        }
    }
    const float n = float(T::COLS), k = over_row<Add>(codes), kk = over_row<Add>(squares);
    const float ky = over_row<Add>(products);
    const float variance = fmaf(kk, n, -k * k);  // integers below 2^24: exact
    const float covariance = fmaf(ky, n, -k * n * (mean - range.zero));
    range.scale = variance > 0 ? covariance / variance : 0.0f;
    range.zero = mean - range.scale * k / n;
    return range;
}

// Range of the own row, with which codes are chosen; `stored` is what readers get.
template <class Half>
DEVICE Range choose_range(const typename Tile<Half>::Elements& y, Range& stored) {
    using T = Tile<Half>;
    constexpr bool FIT = T::BITS == 2 && RANGE_REFITS > 0;
    float low[T::HELD], high[T::HELD], sum[T::HELD], squares[T::HELD];
#pragma unroll
    for (int a = 0; a < T::HELD; a++) {
        low[a] = high[a] = y[a][0];
        sum[a] = squares[a] = 0;
#pragma unroll
        for (int b = 0; b < T::BLOCKS; b++) {
            low[a] = fminf(low[a], y[a][b]);
            high[a] = fmaxf(high[a], y[a][b]);
            if (FIT) {
                sum[a] += y[a][b];
                squares[a] = fmaf(y[a][b], y[a][b], squares[a]);
            }
        }
    }
    const float least = over_row<Lesser>(low), most = over_row<Greater>(high);
    Range range = {(most - least) / float((1 << T::BITS) - 1), least};
    if (FIT) {
        const float mean = over_row<Add>(sum) / float(T::COLS);
        const float square = over_row<Add>(squares) / float(T::COLS);
        const float deviation = sqrtf(fmaxf(fmaf(-mean, mean, square), 0.0f));
        range.scale = fminf(GAUSSIAN_STEP * deviation, range.scale);
        range.zero = fmaxf(fmaf(-1.5f, range.scale, mean), least);
#pragma unroll 1
        for (int i = 0; i < RANGE_REFITS; i++) range = fit_range<Half>(y, range, mean);
    }
    if (!RELATIVE) range.scale = fmaxf(range.scale, 1e-10f);
    stored.scale = as_stored(range.scale);
    stored.zero = as_stored(RELATIVE && stored.scale == 0 ? (least + most) / 2 : range.zero);
    return RELATIVE ? stored : range;
}

// Column factors of least squared error for the codes at hand; y follows them.
template <class Half>
DEVICE void refit_factor(Scratch<Half>& s, typename Tile<Half>::Elements& y, Range own,
                         float& factor) {
    using T = Tile<Half>;
    float products[T::BLOCKS], energy[T::BLOCKS];
    {
        float zero[T::HELD], scale[T::HELD], inverse[T::HELD];
        to_places(own.zero, zero);
        to_places(own.scale, scale);
        to_places(inverse_range<T::BITS>(own.scale), inverse);
#pragma unroll
        for (int b = 0; b < T::BLOCKS; b++) {
            products[b] = energy[b] = 0;
#pragma unroll
            for (int a = 0; a < T::HELD; a++) {
                const float code =
                    code_and_magic<T::BITS>(y[a][b] - zero[a], inverse[a]) - MAGIC;
                const float decoded = fmaf(code, scale[a], zero[a]);
                products[b] = fmaf(y[a][b], decoded, products[b]);
                energy[b] = fmaf(decoded, decoded, energy[b]);
            }
        }
    }
    leave_sums(s, 0, products);
    leave_sums(s, 1, energy);
    __syncthreads();
    const float product = own_sum(s, 0), square = own_sum(s, 1), old = factor;
    const float ratio = square > 0 ? product / square : 1.0f;
    factor = stored_factor(old * bounded(ratio, 0.8f, 1.25f));
    leave_value(s, 0, old / factor);
    leave_value(s, 1, factor);
    __syncthreads();
    float change[T::BLOCKS];
    take_values(s, 0, change);
#pragma unroll
    for (int a = 0; a < T::HELD; a++)
#pragma unroll
        for (int b = 0; b < T::BLOCKS; b++) y[a][b] *= change[b];
}

// Stretches the own row to the norm it had: a grid of least squared error shrinks it.
template <class Half>
DEVICE void restore_norm(const Scratch<Half>& s, const typename Tile<Half>::Elements& y, Range own,
                         Range& stored) {
    using T = Tile<Half>;
    float weight[T::BLOCKS], zero[T::HELD], scale[T::HELD], inverse[T::HELD];
    take_values(s, 1, weight);
    to_places(own.zero, zero);
    to_places(own.scale, scale);
    to_places(inverse_range<T::BITS>(own.scale), inverse);
    float wanted[T::HELD], got[T::HELD];
#pragma unroll
    for (int a = 0; a < T::HELD; a++) {
        wanted[a] = got[a] = 0;
#pragma unroll
        for (int b = 0; b < T::BLOCKS; b++) {
            const float code = code_and_magic<T::BITS>(y[a][b] - zero[a], inverse[a]) - MAGIC;
            const float before = y[a][b] * weight[b];
            const float after = fmaf(code, scale[a], zero[a]) * weight[b];
            wanted[a] = fmaf(before, before, wanted[a]);
            got[a] = fmaf(after, after, got[a]);
        }
    }
    const float before = over_row<Add>(wanted), after = over_row<Add>(got);
    const float ratio = bounded(sqrtf(after > 0 ? before / after : 1.0f), 0.5f, 2.0f);
    stored.scale = as_stored(stored.scale * ratio);
    stored.zero = as_stored(stored.zero * ratio);
}

// Codes to words in the order of `kvarn_core.layout.code_index`. A thread has whole words: column
// blocks of two adjacent rows, and where columns are too few to fill one, of rows 16 further.
template <class Half>
DEVICE void pack_codes(u8* part, const typename Tile<Half>::Elements& y, Range own) {
    using T = Tile<Half>;
    constexpr int PAIRS = T::LOW / 2;
    float zero[T::HELD], inverse[T::HELD];
    to_places(own.zero, zero);
    to_places(inverse_range<T::BITS>(own.scale), inverse);
    u32* const words = reinterpret_cast<u32*>(part + Half::CODES);
    const int lane = T::lane(), turn = T::turn();
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++) {
        const int row = T::row(2 * (pair ^ (turn >> 1 & (PAIRS - 1))));
        const int inside = (lane & 7) * 4 + ((row & 7) >> 1);
        const int place = inside * 4 + (lane >> 3 | (row >> 3 & 1) << 1);
#pragma unroll
        for (int m = 0; m < T::BLOCKS / T::FIELDS_M; m++) {
            u32 word = 0;
#pragma unroll
            for (int i = 0; i < 2 * T::FIELDS_K; i++) {
                const int a = (i / 2) * T::LOW + 2 * pair + i % 2;
                u32 fields = 0;
#pragma unroll
                for (int f = T::FIELDS_M - 1; f >= 0; f--) {
                    const float above = y[a][m * T::FIELDS_M + f] - zero[a];
                    fields = (fields << T::BITS) +
                             as_bits(code_and_magic<T::BITS>(above, inverse[a]));
                }
                fields &= (1u << T::FIELDS_M * T::BITS) - 1;  // MAGIC has zeros here
                const int at = a ^ turn;
                word |= fields << (16 * (at % 2) + 8 * (at / T::LOW));
            }
            const int chunk = m * (T::ROWS / 16 / T::FIELDS_K) + (row >> 4) / T::FIELDS_K;
            words[chunk * 128 + place] = word;
        }
    }
}

// Encodes the tile at the start of `shared` into the half at `part`, of 16-byte alignment. All
// threads of the CTA call it, after a barrier behind the last write of the tile.
template <class Half>
DEVICE void encode(u8* shared, u8* part) {
    using T = Tile<Half>;
    static_assert(sizeof(Scratch<Half>) <= SHARED_BYTES && Half::BYTES <= SHARED_BYTES &&
                  2 * G * D <= SHARED_BYTES, "SHARED_BYTES is too small");
    Scratch<Half>& s = *reinterpret_cast<Scratch<Half>*>(shared);
    typename T::Elements y;
    read_tile<Half>(reinterpret_cast<const u16*>(shared), y);
    __syncthreads();
    float factor = gauge(s, y, raised(s, normalise(s, y)));  // of the own column
    const float unrounded = factor;
    factor = stored_factor(factor);
    leave_value(s, 0, 1.0f / (RELATIVE ? factor : unrounded));
    leave_value(s, 1, factor);
    __syncthreads();
    {
        float inverse[T::BLOCKS];
        take_values(s, 0, inverse);
#pragma unroll
        for (int a = 0; a < T::HELD; a++)
#pragma unroll
            for (int b = 0; b < T::BLOCKS; b++) y[a][b] *= inverse[b];
    }
    Range own, stored;
#pragma unroll 1
    for (int i = 0;; i++) {
        own = choose_range<Half>(y, stored);
        if (i == FACTOR_REFITS) break;
        refit_factor(s, y, own, factor);
    }
    if (RESTORE_NORM && Half::IS_VALUE && T::BITS == 2) restore_norm(s, y, own, stored);
    __syncthreads();
    pack_codes<Half>(shared, y, own);
    if (T::lane() % (LANES / T::HELD) == 0) {
        const int row = T::own_row(), at = Half::IS_VALUE ? m_order(row) : k_order(row);
        reinterpret_cast<u16*>(shared + Half::SCALE)[at] = float_to_half(stored.scale);
        reinterpret_cast<u16*>(shared + Half::ZERO)[at] = float_to_half(stored.zero);
    }
    if (threadIdx.x % T::PARTS == 0)
        reinterpret_cast<u16*>(shared + Half::FACTOR)[m_order(T::own_column())] =
            float_to_half(factor);
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < Half::BYTES / 16; i += THREADS)
        reinterpret_cast<uint4*>(part)[i] = reinterpret_cast<const uint4*>(shared)[i];
}

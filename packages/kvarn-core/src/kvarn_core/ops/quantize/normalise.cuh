// Column factors of a tile: variance normalisation from moments alone, and the gauge.
//
// The tile is read only; factors change. A pass over rows needs sum and sum of squares under the
// column factors (three instructions per element), a pass over columns the squares under the row
// factors (two). A pass also yields the spread of the factors before it, so the best of all passes
// is known without measuring again. Rows stay within 16 lanes; columns cost two barriers.
//
// Defines: RELATIVE, ITERATIONS of the recipe.
#pragma once
#include "tile.cuh"

enum Stat { COLS_MIN, COLS_MAX, ROWS_MIN, ROWS_MAX };  // rows alternate between two pairs

constexpr float FACTOR_RANGE = 4.0f;  // as in the reference

DEVICE float bounded(float x, float least, float most) { return fminf(fmaxf(x, least), most); }
DEVICE int floor_log2(float x) { return int(as_bits(x) >> 23 & 255) - 127; }  // of normal x > 0
DEVICE float power_of_two(int e) { return as_float(u32(e + 127) << 23); }

template <class Half>
DEVICE void row_moments(const typename Tile<Half>::Elements& x,
                        const float (&factor)[Tile<Half>::BLOCKS], float& sum, float& squares) {
    using T = Tile<Half>;
    float s1[T::HELD], s2[T::HELD];
#pragma unroll
    for (int a = 0; a < T::HELD; a++) {
        s1[a] = s2[a] = 0;
#pragma unroll
        for (int b = 0; b < T::BLOCKS; b++) {
            const float y = x[a][b] * factor[b];
            s1[a] += y;
            s2[a] = fmaf(y, y, s2[a]);
        }
    }
    sum = over_row<Add>(s1);
    squares = over_row<Add>(s2);
}

template <class Half>
DEVICE void leave_column_moments(Scratch<Half>& s, const typename Tile<Half>::Elements& x,
                                 const float (&factor)[Tile<Half>::HELD]) {
    using T = Tile<Half>;
    float s1[T::BLOCKS], s2[T::BLOCKS];
#pragma unroll
    for (int b = 0; b < T::BLOCKS; b++) {
        s1[b] = s2[b] = 0;
#pragma unroll
        for (int a = 0; a < T::HELD; a++) {
            const float y = x[a][b] * factor[a];
            if (!RELATIVE) s1[b] += y;
            s2[b] = fmaf(y, y, s2[b]);
        }
    }
    leave_sums(s, 0, s2);
    if (!RELATIVE) leave_sums(s, 1, s1);
}

// Sample variance; loses digits where a mean exceeds many deviations.
DEVICE float variance(float sum, float squares, int count) {
    return fmaxf(fmaf(-sum / float(count), sum, squares), 0.0f) / float(count - 1);
}

// Greatest over least, of measures under their own factors.
DEVICE float spread(float least, float most) {
    return RELATIVE ? sqrtf(most / least) : most / fmaxf(least, 1e-8f);
}

// Sum over the CTA, through a place in `stats` that nobody else uses at the time.
template <class Half>
DEVICE float sum_of_cta(Scratch<Half>& s, int which, float x) {
#pragma unroll
    for (int bit = 16; bit >= 1; bit /= 2) x += __shfl_xor_sync(ALL_LANES, x, bit);
    if (threadIdx.x % 32 == 0) s.stats[which][threadIdx.x / 32] = x;
    __syncthreads();
    x = s.stats[which][threadIdx.x % WARPS];
#pragma unroll
    for (int bit = WARPS / 2; bit >= 1; bit /= 2) x += __shfl_xor_sync(ALL_LANES, x, bit);
    return x;
}

// Power of two nearest to the RMS of the tile, as an exponent; 0 for a zero tile.
template <class Half>
DEVICE int rms_exponent(Scratch<Half>& s, const typename Tile<Half>::Elements& x) {
    using T = Tile<Half>;
    float total = 0;
#pragma unroll
    for (int a = 0; a < T::HELD; a++) {
        float squares = 0;
#pragma unroll
        for (int b = 0; b < T::BLOCKS; b++) squares = fmaf(x[a][b], x[a][b], squares);
        total += squares;
    }
    const float mean = sum_of_cta(s, COLS_MIN, total) / float(T::ROWS * T::COLS);
    return mean > 0 ? (floor_log2(mean) + 1) >> 1 : 0;
}

DEVICE float published_step(float log_factor, float deviation) {
    return bounded(log_factor + logf(bounded(deviation, 1e-3f, 1e3f)), -0.3f, 10.0f);
}

// Inverse of the own column's factor, before the gauge. Recipe `kvarn` (RELATIVE) measures columns
// by their mean square and rows by their variance with a floor, both in squares, so that one
// reciprocal root gives a factor; recipe `paper` keeps logarithms.
template <class Half>
DEVICE float normalise(Scratch<Half>& s, const typename Tile<Half>::Elements& x) {
    using T = Tile<Half>;
    const int exponent = RELATIVE ? rms_exponent(s, x) : 0;
    const float unit = power_of_two(-exponent);
    float column = 1, row = 1, log_column = 0, log_row = 0;  // own inverse factors
    float best = __int_as_float(0x7f800000), best_column = 1;
    leave_value(s, 0, column * unit);
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i <= ITERATIONS; i++) {
        const int rows_min = ROWS_MIN + 2 * (i & 1);
        float measure, sum, squares;  // of the own row, then of the own column
        {
            float factor[T::BLOCKS];
            take_values(s, 0, factor);
            row_moments<Half>(x, factor, sum, squares);
        }
        measure = variance(sum, squares, T::COLS);
        if (RELATIVE) {
            measure = fmaxf(measure, squares / float(64 * T::COLS));
            if (i) row = bounded(rsqrt_approx(measure), 0x1p-10f, 0x1p10f);
            measure = bounded(measure * row * row, 0x1p-20f, 0x1p20f);
        } else {
            measure = sqrtf(measure);
            if (i) log_row = published_step(log_row, measure * row);
            row = expf(-log_row);
            measure *= row;
        }
        leave_least(s, rows_min, measure);
        leave_greatest(s, rows_min + 1, measure);
        {
            float factor[T::HELD];
            to_places(row * unit, factor);
            leave_column_moments(s, x, factor);
        }
        __syncthreads();
        squares = own_sum(s, 0);
        measure = RELATIVE ? squares / float(T::ROWS)
                           : sqrtf(variance(own_sum(s, 1), squares, T::ROWS)) * column;
        const float balanced =
            RELATIVE ? bounded(measure * column * column, 0x1p-20f, 0x1p20f) : measure;
        leave_least(s, COLS_MIN, balanced);
        leave_greatest(s, COLS_MAX, balanced);
        const float previous = column;
        if (RELATIVE) {
            column = bounded(rsqrt_approx(measure), 0x1p-10f, 0x1p10f);
        } else {
            log_column = published_step(log_column, measure);
            column = expf(-log_column);
        }
        leave_value(s, 0, column * unit);
        __syncthreads();
        const float imbalance = spread(least(s, COLS_MIN), greatest(s, COLS_MAX)) +
                                spread(least(s, rows_min), greatest(s, rows_min + 1));
        if (imbalance <= best) best = imbalance, best_column = previous;
    }
    return best_column * unit;
}

// No factor of values far below the RMS of all: `raise_factors` of the reference.
template <class Half>
DEVICE float raised(Scratch<Half>& s, float inverse) {
    if (!RELATIVE || !Half::IS_VALUE) return inverse;
    constexpr int UNREAD = ROWS_MIN + 2 * ((ITERATIONS + 1) & 1);  // by the last pass
    const float own = 1.0f / inverse;
    const float mean_square = sum_of_cta(s, UNREAD, own * own) / float(THREADS);
    return fminf(inverse, FACTOR_RANGE * rsqrt_approx(mean_square));
}

// Shifts a power of two from factors to rows so that all stored numbers fit fp16; returns the own
// column's factor. A zero tile has factors 1.
template <class Half>
DEVICE float gauge(Scratch<Half>& s, const typename Tile<Half>::Elements& x, float inverse) {
    using T = Tile<Half>;
    constexpr int TARGET = T::BITS == 4 ? 3 : 1;
    float factor[T::BLOCKS], peak = 0;
    leave_value(s, 0, inverse);
    __syncthreads();
    take_values(s, 0, factor);
#pragma unroll
    for (int a = 0; a < T::HELD; a++)
#pragma unroll
        for (int b = 0; b < T::BLOCKS; b++) peak = fmaxf(peak, fabsf(x[a][b] * factor[b]));
    const float own = 1.0f / inverse;
    leave_greatest(s, ROWS_MAX, peak);
    leave_greatest(s, COLS_MAX, own);
    __syncthreads();
    peak = greatest(s, ROWS_MAX);
    const int column = floor_log2(greatest(s, COLS_MAX));
    const int shift = max(min(floor_log2(peak) - TARGET, 14 - column), -8 - column);
    return peak > 0 ? own * power_of_two(shift) : 1.0f;
}

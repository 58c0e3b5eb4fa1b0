// Who holds which element of a tile, and sums along both of its axes.
//
// A tile is T [ROWS, COLS], a scale and a zero per row, a factor per column: for K rows are channels
// and columns tokens, for V the reverse. So rows are the k index and columns the m index of the
// packed operand for both. A thread holds HELD rows x BLOCKS columns: the columns lane + 16 b of
// its 16 lanes, because one word of codes spans column blocks and a pair of rows.
//
// Which of its rows a thread holds at place a depends on its lane (a ^ turn): a sum over lanes is
// then an exchange of halves without a selection, and each lane ends with the row at its place 0.
// "Own" means that row, and for columns the one whose sum a thread finishes.
#pragma once
#include "device.cuh"
#include "layout.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int LANES = 16;              // that share rows
constexpr int TEAMS = THREADS / LANES;  // groups of such lanes, each with rows of its own

DEVICE int k_order(int d) {
    return (d >> 5) * 32 + ((d >> 1) & 3) * 8 + ((d >> 4) & 1) * 4 + ((d >> 3) & 1) * 2 + (d & 1);
}
DEVICE int m_order(int i) {
    return (i >> 6) * 64 + (i & 7) * 8 + ((i >> 4) & 3) * 2 + ((i >> 3) & 1);
}

struct Key {
    static constexpr bool IS_VALUE = false;
    static constexpr int ROWS = D, COLS = G, BITS = K_BITS, BYTES = KEY_BYTES;
    static constexpr int CODES = K_CODES, SCALE = K_SCALE, ZERO = K_ZERO, FACTOR = K_TOKEN_SCALE;
};
struct Value {
    static constexpr bool IS_VALUE = true;
    static constexpr int ROWS = G, COLS = D, BITS = V_BITS, BYTES = VALUE_BYTES;
    static constexpr int CODES = V_CODES - KEY_BYTES, SCALE = V_SCALE - KEY_BYTES;
    static constexpr int ZERO = V_ZERO - KEY_BYTES, FACTOR = V_CHANNEL_SCALE - KEY_BYTES;
};

template <class Half>
struct Tile {
    static constexpr int ROWS = Half::ROWS, COLS = Half::COLS, BITS = Half::BITS;
    static constexpr int HELD = ROWS / TEAMS;
    static constexpr int BLOCKS = COLS / 16;
    static constexpr int FIELDS = 16 / BITS;  // of a half word: column blocks, then row blocks
    static constexpr int FIELDS_M = FIELDS < BLOCKS ? FIELDS : BLOCKS;
    static constexpr int FIELDS_K = FIELDS / FIELDS_M;
    static constexpr int LOW = HELD / FIELDS_K;  // adjacent rows; the others are 16 further
    static constexpr int PARTS = THREADS / COLS;  // threads that finish one column
    static_assert(HELD >= 2 * FIELDS_K && HELD <= 8 && BLOCKS % 4 == 0 && PARTS >= 1, "");

    using Elements = float[HELD][BLOCKS];

    static DEVICE int lane() { return threadIdx.x % LANES; }
    static DEVICE int team() { return threadIdx.x / LANES; }
    static DEVICE int turn() { return lane() / (LANES / HELD); }
    static DEVICE int row(int a) {  // of place a before it is turned
        const int adjacent = team() * LOW + a % LOW;
        return FIELDS_K == 1 ? adjacent
                             : (adjacent & 15) | (a / LOW) << 4 | (adjacent >> 4) << 5;
    }
    static DEVICE int own_row() { return row(turn()); }
    static DEVICE int own_column() { return threadIdx.x / PARTS; }
};

// Shared memory of the encoder; the tile lies there before, the packed half after.
template <class Half>
struct Scratch {
    using T = Tile<Half>;
    float sums[2][TEAMS][T::COLS + 16];       // of columns, by team
    float values[2][LANES][T::BLOCKS + 4];    // of columns: factors, weights
    float stats[6][WARPS];                    // extremes, by warp
};

struct Add {
    static DEVICE float of(float a, float b) { return a + b; }
};
struct Lesser {
    static DEVICE float of(float a, float b) { return fminf(a, b); }
};
struct Greater {
    static DEVICE float of(float a, float b) { return fmaxf(a, b); }
};

// Of values at the places of a thread: the own row's over all lanes. Destroys them.
template <class Op, int HELD>
DEVICE float over_row(float (&v)[HELD]) {
    int bit = LANES / 2;
#pragma unroll
    for (int n = HELD / 2; n >= 1; n /= 2, bit /= 2) {
#pragma unroll
        for (int i = 0; i < n; i++)
            v[i] = Op::of(v[i], __shfl_xor_sync(ALL_LANES, v[i + n], bit));
    }
#pragma unroll
    for (; bit >= 1; bit /= 2) v[0] = Op::of(v[0], __shfl_xor_sync(ALL_LANES, v[0], bit));
    return v[0];
}

// The reverse: what belongs to an own row, to every place that holds it.
template <int HELD>
DEVICE void to_places(float own, float (&v)[HELD]) {
    v[0] = own;
#pragma unroll
    for (int n = 1; n < HELD; n *= 2) {
#pragma unroll
        for (int i = 0; i < n; i++)
            v[n + i] = __shfl_xor_sync(ALL_LANES, v[i], n * (LANES / HELD));
    }
}

// Sums of columns: teams leave theirs, and after a barrier one thread in PARTS finishes each.
template <class Half>
DEVICE void leave_sums(Scratch<Half>& s, int which, const float (&v)[Tile<Half>::BLOCKS]) {
    using T = Tile<Half>;
#pragma unroll
    for (int b = 0; b < T::BLOCKS; b++) s.sums[which][T::team()][T::lane() + 16 * b] = v[b];
}
template <class Half>
DEVICE float own_sum(const Scratch<Half>& s, int which) {
    using T = Tile<Half>;
    const int part = threadIdx.x % T::PARTS;
    float total = 0;
#pragma unroll
    for (int i = 0; i < TEAMS / T::PARTS; i++)
        total += s.sums[which][i * T::PARTS + part][T::own_column()];
#pragma unroll
    for (int bit = 1; bit < T::PARTS; bit *= 2) total += __shfl_xor_sync(ALL_LANES, total, bit);
    return total;
}

// What belongs to an own column: left, and after a barrier taken by those who hold the column.
template <class Half>
DEVICE void leave_value(Scratch<Half>& s, int which, float own) {
    using T = Tile<Half>;
    if (threadIdx.x % T::PARTS == 0)
        s.values[which][T::own_column() % 16][T::own_column() / 16] = own;
}
template <class Half>
DEVICE void take_values(const Scratch<Half>& s, int which, float (&v)[Tile<Half>::BLOCKS]) {
    using T = Tile<Half>;
#pragma unroll
    for (int b = 0; b < T::BLOCKS; b += 4) {
        const float4 f = *reinterpret_cast<const float4*>(&s.values[which][T::lane()][b]);
        v[b] = f.x, v[b + 1] = f.y, v[b + 2] = f.z, v[b + 3] = f.w;
    }
}

// Extremes over the CTA of values that are not negative.
template <class Half>
DEVICE void leave_greatest(Scratch<Half>& s, int which, float x) {
    const float all = greatest_of_warp(x);
    if (threadIdx.x % 32 == 0) s.stats[which][threadIdx.x / 32] = all;
}
template <class Half>
DEVICE void leave_least(Scratch<Half>& s, int which, float x) {
    const float all = least_of_warp(x);
    if (threadIdx.x % 32 == 0) s.stats[which][threadIdx.x / 32] = all;
}
template <class Half>
DEVICE float greatest(const Scratch<Half>& s, int which) {
    return greatest_of_warp(s.stats[which][threadIdx.x % WARPS]);
}
template <class Half>
DEVICE float least(const Scratch<Half>& s, int which) {
    return least_of_warp(s.stats[which][threadIdx.x % WARPS]);
}

// The tile in shared memory: fp16 [G, D] by token, 16-byte pieces turned so that threads of a warp
// that read equal channels of different tokens meet different banks.
DEVICE int tile_place(int token, int channel) {
    const int piece = (channel >> 3) ^ (token & 7) ^ ((token >> 3 & 1) << 1);
    return token * D + piece * 8 + (channel & 7);
}
template <class Half>
DEVICE void read_tile(const u16* tile, typename Tile<Half>::Elements& x) {
    using T = Tile<Half>;
#pragma unroll
    for (int b = 0; b < T::BLOCKS; b++) {
        const int column = T::lane() + 16 * b;
        if (Half::IS_VALUE) {
#pragma unroll
            for (int a = 0; a < T::HELD; a++)
                x[a][b] = half_to_float(tile[tile_place(T::row(a ^ T::turn()), column)]);
        } else {
#pragma unroll
            for (int a = 0; a < T::HELD; a += 2) {
                const int channel = T::row((a ^ T::turn()) & ~1);
                u32 pair = *reinterpret_cast<const u32*>(&tile[tile_place(column, channel)]);
                if (T::turn() & 1) pair = pair >> 16 | pair << 16;
                x[a][b] = low_half(pair);
                x[a + 1][b] = high_half(pair);
            }
        }
    }
}

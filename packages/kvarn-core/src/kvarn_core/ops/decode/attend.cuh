// One warp, one unit: scores, probabilities and sums of a record or of exact rows.
//
// Codes go into the tensor cores as they are (codes.cuh): the scales of K are folded into the query,
// those of V into the probabilities, the zeros of V enter as the start of the accumulators. Two rolled
// loops over pairs of k-steps; the state of a warp stays in registers from unit to unit. With 16 heads
// the mma has two tiles of columns; codes are read and unpacked once for both.
#pragma once
#include "codes.cuh"
#include "device.cuh"
#include "layout.cuh"
#include "schedule.cuh"

constexpr int TILES = HEADS / 8;   // of heads: 8 are the N of the mma
constexpr int STEPS = D / 16;      // k-steps of the query
constexpr int QUERY_BYTES = STEPS * 256, STRIP_BYTES = G * 16;  // of a tile
constexpr int EXACT_BLOCKS = (ROWS_PER_PAGE + 15) / 16;
constexpr float LOWEST = -1e30f;
constexpr float HEADROOM = 8.0f;   // log2; probabilities stay below 2^8
static_assert(EXACT_BLOCKS <= G / 16 && RECORD_BYTES % 128 == 0);

DEVICE float minus_infinity() { return as_float(0xff800000u); }

// C fragments: lane (g, t) has channels or tokens g and g + 8 of heads 2t and 2t + 1 of each tile.
struct State {
    float out[D / 16][TILES][4];         // in units of unit_of<V_BITS>(block) per channel block
    float top[TILES][2], sum[TILES][2];  // log2 maximum (of all lanes), sum of probabilities (of this)
};

template <int BLOCKS> DEVICE void clear(float (&c)[BLOCKS][TILES][4]) {
#pragma unroll
    for (int i = 0; i < BLOCKS; i++)
#pragma unroll
        for (int j = 0; j < 4 * TILES; j++) c[i][j / 4][j % 4] = 0.0f;
}

DEVICE void clear(State& s) {
    clear(s.out);
#pragma unroll
    for (int e = 0; e < 2 * TILES; e++) {
        s.top[e / 2][e % 2] = LOWEST;
        s.sum[e / 2][e % 2] = 0.0f;
    }
}

// Over the eight lanes that hold the same heads.
DEVICE float max_of_rows(float x) {
#pragma unroll
    for (int bit = 4; bit < 32; bit *= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, bit));
    return x;
}
DEVICE float sum_of_rows(float x) {
#pragma unroll
    for (int bit = 4; bit < 32; bit *= 2) x += __shfl_xor_sync(ALL_LANES, x, bit);
    return x;
}

// Makes room for scores [16 BLOCKS tokens, 2 heads]: rescales only when a maximum grows by much.
template <int BLOCKS> DEVICE void raise_top(State& s, const float (&scores)[BLOCKS][TILES][4]) {
    float top[TILES][2];
    bool grown = false;
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            top[n][e] = s.top[n][e];
#pragma unroll
            for (int i = 0; i < BLOCKS; i++)
                top[n][e] = fmaxf(top[n][e], fmaxf(scores[i][n][e], scores[i][n][2 + e]));
            top[n][e] = max_of_rows(top[n][e]);
            grown |= top[n][e] > s.top[n][e] + HEADROOM;
        }
    if (!__any_sync(ALL_LANES, grown)) return;
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const float factor = exp2_approx(s.top[n][e] - top[n][e]);
            s.top[n][e] = top[n][e];
            s.sum[n][e] *= factor;
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                s.out[i][n][e] *= factor;
                s.out[i][n][2 + e] *= factor;
            }
        }
}

// --- where things are for a warp -------------------------------------------------------------------------

struct Slot {
    u32 data, query, strip;  // record or rows; query and probabilities in B-fragment order
    u32 key_ready, value_ready;
    u64 policy;
};

DEVICE void fetch_keys(const Slot& slot, const Unit& unit) {
    barrier_expect(slot.key_ready, KEY_BYTES);
    bulk_copy(slot.data, unit.source, KEY_BYTES, slot.key_ready, slot.policy);
}
DEVICE void fetch_values(const Slot& slot, const Unit& unit) {
    barrier_expect(slot.value_ready, VALUE_BYTES);
    bulk_copy(slot.data + V_CODES, unit.source + V_CODES, VALUE_BYTES, slot.value_ready, slot.policy);
}
DEVICE void fetch_rows(const Slot& slot, const Unit& unit) {
    barrier_expect(slot.key_ready, unit.count * ROW_BYTES);
    bulk_copy(slot.data, unit.source, unit.count * ROW_BYTES, slot.key_ready, slot.policy);
    barrier_expect(slot.value_ready, 0);  // both barriers count units
}

// --- a record ------------------------------------------------------------------------------------------

// Step pair of the query of a tile, as operand B.
DEVICE uint4 query_of(const Slot& slot, int tile, int pair) {
    return load_shared4(slot.query + tile * QUERY_BYTES + pair * 512 + threadIdx.x % 32 * 16);
}

// scores[G, heads] = t * (codes @ (q * a) + q @ zero); `hidden` leading tokens get minus infinity
DEVICE void score_record(const Slot& slot, int hidden, float (&scores)[G / 16][TILES][4]) {
    using Keys = Operand<G, D, K_BITS>;
    const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
    float zero[1][TILES][4], part[Keys::PARTS][Keys::FIELD_ROWS][TILES][4];
    clear(zero);
#pragma unroll
    for (int i = 0; i < Keys::PARTS; i++) clear(part[i]);
#pragma unroll 1
    for (int pair = 0; pair < STEPS / 2; pair++) {
        const uint4 a = load_shared4(slot.data + K_SCALE + pair * 64 + column * 16);
        const uint4 z = load_shared4(slot.data + K_ZERO + pair * 64 + column * 16);
        u32 scaled[TILES][2][2];
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            const uint4 q = query_of(slot, n, pair);
            scaled[n][0][0] = mul_half2(q.x, a.x), scaled[n][0][1] = mul_half2(q.y, a.y);
            scaled[n][1][0] = mul_half2(q.z, a.z), scaled[n][1][1] = mul_half2(q.w, a.w);
            mma(zero[0][n], z.x, z.x, z.y, z.y, q.x, q.y);  // rows of A alike: C holds the sum everywhere
            mma(zero[0][n], z.z, z.z, z.w, z.w, q.z, q.w);
        }
#pragma unroll
        for (int i = 0; i < Keys::PARTS; i++)
            multiply_codes<Keys, K_BITS>(part[i], slot.data + K_CODES + i * Keys::CHUNKS * 512, pair,
                                         scaled);
    }
#pragma unroll
    for (int j = 0; j < G / 64; j++) {
        const uint4 t = load_shared4(slot.data + K_TOKEN_SCALE + j * 128 + row * 16);
        const u32 pairs[4] = {t.x, t.y, t.z, t.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int block = 4 * j + i;
            const float unit = 1.0f / unit_of<K_BITS>(block);
            const float low = low_half(pairs[i]), high = high_half(pairs[i]);
#pragma unroll
            for (int n = 0; n < TILES; n++) {
                const float(&from)[4] = part[block / Keys::FIELD_ROWS][block % Keys::FIELD_ROWS][n];
                float(&to)[4] = scores[block][n];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    to[e] = fmaf(from[e], unit, zero[0][n][e]) * low;
                    to[2 + e] = fmaf(from[2 + e], unit, zero[0][n][e]) * high;
                    if (16 * block < SINK_ROWS) {
                        if (16 * block + row < hidden) to[e] = minus_infinity();
                        if (16 * block + 8 + row < hidden) to[2 + e] = minus_infinity();
                    }
                }
            }
        }
    }
}

// out[D, heads] += c * (codes @ (p * u) + p @ zero)
DEVICE void add_record(const Slot& slot, const float (&scores)[G / 16][TILES][4], State& s) {
    using Values = Operand<D, G, V_BITS>;
    const int lane = threadIdx.x % 32, row = lane / 4;
    float zero[TILES][2] = {};
#pragma unroll
    for (int j = 0; j < G / 64; j++) {
        const uint4 u = load_shared4(slot.data + V_SCALE + j * 128 + row * 16);
        const uint4 z = load_shared4(slot.data + V_ZERO + j * 128 + row * 16);
        const u32 us[4] = {u.x, u.y, u.z, u.w}, zs[4] = {z.x, z.y, z.z, z.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int block = 4 * j + i;
            const float z_low = low_half(zs[i]), z_high = high_half(zs[i]);
            const float u_low = low_half(us[i]), u_high = high_half(us[i]);
#pragma unroll
            for (int n = 0; n < TILES; n++) {
                float p[4];
#pragma unroll
                for (int e = 0; e < 4; e++) p[e] = exp2_approx(scores[block][n][e] - s.top[n][e % 2]);
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    s.sum[n][e] += p[e];
                    s.sum[n][e] += p[2 + e];
                    zero[n][e] = fmaf(p[e], z_low, zero[n][e]);
                    zero[n][e] = fmaf(p[2 + e], z_high, zero[n][e]);
                }
                const uint2 b = {transpose(pack_halves(p[0] * u_low, p[1] * u_low)),
                                 transpose(pack_halves(p[2] * u_high, p[3] * u_high))};
                const u32 strip = slot.strip + n * STRIP_BYTES;
                store_shared2(strip + block / 2 * 512 + lane * 16 + block % 2 * 8, b);
            }
        }
    }
#pragma unroll
    for (int e = 0; e < 2 * TILES; e++) zero[e / 2][e % 2] = sum_of_rows(zero[e / 2][e % 2]);
#pragma unroll
    for (int part = 0; part < Values::PARTS; part++) {
        float sums[Values::FIELD_ROWS][TILES][4];
#pragma unroll
        for (int i = 0; i < Values::FIELD_ROWS; i++)
#pragma unroll
            for (int j = 0; j < 4 * TILES; j++)
                sums[i][j / 4][j % 4] = zero[j / 4][j % 2] * unit_of<V_BITS>(i);
        const u32 codes = slot.data + V_CODES + part * Values::CHUNKS * 512;
#pragma unroll 1
        for (int pair = 0; pair < G / 32; pair++) {
            u32 b[TILES][2][2];
#pragma unroll
            for (int n = 0; n < TILES; n++) {  // what this lane itself has stored
                const uint4 p = load_shared4(slot.strip + n * STRIP_BYTES + pair * 512 + lane * 16);
                b[n][0][0] = p.x, b[n][0][1] = p.y;
                b[n][1][0] = p.z, b[n][1][1] = p.w;
            }
            multiply_codes<Values, V_BITS>(sums, codes, pair, b);
        }
#pragma unroll
        for (int j = 0; j < Values::FIELD_ROWS / 4; j++) {
            const int at = part * Values::FIELD_ROWS / 4 + j;
            const uint4 c = load_shared4(slot.data + V_CHANNEL_SCALE + at * 128 + row * 16);
            const u32 cs[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float low = low_half(cs[i]), high = high_half(cs[i]);
#pragma unroll
                for (int e = 0; e < 4 * TILES; e++) {
                    float& out = s.out[4 * at + i][e / 4][e % 4];
                    out = fmaf(e % 4 < 2 ? low : high, sums[4 * j + i][e / 4][e % 4], out);
                }
            }
        }
    }
}

// --- exact rows ----------------------------------------------------------------------------------------

// Address of the 16-byte piece of a row; rows behind the last one repeat it.
DEVICE u32 piece_address(const Slot& slot, const Unit& unit, int row, int piece) {
    row = min(row, unit.count - 1);
    return slot.data + row * ROW_BYTES + (piece ^ ((unit.first + row) & 7)) * 16;
}

DEVICE void score_rows(const Slot& slot, const Unit& unit, float (&scores)[EXACT_BLOCKS][TILES][4]) {
    const int lane = threadIdx.x % 32, row = lane % 16;
    clear(scores);
#pragma unroll 1
    for (int pair = 0; pair < STEPS / 2; pair++) {
        uint4 q[TILES];
#pragma unroll
        for (int n = 0; n < TILES; n++) q[n] = query_of(slot, n, pair);
#pragma unroll
        for (int i = 0; i < EXACT_BLOCKS; i++)
#pragma unroll
            for (int step = 0; step < 2; step++) {
                const int piece = 4 * pair + 2 * step + lane / 16;
                const uint4 a = load_matrix4(piece_address(slot, unit, 16 * i + row, piece));
#pragma unroll
                for (int n = 0; n < TILES; n++)
                    mma(scores[i][n], a.x, a.y, a.z, a.w, step ? q[n].z : q[n].x,
                        step ? q[n].w : q[n].y);
            }
    }
#pragma unroll
    for (int i = 0; i < EXACT_BLOCKS; i++)
#pragma unroll
        for (int j = 0; j < 4 * TILES; j++)
            if (16 * i + 8 * (j % 4 / 2) + lane / 4 >= unit.count)
                scores[i][j / 4][j % 4] = minus_infinity();
}

DEVICE void add_rows(const Slot& slot, const Unit& unit, const float (&scores)[EXACT_BLOCKS][TILES][4],
                     State& s) {
    const int lane = threadIdx.x % 32, row = lane % 8 + lane / 16 * 8, half = lane / 8 % 2;
    u32 p[EXACT_BLOCKS][TILES][2];
#pragma unroll
    for (int i = 0; i < EXACT_BLOCKS; i++)
#pragma unroll
        for (int j = 0; j < 2 * TILES; j++) {
            const int n = j / 2, r = j % 2;
            float x[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                x[e] = exp2_approx(scores[i][n][2 * r + e] - s.top[n][e]);
                s.sum[n][e] += x[e];
            }
            p[i][n][r] = transpose(pack_halves(x[0], x[1]));
        }
#pragma unroll
    for (int block = 0; block < D / 16; block++) {
        float sums[1][TILES][4];
        clear(sums);
#pragma unroll
        for (int i = 0; i < EXACT_BLOCKS; i++) {
            const u32 at = piece_address(slot, unit, 16 * i + row, 2 * block + half) + 2 * D;
            const uint4 a = load_matrix4_transposed(at);
#pragma unroll
            for (int n = 0; n < TILES; n++) mma(sums[0][n], a.x, a.y, a.z, a.w, p[i][n][0], p[i][n][1]);
        }
#pragma unroll
        for (int j = 0; j < 4 * TILES; j++) {
            float& out = s.out[block][j / 4][j % 4];
            out = fmaf(sums[0][j / 4][j % 4], unit_of<V_BITS>(block), out);
        }
    }
}

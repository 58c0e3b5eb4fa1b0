// One warp, one unit: scores, probabilities and sums of a record or of exact rows.
//
// Codes go into the tensor cores as they are (codes.cuh): the scales of K are folded into the query,
// those of V into the probabilities, the zeros of V enter as the start of the accumulators. Two rolled
// loops over pairs of k-steps; the state of a warp stays in registers from unit to unit.
#pragma once
#include "codes.cuh"
#include "device.cuh"
#include "layout.cuh"
#include "schedule.cuh"

constexpr int STEPS = D / 16;      // k-steps of the query
constexpr int EXACT_BLOCKS = (ROWS_PER_PAGE + 15) / 16;
constexpr float LOWEST = -1e30f;
constexpr float HEADROOM = 8.0f;   // log2; probabilities stay below 2^8
static_assert(EXACT_BLOCKS <= G / 16 && RECORD_BYTES % 128 == 0);

DEVICE float minus_infinity() { return as_float(0xff800000u); }

// C fragments: lane (g, t) has channels or tokens g and g + 8 of heads 2t and 2t + 1.
struct State {
    float out[D / 16][4];  // in units of unit_of<V_BITS>(block) per channel block
    float top[2], sum[2];  // log2 maximum (of all lanes), sum of probabilities (of this lane)
};

DEVICE void clear(State& s) {
#pragma unroll
    for (int i = 0; i < D / 16; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) s.out[i][j] = 0.0f;
#pragma unroll
    for (int e = 0; e < 2; e++) {
        s.top[e] = LOWEST;
        s.sum[e] = 0.0f;
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
template <int BLOCKS> DEVICE void raise_top(State& s, const float (&scores)[BLOCKS][4]) {
    float top[2] = {s.top[0], s.top[1]};
#pragma unroll
    for (int i = 0; i < BLOCKS; i++)
#pragma unroll
        for (int e = 0; e < 2; e++) top[e] = fmaxf(top[e], fmaxf(scores[i][e], scores[i][2 + e]));
    top[0] = max_of_rows(top[0]);
    top[1] = max_of_rows(top[1]);
    const bool grown = (top[0] > s.top[0] + HEADROOM) | (top[1] > s.top[1] + HEADROOM);
    if (!__any_sync(ALL_LANES, grown)) return;
    const float factor[2] = {exp2_approx(s.top[0] - top[0]), exp2_approx(s.top[1] - top[1])};
#pragma unroll
    for (int e = 0; e < 2; e++) {
        s.top[e] = top[e];
        s.sum[e] *= factor[e];
    }
#pragma unroll
    for (int i = 0; i < D / 16; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) s.out[i][j] *= factor[j % 2];
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

// scores[G, heads] = t * (codes @ (q * a) + q @ zero); `hidden` leading tokens get minus infinity
DEVICE void score_record(const Slot& slot, int hidden, float (&scores)[G / 16][4]) {
    using Keys = Operand<G, D, K_BITS>;
    const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
    float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    float part[Keys::PARTS][Keys::FIELD_ROWS][4];
#pragma unroll
    for (int i = 0; i < G / 16; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) part[i / Keys::FIELD_ROWS][i % Keys::FIELD_ROWS][j] = 0.0f;
#pragma unroll 1
    for (int pair = 0; pair < STEPS / 2; pair++) {
        const uint4 q = load_shared4(slot.query + pair * 512 + lane * 16);
        const uint4 a = load_shared4(slot.data + K_SCALE + pair * 64 + column * 16);
        const uint4 z = load_shared4(slot.data + K_ZERO + pair * 64 + column * 16);
        const u32 scaled[2][2] = {{mul_half2(q.x, a.x), mul_half2(q.y, a.y)},
                                  {mul_half2(q.z, a.z), mul_half2(q.w, a.w)}};
        mma(zero, z.x, z.x, z.y, z.y, q.x, q.y);  // every row of A alike: C holds the sum everywhere
        mma(zero, z.z, z.z, z.w, z.w, q.z, q.w);
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
            const float(&from)[4] = part[block / Keys::FIELD_ROWS][block % Keys::FIELD_ROWS];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                scores[block][e] = fmaf(from[e], unit, zero[e]) * low;
                scores[block][2 + e] = fmaf(from[2 + e], unit, zero[e]) * high;
                if (16 * block < SINK_ROWS) {
                    if (16 * block + row < hidden) scores[block][e] = minus_infinity();
                    if (16 * block + 8 + row < hidden) scores[block][2 + e] = minus_infinity();
                }
            }
        }
    }
}

// out[D, heads] += c * (codes @ (p * u) + p @ zero)
DEVICE void add_record(const Slot& slot, const float (&scores)[G / 16][4], State& s) {
    using Values = Operand<D, G, V_BITS>;
    const int lane = threadIdx.x % 32, row = lane / 4;
    float zero[2] = {0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < G / 64; j++) {
        const uint4 u = load_shared4(slot.data + V_SCALE + j * 128 + row * 16);
        const uint4 z = load_shared4(slot.data + V_ZERO + j * 128 + row * 16);
        const u32 us[4] = {u.x, u.y, u.z, u.w}, zs[4] = {z.x, z.y, z.z, z.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int block = 4 * j + i;
            float p[4];
#pragma unroll
            for (int e = 0; e < 4; e++) p[e] = exp2_approx(scores[block][e] - s.top[e % 2]);
            const float z_low = low_half(zs[i]), z_high = high_half(zs[i]);
            const float u_low = low_half(us[i]), u_high = high_half(us[i]);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                s.sum[e] += p[e];
                s.sum[e] += p[2 + e];
                zero[e] = fmaf(p[e], z_low, zero[e]);
                zero[e] = fmaf(p[2 + e], z_high, zero[e]);
            }
            const uint2 b = {transpose(pack_halves(p[0] * u_low, p[1] * u_low)),
                             transpose(pack_halves(p[2] * u_high, p[3] * u_high))};
            store_shared2(slot.strip + block / 2 * 512 + lane * 16 + block % 2 * 8, b);
        }
    }
    zero[0] = sum_of_rows(zero[0]);
    zero[1] = sum_of_rows(zero[1]);
#pragma unroll
    for (int part = 0; part < Values::PARTS; part++) {
        float sums[Values::FIELD_ROWS][4];
#pragma unroll
        for (int i = 0; i < Values::FIELD_ROWS; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) sums[i][j] = zero[j % 2] * unit_of<V_BITS>(i);
        const u32 codes = slot.data + V_CODES + part * Values::CHUNKS * 512;
#pragma unroll 1
        for (int pair = 0; pair < G / 32; pair++) {
            const uint4 p = load_shared4(slot.strip + pair * 512 + lane * 16);  // of this lane itself
            const u32 b[2][2] = {{p.x, p.y}, {p.z, p.w}};
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
                for (int e = 0; e < 4; e++) {
                    float& out = s.out[4 * at + i][e];
                    out = fmaf(e < 2 ? low : high, sums[4 * j + i][e], out);
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

DEVICE void score_rows(const Slot& slot, const Unit& unit, float (&scores)[EXACT_BLOCKS][4]) {
    const int lane = threadIdx.x % 32, row = lane % 16;
#pragma unroll
    for (int i = 0; i < EXACT_BLOCKS; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) scores[i][j] = 0.0f;
#pragma unroll 1
    for (int pair = 0; pair < STEPS / 2; pair++) {
        const uint4 q = load_shared4(slot.query + pair * 512 + lane * 16);
#pragma unroll
        for (int i = 0; i < EXACT_BLOCKS; i++)
#pragma unroll
            for (int step = 0; step < 2; step++) {
                const int piece = 4 * pair + 2 * step + lane / 16;
                const uint4 a = load_matrix4(piece_address(slot, unit, 16 * i + row, piece));
                mma(scores[i], a.x, a.y, a.z, a.w, step ? q.z : q.x, step ? q.w : q.y);
            }
    }
#pragma unroll
    for (int i = 0; i < EXACT_BLOCKS; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (16 * i + 8 * (j / 2) + lane / 4 >= unit.count) scores[i][j] = minus_infinity();
}

DEVICE void add_rows(const Slot& slot, const Unit& unit, const float (&scores)[EXACT_BLOCKS][4],
                     State& s) {
    const int lane = threadIdx.x % 32, row = lane % 8 + lane / 16 * 8, half = lane / 8 % 2;
    u32 p[EXACT_BLOCKS][2];
#pragma unroll
    for (int i = 0; i < EXACT_BLOCKS; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float x[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                x[e] = exp2_approx(scores[i][2 * r + e] - s.top[e]);
                s.sum[e] += x[e];
            }
            p[i][r] = transpose(pack_halves(x[0], x[1]));
        }
#pragma unroll
    for (int block = 0; block < D / 16; block++) {
        float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < EXACT_BLOCKS; i++) {
            const u32 at = piece_address(slot, unit, 16 * i + row, 2 * block + half) + 2 * D;
            const uint4 a = load_matrix4_transposed(at);
            mma(sums, a.x, a.y, a.z, a.w, p[i][0], p[i][1]);
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
            s.out[block][j] = fmaf(sums[j], unit_of<V_BITS>(block), s.out[block][j]);
    }
}

// Decode attention for Hopper: one warp owns one unit, and memory is the only limit.
//
// A warp multiplies a record with all heads of a head block alone: no barrier and no traffic between
// warps inside the loop. It has one slot of shared memory; the K part of its next unit is fetched as
// soon as the scores are in registers, the V part after the second product, so some 70 % of all slots
// are in flight. Codes go into the tensor cores as they are (codes.cuh); scales are folded into the
// query (K) and the probabilities (V). Shares of work: schedule.cuh. The warps of a CTA merge at the
// end of a (request, head block); the CTA that comes last adds the partials of all, in their order,
// so results do not depend on which one that is.
//
// Bytes per unit: RECORD_BYTES. Traded away: batch invariance, because the cuts follow the batch;
// and more than 8 heads of a KV head read its records again.
#include "codes.cuh"
#include "device.cuh"
#include "layout.cuh"
#include "schedule.cuh"

// Defined by the launcher: WARPS and CTAS of a processor; QUERY 0 fp16, 1 bf16, 2 fp32.
constexpr int STEPS = D / 16;                       // k-steps of the query
constexpr int PAIRS = D / 64;                       // channel pairs of a lane: 2 lane + 64 i
constexpr int EXACT_BLOCKS = (ROWS_PER_PAGE + 15) / 16;
constexpr int HEAD_STRIDE = D + 4;                  // floats; four heads meet no bank twice
constexpr int REGION_BYTES = HEADS * HEAD_STRIDE * 4;  // of a warp: probabilities, then outputs
constexpr int PARTIAL = HEADS * D + 2 * HEADS;      // floats: outputs, maxima, sums
constexpr float LOWEST = -1e30f;
constexpr float HEADROOM = 8.0f;                    // log2; probabilities stay below 2^8

constexpr int QUERY_AT = WARPS * RECORD_BYTES;
constexpr int REGIONS_AT = QUERY_AT + STEPS * 256;
constexpr int STATES_AT = REGIONS_AT + WARPS * REGION_BYTES;
constexpr int FLAG_AT = STATES_AT + WARPS * HEADS * 8;
constexpr int BARRIERS_AT = FLAG_AT + 16;
constexpr int SHARED_BYTES = BARRIERS_AT + WARPS * 16;
static_assert(SHARED_BYTES == EXPECTED_SHARED_BYTES, "the launcher asks for another size");
static_assert(G * 16 <= REGION_BYTES, "the probabilities of a unit fit the region of a warp");
static_assert(EXACT_BLOCKS <= G / 16 && RECORD_BYTES % 128 == 0);

#if QUERY == 2
using Element = float;
#else
using Element = u16;
#endif

// --- rows of D channels in a warp: lane holds channels 2 lane + 64 i and the next ----------------------

struct Channels {
    float x[PAIRS][2];
};

// Multiplies by the normalised Hadamard matrix: the butterflies of rotation.py, width by width.
DEVICE void rotate(Channels& c) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const float a = c.x[i][0], b = c.x[i][1];
        c.x[i][0] = a + b;
        c.x[i][1] = a - b;
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2)
#pragma unroll
        for (int i = 0; i < 2 * PAIRS; i++) {
            float& mine = c.x[i / 2][i % 2];
            const float other = __shfl_xor_sync(ALL_LANES, mine, distance);
            mine = lane & distance ? other - mine : mine + other;
        }
#pragma unroll
    for (int width = 1; width < PAIRS; width *= 2)
#pragma unroll
        for (int i = 0; i < PAIRS; i++)
            if (!(i & width))
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const float a = c.x[i][e], b = c.x[i | width][e];
                    c.x[i][e] = a + b;
                    c.x[i | width][e] = a - b;
                }
    constexpr float NORM = D == 64 ? 0.125f : D == 128 ? 0.08838834764831845f : 0.0625f;
#pragma unroll
    for (int i = 0; i < 2 * PAIRS; i++) c.x[i / 2][i % 2] *= NORM;
}

DEVICE Channels load_channels(const Element* row) {
    Channels c;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int at = threadIdx.x % 32 * 2 + 64 * i;
#if QUERY == 2
        c.x[i][0] = row[at];
        c.x[i][1] = row[at + 1];
#else
        const u32 pair = *reinterpret_cast<const u32*>(row + at);
#if QUERY == 1
        c.x[i][0] = bfloat_to_float(u16(pair & 0xffffu));
        c.x[i][1] = bfloat_to_float(u16(pair >> 16));
#else
        c.x[i][0] = low_half(pair);
        c.x[i][1] = high_half(pair);
#endif
#endif
    }
    return c;
}

DEVICE float minus_infinity() { return as_float(0xff800000u); }
DEVICE float saturate(float x) { return fminf(fmaxf(x, -65504.0f), 65504.0f); }

DEVICE void store_channels(Element* row, const Channels& c) {
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int at = threadIdx.x % 32 * 2 + 64 * i;
#if QUERY == 2
        row[at] = c.x[i][0];
        row[at + 1] = c.x[i][1];
#elif QUERY == 1
        *reinterpret_cast<u32*>(row + at) =
            u32(float_to_bfloat(c.x[i][0])) | u32(float_to_bfloat(c.x[i][1])) << 16;
#else
        *reinterpret_cast<u32*>(row + at) = pack_halves(saturate(c.x[i][0]), saturate(c.x[i][1]));
#endif
    }
}

// --- the state of a warp -------------------------------------------------------------------------------

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
#pragma unroll 1
    for (int pair = 0; pair < STEPS / 2; pair++) {
        const uint4 q = load_shared4(slot.query + pair * 512 + lane * 16);
        const uint4 z = load_shared4(slot.data + K_ZERO + pair * 64 + column * 16);
        mma(zero, z.x, z.x, z.y, z.y, q.x, q.y);  // every row of A alike: C holds the sum everywhere
        mma(zero, z.z, z.z, z.w, z.w, q.z, q.w);
    }
    float part[Keys::PARTS][Keys::FIELD_ROWS][4];
#pragma unroll
    for (int i = 0; i < G / 16; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            part[i / Keys::FIELD_ROWS][i % Keys::FIELD_ROWS][j] = zero[j % 2] * unit_of<K_BITS>(i);
#pragma unroll 1
    for (int pair = 0; pair < STEPS / 2; pair++) {
        const uint4 q = load_shared4(slot.query + pair * 512 + lane * 16);
        const uint4 a = load_shared4(slot.data + K_SCALE + pair * 64 + column * 16);
        const u32 scaled[2][2] = {{mul_half2(q.x, a.x), mul_half2(q.y, a.y)},
                                  {mul_half2(q.z, a.z), mul_half2(q.w, a.w)}};
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
            const float low = low_half(pairs[i]) * unit, high = high_half(pairs[i]) * unit;
            const float(&from)[4] = part[block / Keys::FIELD_ROWS][block % Keys::FIELD_ROWS];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                scores[block][e] = from[e] * low;
                scores[block][2 + e] = from[2 + e] * high;
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

// --- from warps to CTAs to results ---------------------------------------------------------------------

struct Sum {  // of one head over several parts: outputs relative to 2^top, sum of probabilities
    Channels out;
    float top, sum;
};

DEVICE void leave_state(u32 region, u32 states, State& s) {
    const int lane = threadIdx.x % 32, row = lane / 4, head = lane % 4 * 2;
#pragma unroll
    for (int block = 0; block < D / 16; block++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int at = (head + j % 2) * HEAD_STRIDE + 16 * block + 8 * (j / 2) + row;
            store_shared(region + 4 * at, as_bits(s.out[block][j] * (1.0f / unit_of<V_BITS>(block))));
        }
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const float sum = sum_of_rows(s.sum[e]);
        if (row == 0) store_shared2(states + (head + e) * 8, {as_bits(s.top[e]), as_bits(sum)});
    }
}

DEVICE Sum merge_warps(u32 base, int head) {
    Sum all;
    all.top = LOWEST;
    all.sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * PAIRS; i++) all.out.x[i / 2][i % 2] = 0.0f;
    for (int w = 0; w < WARPS; w++)
        all.top = fmaxf(all.top, as_float(load_shared(base + STATES_AT + (w * HEADS + head) * 8)));
    for (int w = 0; w < WARPS; w++) {
        const uint2 state = load_shared2(base + STATES_AT + (w * HEADS + head) * 8);
        const float factor = exp2_approx(as_float(state.x) - all.top);
        all.sum = fmaf(factor, as_float(state.y), all.sum);
        const u32 from = base + REGIONS_AT + w * REGION_BYTES + head * HEAD_STRIDE * 4;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const uint2 x = load_shared2(from + (threadIdx.x % 32 * 2 + 64 * i) * 4);
            all.out.x[i][0] = fmaf(factor, as_float(x.x), all.out.x[i][0]);
            all.out.x[i][1] = fmaf(factor, as_float(x.y), all.out.x[i][1]);
        }
    }
    return all;
}

DEVICE void write_partial(float* partial, int head, const Sum& sum) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < PAIRS; i++)
        *reinterpret_cast<float2*>(partial + head * D + 2 * lane + 64 * i) =
            make_float2(sum.out.x[i][0], sum.out.x[i][1]);
    if (lane == 0) {
        partial[HEADS * D + head] = sum.top;
        partial[HEADS * D + HEADS + head] = sum.sum;
    }
}

// Partials of a head block that lies in CTAs first .. first + parts - 1, in this order. A CTA has two
// slots: one for a head block that it continues, one for a head block that it begins.
DEVICE const float* partial_of(const float* partials, int first, int part) {
    return partials + u64(2 * (first + part) + (part == 0)) * PARTIAL;
}

DEVICE Sum merge_partials(const float* partials, int first, int parts, int head) {
    const int lane = threadIdx.x % 32;
    Sum all;
    all.top = LOWEST;
    all.sum = 0.0f;
    for (int i = lane; i < parts; i += 32)
        all.top = fmaxf(all.top, partial_of(partials, first, i)[HEADS * D + head]);
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2)
        all.top = fmaxf(all.top, __shfl_xor_sync(ALL_LANES, all.top, bit));
#pragma unroll
    for (int i = 0; i < 2 * PAIRS; i++) all.out.x[i / 2][i % 2] = 0.0f;
    for (int start = 0; start < parts; start += 32) {
        const int mine = start + lane;
        float factor = 0.0f;
        if (mine < parts) {
            const float* state = partial_of(partials, first, mine) + HEADS * D + head;
            factor = exp2_approx(state[0] - all.top);
            all.sum = fmaf(factor, state[HEADS], all.sum);
        }
        const int count = min(32, parts - start);
#pragma unroll 4
        for (int i = 0; i < count; i++) {
            const float f = __shfl_sync(ALL_LANES, factor, i);
            const float* from = partial_of(partials, first, start + i) + head * D + 2 * lane;
#pragma unroll
            for (int j = 0; j < PAIRS; j++) {
                const float2 x = *reinterpret_cast<const float2*>(from + 64 * j);
                all.out.x[j][0] = fmaf(f, x.x, all.out.x[j][0]);
                all.out.x[j][1] = fmaf(f, x.y, all.out.x[j][1]);
            }
        }
    }
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) all.sum += __shfl_xor_sync(ALL_LANES, all.sum, bit);
    return all;
}

DEVICE void write_result(Element* out, float* lse, Sum& sum) {
#pragma unroll
    for (int i = 0; i < 2 * PAIRS; i++) sum.out.x[i / 2][i % 2] /= sum.sum;
    rotate(sum.out);
    store_channels(out, sum.out);
    if (threadIdx.x % 32 == 0) *lse = 0.6931471805599453f * (sum.top + log2_approx(sum.sum));
}

// --- the kernel ------------------------------------------------------------------------------------------

struct Heads {  // of a head block
    int first, count;
    DEVICE Heads(int block, int blocks, int ratio)
        : first(block / blocks * ratio + block % blocks * HEADS),
          count(min(HEADS, ratio - block % blocks * HEADS)) {}
};

// Query of a head block: rotated, times scale, in B-fragment order; heads that do not exist are zero.
DEVICE void load_query(u32 to, const Element* query, int count, float scale) {
    const int lane = threadIdx.x % 32;
    for (int head = threadIdx.x / 32; head < HEADS; head += WARPS) {
        Channels c;
#pragma unroll
        for (int i = 0; i < 2 * PAIRS; i++) c.x[i / 2][i % 2] = 0.0f;
        if (head < count) {
            c = load_channels(query + u64(head) * D);
            rotate(c);
        }
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const int channel = 2 * lane + 64 * i, step = channel / 16, k = channel % 16;
            const u32 at = step / 2 * 512 + (head * 4 + k % 8 / 2) * 16 + step % 2 * 8 + k / 8 * 4;
            store_shared(to + at, pack_halves(saturate(c.x[i][0] * scale), saturate(c.x[i][1] * scale)));
        }
    }
}

// Fixed grid. `counters` [requests * head blocks] are zero before and after a launch.
KERNEL void __launch_bounds__(WARPS * 32, CTAS)
decode_kernel(const Element* query, const u8* cache, const int* table, const int* lengths, Element* out,
              float* lse, float* partials, u32* counters, float scale, int table_stride,
              int query_stride, int out_stride, int requests, int kv_heads, int ratio, int least) {
    DYNAMIC_SHARED(shared);
    const u32 base = shared_address(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int blocks = (ratio + HEADS - 1) / HEADS, cta = int(blockIdx.x), ctas = int(gridDim.x);
    const u32 region = base + REGIONS_AT + warp * REGION_BYTES, ready = base + BARRIERS_AT + warp * 16;
    const Slot slot{base + warp * RECORD_BYTES, base + QUERY_AT, region, ready, ready + 8,
                    stream_policy()};
    if (lane == 0) {
        barrier_init(slot.key_ready, 1);
        barrier_init(slot.value_ready, 1);
        barrier_init_fence();
    }
    __syncwarp();

    const Batch batch{table, lengths, u64(table_stride), requests, kv_heads * blocks};
    Place segment;
    const Share share = take_share(batch, cta, ctas, least, segment);
    Place ahead = segment;  // of the unit that this warp fetches
    int fetched = share.begin + warp;
    Unit next{nullptr, 0, 0};
    if (fetched < share.end) {
        advance(batch, ahead, warp);
        next = locate(batch, cache, kv_heads, blocks, ahead);
        if (lane == 0) {
            if (next.count) {
                fetch_rows(slot, next);
            } else {
                fetch_keys(slot, next);
                fetch_values(slot, next);
            }
        }
    }
    u32 parity = 0;
    for (int at = share.begin; at < share.end;) {  // units of one head block at a time
        const int start = at - segment.index, stop = start + segment.row.units;
        const int end = min(share.end, stop);
        const Heads heads(segment.block, blocks, ratio);
        const u64 request = u64(segment.request);
        load_query(slot.query, query + request * query_stride + u64(heads.first) * D, heads.count, scale);
        __syncthreads();
        State state;
        clear(state);
        while (fetched < end) {
            const Unit unit = next;
            fetched += WARPS;
            const bool more = fetched < share.end;
            if (more) {
                advance(batch, ahead, WARPS);
                next = locate(batch, cache, kv_heads, blocks, ahead);
            }
            const bool early = more && !unit.count && !next.count;  // K part free before V part
            barrier_wait(slot.key_ready, parity);
            if (unit.count) {
                float scores[EXACT_BLOCKS][4];
                score_rows(slot, unit, scores);
                raise_top(state, scores);
                add_rows(slot, unit, scores, state);
            } else {
                float scores[G / 16][4];
                score_record(slot, unit.first, scores);
                __syncwarp();
                if (early && lane == 0) fetch_keys(slot, next);
                raise_top(state, scores);
                barrier_wait(slot.value_ready, parity);
                add_record(slot, scores, state);
            }
            __syncwarp();
            if (more && lane == 0) {
                if (next.count) {
                    fetch_rows(slot, next);
                } else {
                    if (!early) fetch_keys(slot, next);
                    fetch_values(slot, next);
                }
            }
            parity ^= 1;
        }
        leave_state(region, base + STATES_AT + warp * HEADS * 8, state);
        __syncthreads();

        Element* const result = out + request * out_stride + u64(heads.first) * D;
        float* const result_lse = lse + request * (u64(kv_heads) * ratio) + heads.first;
        const int first = start / share.size, parts = (stop - 1) / share.size - first + 1;
        for (int head = warp; head < heads.count; head += WARPS) {
            Sum sum = merge_warps(base, head);
            if (parts == 1)
                write_result(result + u64(head) * D, result_lse + head, sum);
            else
                write_partial(partials + u64(2 * cta + (cta == first)) * PARTIAL, head, sum);
        }
        if (parts > 1) {
            __syncthreads();
            if (threadIdx.x == 0) {
                u32* const counter = counters + request * batch.head_blocks + segment.block;
                const bool last = arrive_global(counter) == u32(parts - 1);
                if (last) *counter = 0;
                store_shared(base + FLAG_AT, last);
            }
            __syncthreads();
            if (load_shared(base + FLAG_AT))
                for (int head = warp; head < heads.count; head += WARPS) {
                    Sum sum = merge_partials(partials, first, parts, head);
                    write_result(result + u64(head) * D, result_lse + head, sum);
                }
        }
        at = end;
        if (at < share.end) {
            segment.index = segment.row.units - 1;
            advance(batch, segment, 1);
        }
        __syncthreads();  // regions, states and query are free
    }

    for (int request = cta; request < requests; request += ctas)  // padded rows
        if (lengths[request] <= 0) {
            const int heads = kv_heads * ratio;
            for (int head = warp; head < heads; head += WARPS) {
                Channels zero;
#pragma unroll
                for (int i = 0; i < 2 * PAIRS; i++) zero.x[i / 2][i % 2] = 0.0f;
                store_channels(out + u64(request) * out_stride + u64(head) * D, zero);
                if (lane == 0) lse[u64(request) * heads + head] = minus_infinity();
            }
        }
}

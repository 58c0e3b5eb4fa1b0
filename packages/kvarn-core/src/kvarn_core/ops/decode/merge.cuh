// From warps to CTAs to results: parts of a head block are added in a fixed order.
//
// Every part is (outputs, maximum, sum of probabilities) per head. Warps of a CTA meet in shared
// memory, CTAs in partials in global memory. There the last CTA waits for L2 as rarely as it can:
// each warp takes the same heads of all parts, and each lane keeps the next parts on their way.
#pragma once
#include "attend.cuh"
#include "channels.cuh"

constexpr int HEAD_STRIDE = D + 4;                     // floats; four heads meet no bank twice
constexpr int REGION_BYTES = HEADS * HEAD_STRIDE * 4;  // outputs of a warp
constexpr int STATE_BYTES = HEADS * 8;                 // maxima and sums of a warp
constexpr int PARTIAL = HEADS * D + 2 * HEADS;         // floats: outputs, (maximum, sum) of each head

struct Sum {  // of one head over several parts: outputs relative to 2^top, sum of probabilities
    Channels out;
    float top, sum;
};

DEVICE void clear(Sum& s) {
    clear(s.out);
    s.top = LOWEST;
    s.sum = 0.0f;
}

DEVICE void leave_state(u32 region, u32 states, State& s) {
    const int lane = threadIdx.x % 32, row = lane / 4;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        const int head = 8 * n + lane % 4 * 2;
#pragma unroll
        for (int block = 0; block < D / 16; block++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int at = (head + j % 2) * HEAD_STRIDE + 16 * block + 8 * (j / 2) + row;
                const float unit = 1.0f / unit_of<V_BITS>(block);
                store_shared(region + 4 * at, as_bits(s.out[block][n][j] * unit));
            }
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const float sum = sum_of_rows(s.sum[n][e]);
            if (row == 0) store_shared2(states + (head + e) * 8, {as_bits(s.top[n][e]), as_bits(sum)});
        }
    }
}

// Channels of a lane in the row at `from`, in pairs.
DEVICE Channels load_shared_channels(u32 from) {
    Channels c;
    from += threadIdx.x % 32 * CHANNELS * 4;
    if constexpr (CHANNELS == 2) {
        const uint2 v = load_shared2(from);
        c.x[0] = as_float(v.x), c.x[1] = as_float(v.y);
    } else {
#pragma unroll
        for (int i = 0; i < CHANNELS; i += 4) {
            const uint4 v = load_shared4(from + 4 * i);
            c.x[i] = as_float(v.x), c.x[i + 1] = as_float(v.y);
            c.x[i + 2] = as_float(v.z), c.x[i + 3] = as_float(v.w);
        }
    }
    return c;
}

DEVICE Sum merge_warps(u32 regions, u32 states, int head) {
    Sum all;
    clear(all);
    for (int w = 0; w < WARPS; w++)
        all.top = fmaxf(all.top, as_float(load_shared(states + w * STATE_BYTES + head * 8)));
    for (int w = 0; w < WARPS; w++) {
        const uint2 state = load_shared2(states + w * STATE_BYTES + head * 8);
        const float factor = exp2_approx(as_float(state.x) - all.top);
        all.sum = fmaf(factor, as_float(state.y), all.sum);
        const Channels c = load_shared_channels(regions + w * REGION_BYTES + head * HEAD_STRIDE * 4);
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) all.out.x[i] = fmaf(factor, c.x[i], all.out.x[i]);
    }
    return all;
}

DEVICE void write_partial(float* partial, int head, const Sum& sum) {
    const int lane = threadIdx.x % 32;
    float* to = partial + head * D + lane * CHANNELS;
    if constexpr (CHANNELS == 2) {
        *reinterpret_cast<float2*>(to) = make_float2(sum.out.x[0], sum.out.x[1]);
    } else {
#pragma unroll
        for (int i = 0; i < CHANNELS; i += 4)
            *reinterpret_cast<float4*>(to + i) = make_float4(
                sum.out.x[i], sum.out.x[i + 1], sum.out.x[i + 2], sum.out.x[i + 3]);
    }
    if (lane == 0)
        *reinterpret_cast<float2*>(partial + HEADS * D + 2 * head) = make_float2(sum.top, sum.sum);
}

DEVICE Channels load_partial(const float* from) {
    Channels c;
    if constexpr (CHANNELS == 2) {
        const uint2 v = load_global2(from);
        c.x[0] = as_float(v.x), c.x[1] = as_float(v.y);
    } else {
#pragma unroll
        for (int i = 0; i < CHANNELS; i += 4) {
            const uint4 v = load_global4(from + i);
            c.x[i] = as_float(v.x), c.x[i + 1] = as_float(v.y);
            c.x[i + 2] = as_float(v.z), c.x[i + 3] = as_float(v.w);
        }
    }
    return c;
}

// Heads that a warp has of a head block, and parts of them that are on their way from L2 at once:
// some 64 registers. A warp with one head keeps 16, all there are at 8 KV heads.
constexpr int HEADS_OF_WARP = (HEADS + WARPS - 1) / WARPS;
constexpr int FLOATS = HEADS_OF_WARP * CHANNELS;  // of a lane for one part
constexpr int AT_ONCE = FLOATS == CHANNELS && FLOATS <= 4 ? 16 : FLOATS <= 8 ? 8 : FLOATS <= 16 ? 4 : 2;
constexpr int WEIGHED = 2;  // parts that a lane weighs at a time
static_assert(32 * WEIGHED % AT_ONCE == 0, "parts in flight have a weight, if only zero");

DEVICE int head_of_warp(int i) { return int(threadIdx.x) / 32 + i * WARPS; }

// Sums of the heads of a warp over parts 0, 1, ... in this order: part 0 lies at `zeroth`, the others
// one after the other from `rest` on. Heads from `heads` on do not exist.
DEVICE void merge_partials(const float* zeroth, const float* rest, int parts, int heads,
                           Sum (&all)[HEADS_OF_WARP]) {
    const int lane = threadIdx.x % 32;
    int head[HEADS_OF_WARP];
#pragma unroll
    for (int h = 0; h < HEADS_OF_WARP; h++) {
        head[h] = min(head_of_warp(h), heads - 1);
        all[h].out = load_partial(zeroth + head[h] * D + lane * CHANNELS);
        const uint2 state = load_global2(zeroth + HEADS * D + 2 * head[h]);
        all[h].top = as_float(state.x);
        all[h].sum = lane ? 0.0f : as_float(state.y);
    }
    for (int left = parts - 1; left > 0; left -= 32 * WEIGHED, rest += 32 * WEIGHED * PARTIAL) {
        const int count = min(32 * WEIGHED, left);
        uint2 state[WEIGHED][HEADS_OF_WARP];
#pragma unroll
        for (int i = 0; i < WEIGHED; i++) {
            const float* from = rest + min(32 * i + lane, count - 1) * PARTIAL + HEADS * D;
#pragma unroll
            for (int h = 0; h < HEADS_OF_WARP; h++) state[i][h] = load_global2(from + 2 * head[h]);
        }
        const float* source[HEADS_OF_WARP];
        Channels x[AT_ONCE][HEADS_OF_WARP];  // on their way before states are looked at
#pragma unroll
        for (int h = 0; h < HEADS_OF_WARP; h++) source[h] = rest + head[h] * D + lane * CHANNELS;
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
#pragma unroll
            for (int h = 0; h < HEADS_OF_WARP; h++) {
                clear(x[k][h]);
                if (k < count) x[k][h] = load_partial(source[h] + k * PARTIAL);
            }
        float factor[WEIGHED][HEADS_OF_WARP];
#pragma unroll
        for (int h = 0; h < HEADS_OF_WARP; h++) {
            float highest = all[h].top;
#pragma unroll
            for (int i = 0; i < WEIGHED; i++) highest = fmaxf(highest, as_float(state[i][h].x));
#pragma unroll
            for (int bit = 1; bit < 32; bit *= 2)
                highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, bit));
            const float before = exp2_approx(all[h].top - highest);
            all[h].top = highest;
            all[h].sum *= before;
#pragma unroll
            for (int i = 0; i < CHANNELS; i++) all[h].out.x[i] *= before;
#pragma unroll
            for (int i = 0; i < WEIGHED; i++) {
                const bool there = 32 * i + lane < count;
                factor[i][h] = there ? exp2_approx(as_float(state[i][h].x) - highest) : 0.0f;
                all[h].sum = there ? fmaf(factor[i][h], as_float(state[i][h].y), all[h].sum) : all[h].sum;
            }
        }
#pragma unroll 1
        for (int at = 0; at < count; at += AT_ONCE) {
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++)
#pragma unroll
                for (int h = 0; h < HEADS_OF_WARP; h++) {
                    const float mine = at + k < 32 ? factor[0][h] : factor[1][h];
                    const float f = __shfl_sync(ALL_LANES, mine, (at + k) % 32);  // 0 behind the last
#pragma unroll
                    for (int i = 0; i < CHANNELS; i++)
                        all[h].out.x[i] = fmaf(f, x[k][h].x[i], all[h].out.x[i]);
                    if (at + k + AT_ONCE < count)
                        x[k][h] = load_partial(source[h] + (k + AT_ONCE) * PARTIAL);
                }
#pragma unroll
            for (int h = 0; h < HEADS_OF_WARP; h++) source[h] += AT_ONCE * PARTIAL;
        }
    }
#pragma unroll
    for (int h = 0; h < HEADS_OF_WARP; h++)
#pragma unroll
        for (int bit = 1; bit < 32; bit *= 2)
            all[h].sum += __shfl_xor_sync(ALL_LANES, all[h].sum, bit);
}

DEVICE void write_result(Element* out, float* lse, Sum& sum) {
    const float scale = 1.0f / sum.sum;
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) sum.out.x[i] *= scale;
    rotate(sum.out);
    store_channels(out, sum.out);
    if (threadIdx.x % 32 == 0) *lse = 0.6931471805599453f * (sum.top + log2_approx(sum.sum));
}

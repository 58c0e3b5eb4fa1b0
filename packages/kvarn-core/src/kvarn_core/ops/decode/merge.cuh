// From warps to CTAs to results: parts of a head block are added in a fixed order.
//
// Every part is (outputs, maximum, sum of probabilities) per head. Warps of a CTA meet in shared
// memory, CTAs in partials in global memory.
#pragma once
#include "attend.cuh"
#include "channels.cuh"

constexpr int HEAD_STRIDE = D + 4;                     // floats; four heads meet no bank twice
constexpr int REGION_BYTES = HEADS * HEAD_STRIDE * 4;  // outputs of a warp
constexpr int STATE_BYTES = HEADS * 8;                 // maxima and sums of a warp
constexpr int PARTIAL = HEADS * D + 2 * HEADS;         // floats: outputs, maxima, sums

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

DEVICE Sum merge_warps(u32 regions, u32 states, int head) {
    Sum all;
    all.top = LOWEST;
    all.sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * PAIRS; i++) all.out.x[i / 2][i % 2] = 0.0f;
    for (int w = 0; w < WARPS; w++)
        all.top = fmaxf(all.top, as_float(load_shared(states + w * STATE_BYTES + head * 8)));
    for (int w = 0; w < WARPS; w++) {
        const uint2 state = load_shared2(states + w * STATE_BYTES + head * 8);
        const float factor = exp2_approx(as_float(state.x) - all.top);
        all.sum = fmaf(factor, as_float(state.y), all.sum);
        const u32 from = regions + w * REGION_BYTES + head * HEAD_STRIDE * 4;
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

// Part `part` of a head block that begins in CTA `first`.
template <class T> DEVICE T* partial_of(T* partials, int first, int part) {
    return partials + u64(slot_of(first + part, first)) * PARTIAL;
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

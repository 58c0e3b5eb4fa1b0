// Rows of D channels in a warp: lane holds channels 2 lane + 64 i and the next, in fp32.
//
// QUERY is the element type in memory: 0 fp16, 1 bf16, 2 fp32.
#pragma once
#include "device.cuh"
#include "layout.cuh"

#if QUERY == 2
using Element = float;
#else
using Element = u16;
#endif

constexpr int PAIRS = D / 64;  // channel pairs of a lane: 2 lane + 64 i

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

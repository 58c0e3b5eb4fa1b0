// Rows of D channels in a warp: lane holds channels lane * CHANNELS, ... one after the other, in fp32.
//
// QUERY is the element type in memory: 0 fp16, 1 bf16, 2 fp32. Rows lie at multiples of 16 bytes.
#pragma once
#include "device.cuh"
#include "layout.cuh"

#if QUERY == 2
using Element = float;
#else
using Element = u16;
#endif

constexpr int CHANNELS = D / 32;                        // of a lane
constexpr int WORDS = CHANNELS * sizeof(Element) / 4;   // of a lane, in memory

struct Channels {
    float x[CHANNELS];
};

struct Words {  // channels as they are in memory: loaded early, looked at later
    u32 x[WORDS];
};

DEVICE void clear(Channels& c) {
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) c.x[i] = 0.0f;
}

// Multiplies by the normalised Hadamard matrix: the butterflies of rotation.py, width by width.
DEVICE void rotate(Channels& c) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int width = 1; width < CHANNELS; width *= 2)
#pragma unroll
        for (int i = 0; i < CHANNELS; i++)
            if (!(i & width)) {
                const float a = c.x[i], b = c.x[i | width];
                c.x[i] = a + b;
                c.x[i | width] = a - b;
            }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2)
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            const float mine = c.x[i], other = __shfl_xor_sync(ALL_LANES, mine, distance);
            c.x[i] = lane & distance ? other - mine : mine + other;
        }
    constexpr float NORM = D == 64 ? 0.125f : D == 128 ? 0.08838834764831845f : 0.0625f;
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) c.x[i] *= NORM;
}

DEVICE Words load_words(const Element* row) {
    Words w;
    const u32* from = reinterpret_cast<const u32*>(row) + threadIdx.x % 32 * WORDS;
    if constexpr (WORDS == 1) {
        w.x[0] = *from;
    } else if constexpr (WORDS == 2) {
        const uint2 v = *reinterpret_cast<const uint2*>(from);
        w.x[0] = v.x, w.x[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) {
            const uint4 v = *reinterpret_cast<const uint4*>(from + i);
            w.x[i] = v.x, w.x[i + 1] = v.y, w.x[i + 2] = v.z, w.x[i + 3] = v.w;
        }
    }
    return w;
}

DEVICE Channels channels_of(const Words& w) {
    Channels c;
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
#if QUERY == 2
        c.x[i] = as_float(w.x[i]);
#elif QUERY == 1
        c.x[2 * i] = bfloat_to_float(u16(w.x[i] & 0xffffu));
        c.x[2 * i + 1] = bfloat_to_float(u16(w.x[i] >> 16));
#else
        c.x[2 * i] = low_half(w.x[i]);
        c.x[2 * i + 1] = high_half(w.x[i]);
#endif
    }
    return c;
}

DEVICE void store_channels(Element* row, const Channels& c) {
    Words w;
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
#if QUERY == 2
        w.x[i] = as_bits(c.x[i]);
#elif QUERY == 1
        w.x[i] = u32(float_to_bfloat(c.x[2 * i])) | u32(float_to_bfloat(c.x[2 * i + 1])) << 16;
#else
        w.x[i] = pack_halves(c.x[2 * i], c.x[2 * i + 1]);
#endif
    }
    u32* to = reinterpret_cast<u32*>(row) + threadIdx.x % 32 * WORDS;
    if constexpr (WORDS == 1) {
        *to = w.x[0];
    } else if constexpr (WORDS == 2) {
        *reinterpret_cast<uint2*>(to) = make_uint2(w.x[0], w.x[1]);
    } else {
#pragma unroll
        for (int i = 0; i < WORDS; i += 4)
            *reinterpret_cast<uint4*>(to + i) =
                make_uint4(w.x[i], w.x[i + 1], w.x[i + 2], w.x[i + 3]);
    }
}

// Host twin of kvarn_core/cuda/device.cuh, and the part of CUDA C++ that kernels use.
#pragma once

#include "machine.hpp"

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr u32 ALL_LANES = 0xffffffffu;

// --- CUDA C++ --------------------------------------------------------------------------------------

#define KERNEL static
#define DEVICE inline
#define DYNAMIC_SHARED(name) u8* const name = emulator::machine.shared_data()
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("kvarn_shared")))
#define __align__(n) alignas(n)
#define threadIdx (emulator::machine.thread)
#define blockIdx (emulator::machine.block)
#define blockDim (emulator::machine.block_size)
#define gridDim (emulator::machine.grid_size)

struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct int2 { int x, y; };
DEVICE uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
DEVICE uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
DEVICE float2 make_float2(float x, float y) { return {x, y}; }
DEVICE float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
DEVICE int2 make_int2(int x, int y) { return {x, y}; }

using std::max;
using std::min;
DEVICE u32 __float_as_uint(float x) { u32 u; memcpy(&u, &x, 4); return u; }
DEVICE float __uint_as_float(u32 u) { float x; memcpy(&x, &u, 4); return x; }
DEVICE int __float_as_int(float x) { return int(__float_as_uint(x)); }
DEVICE float __int_as_float(int i) { return __uint_as_float(u32(i)); }
DEVICE float __fmul_rn(float a, float b) { return a * b; }
DEVICE float __fadd_rn(float a, float b) { return a + b; }
DEVICE float __fsub_rn(float a, float b) { return a - b; }
DEVICE float __fdiv_rn(float a, float b) { return a / b; }
DEVICE float __fsqrt_rn(float a) { return std::sqrt(a); }
DEVICE float __frcp_rn(float a) { return 1.0f / a; }
DEVICE float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
DEVICE int __float2int_rn(float x) { return int(std::nearbyint(x)); }
DEVICE int __popc(u32 x) { return __builtin_popcount(x); }
DEVICE int __clz(int x) { return x ? __builtin_clz(u32(x)) : 32; }
DEVICE int __ffs(int x) { return __builtin_ffs(x); }
template <class T> static inline T __ldg(const T* p) { return *p; }
DEVICE void __threadfence() {}
DEVICE void __threadfence_block() {}
template <class T> static inline T atomicAdd(T* p, T v) { T old = *p; *p = old + v; return old; }
template <class T> static inline T atomicMax(T* p, T v) { T old = *p; *p = std::max(old, v); return old; }
template <class T> static inline T atomicMin(T* p, T v) { T old = *p; *p = std::min(old, v); return old; }
template <class T> static inline T atomicOr(T* p, T v) { T old = *p; *p = old | v; return old; }

struct Nothing {};
DEVICE void __syncthreads() {
    emulator::machine.cta<Nothing>("__syncthreads", Nothing{}, [](auto, auto) {});
}
DEVICE int __syncthreads_or(int x) {
    const int n = int(emulator::machine.threads());
    return emulator::machine.cta<int>("__syncthreads_or", x, [n](const int* const* in, int* const* out) {
        int any = 0;
        for (int i = 0; i < n; i++) any |= *in[i] != 0;
        for (int i = 0; i < n; i++) *out[i] = any;
    });
}
DEVICE void __syncwarp(u32 mask = ALL_LANES) {
    if (mask != ALL_LANES) emulator::machine.fail("part of a warp meets");
    emulator::machine.warp<Nothing>("__syncwarp", Nothing{}, [](auto, auto) {});
}
template <class T, class From>
static inline T emulated_shuffle(const char* name, u32 mask, T x, From from) {
    if (mask != ALL_LANES) emulator::machine.fail("part of a warp meets");
    return emulator::machine.warp<T>(name, x, [from](const T* const* in, T* const* out) {
        for (int i = 0; i < 32; i++) {
            const int j = from(i);
            *out[i] = *in[j < 0 || j > 31 ? i : j];
        }
    });
}
template <class T> static inline T __shfl_xor_sync(u32 mask, T x, int bits) {
    return emulated_shuffle(__func__, mask, x, [bits](int i) { return i ^ bits; });
}
template <class T> static inline T __shfl_up_sync(u32 mask, T x, int n) {
    return emulated_shuffle(__func__, mask, x, [n](int i) { return i - n; });
}
template <class T> static inline T __shfl_down_sync(u32 mask, T x, int n) {
    return emulated_shuffle(__func__, mask, x, [n](int i) { return i + n; });
}
template <class T> static inline T __shfl_sync(u32 mask, T x, int lane) {
    // every lane names its own source
    struct In { T x; int lane; };
    if (mask != ALL_LANES) emulator::machine.fail("part of a warp meets");
    return emulator::machine.warp<T>("__shfl_sync", In{x, lane}, [](const In* const* in, T* const* out) {
        for (int i = 0; i < 32; i++) *out[i] = in[in[i]->lane & 31]->x;
    });
}
DEVICE u32 __ballot_sync(u32 mask, int x) {
    if (mask != ALL_LANES) emulator::machine.fail("part of a warp meets");
    return emulator::machine.warp<u32>("__ballot_sync", x, [](const int* const* in, u32* const* out) {
        u32 all = 0;
        for (int i = 0; i < 32; i++) all |= u32(*in[i] != 0) << i;
        for (int i = 0; i < 32; i++) *out[i] = all;
    });
}
template <class Add> static inline int emulated_reduction(const char* name, u32 mask, int x, Add add) {
    if (mask != ALL_LANES) emulator::machine.fail("part of a warp meets");
    return emulator::machine.warp<int>(name, x, [add](const int* const* in, int* const* out) {
        int all = *in[0];
        for (int i = 1; i < 32; i++) all = add(all, *in[i]);
        for (int i = 0; i < 32; i++) *out[i] = all;
    });
}
DEVICE int __reduce_add_sync(u32 mask, int x) {
    return emulated_reduction(__func__, mask, x, [](int a, int b) { return a + b; });
}
DEVICE int __reduce_max_sync(u32 mask, int x) {
    return emulated_reduction(__func__, mask, x, [](int a, int b) { return std::max(a, b); });
}
DEVICE int __any_sync(u32 mask, int x) { return __ballot_sync(mask, x) != 0; }
DEVICE int __all_sync(u32 mask, int x) { return __ballot_sync(mask, x) == ALL_LANES; }

// --- shared and global memory ----------------------------------------------------------------------

DEVICE u32 shared_address(const void* p) { return emulator::machine.address_of(p); }
template <class T> static inline T emulated_load(u32 a) {
    T v;
    memcpy(&v, emulator::machine.at(a, sizeof(T), true), sizeof(T));
    return v;
}
template <class T> static inline void emulated_store(u32 a, T v) {
    memcpy(emulator::machine.at(a, sizeof(T), true), &v, sizeof(T));
}
DEVICE u32 load_shared(u32 a) { return emulated_load<u32>(a); }
DEVICE uint2 load_shared2(u32 a) { return emulated_load<uint2>(a); }
DEVICE uint4 load_shared4(u32 a) { return emulated_load<uint4>(a); }
DEVICE void store_shared(u32 a, u32 v) { emulated_store(a, v); }
DEVICE void store_shared2(u32 a, uint2 v) { emulated_store(a, v); }
DEVICE void store_shared4(u32 a, uint4 v) { emulated_store(a, v); }
DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 as_bits(float x) { return __float_as_uint(x); }
DEVICE uint2 load_global2(const void* p) { uint2 v; memcpy(&v, p, sizeof v); return v; }
DEVICE uint4 load_global4(const void* p) { uint4 v; memcpy(&v, p, sizeof v); return v; }
DEVICE int late_block() { return int(blockIdx.x); }
DEVICE int late_grid() { return int(gridDim.x); }
DEVICE int late_lane() { return int(threadIdx.x) % 32; }
DEVICE u32 arrive_global(u32* p) { return (*p)++; }

// --- bulk copies and their barriers ----------------------------------------------------------------

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    emulator::machine.at(barrier, 8, true);
    emulator::machine.barriers[barrier] = {arrivals, arrivals};
}
DEVICE void barrier_init_fence() {}
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    emulator::Barrier& b = emulator::machine.barrier(barrier);
    if (b.pending == 0) emulator::machine.fail("more arrivals than the barrier expects");
    b.bytes += bytes;
    b.pending--;
    emulator::machine.complete(b);
}
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    for (int delay = int(emulator::machine.random() % 3); delay; delay--) emulator::machine.yield();
    emulator::machine.finish_copies(barrier);
    while ((emulator::machine.barrier(barrier).phase & 1) == parity) {
        emulator::machine.yield();
        emulator::machine.finish_copies(barrier);
    }
}
DEVICE u64 stream_policy() { return 0; }
DEVICE void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier, u64) {
    emulator::machine.start_copy(to, from, bytes, barrier);
}

// --- halves ----------------------------------------------------------------------------------------

struct EmulatedHalves {
    float value[65536];
    EmulatedHalves() {
        for (int i = 0; i < 65536; i++) {
            const u16 bits = u16(i);
            _Float16 h;
            memcpy(&h, &bits, 2);
            value[i] = float(h);
        }
    }
};
inline const EmulatedHalves emulated_halves;
DEVICE float half_to_float(u16 h) { return emulated_halves.value[h]; }
DEVICE u16 float_to_half(float x) {
    const _Float16 h = _Float16(x);
    u16 bits;
    memcpy(&bits, &h, 2);
    return bits;
}
DEVICE u16 emulated_half(double x) {  // one rounding
    const _Float16 h = _Float16(x);
    u16 bits;
    memcpy(&bits, &h, 2);
    return bits;
}
DEVICE float bfloat_to_float(u16 h) { return as_float(u32(h) << 16); }
DEVICE u16 float_to_bfloat(float x) {
    const u32 u = as_bits(x);
    if (x != x) return 0x7fff;
    return u16((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
DEVICE float low_half(u32 v) { return half_to_float(u16(v & 0xffffu)); }
DEVICE float high_half(u32 v) { return half_to_float(u16(v >> 16)); }
DEVICE u32 emulated_pair(float low, float high) {  // beyond 65504 infinity
    return u32(float_to_half(low)) | u32(float_to_half(high)) << 16;
}
DEVICE float emulated_saturation(float x) {
    return x != x ? x : fminf(fmaxf(x, -65504.0f), 65504.0f);
}
DEVICE u32 pack_halves(float low, float high) {
    return emulated_pair(emulated_saturation(low), emulated_saturation(high));
}
DEVICE u32 mul_half2(u32 a, u32 b) {
    return emulated_pair(low_half(a) * low_half(b), high_half(a) * high_half(b));
}
DEVICE u32 fma_half2(u32 a, u32 b, u32 c) {
    const double low = double(low_half(a)) * low_half(b) + low_half(c);
    const double high = double(high_half(a)) * high_half(b) + high_half(c);
    return u32(emulated_half(low)) | u32(emulated_half(high)) << 16;
}

// --- tensor cores ----------------------------------------------------------------------------------

// Ownership as in the PTX ISA, "Matrix Fragments for mma.m16n8k16": g = lane / 4, t = lane % 4
DEVICE void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    struct Values { float c[4]; u32 a[4], b[2]; };
    struct Result { float c[4]; };
    const Values mine{{c[0], c[1], c[2], c[3]}, {a0, a1, a2, a3}, {b0, b1}};
    const Result got = emulator::machine.warp<Result>(
        "mma", mine, [](const Values* const* in, Result* const* out) {
            static float a[16][16], b[8][16];
            for (int lane = 0; lane < 32; lane++) {
                const int g = lane / 4, t = lane % 4;
                for (int r = 0; r < 4; r++)
                    for (int e = 0; e < 2; e++)
                        a[g + 8 * (r & 1)][2 * t + e + 8 * (r >> 1)] =
                            half_to_float(u16(in[lane]->a[r] >> (16 * e)));
                for (int r = 0; r < 2; r++)
                    for (int e = 0; e < 2; e++)
                        b[g][2 * t + e + 8 * r] = half_to_float(u16(in[lane]->b[r] >> (16 * e)));
            }
            for (int lane = 0; lane < 32; lane++)
                for (int r = 0; r < 4; r++) {
                    const int row = lane / 4 + 8 * (r >> 1), column = 2 * (lane % 4) + (r & 1);
                    double sum = in[lane]->c[r];
                    for (int k = 0; k < 16; k++) sum += double(a[row][k]) * b[column][k];
                    out[lane]->c[r] = float(sum);
                }
        });
    memcpy(c, got.c, sizeof got.c);
}
template <bool TRANSPOSED> static inline uint4 emulated_load_matrix4(u32 address) {
    return emulator::machine.warp<uint4>(
        TRANSPOSED ? "ldmatrix.trans" : "ldmatrix", address, [](const u32* const* in, uint4* const* out) {
            for (int i = 0; i < 4; i++) {
                u16 m[8][8];
                for (int row = 0; row < 8; row++)
                    memcpy(m[row], emulator::machine.at(*in[8 * i + row], 16, true), 16);
                for (int lane = 0; lane < 32; lane++) {
                    const int g = lane / 4, t = 2 * (lane % 4);
                    (&out[lane]->x)[i] = TRANSPOSED ? u32(m[t][g]) | u32(m[t + 1][g]) << 16
                                                    : u32(m[g][t]) | u32(m[g][t + 1]) << 16;
                }
            }
        });
}
DEVICE uint4 load_matrix4(u32 a) { return emulated_load_matrix4<false>(a); }
DEVICE uint4 load_matrix4_transposed(u32 a) { return emulated_load_matrix4<true>(a); }
DEVICE u32 transpose(u32 a) {
    return emulator::machine.warp<u32>("movmatrix", a, [](const u32* const* in, u32* const* out) {
        u16 m[8][8];
        for (int lane = 0; lane < 32; lane++)
            for (int e = 0; e < 2; e++) m[lane / 4][2 * (lane % 4) + e] = u16(*in[lane] >> (16 * e));
        for (int lane = 0; lane < 32; lane++) {
            const int g = lane / 4, t = 2 * (lane % 4);
            *out[lane] = u32(m[t][g]) | u32(m[t + 1][g]) << 16;
        }
    });
}

// --- fp32 --------------------------------------------------------------------------------------------

DEVICE float emulated_flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
DEVICE float exp2_approx(float x) { return emulated_flush(std::exp2(emulated_flush(x))); }
DEVICE float log2_approx(float x) { return std::log2(x); }
DEVICE float rsqrt_approx(float x) { return 1.0f / std::sqrt(x); }
DEVICE float mul_saturating(float a, float b) {
    const float y = a * b;
    return y > 0 ? std::fmin(y, 1.0f) : 0.0f;
}

// --- extremes over the lanes of a warp -----------------------------------------------------------------

template <bool GREATEST> static inline float emulated_extreme(float x) {
    if (std::signbit(x)) emulator::machine.fail("a negative value among those of redux");
    return emulator::machine.warp<float>("redux", x, [](const float* const* in, float* const* out) {
        float all = *in[0];
        for (int i = 1; i < 32; i++) all = GREATEST ? std::fmax(all, *in[i]) : std::fmin(all, *in[i]);
        for (int i = 0; i < 32; i++) *out[i] = all;
    });
}
DEVICE float greatest_of_warp(float x) { return emulated_extreme<true>(x); }
DEVICE float least_of_warp(float x) { return emulated_extreme<false>(x); }

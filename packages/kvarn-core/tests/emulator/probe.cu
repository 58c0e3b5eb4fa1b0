// Small kernels that use every promise of the emulator, and some that break one; see
// tests/test_emulator.py.
#include "device.cuh"

#ifndef BREAK
#define BREAK 0
#endif

// out = 2 in and sums[block] = sum of in, for n rounds of 64 floats through one bulk copy each
KERNEL void __launch_bounds__(64, 1) probe(const float* in, float* out, int n, float* sums) {
    DYNAMIC_SHARED(shared);
    __shared__ float parts[2];
    const u32 base = shared_address(shared), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 slot = base + 16, barrier = base;
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barrier_init_fence();
    }
    __syncthreads();
    float total = 0;
    for (int round = 0; round < n; round++) {
        if (threadIdx.x == 0) {
            barrier_expect(barrier, 256);
            bulk_copy(slot, in + 64 * round + (BREAK == 1 ? 1 : 0), BREAK == 2 ? 4096 : 256, barrier,
                      stream_policy());
        }
        if (BREAK != 3) barrier_wait(barrier, round & 1);
        const float x = as_float(load_shared(slot + 4 * threadIdx.x));
        total += x;
        out[64 * round + threadIdx.x] = 2 * x;
        if (BREAK != 4) __syncthreads();
    }
    for (int bit = 16; bit; bit /= 2) total += __shfl_xor_sync(ALL_LANES, total, bit);
    if (BREAK == 5 && lane == 3) return;
    if (lane == 0) parts[warp] = total;
    if (BREAK == 6 && warp == 1) {
        __syncwarp();
    } else {
        __syncthreads();
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = parts[0] + parts[1];
}

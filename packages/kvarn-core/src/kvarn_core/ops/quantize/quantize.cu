// Tiles that lie in memory, to halves of records: one CTA each.
#include "encode.cuh"

// tiles: fp16 [N, G, D] of K or of V, contiguous; parts: u8 [N, KEY_BYTES or VALUE_BYTES]
KERNEL void __launch_bounds__(THREADS, CTAS)
quantize(const u16* tiles, u8* parts, int is_value) {
    DYNAMIC_SHARED(shared);
    u16* const tile = reinterpret_cast<u16*>(shared);
    const uint4* const from = reinterpret_cast<const uint4*>(tiles + u64(blockIdx.x) * (G * D));
#pragma unroll
    for (int n = 0; n < G * D / 8 / THREADS; n++) {
        const int i = n * THREADS + threadIdx.x;
        const int token = i / (D / 8), channel = i % (D / 8) * 8;
        *reinterpret_cast<uint4*>(&tile[tile_place(token, channel)]) = from[i];
    }
    __syncthreads();
    if (is_value) encode<Value>(shared, parts + u64(blockIdx.x) * VALUE_BYTES);
    else encode<Key>(shared, parts + u64(blockIdx.x) * KEY_BYTES);
}

// Do the tensor cores keep fp16 subnormals? One warp multiplies every code of 2 and 4 bits, at every
// place of a half word that unpacking uses, by 1, 2^-8 and 2^8; adds the number of wrong products.
#include "codes.cuh"

template <int BITS> DEVICE int wrong_products() {
    const u32 factors[3] = {0x3c003c00u, 0x1c001c00u, 0x5c005c00u};  // 1, 2^-8, 2^8
    const float values[3] = {1.0f, 0.00390625f, 256.0f};
    int wrong = 0;
    for (int place = 0; place < 8 / BITS; place++)
        for (int code = 0; code < 1 << BITS; code++) {
            const u32 a = u32(code) << (BITS * place) | u32(code) << (16 + BITS * place);
            for (int i = 0; i < 3; i++) {
                float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                mma(c, a, a, a, a, factors[i], factors[i]);
                const float want = 16.0f * float(code) * unit_of<BITS>(place) * values[i];
                for (int j = 0; j < 4; j++) wrong += c[j] != want;
            }
        }
    return wrong;
}

KERNEL void __launch_bounds__(32) self_test(int* wrong) {
    int count = wrong_products<2>() + wrong_products<4>();
    for (int bit = 1; bit < 32; bit *= 2) count += __shfl_xor_sync(ALL_LANES, count, bit);
    if (threadIdx.x == 0) *wrong = count;
}

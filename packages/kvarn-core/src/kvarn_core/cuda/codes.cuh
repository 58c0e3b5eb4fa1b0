// Codes of a record as operands of the tensor cores, in the fragment order of layout.py.
//
// A b-bit field at bit s of an otherwise empty half is the fp16 subnormal code * 2^(s - 24), exactly:
// unpacking is one AND per two codes, and the factor depends on the row block of the mma only. With
// KVARN_MAGIC, for tensor cores that flush subnormals, the code itself is made with an exponent.
#pragma once
#include "device.cuh"

// Operand A of M rows and K columns with b-bit codes, cut into chunks of 512 bytes.
template <int M, int K, int BITS> struct Operand {
    static constexpr int FIELDS = 16 / BITS;              // codes of a half word
    static constexpr int ROW_BLOCKS = M / 16;
    static constexpr int FIELD_ROWS = FIELDS < ROW_BLOCKS ? FIELDS : ROW_BLOCKS;
    static constexpr int FIELD_COLUMNS = FIELDS / FIELD_ROWS;
    static constexpr int PARTS = ROW_BLOCKS / FIELD_ROWS;         // rows of chunks
    static constexpr int CHUNKS = K / 16 / FIELD_COLUMNS;         // chunks of a part
};

// Value of code 1 in row block `block`.
template <int BITS> DEVICE constexpr float unit_of(int block) {
#ifdef KVARN_MAGIC
    return 1.0f + 0 * block;
#else
    return float(1u << (BITS * (block % (8 / BITS)))) * 5.9604644775390625e-8f;  // 2^-24
#endif
}

template <int BITS> DEVICE u32 field(u32 word, int f) {
    constexpr int HALF = 8 / BITS;
    const int place = BITS * (f % HALF);
    const u32 mask = ((1u << BITS) - 1) * 0x00010001u << place;
    const u32 bits = (f < HALF ? word : word >> 8) & mask;
#ifdef KVARN_MAGIC
    // 1024 + code * 2^place, then times 2^-place minus 1024 * 2^-place: exact
    const u32 scale = u32(15 - place) << 10, offset = 0x8000u | u32(25 - place) << 10;
    return fma_half2(bits | 0x64006400u, scale * 0x00010001u, offset * 0x00010001u);
#else
    return bits;
#endif
}

// c[row blocks of a part, tiles of 8 columns] += codes[part, two k-steps from 2 pair on] * b, b in
// fragment order; codes are unpacked once for all tiles
template <class O, int BITS, int TILES>
DEVICE void multiply_codes(float (&c)[O::FIELD_ROWS][TILES][4], u32 codes, int pair,
                           const u32 (&b)[TILES][2][2]) {
#pragma unroll
    for (int i = 0; i < 2 / O::FIELD_COLUMNS; i++) {
        const int chunk = pair * (2 / O::FIELD_COLUMNS) + i;
        const uint4 a = load_shared4(codes + chunk * 512 + threadIdx.x % 32 * 16);
#pragma unroll
        for (int f = 0; f < O::FIELDS; f++) {
            const int step = i * O::FIELD_COLUMNS + f / O::FIELD_ROWS;
            const u32 x = field<BITS>(a.x, f), y = field<BITS>(a.y, f), z = field<BITS>(a.z, f),
                      w = field<BITS>(a.w, f);
#pragma unroll
            for (int n = 0; n < TILES; n++)
                mma(c[f % O::FIELD_ROWS][n], x, y, z, w, b[n][step][0], b[n][step][1]);
        }
    }
}

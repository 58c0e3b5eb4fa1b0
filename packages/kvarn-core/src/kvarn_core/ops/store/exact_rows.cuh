// The door to the cache, and where its exact rows lie.
//
// PIECES adjacent lanes hold a new row of K or V, 8 channels each: one 16-byte piece of an exact
// row. Butterflies of width 1, 2 and 4 stay in a lane, wider ones go between lanes. Every rounding
// is that of the reference: additions in its order, none fused, one multiplication at the end.
//
// Defines: INPUT, the rows of the model: 0 fp16, 1 bf16, 2 fp32.
#pragma once
#include "device.cuh"
#include "layout.cuh"

constexpr int PIECES = D / 8;
constexpr float FP16_MAX = 65504.0f;
constexpr float UNIT = D == 64 ? 0.125f : D == 128 ? 0.08838834764831845f : 0.0625f;  // D^(-1/2)

#if INPUT == 2
using Element = float;
#else
using Element = u16;
#endif

struct Request {
    int start;         // index of its first new row
    int first;         // position of that row
    int length;        // tokens after this step
    const int* table;  // its row of the page table
};

// False if the request has nothing to store; its row of the page table may then be anything.
DEVICE bool read_request(Request& r, int index, const int* table, long long table_stride,
                         const int* lens, const int* starts) {
    r.start = starts[index];
    r.length = lens[index];
    const int count = starts[index + 1] - r.start;
    r.first = r.length - count;
    r.table = table + index * table_stride;
    return count > 0 && r.first >= 0;
}

// Byte of a piece of an exact row; pieces of adjacent rows are turned against each other.
DEVICE long long exact_place(int page, long long page_stride, int head, int row, int is_value,
                             int piece) {
    const int inside = head * RECORD_BYTES + row * ROW_BYTES + is_value * (ROW_BYTES / 2);
    return page * page_stride + inside + (piece ^ (row & 7)) * 16;
}
DEVICE long long ring_place(const Request& r, long long page_stride, int head, int position,
                            int is_value, int piece) {
    const int row = position % RING_ROWS;
    const int page = r.table[RING_COLUMN + row / ROWS_PER_PAGE];
    return exact_place(page, page_stride, head, row % ROWS_PER_PAGE, is_value, piece);
}

DEVICE float sane(float x) { return x == x ? fminf(fmaxf(x, -FP16_MAX), FP16_MAX) : 0.0f; }

// 8 elements at an address that is a multiple of 16 bytes.
DEVICE void load_piece(const Element* from, float (&x)[8]) {
#if INPUT == 2
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        const float4 v = *reinterpret_cast<const float4*>(from + i);
        x[i] = sane(v.x), x[i + 1] = sane(v.y), x[i + 2] = sane(v.z), x[i + 3] = sane(v.w);
    }
#else
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u16 low = u16(words[i] & 0xffffu), high = u16(words[i] >> 16);
        x[2 * i] = sane(INPUT == 1 ? bfloat_to_float(low) : half_to_float(low));
        x[2 * i + 1] = sane(INPUT == 1 ? bfloat_to_float(high) : half_to_float(high));
    }
#endif
}

// Rotates the row whose pieces lie in PIECES adjacent lanes; all lanes of the warp call it.
DEVICE uint4 rotated(float (&x)[8], int piece) {
#pragma unroll
    for (int width = 1; width < 8; width *= 2) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (i & width) continue;
            const float a = x[i], b = x[i + width];
            x[i] = __fadd_rn(a, b), x[i + width] = __fadd_rn(a, -b);
        }
    }
#pragma unroll
    for (int lanes = 1; lanes < PIECES; lanes *= 2) {
        const bool second = piece & lanes;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float other = __shfl_xor_sync(ALL_LANES, x[i], lanes);
            x[i] = __fadd_rn(other, second ? -x[i] : x[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        x[i] = __fmul_rn(x[i], UNIT);
    }
    return make_uint4(pack_halves(x[0], x[1]), pack_halves(x[2], x[3]), pack_halves(x[4], x[5]),
                      pack_halves(x[6], x[7]));
}

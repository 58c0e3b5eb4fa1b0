// Tiles that are due, to halves of records: one CTA encodes K or V of one tile of one head.
//
// Nothing is decided on the host: a CTA finds its tile from its place in the grid, or that nothing
// is due there, and returns. Rows come from the ring up to the first new token of the request, and
// from the model after it; both end as fp16 in shared memory, so a record does not depend on how its
// rows came.
//
// Defines: INPUT, and those of encode.cuh.
#include "encode.cuh"
#include "exact_rows.cuh"

// Rows [G, D] of a tile, as read_tile() expects them. All ring rows are asked for before one is
// needed: this costs the latency of a page number and of a row, once.
DEVICE void load_tile(u16* tile, const Element* rows, long long row_stride, const u8* cache,
                      long long page_stride, const Request& r, int begin, int head, int is_value) {
    constexpr int STEP = THREADS / PIECES, COUNT = G / STEP;  // tokens of a CTA at once, of a lane
    const int piece = threadIdx.x % PIECES, first = threadIdx.x / PIECES;
    uint4 old[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const int position = begin + first + i * STEP;
        if (position < r.first) {
            const long long at = ring_place(r, page_stride, head, position, is_value, piece);
            old[i] = *reinterpret_cast<const uint4*>(cache + at);
        }
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const int token = first + i * STEP;
        if (begin + token < r.first)
            *reinterpret_cast<uint4*>(&tile[tile_place(token, piece * 8)]) = old[i];
    }
    if (begin + G <= r.first) return;
#pragma unroll 2
    for (int i = 0; i < COUNT; i++) {
        const int token = first + i * STEP, position = begin + token;
        const bool is_new = position >= r.first;
        if (!__any_sync(ALL_LANES, is_new)) continue;
        float x[8] = {};
        if (is_new) {
            const long long index = r.start + (position - r.first);
            load_piece(rows + index * row_stride + head * D + piece * 8, x);
        }
        const uint4 row = rotated(x, piece);
        if (is_new) *reinterpret_cast<uint4*>(&tile[tile_place(token, piece * 8)]) = row;
    }
}

// Slots of requests follow each other: request i has those from starts[i] / G + i on, at least one
// per G new tokens that it begins. -1 if the slot is before the first request.
DEVICE int request_of_slot(int slot, const int* starts, int batch) {
    int found = 0;
    for (int i = threadIdx.x % 32, full = 1; full && found < batch; i += 32) {
        const u32 before = __ballot_sync(ALL_LANES, i < batch && starts[i] / G + i <= slot);
        found += __popc(before);
        full = before == ALL_LANES;
    }
    return found - 1;
}

// The first arguments are those of write_rows. Grid: slots, columns, K and V. Slot n of a request is
// the n-th deadline of a head among the new tokens, and a column is a head. If each request has one
// new token (`one_new`), requests are slots, and a column is the one head among G whose deadline it is.
KERNEL void __launch_bounds__(THREADS, CTAS)
seal(const Element* key, const Element* value, u8* cache, const int* table, const int* lens,
     const int* starts, long long key_stride, long long value_stride, long long page_stride,
     long long table_stride, int batch, int heads, int layer, int one_new) {
    DYNAMIC_SHARED(shared);
    int index = int(blockIdx.x), slot = 0;
    if (!one_new) {
        index = request_of_slot(int(blockIdx.x), starts, batch);
        if (index < 0) return;
        slot = int(blockIdx.x) - (starts[index] / G + index);
    }
    const int is_value = int(blockIdx.z);
    Request r;
    if (!read_request(r, index, table, table_stride, lens, starts)) return;
    // layout.seal_phase of head 0; head i adds 13 i. 69 * 13 = 1 modulo 64 and 128
    const int phase = 29 * r.table[RING_COLUMN] + 37 * layer + G / 2 * is_value;
    int head = int(blockIdx.y);
    if (one_new) head = head * G + int(69 * u32(r.first - phase) & (G - 1));
    const int deadline = r.first + ((phase + 13 * head - r.first) & (G - 1)) + slot * G;
    const int tile = deadline / G - 1;
    if (head >= heads || deadline >= r.length || tile < r.table[HIT_COLUMN]) return;

    const int page = r.table[HEADER_COLUMNS + tile];
    load_tile(reinterpret_cast<u16*>(shared), is_value ? value : key,
              is_value ? value_stride : key_stride, cache, page_stride, r, tile * G, head, is_value);
    __syncthreads();
    u8* const record = cache + page * page_stride + head * RECORD_BYTES;
    if (is_value) encode<Value>(shared, record + KEY_BYTES);
    else encode<Key>(shared, record);
}

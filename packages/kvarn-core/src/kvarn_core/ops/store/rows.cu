// New rows as they come, to the ring and to the sink: PIECES lanes per row, head, and K or V.
//
// A row costs its bytes, read and written once, and D log2 D additions. A launch of a decode step
// is bound by its latency: two loads that depend on each other, a store.
//
// Defines: THREADS, INPUT.
#include "exact_rows.cuh"

// key, value: [T, heads, D], rows of the model; cache: u8 pages; table: int [B, columns];
// lens: int [B]; starts: int [B + 1]; strides in elements. One CTA per THREADS / PIECES half rows
// along x, one request along y. To the ring: the last RING_ROWS new rows, to the sink the first
// SINK_ROWS of the request in any case.
KERNEL void __launch_bounds__(THREADS)
write_rows(const Element* key, const Element* value, u8* cache, const int* table, const int* lens,
           const int* starts, long long key_stride, long long value_stride, long long page_stride,
           long long table_stride, int heads, int to_ring) {
    Request r;
    if (!read_request(r, int(blockIdx.y), table, table_stride, lens, starts)) return;
    const int begin = to_ring ? max(r.first, r.length - RING_ROWS) : r.first;
    const int end = to_ring ? r.length : min(r.length, SINK_ROWS);
    const int item = int(blockIdx.x * (THREADS / PIECES) + threadIdx.x / PIECES);
    const int piece = threadIdx.x % PIECES;
    const int is_value = item % 2, head = item / 2 % heads, position = begin + item / 2 / heads;
    const bool wanted = position < end;
    if (!__any_sync(ALL_LANES, wanted)) return;

    float x[8] = {};
    long long ring = 0, sink = 0;
    bool to_sink = false;
    if (wanted) {
        const long long token = r.start + (position - r.first);
        const Element* const from = is_value ? value + token * value_stride : key + token * key_stride;
        load_piece(from + head * D + piece * 8, x);
        if (to_ring) ring = ring_place(r, page_stride, head, position, is_value, piece);
        const int page = r.table[SINK_COLUMN];
        to_sink = position < SINK_ROWS && page != 0;
        if (to_sink) sink = exact_place(page, page_stride, head, position, is_value, piece);
    }
    const uint4 row = rotated(x, piece);
    if (wanted && to_ring) *reinterpret_cast<uint4*>(cache + ring) = row;
    if (to_sink) *reinterpret_cast<uint4*>(cache + sink) = row;
}

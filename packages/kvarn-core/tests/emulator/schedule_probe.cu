// Writes down what decode's schedule gives to every warp of every CTA, in the functions of decode.
// With a tail, pieces are taken as in decode, and each is written down as the share behind the grid's.
#include "schedule.cuh"
#include "tail.cuh"

constexpr int UNIT_WORDS = 10, SEGMENT_WORDS = 8;

DEVICE void write(int* log, int* count, int words, const int* values) {
    if (threadIdx.x) return;
    const int row = atomicAdd(count, 1);
    for (int i = 0; i < words; i++) log[row * words + i] = values[i];
}

KERNEL void schedule_probe(const int* table, const int* lengths, int* units, int* segments, int* counts,
                           int table_stride, int requests, int kv_heads, int blocks, int least,
                           int slack, int warps, u32 inverse_ctas, u32 inverse_columns,
                           u32 inverse_pairs, u32 inverse_blocks) {
    const Batch batch{table, lengths, u64(table_stride), requests, kv_heads, blocks,
                      kv_heads * blocks};
    const u8* const cache = reinterpret_cast<const u8*>(u64(1) << 40);  // an address to count from
    const int cta = int(blockIdx.x);
    Place place;
    const Inverses inverses{inverse_ctas, inverse_columns, inverse_pairs, inverse_blocks};
    Share share = take_share(batch, inverses, cta, int(gridDim.x), least, slack, place);
    const Line& line = share.line;
    int number = cta;
    DYNAMIC_SHARED(shared);
    const u32 line_at = shared_address(shared);
    if constexpr (TAIL) leave_line(line_at, line);
    const Divisor by_blocks{u32(blocks), inverse_blocks};
again:
    for (int warp = 0; warp < warps; warp++) {
        Place ahead = place;
        for (int i = share.begin + warp; i < share.end; i += warps) {
            if (TAIL && number != cta && i == share.begin + warp)
                ahead = place_on_line(line_at, by_blocks, batch.pairs, i);
            else
                advance(batch, ahead, i == share.begin + warp ? warp : warps);
            const Unit unit = locate(batch, cache, ahead);
            const u64 offset = u64(unit.source - cache);
            const int row[UNIT_WORDS] = {number, warp, ahead.request, ahead.head, ahead.block, ahead.index,
                                         int(offset / RECORD_BYTES), int(offset % RECORD_BYTES),
                                         unit.first, unit.count};
            write(units, counts, UNIT_WORDS, row);
        }
    }
    for (int at = share.begin; at < share.end;) {
        Segment segment = segment_at(share.size, share.end, place, at);
        if constexpr (TAIL) {
            segment = segment_on_line(share.size, line, late_grid(), share.end, place, at);
            share.slot = share.origin + segment.own;
        }
        const int first = share.origin + segment.begins;
        const int row[SEGMENT_WORDS] = {number, place.request, place.head, place.block,
                                        segment.end - at, segment.parts, share.slot - first,
                                        place_of(share.slot, first, int(gridDim.x))};
        write(segments, counts + 1, SEGMENT_WORDS, row);
        at = segment.end;
        if (at < share.end) {
            place.index = place.row.units - 1;
            advance(batch, place, 1);
        }
    }
    if (TAIL && line.tail < line.end) {
        if (threadIdx.x == 0) ask_piece(line_at, reinterpret_cast<u32*>(counts + 2), line);
        const int piece = await_piece(line_at);
        share.begin = line.begin_of(piece);
        share.end = min(line.end, share.begin + line.piece);
        number = int(gridDim.x) + piece;
        if (threadIdx.x == 0) tell_shared(line_at, UNASKED);
        if (share.begin >= share.end) return;
        place = place_on_line(line_at, by_blocks, batch.pairs, share.begin);
        goto again;
    }
}

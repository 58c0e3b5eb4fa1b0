// Writes down what decode's schedule gives to every warp of every CTA, in the functions of decode.
#include "schedule.cuh"

constexpr int UNIT_WORDS = 10, SEGMENT_WORDS = 9;

DEVICE void write(int* log, int* count, int words, const int* values) {
    const int row = atomicAdd(count, 1);
    for (int i = 0; i < words; i++) log[row * words + i] = values[i];
}

KERNEL void schedule_probe(const int* table, const int* lengths, int* units, int* segments, int* counts,
                           int table_stride, int requests, int kv_heads, int blocks, int least,
                           int slack, int warps) {
    const Batch batch{table, lengths, u64(table_stride), requests, kv_heads, blocks};
    const u8* const cache = reinterpret_cast<const u8*>(u64(1) << 40);  // an address to count from
    const int cta = int(blockIdx.x);
    Place place;
    const Share share = take_share(batch, cta, int(gridDim.x), least, slack, place);
    if (threadIdx.x) return;
    for (int warp = 0; warp < warps; warp++) {
        Place ahead = place;
        for (int i = share.begin + warp; i < share.end; i += warps) {
            advance(batch, ahead, i == share.begin + warp ? warp : warps);
            const Unit unit = locate(batch, cache, ahead);
            const u64 offset = u64(unit.source - cache);
            const int row[UNIT_WORDS] = {cta, warp, ahead.request, ahead.head, ahead.block, ahead.index,
                                         int(offset / RECORD_BYTES), int(offset % RECORD_BYTES),
                                         unit.first, unit.count};
            write(units, counts, UNIT_WORDS, row);
        }
    }
    for (int at = share.begin; at < share.end;) {
        const Segment segment = segment_at(share, place, at, cta);
        const int row[SEGMENT_WORDS] = {cta, place.request, place.head, place.block, segment.end - at,
                                        segment.parts, segment.part,
                                        slot_of(segment, segment.part, int(gridDim.x)), share.whole()};
        write(segments, counts + 1, SEGMENT_WORDS, row);
        at = segment.end;
        if (at < share.end) {
            place.index = place.row.units - 1;
            advance(batch, place, 1);
        }
    }
}

// Writes down what decode's schedule gives to every warp of every CTA, in the functions of decode.
#include "schedule.cuh"

constexpr int UNIT_WORDS = 10, SEGMENT_WORDS = 8;

DEVICE void write(int* log, int* count, int words, const int* values) {
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
    const Share share = take_share(batch, inverses, cta, int(gridDim.x), least, slack, place);
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
        const Segment segment = segment_at(share.size, share.end, place, at);
        const int first = share.origin + segment.begins;
        const int row[SEGMENT_WORDS] = {cta, place.request, place.head, place.block, segment.end - at,
                                        segment.parts, share.slot - first,
                                        place_of(share.slot, first, int(gridDim.x))};
        write(segments, counts + 1, SEGMENT_WORDS, row);
        at = segment.end;
        if (at < share.end) {
            place.index = place.row.units - 1;
            advance(batch, place, 1);
        }
    }
}

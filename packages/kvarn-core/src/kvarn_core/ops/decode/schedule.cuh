// Work of a decode step, cut into equal shares without reading a length on the host.
//
// A unit is a record, the rows of one ring page inside the exact window, or the sink rows: about
// the same bytes. The units of all (request, head block) pairs lie in one line; CTA i takes the
// i-th piece of it, and warp w of the CTA every WARPS-th unit of that piece. A head block is up to
// eight query heads of one KV head. Each warp sums the lengths for itself: a launch needs no other.
#pragma once
#include "device.cuh"
#include "layout.cuh"

constexpr int HEADS = 8;  // query heads of a head block: the N of the mma

struct Batch {
    const int* table;
    const int* lengths;
    u64 table_stride;
    int requests, kv_heads, blocks;  // head blocks of a KV head
    DEVICE int pairs() const { return kv_heads * blocks; }  // with one request
};

struct Row {  // what a request reads
    int length, packed, sink, units;
};

struct Ring {  // exact window as at most two runs of ring rows: [start, end) and [0, wrapped)
    int start, end, wrapped;
    DEVICE int first_page() const { return start / ROWS_PER_PAGE; }
    DEVICE int pages() const { return (end - 1) / ROWS_PER_PAGE - first_page() + 1; }
    DEVICE int wrapped_pages() const { return (wrapped + ROWS_PER_PAGE - 1) / ROWS_PER_PAGE; }
};

struct Unit {
    const u8* source;
    int count;      // exact rows, or 0 for a record
    int first;      // page row of the first of them; for a record, tokens that the sink replaces
};

struct Place {  // unit `index` of head block `block` of KV head `head` of request `request`
    int request, head, block, index;
    Row row;
};

struct Share {
    int begin, end, size;  // of the line; size is that of every CTA but the last
};

DEVICE Ring ring_of(const Row& row) {
    const int start = (row.packed & 1) * G, stop = start + row.length - row.packed * G;
    return {start, min(stop, RING_ROWS), max(stop - RING_ROWS, 0)};
}

DEVICE Row read_row(const Batch& batch, int request) {
    const int* columns = batch.table + u64(request) * batch.table_stride;
    const int length = batch.lengths[request], hits = columns[HIT_COLUMN];
    Row row{length, 0, columns[SINK_COLUMN], 0};
    if (length <= 0) return row;
    // a server may warm up with made-up tables: hits beyond the request would leave its row
    const int last = (length - 1) / G;
    row.packed = max(max(last - 1, min(hits, last)), 0);
    const Ring ring = ring_of(row);
    row.sink = row.packed > 0 ? row.sink : 0;
    row.units = row.packed + ring.pages() + ring.wrapped_pages() + (row.sink != 0);
    return row;
}

// Rows of a ring page, or the sink's, that unit `index` >= row.packed consists of.
DEVICE Unit exact_unit(const Row& row, int index, int& column) {
    const Ring ring = ring_of(row);
    int piece = index - row.packed, low = 0, high = SINK_ROWS, page = 0;
    column = SINK_COLUMN;
    if (piece < ring.pages()) {
        page = ring.first_page() + piece;
        low = max(ring.start, page * ROWS_PER_PAGE);
        high = min(ring.end, (page + 1) * ROWS_PER_PAGE);
        column = RING_COLUMN + page;
    } else if (piece -= ring.pages(); piece < ring.wrapped_pages()) {
        page = piece;
        low = page * ROWS_PER_PAGE;
        high = min(ring.wrapped, low + ROWS_PER_PAGE);
        column = RING_COLUMN + page;
    }
    return {nullptr, high - low, low - page * ROWS_PER_PAGE};
}

DEVICE Unit locate(const Batch& batch, const u8* cache, const Place& at) {
    Unit unit{nullptr, 0, at.index == 0 && at.row.sink ? SINK_ROWS : 0};
    int column = HEADER_COLUMNS + at.index;
    if (at.index >= at.row.packed) unit = exact_unit(at.row, at.index, column);
    const u64 page = u64(batch.table[u64(at.request) * batch.table_stride + column]);
    const u64 slice = page * batch.kv_heads + at.head;
    unit.source = cache + slice * RECORD_BYTES + (unit.count ? unit.first * ROW_BYTES : 0);
    return unit;
}

// Inclusive sum over the lanes of a warp.
DEVICE int scan(int x) {
    const int lane = threadIdx.x % 32;
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(ALL_LANES, x, distance);
        x += lane >= distance ? other : 0;
    }
    return x;
}

// The share of a CTA and the place where it begins; whole warps call it. Past the end of the line
// the share is empty and the place is not set.
DEVICE Share take_share(const Batch& batch, int cta, int ctas, int least, Place& at) {
    const int lane = threadIdx.x % 32, requests = batch.requests, pairs = batch.pairs();
    const int per_lane = (requests + 31) / 32;
    int units = 0;
#pragma unroll 4
    for (int i = 0; i < per_lane; i++) {
        const int request = lane * per_lane + i;
        units += request < requests ? read_row(batch, request).units : 0;
    }
    int sum = scan(units);
    const int total = __shfl_sync(ALL_LANES, sum, 31) * pairs;
    Share share;
    share.size = max(least, (total + ctas - 1) / ctas);
    share.begin = min(total, cta * share.size);
    share.end = min(total, share.begin + share.size);
    if (share.begin >= share.end) return share;

    // the lane whose requests hold the first unit, then the request
    int owner = __ffs(int(__ballot_sync(ALL_LANES, sum * pairs > share.begin))) - 1;
    int before = __shfl_sync(ALL_LANES, sum - units, owner);
    at.request = owner;
    if (per_lane > 1) {
        for (int i = 0;; i += 32) {
            const int request = owner * per_lane + i + lane;
            const bool mine = i + lane < per_lane && request < requests;
            units = mine ? read_row(batch, request).units : 0;
            sum = before + scan(units);
            const u32 found = __ballot_sync(ALL_LANES, sum * pairs > share.begin);
            if (found) {
                const int source = __ffs(int(found)) - 1;
                before = __shfl_sync(ALL_LANES, sum - units, source);
                at.request = owner * per_lane + i + source;
                break;
            }
            before = __shfl_sync(ALL_LANES, sum, 31);
        }
    }
    at.row = read_row(batch, at.request);
    const int rest = share.begin - before * pairs, pair = rest / at.row.units;
    at.index = rest - pair * at.row.units;
    at.head = pair / batch.blocks;
    at.block = pair - at.head * batch.blocks;
    return share;
}

// Moves forward by `step` units; there is a unit at the new place.
DEVICE void advance(const Batch& batch, Place& at, int step) {
    at.index += step;
    while (at.index >= at.row.units) {
        at.index -= at.row.units;
        if (++at.block < batch.blocks) continue;
        at.block = 0;
        if (++at.head < batch.kv_heads) continue;
        at.head = 0;
        do at.row = read_row(batch, ++at.request);
        while (at.row.units == 0);
    }
}

// Units [.., end) of the line that a CTA has of the head block at `place`, of which the CTAs first,
// first + 1, ... have `parts` parts.
struct Segment {
    int end, first, parts;
};

DEVICE Segment segment_at(const Share& share, const Place& place, int at) {
    const int start = at - place.index, stop = start + place.row.units, first = start / share.size;
    return {min(share.end, stop), first, (stop - 1) / share.size - first + 1};
}

// Where a CTA leaves its part: it has two slots, one for a head block that it continues and one for
// a head block that it begins.
DEVICE int slot_of(int cta, int first) { return 2 * cta + (cta == first); }

// Work of a decode step, cut into shares without reading a length on the host.
//
// A unit is a record, the rows of one ring page inside the exact window, or the sink rows: about
// the same bytes. A head block is up to HEADS query heads of one KV head of one request. Warp w of a
// CTA takes every WARPS-th unit of the CTA's share. Two ways to cut shares:
//
// - columns: few requests get whole CTAs, so that a CTA has one query and one merge. The grid is
//   columns of one CTA per head block of a request, and a request gets as many columns as it needs
//   at the least share that makes the columns suffice.
// - the line: where columns would make shares uneven, the units of all head blocks lie in one line,
//   and CTA i takes the i-th piece of it.
//
// Each warp sums the lengths for itself: a launch needs no other.
#pragma once
#include "device.cuh"
#include "layout.cuh"

// Division of numbers below 2^31 by one whose inverse is known early: 0xffffffff / by.
struct Divisor {
    u32 by, inverse;
    DEVICE int floor(int x) const {
        const u32 q = u32(u64(u32(x)) * inverse >> 32);  // right, or one too small
        return int(q + (u32(x) - q * by >= by));
    }
    DEVICE int ceil(int x) const { return floor(x + int(by) - 1); }
};
DEVICE Divisor divisor(int n) { return {u32(n), 0xffffffffu / u32(n)}; }
// The same sooner, for numbers below 2^22: the quotient of floats, below 2^32 / n, is near enough.
DEVICE Divisor small_divisor(int n) { return {u32(n), u32(4294966784.0f / float(n))}; }

struct Batch {
    const int* table;
    const int* lengths;
    u64 table_stride;
    int requests, kv_heads, blocks, pairs;  // head blocks of a KV head; of a request
};

struct Inverses {  // of numbers that the launcher knows; there are max(1, ctas / pairs) columns
    u32 ctas, columns, pairs, blocks;
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

struct Share {  // units [begin, end) of the line, or of the head block in columns
    int begin, end, size;  // size is that of every share but the last
    int slot, origin;      // slots of parts: of this share, of the one that begins at unit 0
};

DEVICE Ring ring_of(const Row& row) {
    const int start = (row.packed & 1) * G, stop = start + row.length - row.packed * G;
    return {start, min(stop, RING_ROWS), max(stop - RING_ROWS, 0)};
}

DEVICE Row read_row(const Batch& batch, int request) {
    const int* columns = batch.table + u64(request) * batch.table_stride;
    const int length = max(0, batch.lengths[request]), hits = columns[HIT_COLUMN];
    // a server may warm up with made-up tables: hits beyond the request would leave its row
    const int last = (length - 1) / G, packed = max(max(last - 1, min(hits, last)), 0);
    Row row{length, packed, columns[SINK_COLUMN], 0};
    const Ring ring = ring_of(row);
    row.sink = packed > 0 ? row.sink : 0;
    row.units = length ? packed + ring.pages() + ring.wrapped_pages() + (row.sink != 0) : 0;
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

DEVICE Row row_of_lane(const Row& row, int lane) {
    return {__shfl_sync(ALL_LANES, row.length, lane), __shfl_sync(ALL_LANES, row.packed, lane),
            __shfl_sync(ALL_LANES, row.sink, lane), __shfl_sync(ALL_LANES, row.units, lane)};
}

// Columns that all requests need at a share of `size`; lanes hold the units of up to 32 requests.
DEVICE int columns_at(int size, int units) {
    return __reduce_add_sync(ALL_LANES, small_divisor(size).ceil(units));
}

// The least share up to `most` at which all requests fit in the columns, and the share of a CTA then.
// Lanes hold the rows of up to 32 requests, `all` units together. False if no share does.
DEVICE bool take_column(const Batch& batch, const Divisor& columns, int column, int least, int most,
                        const Row& row, int all, Share& share, Place& at) {
    const int there = int(columns.by);
    int low = max(least, columns.ceil(all)), high = most, part = column, owner = 0;
    if (low > high) return false;
    if (batch.requests > 1) {
        const int each = small_divisor(batch.requests).floor(there);  // with as many for each request
        if (each) {
            const int longest = __reduce_max_sync(ALL_LANES, row.units);
            high = min(high, max(low, small_divisor(each).ceil(longest)));
        }
        if (high == most && columns_at(high, row.units) > there) return false;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (columns_at(middle, row.units) > there)
                low = middle + 1;
            else
                high = middle;
        }
        const int own = small_divisor(low).ceil(row.units), stop = scan(own);
        const u32 behind = __ballot_sync(ALL_LANES, stop > column);
        owner = behind ? __ffs(int(behind)) - 1 : 31;
        part = column - __shfl_sync(ALL_LANES, stop - own, owner);
    }
    share.size = low;
    at.request = owner;
    at.row = row_of_lane(row, owner);
    at.index = part * share.size;
    share.slot = column;
    share.origin = column - part;
    share.end = column < there ? at.row.units : 0;
    share.begin = min(share.end, at.index);
    share.end = min(share.end, at.index + share.size);
    return true;
}

// The share of a CTA and the place where it begins; whole warps call it. If the share is empty, the
// place is not set. Shares have at least `least` units; in columns they are larger than on the line by
// up to `slack` units.
DEVICE Share take_share(const Batch& batch, const Inverses& inverses, int cta, int ctas, int least,
                        int slack, Place& at) {
    const int lane = threadIdx.x % 32, requests = batch.requests, pairs = batch.pairs;
    const bool few = requests <= 32;
    const int per_lane = (requests + 31) / 32;
    const Divisor grid{u32(ctas), inverses.ctas}, by_pairs{u32(pairs), inverses.pairs},
        by_blocks{u32(batch.blocks), inverses.blocks};
    const Divisor columns{u32(max(1, by_pairs.floor(ctas))), inverses.columns};
    const int column = by_pairs.floor(cta);
    Row row{0, 0, 0, 0};
    int units = 0;
    if (few) {
        if (lane < requests) row = read_row(batch, lane);
        units = row.units;
    } else {
#pragma unroll 2
        for (int i = 0; i < per_lane; i++) {
            const int request = lane * per_lane + i;
            units += request < requests ? read_row(batch, request).units : 0;
        }
    }
    int sum = requests > 1 ? scan(units) : __shfl_sync(ALL_LANES, units, 0);
    const int all = __shfl_sync(ALL_LANES, sum, 31), total = all * pairs;
    Share share;
    share.slot = cta;
    share.origin = 0;
    const int size = max(least, grid.ceil(total));
    if (few && pairs <= ctas &&
        take_column(batch, columns, column, least, size + slack, row, all, share, at)) {
        const int pair = cta - column * pairs;
        at.head = by_blocks.floor(pair);
        at.block = pair - at.head * batch.blocks;
        share.slot += pair * int(columns.by);
        share.origin += pair * int(columns.by);
        return share;
    }
    share.size = size;
    share.begin = min(total, cta * size);
    share.end = min(total, share.begin + size);
    if (share.begin >= share.end) return share;

    // the lane whose requests hold the first unit, then the request
    int owner = __ffs(int(__ballot_sync(ALL_LANES, sum * pairs > share.begin))) - 1;
    int before = __shfl_sync(ALL_LANES, sum - units, owner);
    at.request = owner;
    if (few) {
        at.row = row_of_lane(row, owner);
    } else {
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
        at.row = read_row(batch, at.request);
    }
    const int rest = share.begin - before * pairs, place = rest / at.row.units;
    at.index = rest - place * at.row.units;
    at.head = by_blocks.floor(place);
    at.block = place - at.head * batch.blocks;
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

// Units [.., end) that a CTA has of the head block at `place`. The block is left in `parts` parts, in
// slots that follow one another from share.origin + begins on.
struct Segment {
    int end, begins, parts;
};

DEVICE Segment segment_at(int size, int share_end, const Place& place, int at) {
    const int start = at - place.index, stop = start + place.row.units;
    const Divisor by = divisor(size);
    const int begins = by.floor(start);
    return {min(share_end, stop), begins, by.floor(stop - 1) - begins + 1};
}

// A CTA may continue a head block and begin another, so first parts have places of their own behind
// the slots of the grid.
DEVICE int place_of(int slot, int first, int ctas) { return slot + (slot == first ? ctas : 0); }

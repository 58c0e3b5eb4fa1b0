// The last units of the line go to whoever is free.
//
// Multiprocessors do not read equally fast when memory is saturated, so equal shares do not end
// together. The tail of the line is cut into pieces; where they begin and end, and so the bits of
// results, follow from the lengths alone. Only owners are free: pieces are numbered, and a counter in
// global memory says which is next. A CTA asks for one when the first of its warps begins its last
// unit, and each warp fetches its first unit of the piece where it would fetch the next of a share.
//
// Every CTA asks until there is no piece, so it is known which question is the last of a launch: it
// sets the counter back to zero.
#pragma once
#include "schedule.cuh"

constexpr u32 UNASKED = 0x80000000u, ASKED = 0x80000001u;  // in place of a number
// shared memory of a CTA: number of its next piece; then by request row, end on the line, inverse
constexpr int ROWS_AT = 16, ENDS_AT = ROWS_AT + 32 * 16, TAIL_BYTES = ENDS_AT + 32 * 8;

// One warp prepares for all.
DEVICE void leave_line(u32 shared, const Line& line) {
    const int lane = late_lane();
    const Row& row = line.row;
    if (lane == 0) store_shared(shared, UNASKED);
    store_shared4(shared + ROWS_AT + lane * 16,
                  {u32(row.length), u32(row.packed), u32(row.sink), u32(row.units)});
    store_shared2(shared + ENDS_AT + lane * 8, {u32(line.stop), divisor(max(1, row.units)).inverse});
}

// Place of a unit of the line; whole warps call it.
DEVICE Place place_on_line(u32 shared, const Divisor& by_blocks, int pairs, int at) {
    const int stop = int(load_shared(shared + ENDS_AT + late_lane() * 8));
    Place place;
    place.request = __ffs(int(__ballot_sync(ALL_LANES, stop > at))) - 1;
    const uint4 row = load_shared4(shared + ROWS_AT + place.request * 16);
    const uint2 end = load_shared2(shared + ENDS_AT + place.request * 8);
    place.row = {int(row.x), int(row.y), int(row.z), int(row.w)};
    const int rest = at - (int(end.x) - place.row.units * pairs);
    const int pair = Divisor{row.w, end.y}.floor(rest);
    place.index = rest - pair * place.row.units;
    place.head = by_blocks.floor(pair);
    place.block = pair - place.head * int(by_blocks.by);
    return place;
}

// By one lane of each warp: asks, unless another warp has.
DEVICE void ask_piece(u32 shared, u32* next, const Line& line) {
    if (!turn_shared(shared, UNASKED, ASKED)) return;
    const int number = int(count_global(next));
    const int behind = line.begin_of(number - late_grid() + 1) - line.end;
    if (behind >= 0 && behind < line.piece) *next = 0;  // all pieces, and every other CTA's last question
    tell_shared(shared, u32(number));
}

// Number of the next piece, once somebody has it; whole warps call it.
DEVICE int await_piece(u32 shared) {
    int number = -1;
    if (late_lane() == 0)
        while (number < 0) number = int(look_shared(shared));
    return __shfl_sync(ALL_LANES, number, 0);
}

// As segment_at, for shares and pieces.
DEVICE Segment segment_on_line(int size, const Line& line, int ctas, int share_end, const Place& place,
                               int at) {
    const int start = at - place.index, stop = start + place.row.units;
    const Divisor share = divisor(size), piece = divisor(line.piece);
    const auto number = [&](int unit) {
        return unit < line.tail ? share.floor(unit) : ctas + piece.floor(unit - line.tail);
    };
    const int begins = number(start);
    return {min(share_end, stop), begins, number(stop - 1) - begins + 1, number(at)};
}

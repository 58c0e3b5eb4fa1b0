// Decode attention for Hopper: one warp owns one unit, and memory is the only limit.
//
// A warp multiplies a record with all heads of a head block alone: no barrier and no traffic between
// warps inside the loop. It has one slot of shared memory; the K part of its next unit is fetched as
// soon as the scores are in registers, the V part after the second product, so some 70 % of all slots
// are in flight. Codes go into the tensor cores as they are (codes.cuh); scales are folded into the
// query (K) and the probabilities (V). Shares of work: schedule.cuh. The warps of a CTA merge at the
// end of a (request, head block); the CTA that comes last adds the partials of all, in their order,
// so results do not depend on which one that is. Queries are asked for early: the first before the
// first record is found, the next before a merge.
//
// Bytes per unit: RECORD_BYTES. Traded away: batch invariance, because the cuts follow the batch;
// and more heads of a KV head than HEADS read its records again.
#include "attend.cuh"
#include "channels.cuh"
#include "merge.cuh"
#include "schedule.cuh"

// Defined by the launcher: WARPS, CTAS of a processor, HEADS of a head block (8 or 16), QUERY.
constexpr int QUERY_AT = WARPS * RECORD_BYTES;
constexpr int REGIONS_AT = QUERY_AT + TILES * QUERY_BYTES;  // a warp keeps probabilities, then outputs there
constexpr int STATES_AT = REGIONS_AT + WARPS * REGION_BYTES;
constexpr int BARRIERS_AT = STATES_AT + WARPS * STATE_BYTES;
constexpr int NOTES_AT = BARRIERS_AT + WARPS * 16;  // of each warp: what it needs once per head block
constexpr int SHARED_BYTES = NOTES_AT + WARPS * 32;
static_assert(SHARED_BYTES == EXPECTED_SHARED_BYTES, "the launcher asks for another size");
static_assert(TILES * STRIP_BYTES <= REGION_BYTES, "the probabilities of a unit fit the region of a warp");

// Query of a head block as it is in memory: on its way while the first records are found and fetched.
DEVICE void ask_query(Words (&words)[HEADS_OF_WARP], const Element* query, int count) {
#pragma unroll
    for (int h = 0; h < HEADS_OF_WARP; h++) {
#pragma unroll
        for (int i = 0; i < WORDS; i++) words[h].x[i] = 0;
        if (head_of_warp(h) < count) words[h] = load_words(query + u64(head_of_warp(h)) * D);
    }
}

// The same rotated, times scale, in B-fragment order; heads that do not exist are zero.
DEVICE void leave_query(u32 to, const Words (&words)[HEADS_OF_WARP], float scale) {
    const int first = late_lane() * CHANNELS;
#pragma unroll
    for (int h = 0; h < HEADS_OF_WARP; h++) {
        const int head = head_of_warp(h);
        if (HEADS % WARPS && head >= HEADS) break;
        Channels c = channels_of(words[h]);
        rotate(c);
#pragma unroll
        for (int i = 0; i < CHANNELS; i += 2) {
            const int channel = first + i, step = channel / 16, k = channel % 16;
            const u32 at = head / 8 * QUERY_BYTES + step / 2 * 512 + (head % 8 * 4 + k % 8 / 2) * 16 +
                           step % 2 * 8 + k / 8 * 4;
            store_shared(to + at, pack_halves(c.x[i] * scale, c.x[i + 1] * scale));
        }
    }
}

// First query head of the head block at a place, and how many there are.
DEVICE int head_of(const Place& at, int ratio) { return at.head * ratio + at.block * HEADS; }
DEVICE int heads_of(const Place& at, int ratio) { return min(HEADS, ratio - at.block * HEADS); }

// Fixed grid. `counters` [requests * head blocks] are zero before and after a launch.
KERNEL void __launch_bounds__(WARPS * 32, CTAS)
decode_kernel(const Element* query, const u8* cache, const int* table, const int* lengths, Element* out,
              float* lse, float* partials, u32* counters, float scale, int table_stride,
              int query_stride, int out_stride, int requests, int kv_heads, int ratio, int blocks,
              int pairs, int least, int slack, u32 inverse_ctas, u32 inverse_columns, u32 inverse_pairs,
              u32 inverse_blocks) {
    DYNAMIC_SHARED(shared);
    const u32 base = shared_address(shared);
    const int lane = threadIdx.x % 32, warp = __shfl_sync(ALL_LANES, int(threadIdx.x) / 32, 0);
    const u32 regions = base + REGIONS_AT, region = regions + warp * REGION_BYTES;
    const u32 states = base + STATES_AT, ready = base + BARRIERS_AT + warp * 16;
    const u32 note = base + NOTES_AT + warp * 32;  // slot, origin, size; begins, parts
    const Slot slot{base + warp * RECORD_BYTES, base + QUERY_AT, region, ready, ready + 8,
                    stream_policy()};
    if (lane == 0) {
        barrier_init(slot.key_ready, 1);
        barrier_init(slot.value_ready, 1);
        barrier_init_fence();
    }
    __syncwarp();

    const Batch batch{table, lengths, u64(table_stride), requests, kv_heads, blocks, pairs};
    Place place;
    const Inverses inverses{inverse_ctas, inverse_columns, inverse_pairs, inverse_blocks};
    const Share share = take_share(batch, inverses, int(blockIdx.x), int(gridDim.x), least, slack, place);
    if (lane == 0) store_shared4(note, {u32(share.slot), u32(share.origin), u32(share.size), 0});
    __syncwarp();
    Words words[HEADS_OF_WARP];
    const auto ask = [&] {
        const Element* const rows = query + u64(place.request) * query_stride;
        ask_query(words, rows + head_of(place, ratio) * D, heads_of(place, ratio));
    };
    if (share.begin < share.end) ask();
    Place ahead = place;  // of the unit that this warp fetches
    int fetched = share.begin + warp;
    Unit next{nullptr, 0, 0};
    if (fetched < share.end) {
        advance(batch, ahead, warp);
        next = locate(batch, cache, ahead);
        if (lane == 0) {
            if (next.count) {
                fetch_rows(slot, next);
            } else {
                fetch_keys(slot, next);
                fetch_values(slot, next);
            }
        }
    }
    if (share.begin < share.end) leave_query(slot.query, words, scale);
    u32 parity = 0;
    for (int at = share.begin; at < share.end;) {  // units of one head block at a time
        const Segment segment = segment_at(int(load_shared4(note).z), share.end, place, at);
        if (lane == 0) store_shared2(note + 16, {u32(segment.begins), u32(segment.parts)});
        __syncthreads();  // the query is there, and all have read regions and states
        State state;
        clear(state);
        while (fetched < segment.end) {
            const Unit unit = next;
            fetched += WARPS;
            const bool more = fetched < share.end;
            if (more) {
                advance(batch, ahead, WARPS);
                next = locate(batch, cache, ahead);
            }
            const bool early = more && !unit.count && !next.count;  // K part free before V part
            barrier_wait(slot.key_ready, parity);
            if (unit.count) {
                float scores[EXACT_BLOCKS][TILES][4];
                score_rows(slot, unit, scores);
                raise_top(state, scores);
                add_rows(slot, unit, scores, state);
            } else {
                float scores[G / 16][TILES][4];
                score_record(slot, unit.first, scores);
                __syncwarp();
                if (early && lane == 0) fetch_keys(slot, next);
                raise_top(state, scores);
                barrier_wait(slot.value_ready, parity);
                add_record(slot, scores, state);
            }
            __syncwarp();
            if (more && lane == 0) {
                if (next.count) {
                    fetch_rows(slot, next);
                } else {
                    if (!early) fetch_keys(slot, next);
                    fetch_values(slot, next);
                }
            }
            parity ^= 1;
        }
        leave_state(region, states + warp * STATE_BYTES, state);
        const int head = head_of(place, ratio), heads = heads_of(place, ratio);
        Element* const result = out + u64(place.request) * out_stride + head * D;
        float* const result_lse = lse + u64(place.request) * (kv_heads * ratio) + head;
        u32* const counter =
            counters + place.request * batch.pairs + place.head * batch.blocks + place.block;
        const uint2 numbers = load_shared2(note), cut = load_shared2(note + 16);
        const int first = int(numbers.y + cut.x), parts = int(cut.y);
        at = segment.end;
        const bool more = at < share.end;
        if (more) {  // the next query is on its way while warps are merged
            place.index = place.row.units - 1;
            advance(batch, place, 1);
            ask();
        }
        __syncthreads();

        for (int i = warp; i < heads; i += WARPS) {
            Sum sum = merge_warps(regions, states, i);
            if (parts == 1)
                write_result(result + u64(i) * D, result_lse + i, sum);
            else
                write_partial(partials + u64(place_of(int(numbers.x), first, late_grid())) * PARTIAL, i,
                              sum);
        }
        if (more) leave_query(slot.query, words, scale);
        if (parts > 1) {
            __syncthreads();
            bool last = false;
            if (threadIdx.x == 0) {
                last = arrive_global(counter) == u32(parts - 1);
                if (last) *counter = 0;
            }
            if (__syncthreads_or(last)) {
                Sum sums[HEADS_OF_WARP];
                merge_partials(partials + u64(first + late_grid()) * PARTIAL,
                               partials + u64(first + 1) * PARTIAL, parts, heads, sums);
#pragma unroll
                for (int i = 0; i < HEADS_OF_WARP; i++)
                    if (head_of_warp(i) < heads)
                        write_result(result + u64(head_of_warp(i)) * D, result_lse + head_of_warp(i),
                                     sums[i]);
            }
        }
    }

    for (int request = late_block(); request < requests; request += late_grid())  // padded rows
        if (lengths[request] <= 0) {
            const int heads = kv_heads * ratio;
            for (int head = warp; head < heads; head += WARPS) {
                Channels zero;
                clear(zero);
                store_channels(out + u64(request) * out_stride + u64(head) * D, zero);
                if (lane == 0) lse[u64(request) * heads + head] = minus_infinity();
            }
        }
}
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn_core.layout import RING_COLUMN, SINK_COLUMN, RecordLayout, seal_phase
from kvarn_core.ops import gather as gather_op
from kvarn_core.ops import quantize as quantize_op
from kvarn_core.ops.decode import decode
from kvarn_core.ops.gather import gather
from kvarn_core.ops.quantize import quantize
from kvarn_core.ops.store import append, prepare, seal, write_sink
from kvarn_core.rotation import exact_rows
from kvarn_core.spec import DEBUG_PRESETS, PRESETS, Recipe
from kvarn_core.testing import naive
from kvarn_core.testing.compare import assert_same_bits
from kvarn_core.testing.inputs import draw
from kvarn_core.testing.paging import (
    NULL_PAGE,
    Paging,
    allocate,
    chunkings,
    lengths,
    step,
    store_sequence,
)

SMALL = RecordLayout(PRESETS["kvarn_k4v2_g64"], 64)
LAYOUTS = [
    SMALL,
    RecordLayout(PRESETS["kvarn_k2v2_g64"], 64),
    RecordLayout(PRESETS["kvarn_k4v4_g128"], 64),
    RecordLayout(PRESETS["kvarn_k4v2_g128"], 128),
    RecordLayout(PRESETS["kvarn_k2v2_g64"], 256),
    RecordLayout(DEBUG_PRESETS["kvarn_debug32_g64"], 64),
]


def _rows(
    layout: RecordLayout, count: int, seed: int = 0, heads: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (count, heads, layout.head_dim)
    return draw("gaussian", shape, seed=seed), draw("gaussian", shape, seed=seed + 1)


def _records(paging: Paging, request: int, tokens: int) -> torch.Tensor:
    """Records that a query at the newest token reads: [tiles, Hkv, record_bytes]."""
    layout = paging.layout
    packed = layout.packed_tiles(tokens - 1, paging.hits[request])
    first = layout.header_columns
    return paging.cache[paging.page_table[request, first : first + packed].long()]


def _seen(paging: Paging, request: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    key, value, _ = gather(
        paging.cache, paging.page_table[request : request + 1],
        torch.tensor([tokens], dtype=torch.int32), torch.tensor([tokens - 1], dtype=torch.int32),
        layout=paging.layout,
    )  # fmt: skip
    return key, value


def _assert_same_content(one: Paging, i: int, other: Paging, j: int, tokens: int) -> None:
    assert_same_bits(_records(one, i, tokens), _records(other, j, tokens))
    for got, want in zip(_seen(one, i, tokens), _seen(other, j, tokens), strict=True):
        assert_same_bits(got, want)


# --- path independence ----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_pieces_pages_and_layers_do_not_change_a_bit(data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(LAYOUTS))
    total = data.draw(lengths(layout.group, 5 * layout.group))
    chunks = data.draw(chunkings(total, layout.group))
    seed, layer = data.draw(st.integers(0, 99)), data.draw(st.integers(0, 40))
    key, value = _rows(layout, total, seed)
    whole = allocate(layout, [total], seed=1)
    store_sequence(whole, 0, key, value, [total])
    pieces = allocate(layout, [300, total], seed=seed, fill=0x3C)
    store_sequence(pieces, 1, key, value, chunks, layer=layer)
    _assert_same_content(pieces, 1, whole, 0, total)


@pytest.mark.parametrize("name", ["kvarn_k4v2_g128", "kvarn_k2v2_g64"])
def test_token_by_token_equals_one_piece_at_every_length(name: str) -> None:
    layout = RecordLayout(PRESETS[name], 64)
    total = 4 * layout.group + 3
    key, value = _rows(layout, total)
    growing = allocate(layout, [total], seed=3)
    for n in range(1, total + 1):
        store_sequence(growing, 0, key[n - 1 : n], value[n - 1 : n], [1], start=n - 1)
        if n % layout.group in (0, 1, 2, layout.group - 1):
            whole = allocate(layout, [n], seed=4)
            store_sequence(whole, 0, key[:n], value[:n], [n])
            _assert_same_content(growing, 0, whole, 0, n)


def test_a_request_is_the_same_alone_and_in_a_mixed_batch() -> None:
    total = [300, 1, 129, 64]
    rows = [_rows(SMALL, n, seed=i) for i, n in enumerate(total)]
    together = allocate(SMALL, total, seed=5)
    done = [0] * 4
    for sizes in ([200, 1, 0, 63], [0, 0, 128, 0], [1, 0, 0, 1], [99, 0, 1, 0]):
        chunks = []
        for i, size in enumerate(sizes):
            part = slice(done[i], done[i] + size)
            chunks.append((rows[i][0][part], rows[i][1][part]))
            done[i] += size
        step(together, chunks, [d if size else 0 for d, size in zip(done, sizes, strict=True)])
    assert done == total
    for i, n in enumerate(total):
        alone = allocate(SMALL, [n], seed=6)
        store_sequence(alone, 0, *rows[i], [n])
        _assert_same_content(together, i, alone, 0, n)


@pytest.mark.parametrize("hits", [1, 3])
def test_a_prefix_hit_reads_shared_records_and_writes_its_own(hits: int) -> None:
    group, total = SMALL.group, 6 * SMALL.group + 5
    key, value = _rows(SMALL, total)
    paging = allocate(SMALL, [total, total], hits=[0, hits], donors=[0, 0], seed=7)
    store_sequence(paging, 0, key, value, [total])
    before = paging.cache.clone()
    own = paging.own_pages(1)
    store_sequence(
        paging, 1, key[hits * group :], value[hits * group :], [2, 130, total - hits * group - 132],
        start=hits * group,
    )  # fmt: skip
    others = [page for page in range(len(before)) if page not in own]
    assert_same_bits(paging.cache[others], before[others])
    assert_same_bits(_records(paging, 1, total), _records(paging, 0, total))


# --- what is written, and where -------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout", LAYOUTS[:5], ids=lambda layout: f"{layout.preset.name}-d{layout.head_dim}"
)
def test_records_and_exact_rows_hold_what_the_naive_version_expects(layout: RecordLayout) -> None:
    group, dim, total = layout.group, layout.head_dim, 3 * layout.group + 7
    key, value = _rows(layout, total)
    paging = allocate(layout, [total], seed=8)
    store_sequence(paging, 0, key, value, [total])
    table, cache = paging.page_table[0].tolist(), paging.cache.numpy()
    rotated = [exact_rows(x, layout) for x in (key, value)]
    for tile in range(layout.packed_tiles(total - 1)):
        rows = slice(tile * group, (tile + 1) * group)
        want = quantize(*(x[rows].transpose(0, 1) for x in rotated), layout)
        got = paging.cache[table[layout.header_columns + tile]]
        assert_same_bits(got, want)
    doors = [naive.door(x.numpy()) for x in (key, value)]
    places = [
        (token, table[2 + token % (2 * group) // layout.rows_per_page],
         token % (2 * group) % layout.rows_per_page)
        for token in range(total - 2 * group, total)
    ] + [(token, table[SINK_COLUMN], token) for token in range(layout.sink_rows)]  # fmt: skip
    for token, page, row in places:
        for head in range(2):
            got_rows = naive.exact_row(cache[page, head], row, dim)
            for mine, theirs in zip(got_rows, doors, strict=True):
                assert (mine.view(np.int16) == theirs[token, head].view(np.int16)).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_step_writes_only_pages_of_its_requests(data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(LAYOUTS))
    total = data.draw(lengths(layout.group, 4 * layout.group))
    chunks = data.draw(chunkings(total, layout.group))
    paging = allocate(layout, [total, 200, total], seed=data.draw(st.integers(0, 99)))
    key, value = _rows(layout, total)
    store_sequence(paging, 1, key, value, [min(total, 200)])
    before = paging.cache.clone()
    own = set(paging.own_pages(2))
    store_sequence(paging, 2, key, value, chunks)
    others = [page for page in range(len(before)) if page not in own]
    assert_same_bits(paging.cache[others], before[others])


@pytest.mark.parametrize("phase", [0, 1, 31, 62, 63])
def test_every_record_is_written_before_a_query_reads_it(phase: int) -> None:
    total = 5 * SMALL.group
    key, value = _rows(SMALL, total)
    for is_value in (False, True):
        paging = allocate(SMALL, [total], seed=phase)
        page = int(paging.page_table[0, RING_COLUMN])
        layer = next(
            layer
            for layer in range(SMALL.group)
            if seal_phase(page, layer, 0, is_value=is_value, group=SMALL.group) == phase
        )
        for n in range(1, total + 1):
            row = slice(n - 1, n)
            store_sequence(paging, 0, key[row], value[row], [1], start=n - 1, layer=layer)
            records = _records(paging, 0, n)
            unwritten = (records[:, :, -64:] == 0xFF).all(-1) | (records[:, :, :64] == 0xFF).all(-1)
            assert not unwritten.any(), n


def test_sealing_is_spread_over_heads_and_layers() -> None:
    group = SMALL.group
    key, value = _rows(SMALL, 2 * group)
    sealed_at = set()
    for layer in range(4):
        paging = allocate(SMALL, [2 * group], seed=9)
        page = int(paging.page_table[0, SMALL.header_columns])
        for n in range(1, 2 * group + 1):
            before = paging.cache[page].clone()
            store_sequence(
                paging, 0, key[n - 1 : n], value[n - 1 : n], [1], start=n - 1, layer=layer
            )
            if not before.equal(paging.cache[page]):
                assert n > group
                sealed_at.add((layer, n))
        assert not (paging.cache[page] == 0xFF).all()
    assert len({n for _, n in sealed_at}) > 8


def test_sealing_twice_changes_nothing_and_leaves_the_ring_alone() -> None:
    total = 3 * SMALL.group
    key, value = _rows(SMALL, total)
    paging = allocate(SMALL, [total], seed=10)
    store_sequence(paging, 0, key[:100], value[:100], [100])
    where = (paging.page_table, torch.tensor([total]).int(), torch.tensor([0, total - 100]).int())
    new = key[100:], value[100:]
    ring = paging.page_table[0, 2 : SMALL.header_columns].long()
    before = paging.cache[ring].clone()
    seal(*new, paging.cache, *where, layout=SMALL)
    once = paging.cache.clone()
    seal(*new, paging.cache, *where, layout=SMALL)
    assert_same_bits(paging.cache, once)
    assert_same_bits(paging.cache[ring], before)


def test_appending_token_by_token_needs_no_other_call_for_the_sink() -> None:
    key, value = _rows(SMALL, 40)
    appended, stepped = (allocate(SMALL, [40], seed=18) for _ in range(2))
    for n in range(1, 41):
        where = (appended.page_table, torch.tensor([n]).int(), torch.tensor([0, 1]).int())
        append(key[n - 1 : n], value[n - 1 : n], appended.cache, *where, layout=SMALL)
    store_sequence(stepped, 0, key, value, [40])
    assert_same_bits(appended.cache, stepped.cache)


def test_decode_rows_may_be_appended_before_they_seal() -> None:
    total = 4 * SMALL.group
    key, value = _rows(SMALL, total)
    early, late = (allocate(SMALL, [total], seed=19) for _ in range(2))
    for n in range(1, total + 1):
        new = key[n - 1 : n], value[n - 1 : n]
        where = (early.page_table, torch.tensor([n]).int(), torch.tensor([0, 1]).int())
        append(*new, early.cache, *where, layout=SMALL)
        seal(*new, early.cache, *where, layout=SMALL)
        store_sequence(late, 0, *new, [1], start=n - 1)
        assert_same_bits(early.cache, late.cache)


def test_the_null_page_is_never_a_sink() -> None:
    key, value = _rows(SMALL, 200)
    paging = allocate(SMALL, [200], sink=False, seed=11)
    store_sequence(paging, 0, key, value, [3, 197])
    assert (paging.cache[NULL_PAGE] == 0xFF).all()


@pytest.mark.parametrize(("new", "length"), [(0, 0), (0, 150), (3, 0), (3, 2)])
def test_rows_without_tokens_do_nothing(new: int, length: int) -> None:
    paging = allocate(SMALL, [200], seed=12)
    paging.page_table[:] = 10**6  # the table of a padded row is not read
    before = paging.cache.clone()
    key, value = _rows(SMALL, new)
    where = (paging.page_table, torch.tensor([length]).int(), torch.tensor([0, new]).int())
    for op in (write_sink, seal, append):
        op(key, value, paging.cache, *where, layout=SMALL)
        assert_same_bits(paging.cache, before)


@pytest.mark.parametrize("name", ["nan", "inf", "saturating", "zero", "constant", "denormal"])
def test_bad_input_of_one_request_does_not_reach_another(name: str) -> None:
    total = 3 * SMALL.group + 1
    key, value = _rows(SMALL, total)
    results = []
    for kind in ("gaussian", name):
        bad = draw(kind, key.shape, seed=14)
        paging = allocate(SMALL, [total, total], seed=13)
        step(paging, [(bad, bad), (key, value)], [total, total])
        assert all(x.isfinite().all() for x in _seen(paging, 0, total))
        results.append(_seen(paging, 1, total))
    for got, want in zip(*results, strict=True):
        assert_same_bits(got, want)


def test_the_recipe_reaches_the_records() -> None:
    key, value = (0.01 * x for x in _rows(SMALL, 200))
    records = []
    for recipe in (Recipe.KVARN, Recipe.PAPER):
        paging = allocate(SMALL, [200], seed=15)
        store_sequence(paging, 0, key, value, [200], recipe=recipe)
        records.append(_records(paging, 0, 200))
    assert (records[0] != records[1]).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_strided_half_precision_input_is_widened_exactly(dtype: torch.dtype) -> None:
    both = draw("gaussian", (150, 4, 64), seed=16, dtype=dtype)
    key, value = both[:, :2], both[:, 2:]
    paging, want = allocate(SMALL, [150], seed=17), allocate(SMALL, [150], seed=17)
    store_sequence(paging, 0, key, value, [150])
    store_sequence(want, 0, key.float().clone(), value.float().clone(), [150])
    assert_same_bits(paging.cache, want.cache)


def test_wrong_shapes_are_named() -> None:
    paging = allocate(SMALL, [100])
    key, value = _rows(SMALL, 10)
    where = tuple(torch.tensor(x, dtype=torch.int32) for x in ([10], [0, 10]))
    with pytest.raises(ValueError, match=r"^value has shape \(10, 1, 64\)\. Pass \[T, 2, 64\]\.$"):
        seal(key, value[:, :1], paging.cache, paging.page_table, *where, layout=SMALL)
    with pytest.raises(ValueError, match=r"Pass uint8 \[P, Hkv, 3840\] for kvarn_k4v2_g64\.$"):
        append(key, value, paging.cache[:, :, 1:], paging.page_table, *where, layout=SMALL)
    with pytest.raises(ValueError, match=r"needs 11 for the header alone\.$"):
        append(key, value, paging.cache, paging.page_table[:, :10], *where, layout=SMALL)
    with pytest.raises(ValueError, match=r"^cache has dtype torch\.int8 .* Pass uint8 "):
        append(key, value, paging.cache.char(), paging.page_table, *where, layout=SMALL)
    with pytest.raises(ValueError, match=r"^key has 10 rows and value 9\. Pass equally many\.$"):
        append(key, value[:9], paging.cache, paging.page_table, *where, layout=SMALL)
    with pytest.raises(ValueError, match=r"^page_table has .* Pass int32 and 1 rows for 1"):
        append(key, value, paging.cache, paging.page_table[:0], *where, layout=SMALL)
    with pytest.raises(ValueError, match=r"^cu_seqlens_q has .* Pass int32 and 2 rows"):
        append(key, value, paging.cache, paging.page_table, where[0], where[1][:1], layout=SMALL)


def test_the_reference_asks_for_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for op in (quantize_op, gather_op):
        monkeypatch.setattr(
            op, "select", lambda device, layout, engine=None, **_: asked.append(engine) or engine
        )
    key, value = _rows(SMALL, 150)
    paging = allocate(SMALL, [150])
    lists = (torch.tensor(x, dtype=torch.int32) for x in ([150], [0, 150]))
    where = paging.cache, paging.page_table, *lists
    for op in (write_sink, seal, append):
        op(key, value, *where, layout=SMALL, engine="reference")
    lens = torch.tensor([150], dtype=torch.int32)
    decode(torch.randn(1, 4, 64), *where[:2], lens, layout=SMALL, sm_scale=0.1, engine="reference")
    assert len(asked) > 2
    assert set(asked) == {"reference"}


def test_an_op_that_is_none_is_refused() -> None:
    key, value = _rows(SMALL, 1)
    paging = allocate(SMALL, [1])
    where = (torch.tensor(x, dtype=torch.int32) for x in ([1], [0, 1]))
    with pytest.raises(
        ValueError, match=r"^There is no op 'write'\. Choose one of write_sink, seal"
    ):
        prepare("write", key, value, paging.cache, paging.page_table, *where, layout=SMALL)

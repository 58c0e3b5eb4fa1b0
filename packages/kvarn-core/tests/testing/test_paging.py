from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn_core.layout import HIT_COLUMN, SINK_COLUMN, RecordLayout
from kvarn_core.spec import PRESETS
from kvarn_core.testing.paging import NULL_PAGE, allocate, chunkings, layouts, lengths


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data(), layout=layouts(), seed=st.integers(0, 999))
def test_requests_own_their_pages_and_there_are_holes(
    data: st.DataObject, layout: RecordLayout, seed: int
) -> None:
    capacities = data.draw(st.lists(lengths(layout.group, 300), min_size=1, max_size=4))
    paging = allocate(layout, capacities, num_kv_heads=1, seed=seed)
    owned = [page for row in range(len(capacities)) for page in paging.own_pages(row)]
    assert len(owned) == len(set(owned)), "no page has two owners"
    assert NULL_PAGE not in owned
    assert len(set(owned)) < paging.cache.shape[0] - 1, "some pages belong to nobody"
    for row, capacity in enumerate(capacities):
        assert paging.own_pages(row) == paging.used_pages(row)
        assert len(paging.used_pages(row)) == layout.columns(capacity) - 1
    assert paging.page_table.shape[1] > max(layout.columns(n) for n in capacities)


def test_hits_share_records_and_have_no_sink() -> None:
    layout = RecordLayout(PRESETS["kvarn_k4v2_g64"], 64)
    paging = allocate(layout, [400, 400], hits=[0, 3], donors=[0, 0])
    first = layout.header_columns
    table = paging.page_table
    assert table[1, HIT_COLUMN] == 3
    assert table[1, SINK_COLUMN] == NULL_PAGE
    assert table[0, first : first + 3].equal(table[1, first : first + 3])
    assert not set(paging.own_pages(1)) & set(paging.own_pages(0))


def test_poison_covers_exactly_the_pages_nobody_reads() -> None:
    layout = RecordLayout(PRESETS["kvarn_k4v2_g64"], 64)
    paging = allocate(layout, [100, 400], fill=0)
    paging.poison_unused(0x3C)
    poisoned = (paging.cache == 0x3C).all(2).all(1).nonzero().flatten().tolist()
    used = set(paging.used_pages(0)) | set(paging.used_pages(1))
    assert set(poisoned) == set(range(len(paging.cache))) - used
    assert not paging.cache[sorted(used)].any()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), group=st.sampled_from((64, 128)))
def test_chunks_add_up(data: st.DataObject, group: int) -> None:
    total = data.draw(lengths(group, 700))
    chunks = data.draw(chunkings(total, group))
    assert 1 <= total <= 700
    assert sum(chunks) == total
    assert all(1 <= chunk <= 4 * group + 1 for chunk in chunks)

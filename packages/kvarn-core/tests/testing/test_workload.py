from __future__ import annotations

import pytest
import torch

from kvarn_core.layout import HIT_COLUMN, RING_COLUMN, SINK_COLUMN, RecordLayout
from kvarn_core.ops.decode import decode
from kvarn_core.spec import PRESETS
from kvarn_core.testing.workload import (
    decode_bytes,
    dense_decode_bytes,
    exact_rows,
    lengths,
    page_tables,
    random_cache,
    record_tables,
    tiles_in,
)

K4V2 = RecordLayout(PRESETS["kvarn_k4v2_g128"], 128)
SMALL = RecordLayout(PRESETS["kvarn_k4v2_g64"], 64)


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_lengths_end_anywhere_in_the_last_tile(batch: int) -> None:
    found = lengths(batch, 4096)
    assert len(found) == batch
    assert all(4096 - 128 < n <= 4096 for n in found)
    assert found == lengths(batch, 4096)
    assert abs(sum(found) / batch - 4032) < 64 / batch + 1


def test_mixed_lengths_spread_tenfold() -> None:
    found = lengths(64, 10_000, mixed=True)
    assert all(1000 <= n <= 10_000 for n in found)
    assert max(found) > 5 * min(found)


@pytest.mark.parametrize(
    ("tokens", "rows"), [(1, 1), (128, 128), (256, 256), (257, 129 + 27), (384, 283), (385, 156)]
)
def test_exact_rows_are_the_ring_window_and_the_sink(tokens: int, rows: int) -> None:
    assert exact_rows(K4V2, tokens) == rows


def test_bytes_of_a_decode_step_counted_by_hand() -> None:
    # 300 tokens: one record, 172 ring rows, 27 sink rows; query and output of 64 heads
    assert decode_bytes(K4V2, [300], 64, 8) == 8 * (13_824 + 199 * 512) + 64 * 128 * 4
    assert dense_decode_bytes(8 * 128 * 4, [300], 64, 128) == 300 * 4096 + 64 * 128 * 4


def test_a_long_context_is_four_times_smaller_than_fp16() -> None:
    batch = lengths(32, 16_384)
    ratio = dense_decode_bytes(8 * 128 * 4, batch, 64, 128) / decode_bytes(K4V2, batch, 64, 8)
    assert 4.4 < ratio < 4.6


def test_no_two_requests_and_no_two_sets_share_a_page() -> None:
    tables, pages = page_tables([3, 7, 1], sets=4, seed=1)
    assert tables.shape == (4, 3, 7)
    used = tables[tables > 0].tolist()
    assert sorted(used) == list(range(1, pages))
    assert used != sorted(used)
    assert ((tables > 0).sum(-1) == torch.tensor([3, 7, 1])).all()


def test_record_tables_have_a_header_and_the_records() -> None:
    tables, pages = record_tables(SMALL, [1, 200], sets=2)
    assert tables.shape == (2, 2, SMALL.columns(200))
    assert (tables[..., HIT_COLUMN] == 0).all()
    assert (tables[..., SINK_COLUMN : SMALL.columns(1)] > 0).all()
    assert (tables[:, 1, SINK_COLUMN:] > 0).all()
    assert tables.max() < pages


def test_a_random_cache_is_readable() -> None:
    batch = [300, 64]
    tables, pages = record_tables(SMALL, batch, sets=2)
    cache = random_cache(SMALL, tables, pages, 2, device=torch.device("cpu"))
    query = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0))
    lens = torch.tensor(batch, dtype=torch.int32)
    first, second = (
        decode(query, cache, table, lens, layout=SMALL, sm_scale=0.125)[0] for table in tables
    )
    for out in (first, second):
        assert out.isfinite().all()
        assert 1e-3 < out.abs().mean() < 10
    assert not torch.equal(first, second)


def test_ring_pages_hold_rows_and_record_pages_hold_codes() -> None:
    tables, pages = record_tables(SMALL, [300])
    cache = random_cache(SMALL, tables, pages, 1, device=torch.device("cpu"))
    ring = cache[tables[0, 0, RING_COLUMN].item()].view(torch.float16)
    assert 0.9 < ring.float().std() < 1.1
    record = cache[tables[0, 0, SMALL.header_columns].item()]
    scale = record[:, SMALL.fields["k_scale"].offset : SMALL.fields["k_scale"].end]
    assert ((scale.view(torch.float16) > 0) & (scale.view(torch.float16) < 0.1)).all()


@pytest.mark.parametrize(("first", "last", "tiles"), [(0, 127, 0), (0, 128, 1), (100, 300, 2)])
def test_tiles_completed(first: int, last: int, tiles: int) -> None:
    assert tiles_in(first, last, 128) == tiles

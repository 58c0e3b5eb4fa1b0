from __future__ import annotations

import pytest
import torch

from kvarn_core.exact import read_rows, ring_pages, write_rows
from kvarn_core.layout import HEAD_DIMS, RecordLayout
from kvarn_core.rotation import to_fp16
from kvarn_core.spec import DEBUG_PRESETS, PRESETS
from kvarn_core.testing import naive
from kvarn_core.testing.compare import assert_same_bits
from kvarn_core.testing.inputs import draw

LAYOUTS = [RecordLayout(preset, dim) for preset in PRESETS.values() for dim in HEAD_DIMS]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.preset.name}-d{x.head_dim}")
def test_every_row_of_a_page_comes_back_and_lies_where_it_should(layout: RecordLayout) -> None:
    per_page, dim = layout.rows_per_page, layout.head_dim
    cache = torch.full((5, 2, layout.record_bytes), 0xFF, dtype=torch.uint8)
    pages, rows = torch.tensor([3, 1], dtype=torch.int32), torch.arange(2 * per_page)
    key, value = (to_fp16(draw("gaussian", (len(rows), 2, dim), seed=seed)) for seed in (1, 2))
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))
    write_rows(cache, pages, rows[shuffled], key[shuffled], value[shuffled], layout)
    for got, want in zip(read_rows(cache, pages, rows, layout), (key, value), strict=True):
        assert_same_bits(got, want)
    for row in rows.tolist():
        for head in range(2):
            page = cache[3 if row < per_page else 1, head].numpy()
            stored = naive.exact_row(page, row % per_page, dim)
            assert_same_bits(torch.from_numpy(stored[0].copy()), key[row, head])
            assert_same_bits(torch.from_numpy(stored[1].copy()), value[row, head])
    assert (cache[[0, 2, 4]] == 0xFF).all()
    assert (cache[:, :, per_page * layout.row_bytes :] == 0xFF).all()


def test_debug_rows_are_fp32() -> None:
    layout = RecordLayout(DEBUG_PRESETS["kvarn_debug32_g64"], 64)
    cache = torch.zeros(2, 1, layout.record_bytes, dtype=torch.uint8)
    key, value = draw("gaussian", (2, 27, 1, 64), seed=4).unbind(0)
    pages, rows = torch.tensor([1]), torch.arange(27)
    write_rows(cache, pages, rows, key, value, layout)
    for got, want in zip(read_rows(cache, pages, rows, layout), (key, value), strict=True):
        assert_same_bits(got, want)


def test_the_ring_is_the_part_of_the_table_between_sink_and_records() -> None:
    layout = RecordLayout(PRESETS["kvarn_k4v2_g128"], 128)
    assert ring_pages(torch.arange(20), layout).tolist() == list(range(2, 12))

"""What ops ask of the cache and of lists; each op's own tests show that it asks."""

from __future__ import annotations

import pytest
import torch

from kvarn_core.checks import check_cache, check_dense, check_requests
from kvarn_core.layout import RecordLayout
from kvarn_core.spec import PRESETS

LAYOUT = RecordLayout(PRESETS["kvarn_k4v2_g64"], 64)
TABLE = torch.zeros(2, LAYOUT.header_columns, dtype=torch.int32)
TWO = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize("shape", [(4, 3840), (4, 2, 3839)])
def test_a_cache_of_another_shape_is_named(shape: tuple[int, ...]) -> None:
    check_cache(torch.zeros(4, 2, 3840, dtype=torch.uint8), LAYOUT)
    with pytest.raises(ValueError, match=r"^cache has .* Pass uint8 \[P, Hkv, 3840\]"):
        check_cache(torch.zeros(shape, dtype=torch.uint8), LAYOUT)


def test_prefix_sums_have_one_entry_more() -> None:
    check_requests(2, LAYOUT, TABLE, lens=TWO, cu_lens=torch.zeros(3).int(), absent=None)
    with pytest.raises(ValueError, match=r"^cu_lens has .* and 2 rows\. Pass int32 and 3 rows"):
        check_requests(2, LAYOUT, TABLE, lens=TWO, cu_lens=TWO)
    with pytest.raises(ValueError, match=r"^lens has .* and 2 rows\. Pass int32 and 3 rows"):
        check_requests(3, LAYOUT, torch.cat([TABLE, TABLE]), lens=TWO)
    with pytest.raises(ValueError, match=r"^page_table has 10 columns\. kvarn_k4v2_g64 needs 11"):
        check_requests(2, LAYOUT, TABLE[:, :10])


def test_rows_may_be_apart_but_not_their_elements() -> None:
    wide = torch.zeros(2, 40, dtype=torch.int32)
    check_dense(wide[:, :20], lens=TWO, absent=None)
    with pytest.raises(ValueError, match=r"^page_table has strides \(40, 2\)"):
        check_dense(wide[:, ::2], lens=TWO)
    with pytest.raises(ValueError, match=r"^lens has strides \(2,\)\. Pass it contiguous\.$"):
        check_dense(wide, lens=torch.zeros(4)[::2])

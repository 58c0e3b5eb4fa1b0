from __future__ import annotations

import numpy as np
import pytest
import torch

from kvarn_core.layout import RecordLayout, m_order
from kvarn_core.ops.quantize import quantize
from kvarn_core.spec import PRESETS, Recipe
from kvarn_core.testing.inputs import spread_tiles
from kvarn_core.testing.records import assert_equivalent_records, edge_moves

LAYOUT = RecordLayout(PRESETS["kvarn_k4v2_g64"], 64)
KEY, VALUE = (
    spread_tiles(2, 64, 64, row_spread=0.3, col_spread=0.3, seed=seed).half() for seed in (1, 2)
)


def _records() -> torch.Tensor:
    return quantize(KEY, VALUE, LAYOUT, engine="reference")


def _halves(records: torch.Tensor, name: str) -> torch.Tensor:
    """A record field as fp16 bit patterns that can be changed in place."""
    field = LAYOUT.fields[name]
    return records[:, field.offset : field.end].view(torch.int16)


def test_equal_records_are_equivalent() -> None:
    assert_equivalent_records(_records(), _records(), KEY, VALUE, LAYOUT)


def test_one_factor_may_differ_by_one_unit() -> None:
    records = _records()
    _halves(records, "k_token_scale")[0, 5] += 1
    assert_equivalent_records(records, _records(), KEY, VALUE, LAYOUT)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("k_token_scale", 30, "key: a factor differs by 30"),
        ("v_scale", 400, "value 1: squared errors"),
    ],
)
def test_a_wrong_number_is_found(name: str, change: int, message: str) -> None:
    records = _records()
    _halves(records, name)[1, 7] += change
    with pytest.raises(AssertionError, match=message):
        assert_equivalent_records(records, _records(), KEY, VALUE, LAYOUT)


@pytest.mark.parametrize(
    ("on_edge", "share", "allowed"),
    [(True, 1.0, True), (True, -1.0, False), (True, 2.0, False), (False, 1.0, False)],
)
def test_a_factor_may_follow_one_code_on_an_edge(
    on_edge: bool, share: float, allowed: bool
) -> None:
    moves = edge_moves(VALUE[:1].float(), 2, Recipe.KVARN, is_value=True)  # [G, D]
    at = np.unravel_index(np.abs(moves).argmax(), moves.shape)
    column = at[1] if on_edge else int(np.abs(moves).max(0).argmin())
    assert abs(moves[at]) > 0.03, "more than the 1 % that every factor may differ by"
    records = _records()
    factors = _halves(records, "v_channel_scale").view(torch.float16)
    factors[0, m_order(column)] *= 1 + share * float(moves[at])
    if allowed:
        assert_equivalent_records(records, _records(), KEY, VALUE, LAYOUT)
        return
    with pytest.raises(AssertionError, match="value: a factor differs by"):
        assert_equivalent_records(records, _records(), KEY, VALUE, LAYOUT)


def test_many_small_differences_are_found() -> None:
    records = _records()
    _halves(records, "v_channel_scale")[0, :16] += 2
    with pytest.raises(AssertionError, match=r"value: only 87\.5000% of the factors differ by at"):
        assert_equivalent_records(records, _records(), KEY, VALUE, LAYOUT)


def test_wrong_codes_are_found() -> None:
    records = _records()
    records[0, 0] ^= 0b0010  # one code by two steps
    with pytest.raises(AssertionError, match="key: a code differs by 2 where factors are equal"):
        assert_equivalent_records(records, _records(), KEY, VALUE, LAYOUT)
    records = _records()
    records[:, LAYOUT.fields["v_codes"].offset :][:, :32] ^= 1
    with pytest.raises(AssertionError, match="of the codes differ by at most 0"):
        assert_equivalent_records(records, _records(), KEY, VALUE, LAYOUT)


def test_a_gauge_may_differ_by_a_power_of_two() -> None:
    records = _records()
    field = LAYOUT.fields
    for name, factor in (("k_token_scale", 2.0), ("k_scale", 0.5), ("k_zero", 0.5)):
        part = records[:, field[name].offset : field[name].end].view(torch.float16)
        part *= factor
    assert_equivalent_records(records, _records(), KEY, VALUE, LAYOUT)


def test_the_published_recipe_may_stop_at_a_proportional_pass() -> None:
    records = _records()
    field = LAYOUT.fields["k_token_scale"]
    records[:, field.offset : field.end].view(torch.float16).mul_(1.0625)
    with pytest.raises(AssertionError, match="key: only"):
        assert_equivalent_records(records, _records(), KEY, VALUE, LAYOUT)
    part = records[:, LAYOUT.fields["k_scale"].offset : LAYOUT.fields["k_zero"].end]
    part.view(torch.float16).div_(1.0625)
    assert_equivalent_records(records, _records(), KEY, VALUE, LAYOUT, Recipe.PAPER)

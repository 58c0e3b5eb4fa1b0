from __future__ import annotations

import pytest
import torch

from kvarn_core.testing.compare import (
    assert_as_good_as,
    assert_close,
    assert_same_bits,
    assert_same_specials,
    relative_error,
)

NAN, INF = float("nan"), float("inf")


def test_special_values_must_stand_at_the_same_places() -> None:
    x = torch.tensor([[1.0, NAN], [INF, -INF]])
    assert_same_specials(x, x.clone())
    with pytest.raises(
        AssertionError, match=r"NaN differ in 1 of 4 elements, first at \[\(0, 1\)\]"
    ):
        assert_same_specials(torch.tensor([[1.0, 2.0], [INF, -INF]]), x)
    with pytest.raises(AssertionError, match=r"\+inf differ in 1 of 4"):
        assert_same_specials(torch.tensor([[1.0, NAN], [-INF, -INF]]), x)


def test_relative_error() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == 0.1
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.tensor([1.0]), torch.tensor([0.0])) == INF
    assert relative_error(torch.tensor([1.0, INF]), torch.tensor([1.0, INF])) == 0.0


def test_close_and_as_good_as_fail_beyond_their_bounds() -> None:
    want = torch.ones(8)
    got = want.clone()
    got[5] += 0.01
    assert_close(got, want, tolerance=0.004)
    with pytest.raises(AssertionError, match=r"> 3\.0e-03, worst at \(5,\)"):
        assert_close(got, want, tolerance=0.003)
    low = want + 0.002
    assert_as_good_as(got, want, low)
    with pytest.raises(AssertionError, match=r"allowed 2\.000e-03"):
        assert_as_good_as(got, want, low, factor=1.0)


def test_bits_tell_signs_of_zero_and_dtypes_apart() -> None:
    assert_same_bits(torch.tensor([NAN]), torch.tensor([NAN]))
    with pytest.raises(
        AssertionError, match=r"bits differ in 1 of 2 elements, first at \[\(1,\)\]"
    ):
        assert_same_bits(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0]))
    with pytest.raises(AssertionError, match="dtypes"):
        assert_same_bits(torch.zeros(1), torch.zeros(1).double())
    with pytest.raises(AssertionError, match="shapes"):
        assert_same_bits(torch.zeros(1), torch.zeros(2))

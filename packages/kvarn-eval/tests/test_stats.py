from __future__ import annotations

import math

import numpy as np
import pytest

from kvarn_eval.schema import Verdict
from kvarn_eval.stats import (
    mcnemar,
    mean_interval,
    non_inferiority,
    ratio_samples,
    score_interval,
    speed_change,
    upper_share,
)


def test_equal_data_give_equal_intervals() -> None:
    values = np.random.default_rng(0).normal(size=40).tolist()
    assert mean_interval(values) == mean_interval(values)


def test_the_interval_has_the_width_of_the_standard_error() -> None:
    values = np.random.default_rng(1).normal(size=400).tolist()
    low, high = mean_interval(values)
    expected = 2 * 1.96 * np.std(values) / np.sqrt(len(values))
    assert (high - low) == pytest.approx(expected, rel=0.05)
    assert low < np.mean(values) < high


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    hits = [low < 0 < high for low, high in (mean_interval(rng.normal(size=60)) for _ in range(60))]
    assert 51 <= sum(hits) <= 60


def test_paired_units_give_a_narrow_ratio() -> None:
    difficulty = np.random.default_rng(3).lognormal(sigma=2, size=30)
    samples = ratio_samples((0.4 * difficulty).tolist(), difficulty.tolist())
    assert samples == pytest.approx(0.4)


def test_strata_remove_the_difference_between_families() -> None:
    values, family = [0.0] * 20 + [1.0] * 20, ["a"] * 20 + ["b"] * 20
    assert mean_interval(values, family) == (0.5, 0.5)
    low, high = mean_interval(values)
    assert low < 0.5 < high


@pytest.mark.parametrize(("top", "bottom"), [([], []), ([1.0], [1.0, 2.0])])
def test_units_must_pair(top: list[float], bottom: list[float]) -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        ratio_samples(top, bottom)


@pytest.mark.parametrize(
    ("lost", "won", "items", "verdict"),
    [
        (0, 0, 300, Verdict.PASS),
        (0, 0, 200, Verdict.INCONCLUSIVE),  # nothing lost of too few
        (6, 0, 1024, Verdict.INCONCLUSIVE),
        (4, 0, 1024, Verdict.PASS),
        (50, 10, 2000, Verdict.FAIL),  # 2 points lost
        (4, 3, 200, Verdict.INCONCLUSIVE),  # half a point lost on too few items
        (10, 10, 2000, Verdict.PASS),
        (20, 0, 2000, Verdict.FAIL),  # exactly the margin
    ],
)
def test_non_inferiority_at_a_margin_of_one_point(
    lost: int, won: int, items: int, verdict: Verdict
) -> None:
    differences = [-1.0] * lost + [1.0] * won + [0.0] * (items - lost - won)
    assert non_inferiority(differences, 0.01).verdict is verdict


def test_to_lose_more_never_helps() -> None:
    bounds = [
        non_inferiority([-lost, *[0.0] * 15], 0.1).lower_bound for lost in (0.0, 0.25, 0.5, 1.0)
    ]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[1] < bounds[0] < -0.1


@pytest.mark.parametrize(
    ("scores", "low", "high"),  # Clopper-Pearson, by the beta distribution
    [
        ([1.0] * 64, 0.025 ** (1 / 64), 1.0),
        ([0.0] * 16, 0.0, 0.20591),
        ([1.0] * 62 + [0.5] * 2, 0.91598, 1.0),  # one item was lost, 63 won
    ],
)
def test_an_interval_of_few_scores_is_no_narrower_than_the_exact_one(
    scores: list[float], low: float, high: float
) -> None:
    assert score_interval(scores) == (pytest.approx(low, abs=1e-5), pytest.approx(high, abs=2e-3))


@pytest.mark.parametrize(
    ("count", "total", "bound"),  # by the beta distribution
    [(0, 200, 1 - 0.05 ** (1 / 200)), (1, 10, 0.39416), (5, 5, 1.0), (24, 1024, 0.03280)],
)
def test_the_exact_bound_of_a_share(count: int, total: int, bound: float) -> None:
    assert upper_share(count, total) == pytest.approx(bound, abs=1e-5)


def test_a_gate_passes_a_loss_of_the_margin_once_in_twenty() -> None:
    margin, items = 0.01, 1024
    passing = [
        lost for lost in range(30)
        if non_inferiority([-1.0] * lost + [0.0] * (items - lost), margin).verdict is Verdict.PASS
    ]  # fmt: skip
    chance = sum(
        math.comb(items, lost) * margin**lost * (1 - margin) ** (items - lost) for lost in passing
    )
    assert 0.01 < chance <= 0.05


@pytest.mark.parametrize(
    ("only_reference", "only_tested", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (6, 0, 2 / 64), (1, 8, 20 / 512)],
)
def test_mcnemar_is_the_exact_binomial(only_reference: int, only_tested: int, p: float) -> None:
    assert mcnemar(only_reference, only_tested) == pytest.approx(p)


@pytest.mark.parametrize(
    ("base", "head", "higher", "loss", "verdict"),
    [
        ([100.0] * 5, [104.0] * 5, False, 0.04, Verdict.PASS),
        ([100.0] * 5, [106.0] * 5, False, 0.06, Verdict.FAIL),
        ([100.0] * 5, [94.0] * 5, False, -0.06, Verdict.PASS),
        ([100.0] * 5, [94.0] * 5, True, 0.06, Verdict.FAIL),
        ([100.0] * 5, [106.0] * 5, True, -0.06, Verdict.PASS),
        ([100.0] * 5, [106.0] * 4, False, 0.06, Verdict.INCONCLUSIVE),
        ([96.0, 98.0, 100.0, 102.0, 104.0], [107.0] * 5, False, 0.07, Verdict.INCONCLUSIVE),
        ([96.0, 98.0, 100.0, 102.0, 104.0], [104.0] * 5, False, 0.04, Verdict.PASS),
        ([96.0, 98.0, 100.0, 102.0, 104.0], [110.0] * 5, False, 0.10, Verdict.FAIL),  # 3 x noise
        ([90.0, 96.0, 100.0, 104.0, 110.0], [120.0] * 5, False, 0.2, Verdict.INCONCLUSIVE),
    ],
)
def test_speed_is_judged_three_ways(
    base: list[float], head: list[float], higher: bool, loss: float, verdict: Verdict
) -> None:
    found = speed_change(base, head, 0.05, higher_is_better=higher)
    assert found.loss == pytest.approx(loss)
    assert found.verdict is verdict


def test_a_speed_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="speed of zero"):
        speed_change([1.0] * 5, [0.0] * 5, 0.05, higher_is_better=True)

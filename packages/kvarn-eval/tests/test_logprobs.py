from __future__ import annotations

import math

import numpy as np
import pytest

from kvarn_eval.logprobs import compare


def distribution(seed: int, size: int = 50) -> np.ndarray:
    logits = 3 * np.random.default_rng(seed).normal(size=size)
    return np.exp(logits) / np.exp(logits).sum()


def top(p: np.ndarray, count: int) -> dict[int, float]:
    return {int(i): math.log(p[i]) for i in np.argsort(-p)[:count]}


def exact(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum())


def test_the_full_vocabulary_gives_the_divergence() -> None:
    p, q = distribution(0), distribution(1)
    found = compare(top(p, 50), top(q, 50))
    assert found.kld == pytest.approx(exact(p, q), abs=1e-9)
    assert found.covered == pytest.approx(1.0)


@pytest.mark.parametrize("count", [1, 5, 20, 40])
def test_merging_outcomes_only_lowers_it(count: int) -> None:
    for seed in range(20):
        p = distribution(seed)
        q = p * np.exp(0.3 * np.random.default_rng(seed + 100).normal(size=50))
        q /= q.sum()
        found = compare(top(p, count), top(q, count))
        assert 0 <= found.kld <= exact(p, q) + 1e-9
        assert 0 <= found.covered <= 1


def test_equal_distributions_do_not_diverge() -> None:
    p = top(distribution(3), 20)
    assert compare(p, p).kld == 0
    assert compare(p, p).same_top


def test_another_first_choice_is_seen() -> None:
    p, q = {1: math.log(0.6), 2: math.log(0.4)}, {1: math.log(0.4), 2: math.log(0.6)}
    assert not compare(p, q).same_top


def test_disjoint_reports_are_one_bucket() -> None:
    found = compare({1: math.log(0.9)}, {2: math.log(0.9)})
    assert found.kld == 0
    assert found.covered == 0

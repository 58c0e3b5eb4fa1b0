"""Uncertainty of paired measurements: bootstrap over independent units, McNemar, verdicts.

The unit is the item or the sequence, never the token: neighbouring tokens are correlated. Seeds are
fixed, so equal data give equal intervals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvarn_eval.schema import Verdict, summary

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Indices = NDArray[np.int64]

RESAMPLES = 10_000
MIN_SAMPLES = 5  # of each side; fewer say nothing about their own noise
SEED = 20_260_603
_CHUNK = 500  # resamples drawn at once; bounds memory
_WHOLE = 1e-9  # sums of scores this close to a whole number of items are one


def _draws(count: int, strata: Sequence[object] | None) -> Iterator[Indices]:
    """Indices [_CHUNK, count] of units, each resampled within its stratum."""
    labels = [0] * count if strata is None else list(strata)
    groups = [
        np.array([i for i, s in enumerate(labels) if s == label]) for label in dict.fromkeys(labels)
    ]
    rng = np.random.default_rng(SEED)
    for _ in range(RESAMPLES // _CHUNK):
        drawn = [g[rng.integers(len(g), size=(_CHUNK, len(g)))] for g in groups]
        yield np.concatenate(drawn, axis=1)


def ratio_samples(
    top: Sequence[float], bottom: Sequence[float], strata: Sequence[object] | None = None
) -> Floats:
    """Bootstrap samples of ``sum(top) / sum(bottom)``, paired by unit.

    Parameters
    ----------
    top, bottom : sequence of float, length N
        Contributions of each unit. With `bottom` all ones the ratio is the mean.
    strata : sequence, optional, length N
        Units are resampled within equal labels.

    Returns
    -------
    float64 [RESAMPLES]

    Raises
    ------
    ValueError
        If the sequences are empty or differ in length.
    """
    if len(top) == 0 or len(top) != len(bottom):
        raise ValueError(f"{len(top)} and {len(bottom)} units cannot be paired.")
    a, b = np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)
    draws = _draws(len(a), strata)
    return np.concatenate([a[i].sum(axis=1) / b[i].sum(axis=1) for i in draws])


def mean_interval(
    values: Sequence[float], strata: Sequence[object] | None = None, level: float = 0.95
) -> tuple[float, float]:
    """Two-sided bootstrap interval of the mean of `values`, one per unit."""
    return interval(ratio_samples(values, [1.0] * len(values), strata), level)


def score_interval(
    scores: Sequence[float], strata: Sequence[object] | None = None, level: float = 0.95
) -> tuple[float, float]:
    """Two-sided interval of a mean of scores from 0 to 1, one per item.

    Notes
    -----
    Resampling items of which none was lost shows none lost. The interval is therefore no narrower
    than the exact one (Clopper-Pearson) of the share that was reached, rounded outwards to items.
    """
    low, high = mean_interval(scores, strata, level)
    count, reached, tail = len(scores), float(sum(scores)), (1 + level) / 2
    won, lost = (math.ceil(n - _WHOLE) for n in (reached, count - reached))
    return min(low, 1 - upper_share(lost, count, tail)), max(high, upper_share(won, count, tail))


def interval(samples: Floats, level: float = 0.95) -> tuple[float, float]:
    """Central interval that holds `level` of the bootstrap samples."""
    tail = (1 - level) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class NonInferiority:
    """Outcome of a paired non-inferiority test; differences in the unit of the scores."""

    difference: float
    lower_bound: float
    verdict: Verdict


def non_inferiority(
    differences: list[float], margin: float, strata: Sequence[object] | None = None
) -> NonInferiority:
    """Test that scores do not fall by `margin` or more.

    Parameters
    ----------
    differences : list of float
        Score of the tested arm minus score of the reference, one per item.
    margin : float
        Largest acceptable loss, positive.
    strata : sequence, optional
        Task of each item.

    Returns
    -------
    NonInferiority
        Pass if the one-sided 95 % bound lies above -margin, fail if the mean does not, otherwise
        inconclusive.

    Notes
    -----
    Resampling a handful of lost items, or none, does not show how many more a population may hold.
    The bound is therefore no higher than the one with the exact (Clopper-Pearson) bound of the
    share of lost items; what items lost in part counts together, rounded up to items.
    """
    samples = ratio_samples(differences, [1.0] * len(differences), strata)
    mean, bound = float(np.mean(differences)), float(np.quantile(samples, 0.05))
    count, won = len(differences), sum(max(d, 0.0) for d in differences)
    lost = math.ceil(-sum(min(d, 0.0) for d in differences) - _WHOLE)
    bound = min(bound, won / count - upper_share(lost, count))
    verdict = Verdict.INCONCLUSIVE
    if mean <= -margin:
        verdict = Verdict.FAIL
    elif bound > -margin:
        verdict = Verdict.PASS
    return NonInferiority(mean, bound, verdict)


def upper_share(count: int, total: int, level: float = 0.95) -> float:
    """One-sided exact (Clopper-Pearson) bound of a share, after `count` of `total` were seen."""
    if count == total:
        return 1.0
    seen = np.arange(count + 1)
    ways = np.array([math.lgamma(n + 1) for n in range(total + 1)])
    ways = ways[total] - ways[seen] - ways[total - seen]
    low, high = count / total, 1.0
    while high - low > 1e-9:
        share = (low + high) / 2
        chance = np.exp(ways + seen * np.log(share) + (total - seen) * np.log1p(-share)).sum()
        low, high = (share, high) if chance > 1 - level else (low, share)
    return high


@dataclass(frozen=True)
class SpeedChange:
    """Outcome of a noise-aware comparison; shares of the base median, losses positive."""

    loss: float
    noise: float
    limit: float
    verdict: Verdict


def speed_change(
    base: Sequence[float], head: Sequence[float], threshold: float, *, higher_is_better: bool
) -> SpeedChange:
    """Compare two sets of speed samples, three ways.

    Parameters
    ----------
    base, head : sequence of float
        Samples of each side, positive.
    threshold : float
        Smallest loss that matters, as a share of the base median.
    higher_is_better : bool
        True for rates, False for times.

    Returns
    -------
    SpeedChange
        Inconclusive if a side has fewer than `MIN_SAMPLES` samples or a noise (1.4826 times the
        median absolute deviation over the median) above `threshold`. Otherwise pass up to a loss
        of `threshold`, fail above the larger of it and three times the noise, and inconclusive
        between the two.

    Raises
    ------
    ValueError
        If a sample is not positive.
    """
    if min(*base, *head) <= 0:
        raise ValueError("A speed of zero cannot be compared. Measure again.")
    (middle, spread), (other, other_spread) = summary(list(base)), summary(list(head))
    change = other / middle - 1
    loss = -change if higher_is_better else change
    noise = max(spread / middle, other_spread / other)
    limit = max(threshold, 3 * noise)
    verdict = Verdict.INCONCLUSIVE
    if noise <= threshold and min(len(base), len(head)) >= MIN_SAMPLES:
        if loss > limit:
            verdict = Verdict.FAIL
        elif loss <= threshold:
            verdict = Verdict.PASS
    return SpeedChange(loss, noise, limit, verdict)


def mcnemar(only_reference: int, only_tested: int) -> float:
    """Exact two-sided p-value that discordant items favour neither arm.

    Parameters
    ----------
    only_reference, only_tested : int
        Items that only this arm got right.
    """
    total = only_reference + only_tested
    tail = sum(math.comb(total, k) for k in range(min(only_reference, only_tested) + 1))
    return min(1.0, 2 * tail / (1 << total))

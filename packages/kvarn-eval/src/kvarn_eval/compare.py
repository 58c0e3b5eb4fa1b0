"""Did a change make anything worse? Two sides in, one verdict per quantity out.

Speed is judged three ways, with the noise of the samples (`stats.speed_change`); accuracy by paired
non-inferiority over the same problems; divergence against a bound of 5 %; capacity exactly. Only
KVarN's own arms decide. The others are controls: one that moved shows that the machine did, and
whatever was timed beside it decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvarn_eval.schema import Arm, Measurement, Strict, Unit, Verdict, portable_command
from kvarn_eval.sides import (
    CACHES,
    Pool,
    Side,
    check_same_subject,
    differences,
    family_of,
    is_accuracy,
    is_ours,
)
from kvarn_eval.stats import MIN_SAMPLES, mcnemar, non_inferiority, speed_change

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

KERNEL, RATE, TAIL = 0.05, 0.03, 0.08  # losses of speed that matter
KLD_GROWTH = 1.05
MARGIN = 0.01  # of accuracy, pooled
SMOKE_MARGIN = 0.05  # of the demonstration: some dozens of problems
FAMILY_MARGIN = 0.02
POOL_JITTER = 0.01  # of a pool that vLLM sizes from the memory it finds free
TAILS = ("step_p99", "tpot_p99", "itl_p99")
SIZES = (Unit.TOKENS, Unit.REQUESTS, Unit.TOKENS_PER_GIB)


class Change(Strict):
    """One quantity on both sides; `value` is judged against `limit` as `rule` says."""

    name: str
    arm: str
    unit: Unit
    base: float
    head: float
    samples: tuple[int, int]
    rule: str
    value: float
    limit: float
    required: bool
    verdict: Verdict
    reason: str


class Comparison(Strict):
    """All changes between two sides, and the verdict."""

    schema_version: Literal[1] = 1
    suite: str
    command: list[str]
    base: Side
    head: Side
    differences: list[str]
    changes: list[Change]

    @property
    def verdict(self) -> Verdict:
        """Worst verdict of what is required; inconclusive if nothing is."""
        return Verdict.worst(change.verdict for change in self.changes if change.required)

    def save(self, path: Path) -> None:
        """Write the comparison as indented JSON."""
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True, eq=False)  # found by identity
class Pair:
    """One measurement on both sides; `once` if every run has a single sample of it."""

    base: Measurement
    head: Measurement
    arm: Arm
    once: bool

    @property
    def ours(self) -> bool:
        """Whether it decides; others are controls."""
        return is_ours(self.base.arm, self.arm)

    def change(self, verdict: Verdict, reason: str, **fields: object) -> Change:
        """What is said about the pair."""
        old, new = self.base, self.head
        return Change.model_validate(
            {
                "name": old.name,
                "arm": old.arm,
                "unit": old.unit,
                "base": old.median,
                "head": new.median,
                "samples": (len(old.samples), len(new.samples)),
                "required": self.ours,
                "verdict": verdict,
                "reason": reason,
                **fields,
            }
        )


def compare(base: Pool, head: Pool, margin: float | None = None) -> Comparison:
    """Judge everything that a change may not make worse.

    Parameters
    ----------
    base, head : Pool
        Before and after; `head` may have measured more.
    margin : float, optional
        Largest acceptable loss of pooled accuracy, as a share; 0.01, or 0.05 for the few problems
        of the demonstration.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError
        If the sides did not measure the same thing, or are the same run.
    """
    check_same_subject(base.documents[0], head.documents[0])
    old, new = base.describe(), head.describe()
    if same := set(old.runs) & set(new.runs):
        raise ValueError(f"Both sides hold the run {min(same)}. Compare two different runs.")
    if margin is None:
        margin = SMOKE_MARGIN if base.first.suite == "demo" else MARGIN
    arms, runs = base.first.arms, (len(base.documents), len(head.documents))
    pairs = [
        Pair(m, new, arms[m.arm], once=(len(m.samples), len(new.samples)) == runs)
        for m, new in ((m, head.measured[key]) for key, m in base.measured.items())
    ]
    found = [*differences(base.first, head.first), *base.differences, *head.differences]
    speed = {
        pair: change
        for pair in pairs
        if (change := compare_speed(pair, [*disturbances(pair, base, head), *found]))
    }
    changes = [
        *doubt(speed),
        *(change for pair in pairs if (change := compare_size(pair, found))),
        *(change for pair in pairs if (change := compare_kld(pair, base, head))),
        *(compare_accuracy(pair, base, head, margin) for pair in pairs if is_accuracy(pair.base)),
    ]
    return Comparison(
        suite=base.first.suite,
        command=portable_command(),
        base=old,
        head=new,
        differences=found,
        changes=changes,
    )


def speed_threshold(measurement: Measurement) -> float | None:
    """Smallest loss that matters, as a share; None if the quantity is no speed that is judged."""
    if measurement.unit in {Unit.MICROSECONDS, Unit.GIGABYTES_PER_SECOND}:
        return KERNEL
    if measurement.unit is Unit.TOKENS_PER_SECOND:
        return RATE
    if measurement.unit is Unit.SECONDS and measurement.name.endswith(TAILS):
        return TAIL
    return None


def disturbances(pair: Pair, base: Pool, head: Pool) -> list[str]:
    """What disturbed a pair: a GPU that slowed itself down, a prefix cache that was not primed."""
    found = {"base": base.disturbance(pair.base), "head": head.disturbance(pair.base)}
    return [f"{side}: {why}" for side, why in found.items() if why]


def compare_speed(pair: Pair, doubts: list[str]) -> Change | None:
    """Three-way verdict on a time or a rate; with a doubt, such as another GPU, none.

    What a run measures once is required as soon as there are enough runs, and reported before.
    """
    threshold = speed_threshold(pair.base)
    if threshold is None:
        return None
    higher = pair.base.better == "higher"
    few = min(len(pair.base.samples), len(pair.head.samples)) < MIN_SAMPLES
    required = pair.ours and not (pair.once and few)
    if min(*pair.base.samples, *pair.head.samples) <= 0:  # a slope that noise turned downwards
        return pair.change(
            Verdict.INCONCLUSIVE,
            "a speed of zero or less cannot be compared",
            rule="loss of speed <= limit",
            value=0.0,
            limit=threshold,
            required=required,
        )
    found = speed_change(pair.base.samples, pair.head.samples, threshold, higher_is_better=higher)
    way = "slower" if found.loss > 0 else "faster"
    reason = f"{100 * abs(found.loss):.1f} % {way}, noise {100 * found.noise:.1f} %"
    verdict = found.verdict
    if doubts:
        verdict, reason = Verdict.INCONCLUSIVE, f"{reason}; {doubts[0]}"
    elif verdict is Verdict.INCONCLUSIVE:
        if found.noise > threshold:
            reason += f", above {100 * threshold:g} %"
        elif min(len(pair.base.samples), len(pair.head.samples)) < MIN_SAMPLES:
            reason += "; too few samples"
        else:
            reason += f"; a loss above {100 * threshold:g} % may be noise"
    return pair.change(
        verdict,
        reason,
        rule="loss of speed <= limit",
        value=found.loss,
        limit=found.limit,
        required=required,
    )


def doubt(speed: dict[Pair, Change]) -> list[Change]:
    """Withhold verdicts on what was timed beside a control that moved, for better or worse.

    A control that was timed beside nothing of ours, such as the bandwidth of plain copies, speaks
    for the whole machine.
    """
    beside = {change.name for pair, change in speed.items() if pair.ours}
    moved: dict[str, str] = {}
    for pair, change in speed.items():
        if not pair.ours and abs(change.value) > change.limit:
            if pair.arm.kv_cache_dtype.startswith(CACHES):
                continue  # the published recipe runs our kernels and moves with them
            name = change.name if change.name in beside else ""
            moved.setdefault(name, f"the control {change.arm} moved too ({change.name})")
    judged = []
    for pair, change in speed.items():
        why = moved.get(change.name) or moved.get("")
        if pair.ours and why:
            doubted = {"verdict": Verdict.INCONCLUSIVE, "reason": f"{change.reason}; {why}"}
            change = change.model_copy(update=doubted)
        judged.append(change)
    return judged


def compare_size(pair: Pair, environment: list[str]) -> Change | None:
    """Capacity may not shrink; where vLLM sizes the pool itself, not by more than its jitter."""
    m = pair.base
    if m.unit not in SIZES or m.better != "higher":
        return None
    options = " ".join(pair.arm.options).replace("-", "_").lower()
    fixed = "cache_memory_bytes" in options or "cpu_kvcache_space" in options
    limit = 0.0 if fixed or m.unit is Unit.TOKENS_PER_GIB else POOL_JITTER
    loss = 1 - pair.head.median / m.median if m.median else 0.0
    verdict = Verdict.FAIL if loss > limit else Verdict.PASS
    reason = f"{100 * abs(loss):.2f} % {'less' if loss > 0 else 'more'}"
    if environment and limit:
        verdict, reason = Verdict.INCONCLUSIVE, f"{reason}; {environment[0]}"
    # requests are whole: a jitter of the pool may cost one
    required = pair.ours and (limit == 0 or m.unit is not Unit.REQUESTS)
    rule = "loss of capacity <= limit"
    return pair.change(verdict, reason, rule=rule, value=loss, limit=limit, required=required)


def compare_kld(pair: Pair, base: Pool, head: Pool) -> Change | None:
    """Mean divergence of ours may not grow by more than 5 %; on other texts nothing is decided."""
    m = pair.base
    if m.unit is not Unit.NATS or m.name.rpartition(".")[2] != "kld_mean" or not pair.ours:
        return None
    value, limit = pair.head.median, KLD_GROWTH * m.median
    verdict = Verdict.FAIL if value > limit else Verdict.PASS
    reason = f"{value / m.median:.3f} times that of the base" if m.median else "the base has none"
    profile, _, rest = m.name.partition(".")
    if rest.startswith("traces.") and len(base.texts(profile) | head.texts(profile)) > 1:
        verdict, reason = Verdict.INCONCLUSIVE, f"{reason}; the texts are not the same"
    return pair.change(
        verdict,
        reason,
        rule=f"mean KLD <= {KLD_GROWTH:g} x that of the base",
        value=value,
        limit=limit,
    )


def compare_accuracy(pair: Pair, base: Pool, head: Pool, margin: float) -> Change:
    """Paired non-inferiority over the same problems; families are reported, the pool decides."""
    family, rule = family_of(pair.base), "lower 95 % bound of the difference > limit"
    limit = FAMILY_MARGIN if family else margin
    required = pair.ours and not family
    old, new = base.right(pair.base.key), head.right(pair.base.key)
    if old is None or new is None:
        loss = pair.head.median - pair.base.median
        reason = f"{100 * loss:+.1f} points; no answers were kept to pair"
        return pair.change(
            Verdict.INCONCLUSIVE, reason, rule=rule, value=loss, limit=-limit, required=required
        )
    if old.keys() != new.keys():
        raise ValueError(f"The sides answered different problems ({pair.base.key}).")
    result = non_inferiority(
        [new[item] - old[item] for item in old], limit, [name for name, _ in old]
    )
    lost, won = _count(old[i] > new[i] for i in old), _count(new[i] > old[i] for i in old)
    return pair.change(
        result.verdict,
        f"{100 * result.difference:+.1f} points on {len(old)} problems: {lost} lost, {won} won "
        f"(McNemar p = {mcnemar(lost, won):.2f})",
        rule=rule,
        value=result.lower_bound,
        limit=-limit,
        required=required,
    )


def _count(events: Iterable[bool]) -> int:
    return sum(events)

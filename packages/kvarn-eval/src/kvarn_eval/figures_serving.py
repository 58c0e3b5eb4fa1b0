"""Figures of served models: quality against speed, and time per token over the length of context.

All arms of a figure come from one machine and one model; anything else is refused. Quality alone
may be that of another model, which the figure then names: random weights have speed and size, but
no answers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import pyplot as plt

from kvarn_eval.report import label
from kvarn_eval.schema import Unit
from kvarn_eval.sides import family_of, is_accuracy

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvarn_eval.schema import Measurement, Run

# Of several speeds the one that shows most: as many requests as fit, the article's burst, any.
SPEEDS = (r"decode_capacity$", r"primed_full\b.*decode$", r"burst.*output_throughput$", r"decode",
          r"output_throughput$")  # fmt: skip
SIZES = ("tokens_per_gib", "pool_tokens")
LENGTH = re.compile(r"isl-(\d+)\.itl_p50$")


@dataclass(frozen=True)
class Point:
    """One arm of the figure of quality against speed; `size` and `speed` are over the reference."""

    arm: str
    speed: float
    quality: Measurement
    size: float


def check_one_machine(runs: Sequence[Run]) -> None:
    """Refuse runs of several machines or models.

    Raises
    ------
    ValueError
        If GPUs, CPU or models differ.
    """
    first = runs[0]

    def subject(run: Run) -> tuple[object, ...]:
        gpus = [(gpu.name, gpu.driver) for gpu in run.environment.gpus]
        return gpus, run.environment.cpu, Path(run.model.name).name, run.model.dtype

    for run in runs[1:]:
        weights = {x.model.weights_sha256 for x in (first, run)} - {None}  # unknown for any folder
        if subject(run) != subject(first) or len(weights) > 1:
            raise ValueError(
                f"{first.suite} and {run.suite} were measured on other machines or models. "
                "A figure shows arms of one."
            )


def points(
    runs: Sequence[Run], answers: Run | None = None, profile: str | None = None
) -> tuple[str, str, list[Point]]:
    """What the figure of quality against speed shows.

    Parameters
    ----------
    runs : sequence of Run
        Of one machine and model.
    answers : Run, optional
        Of any machine and model; quality is taken from here alone. Its arms are those of the same
        names, or else the only ones with the same cache.
    profile : str, optional
        Whose accuracy counts; the first that most arms have by default.

    Returns
    -------
    quality, speed : str
        Names of the measurements; empty if the runs lack one.
    points : list of Point
        Arms that have both, the reference among them; none if there is no reference.

    Raises
    ------
    ValueError
        If no accuracy on `profile` was measured.
    """
    everything = [m for run in runs for m in run.measurements]
    reference = next(
        (name for run in runs for name, arm in run.arms.items()
         if arm.kv_cache_dtype == "auto" and arm.method is None), None,
    )  # fmt: skip
    asked = everything if answers is None else answers.measurements
    pooled = [m.name for m in asked if is_pooled(m)]
    if profile is not None:
        pooled = [name for name in pooled if name.startswith(f"{profile}.")]
        if not pooled:
            raise ValueError(f"No accuracy on profile {profile} was measured.")
    qualities = _by_arm(asked, pooled)
    if answers is not None:
        qualities = _of_the_same_caches(qualities, runs, answers)
    speeds = _by_arm(everything, _speeds(everything))
    sizes = _by_arm(everything, SIZES)
    names = [next(iter(found.values())).name if found else "" for found in (qualities, speeds)]
    if reference is None or any(reference not in found for found in (qualities, speeds, sizes)):
        return names[0], names[1], []
    base_speed, base_size = speeds[reference].median, sizes[reference].median
    return (
        names[0],
        names[1],
        [
            Point(arm, speeds[arm].median / base_speed, quality, sizes[arm].median / base_size)
            for arm, quality in qualities.items()
            if arm in speeds and arm in sizes
        ],
    )


def is_pooled(measurement: Measurement) -> bool:
    """Whether a measurement is the accuracy over all families."""
    return is_accuracy(measurement) and not family_of(measurement)


def _of_the_same_caches(
    qualities: dict[str, Measurement], runs: Sequence[Run], answers: Run
) -> dict[str, Measurement]:
    """Quality that another run measured, by the names that arms have in `runs`."""
    found = {}
    for name, arm in ((name, arm) for run in runs for name, arm in run.arms.items()):
        same = [
            other for other, theirs in answers.arms.items()
            if theirs.method is None and theirs.kv_cache_dtype == arm.kv_cache_dtype
        ]  # fmt: skip
        theirs = name if name in answers.arms or len(same) != 1 else same[0]
        if theirs in qualities:
            found[name] = qualities[theirs]
    return found


def draw_pareto(
    runs: Sequence[Run], answers: Run | None = None, profile: str | None = None
) -> Any | None:
    """Accuracy with its interval over speed, marker area by capacity; None without two arms.

    Parameters are those of `points`.
    """
    quality, speed, shown = points(runs, answers, profile)
    if len(shown) < 2:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    for rank, point in enumerate(sorted(shown, key=lambda point: point.speed)):
        m = point.quality
        low, high = m.interval or (m.median, m.median)
        y = 100 * m.median
        axes.errorbar(point.speed, y, yerr=[[y - 100 * low], [100 * high - y]], color="0.6",
                      capsize=2, linewidth=0.8)  # fmt: skip
        axes.scatter(point.speed, y, s=60 * point.size, alpha=0.8, label=point.arm)
        note = f"{point.arm}\n{point.size:.2f}x tokens"
        place = (11, -20 if rank % 2 else 6)  # in turn, since neighbours may be close
        axes.annotate(note, (point.speed, y), xytext=place, textcoords="offset points", fontsize=7)
    axes.axvline(1, color="0.7", linewidth=0.8, linestyle=":", zorder=0)
    axes.margins(x=0.25, y=0.3)
    axes.set_ylim(top=min(axes.get_ylim()[1], 101))
    axes.set_xlim(left=max(axes.get_xlim()[0], 0))
    axes.set_xlabel(f"{label(speed)}, over the fp16 cache (marker area: tokens that fit)")
    whose = f" of {Path(answers.model.name).name}" if answers else ""
    axes.set_ylabel(f"{label(quality)}{whose}, % (95 % interval)")
    arms = {name for run in runs for name in run.arms}
    missing = sorted(arms - {point.arm for point in shown})
    title = "Quality and speed"
    axes.set_title(title + (f"; not in both: {', '.join(missing)}" if missing else ""), loc="left")
    return figure


def draw_itl(run: Run) -> Any | None:
    """Median time per token over the length of the prompt, one line per arm; None without points.

    Dashed: the line that the suite fitted.
    """
    series: dict[str, list[tuple[int, float]]] = {}
    for m in run.measurements:
        if (found := LENGTH.search(m.name)) and m.unit is Unit.SECONDS:
            series.setdefault(m.arm, []).append((int(found[1]), 1000 * m.median))
    if not any(len(points) > 1 for points in series.values()):
        return None
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for number, (arm, points_of_arm) in enumerate(series.items()):
        lengths, times = zip(*sorted(points_of_arm), strict=True)
        axes.plot(lengths, times, marker="o", markersize=3, color=f"C{number}", label=arm)
        if line := _fit(run, arm):
            base, rise = line
            fitted = [1000 * base + rise / 1000 * length / 1000 for length in lengths]
            axes.plot(lengths, fitted, linestyle="--", linewidth=0.7, color=f"C{number}")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(lambda length, place: f"{length / 1000:g}K")
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("median time per token (ms)")
    axes.set_title("One request: time per token over context", loc="left")
    axes.legend(fontsize=7, frameon=False)
    return figure


def _fit(run: Run, arm: str) -> tuple[float, float] | None:
    """Seconds at length 0 and microseconds per 1,000 tokens, as the suite fitted them."""
    found = {m.name.rpartition(".")[2]: m.median for m in run.measurements
             if m.arm == arm and m.name.endswith((".base", ".per_1k_tokens"))}  # fmt: skip
    if found.keys() >= {"base", "per_1k_tokens"}:
        return found["base"], found["per_1k_tokens"]
    return None


def _speeds(everything: Iterable[Measurement]) -> list[str]:
    """Names of speeds, the most telling first."""
    names = {m.name: None for m in everything if m.unit is Unit.TOKENS_PER_SECOND}
    return [name for pattern in SPEEDS for name in names if re.search(pattern, name)]


def _by_arm(everything: Sequence[Measurement], names: Sequence[str]) -> dict[str, Measurement]:
    """By arm, the one of `names` that most arms have; the first of equals."""
    found = [{m.arm: m for m in everything if m.name == name} for name in names]
    return max(found, key=len, default={})

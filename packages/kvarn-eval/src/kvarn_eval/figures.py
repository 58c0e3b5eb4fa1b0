"""Figures of a result document, as SVG.

They carry no date and use a fixed hash salt: equal data give equal files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

from kvarn_eval.figures_serving import check_one_machine, draw_itl, draw_pareto

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kvarn_eval.schema import Measurement, Run

STYLE: dict[str, Any] = {
    "svg.hashsalt": "kvarn",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}
COLOURS = 10  # of lines, before they repeat
BASELINE = "flash-fp16"  # arm that kernel times are relative to


def draw(
    run: Run,
    out: Path,
    others: Sequence[Run] = (),
    answers: Run | None = None,
    profile: str | None = None,
) -> list[Path]:
    """Draw every figure that the measurements of a run allow.

    Parameters
    ----------
    run : Run
        What to draw.
    out : Path
        Existing folder; files of the same name are replaced.
    others : sequence of Run
        Runs of the same machine and model that complete the figure of quality against speed.
    answers : Run, optional
        Run of another model that this figure takes quality from.
    profile : str, optional
        Whose accuracy it shows.

    Returns
    -------
    list of Path
        Files written.

    Raises
    ------
    ValueError
        If `others` are of another machine or model, or no accuracy on `profile` was measured.
    """
    check_one_machine([run, *others])
    figures = []
    with mpl.rc_context(STYLE):
        figures += [_draw_curve(run, subject, out) for subject in _profiles(run)]
        if any(m.name == "tokens_per_gib" for m in run.measurements):
            figures.append(_draw_capacity(run, out))
        if kernels := _kernels(run):
            figures.append(_draw_times(kernels, out))
            figures.append(_draw_bandwidth(kernels, out))
        for name, drawn in (
            ("pareto", draw_pareto([run, *others], answers, profile)),
            ("itl_context", draw_itl(run)),
        ):
            if drawn is not None:
                figures.append(_save(drawn, out / f"{name}.svg"))
    return figures


def _profiles(run: Run) -> list[str]:
    """Subjects with something to draw."""
    found = (m.context["profile"] for m in run.measurements if "from" in m.context and m.median > 0)
    return [str(profile) for profile in dict.fromkeys(found)]


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def _draw_curve(run: Run, profile: str, out: Path) -> Path:
    """Mean KLD over the position in the text, one line per arm."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for arm in run.arms:
        points = [
            m
            for m in run.measurements
            if m.arm == arm and m.context.get("profile") == profile and "from" in m.context
        ]
        points = [m for m in points if m.median > 0]  # zero has no place on a logarithmic axis
        middle = [(float(m.context["from"] or 0) + float(m.context["to"] or 0)) / 2 for m in points]
        if points:
            line = "-" if len(axes.lines) < COLOURS else "--"
            axes.plot(middle, [m.median for m in points], line, marker="o", markersize=3, label=arm)
    axes.set_yscale("log")
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel("mean KLD to the fp16 cache (nats)")
    axes.set_title(f"Divergence by position, {profile} model", loc="left")
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(figure, out / f"kld_position_{profile}.svg")


def _draw_capacity(run: Run, out: Path) -> Path:
    """Tokens per GiB of cache, one bar per arm."""
    found = [m for m in run.measurements if m.name == "tokens_per_gib"]
    figure, axes = plt.subplots(figsize=(5.2, 1.0 + 0.45 * len(found)))
    bars = axes.barh([m.arm for m in found], [m.median for m in found], color="#3b6ea5")
    axes.bar_label(bars, labels=[f"{m.median:,.0f}" for m in found], padding=3)
    axes.set_xlim(0, 1.2 * max(m.median for m in found))
    axes.invert_yaxis()
    axes.set_xlabel("tokens per GiB of KV cache, as the server reports")
    return _save(figure, out / "capacity.svg")


def _kernels(run: Run) -> dict[str, dict[str, Measurement]]:
    """Decode kernels timed beside the baseline, by case and arm."""
    cases: dict[str, dict[str, Measurement]] = {}
    for m in run.measurements:
        if m.name.startswith("decode.") and "gb_per_s" in m.context:
            cases.setdefault(m.name, {})[m.arm] = m
    return {name: arms for name, arms in cases.items() if BASELINE in arms}


def _draw_times(kernels: dict[str, dict[str, Measurement]], out: Path) -> Path:
    """Time over that of the baseline, one group of bars per case."""
    figure, axes = _bars(
        kernels, lambda m: m.median / kernels[m.name][BASELINE].median, lambda m: m.median
    )
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"time over {BASELINE}, logarithmic (labels: microseconds)")
    return _save(figure, out / "kernel_times.svg")


def _draw_bandwidth(kernels: dict[str, dict[str, Measurement]], out: Path) -> Path:
    """Share of the read rate that each kernel reaches with the bytes it must move."""
    figure, axes = _bars(
        kernels,
        lambda m: 100 * float(m.context.get("share_of_read") or 0),
        lambda m: float(m.context["gb_per_s"] or 0),
    )
    axes.set_xlim(0, 110)
    axes.set_xlabel("bytes that must move, % of the measured read rate (labels: GB/s)")
    return _save(figure, out / "bandwidth.svg")


def _bars(
    kernels: dict[str, dict[str, Measurement]],
    length: Callable[[Measurement], float],
    text: Callable[[Measurement], float],
) -> tuple[Any, Any]:
    """Horizontal bars, grouped by case, one colour per arm."""
    arms = list(dict.fromkeys(arm for case in kernels.values() for arm in case))
    rows = sum(len(case) + 1 for case in kernels.values())
    figure, axes = plt.subplots(figsize=(7.2, 1.2 + 0.19 * rows))
    y, ticks = 0.0, []
    for case in kernels.values():
        ticks.append(y + (len(case) - 1) / 2)
        for arm, m in case.items():
            bar = axes.barh(y, length(m), height=0.85, color=f"C{arms.index(arm)}")
            axes.bar_label(bar, labels=[f"{text(m):,.0f}"], padding=3, fontsize=6)
            y += 1
        y += 1
    axes.set_yticks(ticks, [name.removeprefix("decode.") for name in kernels])
    axes.margins(y=0.01)
    axes.invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(len(arms))]
    axes.legend(handles, arms, fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure, axes

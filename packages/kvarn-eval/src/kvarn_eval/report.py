"""From a result document to what people read: markdown, SVG figures, a terminal table.

Nothing is computed from anything but the document, so a report can be made again at any time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from kvarn_eval.schema import Unit, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvarn_eval.schema import Measurement, Run

WORDS = {
    Verdict.PASS: "All required gates pass.",
    Verdict.FAIL: "A required gate fails.",
    Verdict.INCONCLUSIVE: "The evidence does not decide every required gate.",
}
LABELS = {
    "answer_tokens": "answer length (median)",
    "reading_records": "generated past two tiles",
    "pool_tokens": "cache pool",
    "tokens_per_gib": "tokens per GiB of cache",
    "longest_requests": "longest requests that fit",
    "seconds": "time to answer and score",
    "kld_mean": "mean KLD",
    "kld_median": "median KLD",
    "kld_p999": "99.9 % KLD",
    "kld_early": "mean KLD before 2 G",
    "top1": "top-1 agreement",
    "answer_kld": "mean KLD on answers",
    "answer_top1": "top-1 agreement on answers",
    "covered": "probability compared one by one",
    "startup": "start-up",
    "reported_tokens": "tokens vLLM reports",
    "requests_that_fit": "requests that fit",
    "decode_equal": "decode, equal batch",
    "decode_capacity": "decode, as many as fit",
}
FEW_ARMS = 3  # up to here arms are columns
MANY_NAMES = 16  # from here on too


def render(
    run: Run,
    out: Path,
    others: Sequence[Run] = (),
    answers: Run | None = None,
    profile: str | None = None,
) -> list[Path]:
    """Write `report.md` and the figures of a run.

    Parameters
    ----------
    run : Run
        What to render.
    out : Path
        Existing folder; files of the same name are replaced.
    others, answers, profile
        As in `figures.draw`.

    Returns
    -------
    list of Path
        Files written, the report first.
    """
    from kvarn_eval.figures import draw  # matplotlib, which a machine that only measures may lack

    figures = draw(run, out, others, answers, profile)
    report = out / "report.md"
    report.write_text(markdown(run, [figure.name for figure in figures]), encoding="utf-8")
    return [report, *figures]


def headline(run: Run) -> str:
    """The verdict in one sentence, with what decided it: an arm that failed, or the first gate."""
    if run.failed and run.verdict is Verdict.INCONCLUSIVE:
        return f"Not all of {' and '.join(run.failed)} was measured."
    deciding = [g for g in run.gates if g.required and g.verdict is run.verdict]
    if run.verdict is Verdict.PASS or not deciding:
        return WORDS[run.verdict]
    return f"{WORDS[run.verdict]} {deciding[0].name}: {deciding[0].reason}."


def markdown(run: Run, figures: list[str]) -> str:
    """The report: verdict, gates, measurements, figures, environment, command."""
    lines = [f"# {run.suite}: {run.verdict.value}", "", headline(run), ""]
    for arm, how in run.failed.items():
        lines += [f"Not all of {arm} was measured. {how}", ""]
    lines += ["## Gates", ""]
    gates = [
        [
            g.name,
            g.verdict.value + ("" if g.required else " (not required)"),
            g.rule,
            format_number(g.value),
            format_number(g.limit),
            g.reason,
        ]
        for g in run.gates
    ]
    lines += _table(["gate", "verdict", "rule", "value", "limit", "reason"], gates)
    for profile, measurements in _sections(run).items():
        lines += ["", f"## Measurements{f': {profile}' if profile else ''}", ""]
        lines += _pivot(run, measurements, f"{profile}." if profile else "")
    for figure in figures:
        lines += ["", f"![{figure.removesuffix('.svg')}]({figure})"]
    lines += ["", "## Reproduce", "", "```", " ".join(run.command), "```", ""]
    lines += ["<details><summary>Environment</summary>", "", "```json"]
    lines += [run.model_dump_json(indent=1, include=_ENVIRONMENT), "```", "", "</details>", ""]
    return "\n".join(lines)


_ENVIRONMENT = {
    "run_id", "started", "seconds", "suite_sha256", "git", "environment", "model", "arms", "commits"
}  # fmt: skip


def comparison(run: Run, reference: str, tested: str) -> Table:
    """A terminal table of two arms side by side."""
    table = Table(title=headline(run), title_justify="left")
    for column, justify in (
        ("", "left"),
        (reference, "right"),
        (tested, "right"),
        ("ratio", "right"),
    ):
        table.add_column(column, justify="right" if justify == "right" else "left")
    of_arm = {
        arm: {m.name: m for m in run.measurements if m.arm == arm} for arm in (reference, tested)
    }
    for name, measurement in of_arm[tested].items():
        other = of_arm[reference].get(name)
        ratio = ""
        if other is not None and other.median and measurement.unit is not Unit.SHARE:
            ratio = f"{measurement.median / other.median:.2f}"
        cells = [format_value(other) if other else "", format_value(measurement), ratio]
        table.add_row(label(name), *cells)
    return table


def label(name: str) -> str:
    """A measurement's name as people read it."""
    return LABELS.get(name, name.replace("_", " ").replace(".", ": "))


def format_number(value: float) -> str:
    """Three or four significant digits, large numbers in full."""
    if value == int(value) and abs(value) >= 1:
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_value(measurement: Measurement) -> str:
    """Median with its unit; shares as per cent."""
    if measurement.unit is Unit.SHARE:
        return f"{100 * measurement.median:.1f} %"
    unit = "" if measurement.unit in {Unit.COUNT, Unit.RATIO} else f" {measurement.unit.value}"
    return format_number(measurement.median) + unit


def _sections(run: Run) -> dict[str, list[Measurement]]:
    """Measurements by profile, without the points of curves."""
    sections: dict[str, list[Measurement]] = {}
    for measurement in run.measurements:
        if "from" not in measurement.context:
            profile = str(measurement.context.get("profile", ""))
            sections.setdefault(profile, []).append(measurement)
    return sections


def _pivot(run: Run, measurements: list[Measurement], prefix: str) -> list[str]:
    """Arms against measurements; few arms are columns, many are rows if the table fits a page."""
    names = list(dict.fromkeys(m.name for m in measurements))
    cell = {(m.arm, m.name): _with_interval(m) for m in measurements}
    labels = [label(name.removeprefix(prefix)) for name in names]
    if len(run.arms) > FEW_ARMS and len(names) < MANY_NAMES:
        rows = [[arm, *(cell.get((arm, name), "") for name in names)] for arm in run.arms]
        return _table(["arm", *labels], rows)
    rows = [
        [text, *(cell.get((arm, name), "") for arm in run.arms)]
        for text, name in zip(labels, names, strict=True)
    ]
    return _table(["", *run.arms], rows)


def _with_interval(measurement: Measurement) -> str:
    text = format_value(measurement)
    if measurement.interval is None:
        return text
    scale = 100 if measurement.unit is Unit.SHARE else 1
    low, high = (format_number(scale * bound) for bound in measurement.interval)
    return f"{text} ({low} – {high})"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(row) + " |" for row in cells]

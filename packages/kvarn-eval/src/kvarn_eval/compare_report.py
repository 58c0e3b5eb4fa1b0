"""A comparison as people read it: one table, in the terminal and as markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from kvarn_eval.report import WORDS, format_number
from kvarn_eval.schema import Unit, Verdict

if TYPE_CHECKING:
    from kvarn_eval.compare import Change, Comparison
    from kvarn_eval.schema import Run
    from kvarn_eval.sides import Side

COLUMNS = ("quantity", "arm", "base", "head", "verdict", "value", "limit", "reason")
STYLES = {Verdict.PASS: "green", Verdict.FAIL: "red", Verdict.INCONCLUSIVE: "yellow"}


def headline(comparison: Comparison) -> str:
    """The verdict in one sentence, with the first quantity that decided it."""
    verdict = comparison.verdict
    deciding = [c for c in comparison.changes if c.required and c.verdict is verdict]
    if verdict is Verdict.PASS:
        undecided = sum(c.verdict is Verdict.INCONCLUSIVE for c in comparison.changes)
        rest = f" Not required and undecided: {undecided}." if undecided else ""
        return f"Nothing became worse: {len(deciding)} required rules pass.{rest}"
    if not deciding:
        return "Nothing that decides was measured."
    first = deciding[0]
    return f"{WORDS[verdict]} {first.name} ({first.arm}): {first.reason}."


def table(comparison: Comparison) -> Table:
    """The changes, for a terminal."""
    shown = Table(title=headline(comparison), title_justify="left")
    for column in COLUMNS:
        right = column in {"base", "head", "value", "limit"}
        shown.add_column(column, justify="right" if right else "left", no_wrap=column != "reason")
    for change in comparison.changes:
        *cells, reason = _cells(change)
        told = "" if change.verdict is Verdict.PASS else reason
        shown.add_row(*cells, told, style=STYLES[change.verdict] if change.required else None)
    return shown


def markdown(comparison: Comparison) -> str:
    """The report: verdict, sides, changes, command."""
    lines = [f"# {comparison.suite}: {comparison.verdict.value}", "", headline(comparison), ""]
    lines += [f"- {name}: {_side(side)}" for name, side in _sides(comparison)]
    lines += [f"- {difference}" for difference in comparison.differences]
    lines += ["", "| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cells(change)) + " |" for change in comparison.changes]
    lines += ["", "Verdicts in parentheses decide nothing: controls, and what is only reported."]
    lines += ["", "```", " ".join(comparison.command), "```", ""]
    return "\n".join(lines)


def old_and_new(old: Run | None, new: Run) -> Table:
    """What a file of baselines held and now holds, quantity by quantity."""
    commit = (new.git.sha or "")[:12]
    shown = Table(title=f"{new.suite} at {commit}", title_justify="left")
    for column in ("quantity", "arm", "old", "new", "new / old"):
        shown.add_column(column)
    before = {} if old is None else {m.key: m.median for m in old.measurements}
    for m in new.measurements:
        was = before.get(m.key)
        ratio = f"{m.median / was:.3f}" if was else ""
        shown.add_row(m.name, m.arm, "" if was is None else _value(was, m.unit),
                      _value(m.median, m.unit), ratio)  # fmt: skip
    return shown


def _sides(comparison: Comparison) -> tuple[tuple[str, Side], ...]:
    return ("base", comparison.base), ("head", comparison.head)


def _side(side: Side) -> str:
    gpus = ", ".join(gpu.name for gpu in side.environment.gpus) or side.environment.cpu
    dirty = {True: ", with changes", False: "", None: ", unchecked"}[side.git.dirty]
    runs = f"{len(side.runs)} run" + "s" * (len(side.runs) > 1)
    kept = "".join(f"; {arm} of commit {', '.join(of)}" for arm, of in side.commits.items())
    return f"commit {(side.git.sha or 'unknown')[:12]}{dirty}, {gpus}, {runs}{kept}"


def _cells(change: Change) -> list[str]:
    share = change.rule.startswith("loss")
    factor, unit = (100, " %") if share or change.unit is Unit.SHARE else (1, "")
    return [
        change.name,
        change.arm,
        _value(change.base, change.unit),
        _value(change.head, change.unit),
        change.verdict.value if change.required else f"({change.verdict.value})",
        format_number(factor * change.value) + unit,
        format_number(factor * change.limit) + unit,
        change.reason,
    ]


def _value(value: float, unit: Unit) -> str:
    if unit is Unit.SHARE:
        return f"{100 * value:.1f} %"
    return f"{format_number(value)} {unit.value}"

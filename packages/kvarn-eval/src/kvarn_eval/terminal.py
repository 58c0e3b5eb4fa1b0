"""What all commands share on a terminal: progress, errors of usage, the end of a run."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from kvarn_eval import report as reports

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvarn_eval.schema import Run

console = Console(stderr=True)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A callback that shows what happens; on a terminal as bars, otherwise one line per step."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    shown: dict[str, TaskID] = {}
    with Progress(*columns, TimeElapsedColumn(), console=console) as bars:

        def show(what: str, done: int, steps: int) -> None:
            key = what.partition(",")[0]
            if key not in shown:
                for other in shown.values():
                    bars.stop_task(other)
                shown[key] = bars.add_task(what, total=steps)
                if not console.is_terminal:
                    console.print(what)
            bars.update(shown[key], description=what, completed=done, total=steps)

        yield show


def stop_on_signal(number: int, frame: object) -> NoReturn:
    """Turn SIGTERM into an exception, so that servers are reaped."""
    raise SystemExit(128 + number)


def fail_usage(message: str) -> NoReturn:
    """Print what is wrong with a command; exit status 2."""
    console.print(message, style="red", markup=False)
    raise typer.Exit(2)


def finish(run: Run, out: Path, as_json: bool) -> NoReturn:
    """Write result and report, say the verdict, exit with it."""
    run.save(out / "result.json")
    files = reports.render(run, out)
    if as_json:
        sys.stdout.write(run.model_dump_json(indent=1) + "\n")
    console.print(
        f"Written: {', '.join(str(file) for file in files)}", markup=False, soft_wrap=True
    )
    console.print(reports.headline(run), markup=False, soft_wrap=True)
    raise typer.Exit(run.verdict.exit_code)

"""What all commands share on a terminal: progress, errors of usage, the end of a run."""

from __future__ import annotations

import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import typer
from pydantic import ValidationError
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
from kvarn_eval.preflight import Missing
from kvarn_eval.schema import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

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


STOPPING = (signal.SIGTERM, signal.SIGHUP)


def stop_on_signals() -> None:
    """Reap servers also when asked to stop and when the terminal closes."""
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, stop_on_signal)


def stop_on_signal(number: int, frame: object) -> NoReturn:
    """Turn the first signal into an exception; others do not interrupt the reaping."""
    for other in STOPPING:
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)


def fail_usage(message: str) -> NoReturn:
    """Print what is wrong with a command, or what it lacks; exit status 2."""
    console.print(message, style="red", markup=False, soft_wrap=True)
    raise typer.Exit(2)


def make_folder(folder: Path) -> None:
    """Create the folder of results, if it is missing; exit status 2 if there can be none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail_usage(f"{folder} cannot be a folder ({error.strerror}). Name another with --out.")


@contextmanager
def failures(result: Path | None = None) -> Iterator[None]:
    """Say in place of a traceback why a measurement failed, or why it cannot begin.

    Exit status 1 for what went wrong meanwhile, with `result` as in `fail`; 2 for what is missing
    or wrong in what was asked.
    """
    try:
        yield
    except typer.Exit:  # a RuntimeError
        raise
    except (RuntimeError, ValidationError) as error:
        fail(error, result)
    except (Missing, ValueError) as error:
        fail_usage(str(error))


def fail(error: Exception, result: Path | None = None) -> NoReturn:
    """Print why a measurement failed, and render what is in `result` so far; exit status 1."""
    what = "No result can hold what was measured. " if isinstance(error, ValueError) else ""
    console.print(f"{what}{error}", style="red", markup=False, soft_wrap=True)
    if result is not None and result.is_file():
        reports.render(Run.load(result), result.parent)
    raise typer.Exit(1) from error


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

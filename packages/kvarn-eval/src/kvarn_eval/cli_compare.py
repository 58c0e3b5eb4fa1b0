"""The commands that judge results against earlier ones: ``compare`` and ``baseline``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvarn_eval import compare_report, stored
from kvarn_eval.compare import compare as judge
from kvarn_eval.sides import Document, pool
from kvarn_eval.terminal import console, fail_usage, make_folder

BaseOption = Annotated[
    list[Path] | None, typer.Option("--base", exists=True, help="Another run of the base.")
]
HeadOption = Annotated[
    list[Path] | None, typer.Option("--head", exists=True, help="Another run of the head.")
]


def compare(
    base: Annotated[Path, typer.Argument(exists=True, help="Result or baselines, before.")],
    head: Annotated[Path, typer.Argument(exists=True, help="Result after the change.")],
    more_base: BaseOption = None,
    more_head: HeadOption = None,
    margin: Annotated[
        float | None,
        typer.Option(min=0.01, help="Largest loss of accuracy, in points; 1, of the demo 5."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for comparison.json and comparison.md.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison.")] = False,
) -> None:
    """Judge a change by two results: speed, capacity, divergence and accuracy.

    Exit status: 0 nothing became worse, 1 something did, 2 the results cannot be compared, 3 the
    evidence does not decide (too noisy, too few samples, another machine).
    """
    try:
        after = [Document.load(path) for path in (head, *(more_head or []))]
        suite = after[0].run.suite
        before = [stored.load_document(path, suite) for path in (base, *(more_base or []))]
        found = judge(pool(before), pool(after), None if margin is None else margin / 100)
    except ValueError as error:
        fail_usage(str(error))
    if out is not None:
        make_folder(out)
        found.save(out / "comparison.json")
        text = compare_report.markdown(found)
        (out / "comparison.md").write_text(text, encoding="utf-8")
    if as_json:
        sys.stdout.write(found.model_dump_json(indent=1) + "\n")
    else:
        Console().print(compare_report.table(found))
    console.print(compare_report.headline(found), markup=False, soft_wrap=True)
    raise typer.Exit(found.verdict.exit_code)


def baseline(
    result: Annotated[Path, typer.Argument(exists=True, help="Result of the main branch.")],
    folder: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder of baselines.")
    ] = stored.FOLDER,
    as_json: Annotated[bool, typer.Option("--json", help="Print the stored result.")] = False,
) -> None:
    """Make a result the baseline of its machine; prints old and new values for the review."""
    try:
        document = Document.load(result)
        path, old = stored.accept(document, folder)
    except ValueError as error:
        fail_usage(str(error))
    if as_json:
        sys.stdout.write(document.run.model_dump_json(indent=1) + "\n")
    else:
        Console().print(compare_report.old_and_new(old, document.run))
    console.print(f"Written: {path}", markup=False, soft_wrap=True)

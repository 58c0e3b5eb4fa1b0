"""Absolute baselines: the last accepted results of one kind of machine, one per suite.

`packages/kvarn-eval/baselines/<machine>.json` is written by ``kvarn-eval baseline`` from a run of
the main branch and changed by review only, which is why the command prints old and new values.
Accuracy is not kept here: it is compared problem by problem, and those stay with their run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from kvarn_eval.schema import Run, Strict, Verdict, portable_command
from kvarn_eval.sides import (
    Document,
    check_commits,
    check_complete,
    check_same_subject,
    gpus_of,
    is_accuracy,
)

FOLDER = Path("packages", "kvarn-eval", "baselines")  # of a checkout


class Baselines(Strict):
    """Accepted results of one machine, by suite."""

    schema_version: Literal[1] = 1
    machine: str
    runs: dict[str, Run]

    def save(self, path: Path) -> None:
        """Write as indented JSON."""
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Baselines:
        """Read a file; raises ValueError if it is not exactly of this schema."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"))


def machine(run: Run) -> str:
    """Short name of the machine of a run: ``cpu``, ``h100``, ``h200-x2``."""
    gpus = gpus_of(run)
    if not gpus:
        return "cpu"
    models = re.findall(r"\b[A-Z]+\d+[A-Z]*\b", gpus[0].name)
    name = models[0] if models else re.sub(r"[^A-Za-z0-9]+", "-", gpus[0].name)
    return name.lower() + (f"-x{len(gpus)}" if len(gpus) > 1 else "")


def load_document(path: Path, suite: str | None) -> Document:
    """Read a result, or out of a file of baselines the one of `suite`.

    Raises
    ------
    ValueError
        If the file is neither, or keeps no result of the suite.
    """
    try:
        text = path.read_text(encoding="utf-8")
        kept = Baselines.model_validate_json(text) if '"runs"' in text else None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is neither a result nor a file of baselines: {error}") from error
    if kept is None:
        return Document.load(path)
    if suite is None or suite not in kept.runs:
        raise ValueError(
            f"{path} keeps no result of {suite or 'that suite'}, only of {', '.join(kept.runs)}."
        )
    return Document(kept.runs[suite], path)


def accept(document: Document, folder: Path) -> tuple[Path, Run | None]:
    """Store a result in the file of its machine, in place of the earlier one of its suite.

    Parameters
    ----------
    document : Document
        The result.
    folder : Path
        Where the files of baselines lie.

    Returns
    -------
    path : Path
        The file written.
    old : Run or None
        What was kept before.

    Raises
    ------
    ValueError
        If the result cannot be a reference: made of changed sources or of several commits,
        interrupted, failed, one of answers, or lacking what the earlier one has.
    """
    run = document.run
    check_complete(document)
    check_commits(document)
    if run.git.sha is None or run.git.dirty:
        raise ValueError(
            f"{document.path} was made of changed or unknown sources. Commit first; KVARN_COMMIT "
            "names the commit of an installed copy."
        )
    if run.verdict is Verdict.FAIL:
        raise ValueError(f"{document.path} fails its own gates and cannot be a baseline.")
    if any(is_accuracy(m) for m in run.measurements):
        raise ValueError(
            f"{document.path} is about answers, which are compared problem by problem. Keep its "
            "folder and compare with that."
        )
    name = machine(run)
    path = folder / f"{name}.json"
    kept = Baselines.load(path) if path.exists() else Baselines(machine=name, runs={})
    old = kept.runs.get(run.suite)
    if old is not None:
        check_same_subject(Document(old, path), document)
    run = run.model_copy(update={"command": portable_command(run.command)})
    Baselines(machine=name, runs={**kept.runs, run.suite: run}).save(path)
    return path, old

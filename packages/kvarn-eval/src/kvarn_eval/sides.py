"""The two sides of a comparison: what was measured before a change, and after it.

A side is one result document, or several of the same commit whose samples are pooled: runs that
alternate (before, after, after, before) show the noise between processes, which one run cannot.
Sides that did not measure the same thing are refused, so a table never becomes smaller in silence.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvarn_eval.schema import (
    Arm,
    Environment,
    Git,
    Gpu,
    Measurement,
    Run,
    Strict,
    Unit,
    Verdict,
    measure,
)
from kvarn_eval.sources import sources

if TYPE_CHECKING:
    from collections.abc import Sequence

Problem = tuple[str, int | str]  # family, seed or name
KERNELS = "bench_ops"
"""Suites of this name identify cases by their names: lists and descriptions of arms may grow."""
CLOCK_TOLERANCE = 0.05
OURS = "kvarn-"  # packages that a comparison is about
CACHES = "kvarn_"  # cache dtypes that run our kernels
PAPER = re.compile(r"""["']recipe["']: *["']paper["']""")  # as JSON, or as Python prints it


class Side(Strict):
    """Where one side of a comparison comes from; `commits` are those of controls."""

    runs: list[str]
    git: Git
    environment: Environment
    commits: dict[str, list[str]]


@dataclass(frozen=True)
class Document:
    """A result and the file it was read from, beside which its raw data lie."""

    run: Run
    path: Path

    @classmethod
    def load(cls, path: Path) -> Document:
        """Read a result; raises ValueError with the name of the file if it is not one."""
        try:
            return cls(Run.load(path), path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a result of this version: {error}") from error

    @property
    def disturbed(self) -> dict[tuple[str, str], str]:
        """Why speeds say nothing, by arm and load; without a load it is true of the whole arm."""
        gates = {gate.name: gate for gate in self.run.gates if gate.verdict is not Verdict.PASS}
        found = {
            (m.arm, ""): f"the GPU slowed itself down for {m.median:.3g} s"
            for m in self.run.measurements
            if m.name == "slowdown" and m.median > 0
        }
        for m in self.run.measurements:
            load = m.name.rpartition(".")[0]
            for kind in ("steady", "valid"):
                if gate := gates.get(f"{load}.{kind}.{m.arm}"):
                    found[m.arm, load] = f"its load is not {kind}: {gate.reason}"
        return found

    def right(self, measurement: Measurement) -> dict[Problem, float] | None:
        """Score of each problem behind an accuracy, from the lines of its raw file.

        A line has the `family` of a problem, its `seed` (or any name) and whether it is `right`, or
        how right on average. Other keys are not read.

        Returns
        -------
        dict or None
            None if there is no file of such lines beside the result.

        Raises
        ------
        ValueError
            If the answers are those of another run.
        """
        file = self.path.parent / (measurement.raw or "")
        if not file.is_file():
            return None
        family = family_of(measurement)
        try:
            answers = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            found = {
                (answer["family"], answer["seed"]): float(answer["right"])
                for answer in answers
                if family in ("", answer["family"])
            }
        except (ValueError, KeyError, TypeError):
            return None
        if not found or abs(sum(found.values()) / len(found) - measurement.median) > 1e-9:
            raise ValueError(f"{file} does not hold the answers behind {measurement.key}.")
        return found


@dataclass(frozen=True)
class Pool:
    """Documents of one side, pooled.

    Parameters
    ----------
    documents : tuple of Document
        All of one commit, suite, model and set of arms.
    measured : dict of str to Measurement
        By `Measurement.key`, with the samples of all documents.
    """

    documents: tuple[Document, ...]
    measured: dict[str, Measurement]

    @property
    def first(self) -> Run:
        """The first document; the others agree with it in everything but their samples."""
        return self.documents[0].run

    @property
    def differences(self) -> list[str]:
        """What differs between the machines of its documents; see `differences`."""
        return [text for d in self.documents[1:] for text in differences(self.first, d.run)]

    def describe(self) -> Side:
        """Runs, commit, environment, and controls of other commits."""
        commits: dict[str, list[str]] = {}
        for document in self.documents:
            for arm, of in document.run.commits.items():
                commits[arm] = sorted({*commits.get(arm, []), *of})
        return Side(
            runs=[document.run.run_id for document in self.documents],
            git=self.first.git,
            environment=self.first.environment,
            commits=commits,
        )

    def texts(self, profile: str) -> set[str | None]:
        """Hashes of the texts on which its runs measured divergence; None of one that lacks it."""
        return {document.run.texts.get(profile) for document in self.documents}

    def disturbance(self, measurement: Measurement) -> str:
        """Why a speed says nothing, if it was disturbed in one of the runs; else nothing."""
        own = measurement.name.rpartition(".")[0]
        for document in self.documents:
            for (arm, load), why in document.disturbed.items():
                scenario = load.partition(".")[0]  # of a line through several loads
                if arm == measurement.arm and (not load or own in {load, scenario}):
                    return why
        return ""

    def right(self, key: str) -> dict[Problem, float] | None:
        """Score of each problem, averaged over the documents; see `Document.right`."""
        of_runs = []
        for document in self.documents:
            measurement = next(m for m in document.run.measurements if m.key == key)
            scores = document.right(measurement)
            if scores is None:
                return None
            of_runs.append(scores)
        if any(scores.keys() != of_runs[0].keys() for scores in of_runs):
            raise ValueError(f"The runs of one side answered different problems ({key}).")
        return {item: sum(run[item] for run in of_runs) / len(of_runs) for item in of_runs[0]}


def is_accuracy(measurement: Measurement) -> bool:
    """Whether a measurement is the share of right answers: ``[profile.]accuracy[.family]``."""
    return measurement.unit is Unit.SHARE and "accuracy" in measurement.name.split(".")


def family_of(measurement: Measurement) -> str:
    """Family of problems that an accuracy is about; empty for all of them."""
    return measurement.name.partition("accuracy")[2].removeprefix(".")


def is_kernels(run: Run) -> bool:
    """Whether a result is one of the kernel benchmark."""
    return run.suite.partition(" ")[0] == KERNELS


def pool(documents: Sequence[Document]) -> Pool:
    """Join the documents of one side.

    Parameters
    ----------
    documents : sequence of Document
        At least one; all of the same commit, suite, model and arms.

    Returns
    -------
    Pool

    Raises
    ------
    ValueError
        If they are not of one side, or one is no whole run of its commit.
    """
    first = documents[0]
    for document in documents:
        check_complete(document)
        check_commits(document)
    for other in documents[1:]:
        if other.run.run_id == first.run.run_id:
            raise ValueError(f"{first.path} and {other.path} are the same run. Name it once.")
        check_same_subject(first, other)
        check_same_subject(other, first)
        if other.run.git != first.run.git:
            raise ValueError(f"{first.path} and {other.path} are of different commits.")
    samples: dict[str, list[float]] = {}
    for document in documents:
        for m in document.run.measurements:
            samples.setdefault(m.key, []).extend(m.samples)
    measured = {
        m.key: measure(
            m.name,
            m.arm,
            m.unit,
            samples[m.key],
            better=m.better,
            interval=m.interval if len(documents) == 1 else None,
            context=m.context,
            raw=m.raw,
        )
        for m in first.run.measurements
    }
    return Pool(tuple(documents), measured)


def check_complete(document: Document) -> None:
    """Refuse a run that was interrupted: what it lacks would be missing from the comparison.

    Raises
    ------
    ValueError
        If an arm failed, or a gate says so.
    """
    for arm, how in document.run.failed.items():
        raise ValueError(
            f"{document.path} did not measure all of {arm} ({how.rstrip('.')}). "
            "Finish it with --reuse."
        )
    for gate in document.run.gates:
        if gate.name == "complete" and gate.verdict is not Verdict.PASS:
            raise ValueError(
                f"{document.path} is of an interrupted run ({gate.reason}). Finish it with --reuse."
            )


def check_commits(document: Document) -> None:
    """Refuse a run that kept one of our arms from another commit, which it would be judged as.

    Raises
    ------
    ValueError
        If there is one; what controls measure does not depend on our commit.
    """
    run = document.run
    for name, commits in run.commits.items():
        others = sorted(set(commits) - {sources(run.git)})
        if others and name in run.arms and is_ours(name, run.arms[name]):
            raise ValueError(
                f"{document.path} kept {name} of another commit ({', '.join(others)}). "
                "Measure it again without --reuse."
            )


def check_same_subject(base: Document, head: Document) -> None:
    """Refuse a head that did not measure everything that the base did, in the same way.

    Raises
    ------
    ValueError
        If suite, its data, model, arms or measurements disagree.
    """
    old, new = base.run, head.run
    files = f"{base.path} and {head.path}"
    if old.suite != new.suite:
        raise ValueError(f"{files} are of different suites: {old.suite} and {new.suite}.")
    if not is_kernels(old) and old.suite_sha256 != new.suite_sha256:
        raise ValueError(f"{files} were made with other texts, problems or settings.")
    if _model(old) != _model(new):
        raise ValueError(f"{files} are of different models.")
    if missing := set(old.arms) - set(new.arms):
        raise ValueError(f"{head.path} lacks the arm {min(missing)}, which {base.path} has.")
    for name, arm in old.arms.items():
        if not is_kernels(old) and arm != new.arms[name]:
            raise ValueError(f"{files} describe the arm {name} differently.")
    keys = {m.key: m.unit for m in new.measurements}
    for m in old.measurements:
        if keys.get(m.key) != m.unit:
            raise ValueError(
                f"{head.path} lacks {m.key} in {m.unit.value}, which {base.path} has. "
                "Measure both sides with the same cases."
            )


def is_ours(name: str, arm: Arm) -> bool:
    """Whether an arm is KVarN as it is served; every other arm is a control."""
    if arm.window_tiles is not None:  # emulated: parts of ours left out are arms too
        return name == "kvarn"
    return arm.kv_cache_dtype.startswith(CACHES) and not PAPER.search(" ".join(arm.options))


def gpus_of(run: Run) -> list[Gpu]:
    """GPUs that a run used; the kernel benchmark uses the first."""
    gpus = run.environment.gpus
    return gpus[:1] if is_kernels(run) else gpus


def differences(base: Run, head: Run) -> list[str]:
    """What differs between the machines and packages of two runs, one phrase each.

    Kernels are launched by CUDA graphs, so neither the processor nor further GPUs matter to them;
    their clocks do, and were asked for right after a timing. Other suites ask when the GPU is idle.
    """
    old, new = base.environment, head.environment
    pairs = list(zip(gpus_of(base), gpus_of(head), strict=False))
    facts: list[tuple[str, object, object]] = [
        ("number of GPUs", len(gpus_of(base)), len(gpus_of(head)))
    ]
    for a, b in pairs:
        facts += [
            ("GPU", a.name, b.name),
            ("GPU memory", a.memory_mib, b.memory_mib),
            ("driver", a.driver, b.driver),
            ("power cap", a.power_cap_w, b.power_cap_w),
        ]
    if is_kernels(base):
        for a, b in pairs:
            facts.append(("memory clock", a.memory_clock_mhz, b.memory_clock_mhz))
            clocks = [clock for clock in (a.sm_clock_mhz, b.sm_clock_mhz) if clock]
            if clocks and max(clocks) > (1 + CLOCK_TOLERANCE) * min(clocks):
                facts.append(("SM clock", a.sm_clock_mhz, b.sm_clock_mhz))
    else:
        facts += [("CPU", old.cpu, new.cpu), ("number of cores", old.cores, new.cores)]
    facts.append(("Python", old.python, new.python))
    facts += [
        (name, old.packages.get(name), new.packages.get(name))
        for name in sorted(old.packages.keys() | new.packages.keys())
        if not name.startswith(OURS)
    ]
    return [f"{what} was {a}, is {b}" for what, a, b in facts if a != b]


def _model(run: Run) -> tuple[object, ...]:
    model = run.model
    name = Path(model.name).name  # checkouts differ in their folders
    return name, model.weights_sha256, model.dtype, model.tensor_parallel

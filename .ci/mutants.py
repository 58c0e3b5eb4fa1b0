"""Change one line of the product at a time, and see that the tests named for it turn red.

    python .ci/mutants.py [PART OF A NAME ...]

A test that has never been red is not evidence. Every entry of `mutants.toml` names a file, a line
of it, what the line becomes, and the tests that must notice. All of it happens in a copy of the
checkout; the tests must be green there before anything is changed. Exit status: 0 every mutant was
caught, 1 one survived, 2 an entry is wrong (no such line, tests that do not run).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kvarn-core", "kvarn-vllm", "kvarn-eval")
GREEN, RED = 0, 1  # of pytest; anything else means that tests did not run


class WrongEntry(Exception):
    """An entry that says nothing, because its line or its tests are not there."""


@dataclass(frozen=True)
class Mutant:
    """One change of one line, and the tests that must turn red."""

    name: str
    file: str
    line: str
    becomes: str
    tests: list[str]
    env: dict[str, str] = field(default_factory=dict)

    def apply(self, root: Path) -> str:
        """Change the file under `root`; returns its old text."""
        path = root / self.file
        if not path.is_file():
            raise WrongEntry(f"{self.name}: there is no {self.file}.")
        old = path.read_text(encoding="utf-8")
        lines = old.split("\n")
        places = [i for i, line in enumerate(lines) if line.strip() == self.line]
        if len(places) != 1:
            raise WrongEntry(f"{self.name}: {self.file} has {len(places)} lines {self.line!r}.")
        if self.line == self.becomes:
            raise WrongEntry(f"{self.name}: the line does not change.")
        [i] = places
        lines[i] = lines[i].replace(self.line, self.becomes)
        path.write_text("\n".join(lines), encoding="utf-8")
        return old


def load(path: Path) -> list[Mutant]:
    """Entries of a file; their names are unique."""
    entries = [Mutant(**entry) for entry in tomllib.loads(path.read_text("utf-8"))["mutant"]]
    names = [entry.name for entry in entries]
    if twice := {name for name in names if names.count(name) > 1}:
        raise WrongEntry(f"Two mutants are called {min(twice)}.")
    return entries


def copy_checkout(target: Path) -> None:
    """Copy every file that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        source = ROOT / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)


def environment(root: Path, extra: dict[str, str]) -> dict[str, str]:
    """Variables under which the packages are those of the copy, and no stale bytecode is read."""
    sources = os.pathsep.join(str(root / "packages" / name / "src") for name in PACKAGES)
    fixed = {"PYTHONPATH": sources, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **fixed, **extra}


def run_tests(root: Path, tests: list[str], env: dict[str, str]) -> tuple[int, str]:
    """Status of pytest on some tests of the copy, and what it printed."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-o", "addopts=", "--import-mode=importlib"]
    command = [sys.executable, "-m", "pytest", "-p", "kvarn_core.testing.plugin", *options, *tests]
    done = subprocess.run(
        command, cwd=root, env=environment(root, env), capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def check_green(root: Path, mutants: list[Mutant]) -> None:
    """Run all named tests once on the unchanged copy."""
    suites: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for mutant in mutants:
        suites.setdefault(tuple(sorted(mutant.env.items())), []).extend(mutant.tests)
    for env, tests in suites.items():
        status, text = run_tests(root, list(dict.fromkeys(tests)), dict(env))
        if status != GREEN or " skipped" in text.splitlines()[-1]:
            raise WrongEntry(f"The tests are not green before any change:\n{text[-4000:]}")


def hunt(root: Path, mutants: list[Mutant]) -> list[str]:
    """Names of the mutants under `root` that no test noticed."""
    survivors = []
    for number, mutant in enumerate(mutants, 1):
        began = time.monotonic()
        old = mutant.apply(root)
        try:
            status, text = run_tests(root, mutant.tests, mutant.env)
        finally:
            (root / mutant.file).write_text(old, encoding="utf-8")
        if status not in {GREEN, RED}:
            raise WrongEntry(f"{mutant.name}: the tests did not run:\n{text[-4000:]}")
        if status == GREEN:
            survivors.append(mutant.name)
        verdict = "SURVIVED" if status == GREEN else "caught"
        seconds = time.monotonic() - began
        print(f"[{number:2} of {len(mutants)}] {verdict:8} {mutant.name} ({seconds:.0f} s)",
              flush=True)  # fmt: skip
    return survivors


def main(words: list[str]) -> int:
    """Hunt the mutants whose names contain one of `words`, or all."""
    try:
        mutants = load(Path(__file__).with_suffix(".toml"))
        chosen = [m for m in mutants if not words or any(word in m.name for word in words)]
        if not chosen:
            raise WrongEntry(f"No mutant is called {' or '.join(words)}.")
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            root = Path(folder)
            copy_checkout(root)
            print(f"{len(chosen)} mutants; first the tests on unchanged sources", flush=True)
            check_green(root, chosen)
            survivors = hunt(root, chosen)
    except WrongEntry as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(chosen) - len(survivors)} caught, {len(survivors)} survived {survivors or ''}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

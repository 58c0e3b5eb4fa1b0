"""Measuring two commits in turns: what runs where, in which order, and what is judged."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
BENCH = """
import json, os, pathlib, sys
import kvarn_core
line = json.dumps([kvarn_core.SIDE, os.environ["TRITON_CACHE_DIR"], sys.argv[1:-1]])
assert "KVARN_COMMIT" not in os.environ
with open(os.environ["KVARN_TEST_LOG"], "a") as log:
    print(line, file=log)
pathlib.Path(sys.argv[-1]).write_text(json.dumps({"side": kvarn_core.SIDE}))
"""


@pytest.fixture
def ab(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("ab")


def git(folder: Path, *arguments: str) -> str:
    named = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *named, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit_side(repository: Path, side: str) -> None:
    source = repository / "packages/kvarn-core/src/kvarn_core/__init__.py"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(f"SIDE = {side!r}\n")
    bench = repository / "packages/kvarn-core/benchmarks/bench_ops.py"
    bench.parent.mkdir(parents=True, exist_ok=True)
    bench.write_text(BENCH)
    git(repository, "add", ".")
    git(repository, "commit", "-qm", side)


def test_each_side_runs_its_own_tree_in_turns(
    ab: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    git(repository, "init", "-qb", "main")
    commit_side(repository, "base")
    git(repository, "switch", "-qc", "change")
    commit_side(repository, "head")
    git(repository, "switch", "-q", "main")
    commit_side(repository, "later")  # after the change left main
    git(repository, "switch", "-q", "change")

    log, out = tmp_path / "log", tmp_path / "out"
    tool = tmp_path / "bin" / "kvarn-eval"
    tool.parent.mkdir()
    tool.write_text(
        f"#!{sys.executable}\nimport sys\nprint('judged', *sys.argv[1:])\nsys.exit(3)\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    monkeypatch.setenv("KVARN_TEST_LOG", str(log))
    monkeypatch.setenv("KVARN_COMMIT", "both the same")
    monkeypatch.setattr(ab, "__file__", str(repository / "packages/kvarn-core/benchmarks/ab.py"))

    assert ab.main(["main", "--out", str(out)]) == 3
    turns = [json.loads(line) for line in log.read_text().splitlines()]
    assert [side for side, _, _ in turns] == ["base", "head", "head", "base"]
    caches = {side: {c for s, c, _ in turns if s == side} for side in ("base", "head")}
    assert caches["base"] != caches["head"]
    assert all(arguments == ["--quick", "--ours-only", "--out"] for _, _, arguments in turns)

    files = {name: str(out / f"{name}.json") for name in ("1-base", "2-head", "3-head", "4-base")}
    sides = [json.loads(Path(file).read_text())["side"] for file in files.values()]
    assert sides == ["base", "head", "head", "base"]
    judged = (
        f"{files['1-base']} {files['2-head']} --base {files['4-base']} --head {files['3-head']}"
    )
    assert capfd.readouterr().out.endswith(f"judged compare {judged} --out {out}\n")
    assert "base-tree" not in git(repository, "worktree", "list")


def test_a_benchmark_that_fails_is_a_failure(
    ab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    git(repository, "init", "-qb", "main")
    commit_side(repository, "base")
    monkeypatch.setattr(ab, "__file__", str(repository / "packages/kvarn-core/benchmarks/ab.py"))
    monkeypatch.delenv("KVARN_TEST_LOG", raising=False)
    assert ab.main(["main", "--out", str(tmp_path / "out")]) == 1

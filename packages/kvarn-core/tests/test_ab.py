"""Measuring two commits in turns: what runs where, in which order, and what is pooled."""

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
log = pathlib.Path(os.environ["KVARN_TEST_LOG"])
turn = len(log.read_text().splitlines()) if log.exists() else 0
caches = os.environ["TRITON_CACHE_DIR"]
log.open("a").write(json.dumps([kvarn_core.SIDE, caches, sys.argv[1:-1]]) + chr(10))
samples = [kvarn_core.MICROSECONDS + turn]
measured = {"name": "decode", "arm": "kvarn", "samples": samples, "median": 0, "noise": 0}
document = {"suite_sha256": "s", "git": kvarn_core.SIDE, "arms": {}, "seconds": 1.5, "gates": [1],
            "measurements": [measured]}
pathlib.Path(sys.argv[-1]).write_text(json.dumps(document))
"""


@pytest.fixture
def ab(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("ab")


def git(folder: Path, *arguments: str) -> str:
    named = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *named, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit_side(repository: Path, side: str, microseconds: int) -> None:
    source = repository / "packages/kvarn-core/src/kvarn_core/__init__.py"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(f"SIDE = {side!r}\nMICROSECONDS = {microseconds}\n")
    bench = repository / "packages/kvarn-core/benchmarks/bench_ops.py"
    bench.parent.mkdir(parents=True, exist_ok=True)
    bench.write_text(BENCH)
    git(repository, "add", ".")
    git(repository, "commit", "-qm", side)


def test_each_side_runs_its_own_tree_in_turns(
    ab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    git(repository, "init", "-qb", "main")
    commit_side(repository, "base", 100)
    git(repository, "switch", "-qc", "change")
    commit_side(repository, "head", 200)
    git(repository, "switch", "-q", "main")
    commit_side(repository, "later", 300)  # after the change left main
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

    pooled = {side: json.loads((out / f"{side}.json").read_text()) for side in ("base", "head")}
    assert pooled["base"]["measurements"][0]["samples"] == [100, 103]
    assert pooled["head"]["measurements"][0]["samples"] == [201, 202]
    assert pooled["head"]["measurements"][0]["median"] == 201.5
    assert pooled["head"]["measurements"][0]["noise"] == pytest.approx(1.4826 * 0.5)
    assert pooled["head"]["gates"] == []
    assert pooled["head"]["seconds"] == 3.0
    printed = (out / "comparison.txt").read_text()
    assert printed.startswith("judged compare")
    assert "base-tree" not in git(repository, "worktree", "list")


def document(**changes: Any) -> dict[str, Any]:
    measured = [{"name": "decode", "arm": "kvarn", "samples": [1.0]}]
    fields = {"suite_sha256": "s", "git": {}, "arms": {}, "seconds": 1, "measurements": measured}
    return {**fields, **changes}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"git": {"sha": "b"}}, "Runs of one side differ in git. Measure again."),
        ({"suite_sha256": "t"}, "Runs of one side differ in suite_sha256. Measure again."),
        ({"measurements": []}, "One run did not measure kvarn:decode. Measure again."),
    ],
    ids=["commit", "cases", "missing"],
)
def test_runs_that_differ_are_not_pooled(ab: Any, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ab.pool([document(), document(**changes)])


def test_a_benchmark_that_fails_is_a_failure(
    ab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    git(repository, "init", "-qb", "main")
    commit_side(repository, "base", 100)
    monkeypatch.setattr(ab, "__file__", str(repository / "packages/kvarn-core/benchmarks/ab.py"))
    monkeypatch.delenv("KVARN_TEST_LOG", raising=False)
    assert ab.main(["main", "--out", str(tmp_path / "out")]) == 1

"""``kvarn-eval compare`` and ``baseline`` as a workflow calls them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvarn_eval.cli import app

sys.path.insert(0, str(Path(__file__).parent))
from injected import OURS, RECORDED, RESULTS, scaled, write

CASE = "decode.b32.n16384"


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    ("factor", "shape", "status", "says"),
    [
        (1.0, (1.0,) * 5, 0, "Nothing became worse"),
        (1.2, (1.0,) * 5, 1, f"{CASE} ({OURS}): 20.0 % slower"),
        (1.2, (1.0,) * 3, 3, "too few samples"),
    ],
)
def test_the_exit_status_is_the_verdict(
    factor: float, shape: tuple[float, ...], status: int, says: str, tmp_path: Path
) -> None:
    head = write(tmp_path / "head.json", scaled(CASE, OURS, factor, shape))
    found, shown, error = run("compare", str(RECORDED), str(head))
    assert found == status
    assert says in error
    assert CASE in shown


def test_the_comparison_is_printed_and_written(tmp_path: Path) -> None:
    head = write(tmp_path / "head.json", scaled(CASE, OURS, 1.2))
    more = write(tmp_path / "more.json", scaled(CASE, OURS, 1.2))
    options = ("--head", str(more), "--out", str(tmp_path / "out"), "--json")
    status, printed, _ = run("compare", str(RECORDED), str(head), *options)
    assert status == 1
    data = json.loads(printed)
    assert data == json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert data["head"]["runs"] == ["head", "more"]
    report = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert report.startswith("# bench_ops full: fail\n\nA required gate fails.")
    assert f"| {CASE} | {OURS} | 207.5 us | 248.9 us | fail | 20 % | 5 % |" in report
    assert "commit f74315d0eca3, NVIDIA H100 80GB HBM3, 2 runs" in report


def test_what_cannot_be_compared_is_wrong_usage(tmp_path: Path) -> None:
    assert run("compare", str(RECORDED), str(RECORDED))[0] == 2
    assert run("compare", str(RECORDED), "nowhere.json")[0] == 2
    (tmp_path / "x.json").write_text("[]", encoding="utf-8")
    assert run("compare", str(RECORDED), str(tmp_path / "x.json"))[0] == 2
    (tmp_path / "x.json").write_text("no JSON", encoding="utf-8")
    assert run("compare", str(tmp_path / "x.json"), str(RECORDED))[0] == 2


def test_an_interrupted_run_is_refused_in_one_sentence(tmp_path: Path) -> None:
    def part(data: dict[str, Any]) -> None:
        gate = {
            "name": "complete",
            "verdict": "inconclusive",
            "reason": "not measured: plain kvarn",
        }
        data["gates"] = [data["gates"][0] | gate]

    file = str(write(tmp_path / "part.json", part))
    for sides in ((file, str(RECORDED)), (str(RECORDED), file)):
        status, _, error = run("compare", *sides)
        assert status == 2
        says = f"{file} is of an interrupted run (not measured: plain kvarn). Finish it with"
        assert error == f"{says} --reuse.\n"


def test_a_result_without_its_answers_is_undecided(tmp_path: Path) -> None:
    def of_one_commit(data: dict[str, Any]) -> None:
        data["commits"] = {}

    source = RESULTS / "small-model-cpu" / "result.json"
    sides = [
        str(write(tmp_path / f"{side}.json", of_one_commit, source=source))
        for side in ("base", "head")
    ]
    status, _, error = run("compare", *sides)
    assert status == 3
    assert "no answers were kept to pair" in error


def test_a_baseline_is_stored_and_compared_with(tmp_path: Path) -> None:
    folder = tmp_path / "baselines"
    assert run("baseline", str(RECORDED), "--folder", str(folder))[0] == 2
    folder.mkdir()
    status, shown, error = run("baseline", str(RECORDED), "--folder", str(folder))
    assert status == 0
    assert "h100.json" in error
    assert "207.5 us" in shown
    kept = str(folder / "h100.json")
    slower = write(tmp_path / "head.json", scaled(CASE, OURS, 1.2))
    assert run("compare", kept, str(slower))[0] == 1
    status, shown, _ = run("baseline", str(slower), "--folder", str(folder))
    assert status == 0
    assert "1.200" in shown
    assert run("compare", kept, str(write(tmp_path / "b.json", scaled(CASE, OURS, 1.2))))[0] == 0


def test_a_baseline_may_be_refused(tmp_path: Path) -> None:
    dirty = write(tmp_path / "x.json", lambda data: data["git"].update(dirty=True))
    status, _, error = run("baseline", str(dirty), "--folder", str(tmp_path))
    assert status == 2
    assert "Commit first" in error
    assert not (tmp_path / "h100.json").exists()


def test_a_folder_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    head = write(tmp_path / "head.json", scaled(CASE, OURS, 1.0))
    status, _, error = run("compare", str(RECORDED), str(head), "--out", str(head))
    assert status == 2
    assert error == f"{head} cannot be a folder (File exists). Name another with --out.\n"

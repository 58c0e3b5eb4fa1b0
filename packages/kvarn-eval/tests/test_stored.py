"""Absolute baselines: one file per machine, changed only by an accepted result."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from kvarn_eval.schema import Gpu
from kvarn_eval.sides import Document
from kvarn_eval.stored import Baselines, accept, load_document, machine

sys.path.insert(0, str(Path(__file__).parent))
from injected import OURS, RECORDED, RESULTS, scaled, write


@pytest.mark.parametrize(
    ("names", "machine_name"),
    [
        ([], "cpu"),
        (["NVIDIA H100 80GB HBM3"], "h100"),
        (["NVIDIA H200", "NVIDIA H200"], "h200-x2"),
        (["NVIDIA A100-SXM4-80GB"], "a100"),
        (["NVIDIA L40S"], "l40s"),
        (["NVIDIA GeForce RTX 4090"], "nvidia-geforce-rtx-4090"),
    ],
)
def test_the_file_is_named_after_the_machine(names: list[str], machine_name: str) -> None:
    run = Document.load(RECORDED).run
    gpus = [Gpu(name=name, memory_mib=1, driver="1") for name in names]
    environment = run.environment.model_copy(update={"gpus": gpus})
    served = run.model_copy(update={"environment": environment, "suite": "throughput"})
    assert machine(served) == machine_name
    one_gpu = machine_name.partition("-x2")[0]
    assert machine(served.model_copy(update={"suite": run.suite})) == one_gpu


def test_a_result_is_stored_and_found_by_its_suite(tmp_path: Path) -> None:
    document = Document.load(RECORDED)
    path, old = accept(document, tmp_path)
    assert (path.name, old) == ("h100.json", None)
    assert load_document(path, document.run.suite).run == document.run
    with pytest.raises(ValueError, match="keeps no result of demo, only of bench_ops full"):
        load_document(path, "demo")
    faster = Document.load(write(tmp_path / "b.json", scaled("seal.step.b32", OURS, 0.5)))
    assert accept(faster, tmp_path)[1] == document.run
    assert Baselines.load(path).runs == {document.run.suite: faster.run}


def test_the_command_is_kept_without_folders_of_a_machine(tmp_path: Path) -> None:
    def elsewhere(data: dict[str, Any]) -> None:
        data["command"] = ["/opt/bin/bench_ops.py", "--full", "--out", "/home/me/bench.json"]

    document = Document.load(write(tmp_path / "a.json", elsewhere))
    path, _ = accept(document, tmp_path)
    kept = load_document(path, document.run.suite).run.command
    assert kept == ["bench_ops.py", "--full", "--out", "bench.json"]


def test_suites_of_a_machine_share_a_file(tmp_path: Path) -> None:
    other = Document.load(write(tmp_path / "b.json", lambda data: data.update(suite="other")))
    accept(Document.load(RECORDED), tmp_path)
    path, _ = accept(other, tmp_path)
    assert set(Baselines.load(path).runs) == {"bench_ops full", "other"}


def dirty(data: dict[str, Any]) -> None:
    data["git"]["dirty"] = True


def unknown(data: dict[str, Any]) -> None:
    data["git"]["sha"] = None


def red(data: dict[str, Any]) -> None:
    data["gates"][0]["verdict"] = "fail"


def smaller(data: dict[str, Any]) -> None:
    data["measurements"] = [m for m in data["measurements"] if m["name"] != "seal.step.b32"]


def interrupted(data: dict[str, Any]) -> None:
    data["gates"][0].update(name="complete", verdict="inconclusive")


def failed(data: dict[str, Any]) -> None:
    data["failed"] = {"fp8": "Arm fp8 took too long."}


def mixed(data: dict[str, Any]) -> None:
    data["commits"] = {OURS: ["1" * 40]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (failed, "did not measure all of fp8"),
        (mixed, f"kept {OURS} of another commit"),
        (interrupted, "of an interrupted run"),
        (dirty, "changed or unknown sources"),
        (unknown, "changed or unknown sources"),
        (red, "fails its own gates"),
        (smaller, "lacks kvarn_k4v2_g128:seal.step.b32"),
    ],
)
def test_what_is_no_reference_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    accept(Document.load(RECORDED), tmp_path)
    before = (tmp_path / "h100.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        accept(Document.load(write(tmp_path / "b.json", change)), tmp_path)
    assert (tmp_path / "h100.json").read_bytes() == before


def test_answers_are_no_baseline(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compared problem by problem"):
        accept(Document.load(RESULTS / "demo" / "result.json"), tmp_path)


def test_a_damaged_file_of_baselines_is_named(tmp_path: Path) -> None:
    file = tmp_path / "h100.json"
    file.write_text('{"runs": {}, "surprise": 1}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"h100\.json is neither a result nor"):
        load_document(file, "demo")

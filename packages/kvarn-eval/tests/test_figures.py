"""Figures of kernel times, from a document as the kernel benchmark writes it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from kvarn_eval.figures import draw
from kvarn_eval.report import markdown
from kvarn_eval.schema import Run, Verdict

BENCHMARKS = Path(__file__).parents[2] / "kvarn-core" / "benchmarks"
TIMES = {"flash-fp16": 716.0, "flash-fp8": 421.0, "kvarn_k4v2_g128": 175.0}


@pytest.fixture
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A document of two cases, written by the benchmark's own code."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    made = importlib.import_module("document").Document("bench_ops quick")
    made.arms = {arm: {"method": arm} for arm in ("memory", *TIMES)}
    made.add("read", "memory", "GB/s", [3100.0, 3101.0, 3099.0], {"bytes": 1 << 31})
    for case in ("decode.b32.n16384", "decode.b8.n4096"):
        for arm, time in TIMES.items():
            facts = {"batch": 32, "gb_per_s": 2800.0, "share_of_read": 0.9}
            made.add(case, arm, "us", [time, time + 1, time - 1], facts)
    made.add("append.step.b32", "kvarn_k4v2_g128", "us", [3.0], {"gb_per_s": 1.0})
    made.require_speedup("decode.b32.n16384", "kvarn_k4v2_g128", "flash-fp16", 1.5)
    made.write(tmp_path / "bench.json", ["decode.b32.n16384"])
    return tmp_path / "bench.json"


def test_a_kernel_benchmark_is_a_run(document: Path) -> None:
    run = Run.load(document)
    assert run.verdict is Verdict.PASS
    assert run.value("kvarn_k4v2_g128", "decode.b32.n16384") == 175
    assert "4.09 times as fast" in run.gates[0].reason
    text = markdown(run, [])
    assert "| decode: b32: n16384 |" in text
    assert "| 716 us |" in text


def test_kernel_times_are_drawn(document: Path, tmp_path: Path) -> None:
    run = Run.load(document)
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        names = {file.name for file in draw(run, folder)}
        assert names == {"kernel_times.svg", "bandwidth.svg"}
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
        assert "b32.n16384" in (first / name).read_text(encoding="utf-8")


def test_other_times_give_another_figure(document: Path, tmp_path: Path) -> None:
    draw(Run.load(document), tmp_path)
    before = (tmp_path / "kernel_times.svg").read_bytes()
    slower = document.read_text(encoding="utf-8").replace("175.0", "350.0")
    document.write_text(
        slower.replace("176.0", "351.0").replace("174.0", "349.0"), encoding="utf-8"
    )
    draw(Run.load(document), tmp_path)
    assert (tmp_path / "kernel_times.svg").read_bytes() != before

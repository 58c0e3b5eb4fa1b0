"""The stamps of `benchmarks/phases.py`, without a GPU."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from kvarn_core import nvrtc
from kvarn_core.layout import RecordLayout
from kvarn_core.ops.decode import cuda
from kvarn_core.ops.decode.shapes import shapes
from kvarn_core.spec import PRESETS

MAIN = RecordLayout(PRESETS["kvarn_k4v2_g128"], 128)
SHAPE = shapes(MAIN)[0]


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("phases")


@pytest.mark.compile
def test_the_kernel_compiles_with_stamps(phases: Any, tmp_path: Path) -> None:
    served = cuda.variant(MAIN, torch.float16, SHAPE)
    variant = phases.stamped(served, tmp_path / "decode")
    assert len(variant.arguments) == len(served.arguments) + 1
    assert nvrtc.compile(variant.program) != nvrtc.compile(served.program)


def test_every_stamp_has_a_line_of_its_own(phases: Any, tmp_path: Path) -> None:
    variant = phases.stamped(cuda.variant(MAIN, torch.float16, SHAPE), tmp_path / "decode")
    text = variant.program.source.read_text(encoding="utf-8")
    assert [f"STAMP({i})" in text for i in range(len(phases.PHASES))] == [True] * 8


def test_a_line_that_is_gone_is_named(
    phases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(phases.STAMPS, "first record", "no such line")
    with pytest.raises(ValueError, match="0 lines 'no such line'"):
        phases.stamped(cuda.variant(MAIN, torch.float16, SHAPE), tmp_path / "decode")


def test_times_count_from_the_first_start_and_idle_ctas_do_not(phases: Any) -> None:
    stamps = torch.zeros(4, 8, dtype=torch.int64)  # the last was not launched
    stamps[0] = 1_000_000 + 1000 * torch.arange(8)
    stamps[1] = 1_002_000 + 1000 * torch.arange(8)
    stamps[2, 0] = stamps[2, 7] = 1_000_500  # nothing to do
    lines = phases.table(stamps)
    assert lines[0].startswith("2 of 3 CTAs have work")
    assert lines[1].split() == ["start", "0.00", "0.20", "1.00", "1.80", "2.00"]
    assert lines[-1].split() == ["end", "7.00", "7.20", "8.00", "8.80", "9.00"]

"""The emulator runs a correct kernel and names the fault of every broken one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulator.build import EmulatedKernel, EmulationError

from kvarn_core.nvrtc import Program, Variant

pytest.importorskip("ziglang", reason="builds C++ for the CPU; the package ziglang is missing")
pytestmark = pytest.mark.emulate

SOURCE = Path(__file__).parent / "emulator" / "probe.cu"
ARGUMENTS = ("pointer", "pointer", "i32", "pointer")


def _run(fault: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    variant = Variant(
        "probe", Program("probe", SOURCE, {}, {"BREAK": fault}), ARGUMENTS, 64, 1, 512
    )
    x, y, sums = torch.arange(192.0), torch.full((192,), -1.0), torch.zeros(3)
    kernel = EmulatedKernel(variant, [x], seed)
    kernel.launch((3, 1, 1), x.data_ptr(), y.data_ptr(), 3, sums.data_ptr())
    return x, y, sums


@pytest.mark.parametrize("seed", range(20))
def test_a_correct_kernel_gives_its_result_in_any_order(seed: int) -> None:
    x, y, sums = _run(0, seed)
    assert torch.equal(y, 2 * x)
    assert sums.tolist() == [x.sum()] * 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, "misaligned bulk copy"),
        (2, "reads outside the memory of the launch"),
        (3, "read while a bulk copy fills it"),
        (5, "wait for each other for ever"),
        (6, "wait for each other for ever"),
    ],
)
def test_a_fault_is_found_in_any_order(fault: int, message: str) -> None:
    for seed in range(5):
        with pytest.raises(EmulationError, match=message):
            _run(fault, seed)


def test_a_missing_barrier_is_found_in_some_order() -> None:
    found = 0
    for seed in range(20):
        try:
            x, y, _ = _run(4, seed)
            found += not torch.equal(y, 2 * x)
        except EmulationError:
            found += 1
    assert found > 0

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest
import torch

from kvarn_core import PRESETS, RecordLayout, dispatch
from kvarn_core.dispatch import explain, on, select
from kvarn_core.spec import DEBUG_PRESETS

if TYPE_CHECKING:
    from collections.abc import Iterator

LAYOUT = RecordLayout(PRESETS["kvarn_k4v2_g128"], 128)
DEBUG = RecordLayout(DEBUG_PRESETS["kvarn_debug32_g128"], 128)
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    dispatch._select_on_gpu.cache_clear()
    yield
    dispatch._select_on_gpu.cache_clear()


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Pretend that there is a GPU of the given compute capability."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imagined GPU")
    monkeypatch.setattr("kvarn_core.nvrtc.driver_obstacle", lambda: None)


@pytest.mark.parametrize("capability", [(8, 0), (12, 0)], indirect=True)
def test_a_gpu_gets_triton_and_a_reason(capability: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvarn_core.nvrtc.obstacle", lambda: None)
    assert select(GPU, LAYOUT, kernels=("triton", "cuda")) == "triton"
    have = ".".join(map(str, torch.cuda.get_device_capability(GPU)))
    assert explain(GPU, LAYOUT) == (
        "The triton engine runs on cuda:0 (Imagined GPU). The cuda engine cannot run: "
        f"cuda:0 has compute capability {have} and its kernels need exactly 9.0."
    )


@pytest.mark.parametrize("capability", [(9, 0)], indirect=True)
def test_hopper_gets_cuda_if_it_can_compile(
    capability: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvarn_core.nvrtc.obstacle", lambda: None)
    assert select(GPU, LAYOUT, kernels=("triton", "cuda")) == "cuda"
    assert select(GPU, LAYOUT) == "triton"  # an operation without such a kernel
    assert explain(GPU, LAYOUT) == (
        "The cuda engine runs on cuda:0 (Imagined GPU). "
        "Operations in CUDA C++: decode, quantize, store; Triton runs the others."
    )
    monkeypatch.setattr("kvarn_core.nvrtc.obstacle", lambda: "the package cuda-bindings")
    dispatch._select_on_gpu.cache_clear()
    assert select(GPU, LAYOUT, kernels=("triton", "cuda")) == "triton"
    assert explain(GPU, LAYOUT).endswith("run: the package cuda-bindings is not installed.")


@pytest.mark.parametrize("capability", [(9, 0)], indirect=True)
def test_an_older_driver_gets_triton_and_a_reason(
    capability: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvarn_core.nvrtc.obstacle", lambda: None)
    monkeypatch.setattr("kvarn_core.nvrtc.driver_obstacle", lambda: "the driver is old")
    assert select(GPU, LAYOUT, kernels=("triton", "cuda")) == "triton"
    assert explain(GPU, LAYOUT).endswith("The cuda engine cannot run: the driver is old.")
    with pytest.raises(RuntimeError, match=r"the driver is old\. Use the triton engine"):
        select(GPU, LAYOUT, "cuda", kernels=("triton", "cuda"))


@pytest.mark.parametrize("capability", [(7, 5)], indirect=True)
def test_an_old_gpu_gets_the_reference_and_a_reason(capability: None) -> None:
    assert select(GPU, LAYOUT) == "reference"
    reason = "cuda:0 has compute capability 7.5 and the kernels need 8.0 or higher"
    assert explain(GPU, LAYOUT) == f"The reference engine runs on cuda:0, because {reason}."
    with pytest.raises(RuntimeError, match=f"^The triton engine cannot run: {reason}"):
        select(GPU, LAYOUT, "triton")


def test_the_cpu_gets_the_reference_and_a_reason() -> None:
    assert select(CPU, LAYOUT) == "reference"
    reason = "the kernels need a CUDA GPU, or TRITON_INTERPRET=1 on the CPU"
    assert explain(CPU, LAYOUT) == f"The reference engine runs on cpu, because {reason}."
    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET=1 on the CPU\. Use the reference"):
        select(CPU, LAYOUT, "triton")


def test_the_interpreter_runs_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select(CPU, LAYOUT) == "reference"
    assert select(CPU, LAYOUT, "triton") == "triton"
    assert explain(CPU, LAYOUT, "triton") == "The triton engine runs on cpu, as asked for."
    with pytest.raises(RuntimeError, match="need a CUDA GPU"):
        select(torch.device("meta"), LAYOUT, "triton")


@pytest.mark.parametrize("capability", [(9, 0)], indirect=True)
def test_a_debug_preset_has_the_reference_only(capability: None) -> None:
    assert select(GPU, DEBUG) == "reference"
    assert "fp32 rows, which no kernel reads" in explain(GPU, DEBUG)
    with pytest.raises(ValueError, match="kvarn_debug32_g128 stores fp32 rows"):
        select(GPU, DEBUG, "triton")


@pytest.mark.parametrize("capability", [(9, 0)], indirect=True)
def test_the_reference_can_be_asked_for_anywhere(capability: None) -> None:
    for device in (CPU, GPU):
        assert select(device, LAYOUT, "reference") == "reference"
        assert explain(device, LAYOUT, "reference").endswith("as asked for.")


def test_a_missing_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvarn_core.dispatch.triton_installed", lambda: False)
    assert select(GPU, LAYOUT) == "reference"
    assert explain(GPU, LAYOUT).endswith("because the package triton is not installed.")


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"no engine 'magic'\. Choose one of reference, triton, cuda\."
    ):
        select(CPU, LAYOUT, "magic")


@pytest.mark.parametrize("capability", [(9, 0)], indirect=True)
def test_hopper_runs_cuda_when_asked_for(capability: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvarn_core.nvrtc.obstacle", lambda: None)
    assert select(GPU, LAYOUT, "cuda", kernels=("triton", "cuda")) == "cuda"
    assert select(GPU, LAYOUT, "cuda") == "triton"  # an operation without such a kernel
    assert explain(GPU, LAYOUT, "cuda") == (
        "The cuda engine runs on cuda:0, as asked for. "
        "Operations in CUDA C++: decode, quantize, store; Triton runs the others."
    )


@pytest.mark.parametrize("capability", [(8, 0), (10, 0), (12, 0)], indirect=True)
def test_other_gpus_refuse_cuda(capability: None) -> None:
    with pytest.raises(RuntimeError, match=r"^The cuda engine cannot run: .* need exactly 9\.0"):
        select(GPU, LAYOUT, "cuda")


def test_kernels_run_on_the_gpu_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: device)
    assert on(torch.device("cuda", 1)) == torch.device("cuda", 1)
    for here in (torch.device("cuda", 0), CPU):
        assert isinstance(on(here), nullcontext)


def test_the_cpu_refuses_cuda() -> None:
    with pytest.raises(RuntimeError, match=r"need a GPU of compute capability 9\.0\. Use the ref"):
        select(CPU, LAYOUT, "cuda")


@pytest.mark.parametrize("capability", [(9, 0)], indirect=True)
def test_a_missing_compiler_is_a_reason(capability: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvarn_core.nvrtc.obstacle", lambda: "the package nvidia-cuda-nvrtc")
    with pytest.raises(RuntimeError, match="the package nvidia-cuda-nvrtc is not installed"):
        select(GPU, LAYOUT, "cuda")

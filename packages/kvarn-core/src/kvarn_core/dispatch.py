"""Which engine runs an operation: the reference in plain torch, Triton kernels, or CUDA C++.

The choice follows from the device and the preset, never from the environment or from what happened
before, and `explain` says it. An engine asked for by name runs or is refused; under `cuda` an
operation without a kernel in CUDA C++ runs in Triton.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from kvarn_core.layout import RecordLayout

ENGINES = ("reference", "triton", "cuda")
IN_CUDA = ("decode", "quantize", "store")  # operations with a kernel in CUDA C++
TRITON_CAPABILITY = (8, 0)  # the oldest GPU whose tensor cores the kernels can use


def select(
    device: torch.device,
    layout: RecordLayout | None,
    engine: str | None = None,
    *,
    kernels: tuple[str, ...] = ("triton",),
) -> str:
    """Choose the engine of an operation.

    Parameters
    ----------
    device : torch.device
        Where the cache lives.
    layout : RecordLayout, optional
        Byte layout of the preset; None for an operation without records.
    engine : str, optional
        A member of `ENGINES` forces one; None takes cuda where the GPU can run it, then Triton.
    kernels : tuple of str
        Engines that have a kernel for the operation. Without ``"cuda"`` among them Triton runs
        what the cuda engine is asked for.

    Returns
    -------
    str
        A member of `ENGINES`.

    Raises
    ------
    ValueError
        If there is no such engine, or if it cannot read the preset.
    RuntimeError
        If the machine lacks what the engine needs.

    Notes
    -----
    On the CPU Triton must be asked for, and runs in its interpreter (``TRITON_INTERPRET=1``). What
    was chosen for a GPU is remembered: every call of an operation asks.
    """
    choose = _select_on_gpu if device.type == "cuda" else _select
    return choose(device, layout, engine, kernels)


def _select(
    device: torch.device,
    layout: RecordLayout | None,
    engine: str | None,
    kernels: tuple[str, ...],
) -> str:
    if engine not in (None, *ENGINES):
        raise ValueError(f"There is no engine {engine!r}. Choose one of {', '.join(ENGINES)}.")
    if engine == "reference":
        return engine
    if engine is None:
        if device.type != "cuda" or _obstacle(device, layout, "triton"):
            return "reference"
        able = "cuda" in kernels and not _obstacle(device, layout, "cuda")
        return "cuda" if able else "triton"
    wanted = engine if engine in kernels else "triton"
    for needed in dict.fromkeys((engine, wanted)):
        if obstacle := _obstacle(device, layout, needed):
            error = ValueError if layout and layout.preset.is_debug else RuntimeError
            able = needed == "cuda" and not _obstacle(device, layout, "triton")
            other = "triton" if able else "reference"
            raise error(f"The {needed} engine cannot run: {obstacle}. Use the {other} engine.")
    return wanted


_select_on_gpu = cache(_select)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the current GPU for a ``with`` block; Triton launches on the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def check_devices(device: torch.device, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError that names the first of `tensors` which is not on `device`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}. Pass it on {device}.")


def explain(device: torch.device, layout: RecordLayout | None, engine: str | None = None) -> str:
    """Say which engine `select` chooses for a whole step and why; same parameters and errors."""
    chosen = select(device, layout, engine, kernels=ENGINES)
    rest = ""
    if chosen == "cuda":
        rest = f" Operations in CUDA C++: {', '.join(IN_CUDA)}; Triton runs the others."
    if engine is not None:
        return f"The {chosen} engine runs on {device}, as asked for.{rest}"
    if chosen != "reference":
        if chosen == "triton":
            rest = f" The cuda engine cannot run: {_obstacle(device, layout, 'cuda')}."
        return f"The {chosen} engine runs on {device} ({torch.cuda.get_device_name(device)}).{rest}"
    return f"The reference engine runs on {device}, because {_obstacle(device, layout, 'triton')}."


def _obstacle(device: torch.device, layout: RecordLayout | None, engine: str) -> str | None:
    """Why the kernels of an engine cannot run, as a clause, or None."""
    if layout and layout.preset.is_debug:
        return f"{layout.preset.name} stores fp32 rows, which no kernel reads"
    return _cuda_obstacle(device) if engine == "cuda" else _triton_obstacle(device)


def _cuda_obstacle(device: torch.device) -> str | None:
    from kvarn_core import nvrtc

    need = ".".join(map(str, nvrtc.CAPABILITY))
    if device.type != "cuda":
        return f"its kernels need a GPU of compute capability {need}"
    capability = torch.cuda.get_device_capability(device)
    if capability != nvrtc.CAPABILITY:
        have = ".".join(map(str, capability))
        return f"{device} has compute capability {have} and its kernels need exactly {need}"
    if missing := nvrtc.obstacle():
        return f"{missing} is not installed"
    return nvrtc.driver_obstacle()


def _triton_obstacle(device: torch.device) -> str | None:
    if not triton_installed():
        return "the package triton is not installed"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < TRITON_CAPABILITY:
            have, need = (
                ".".join(map(str, version)) for version in (capability, TRITON_CAPABILITY)
            )
            return f"{device} has compute capability {have} and the kernels need {need} or higher"
    elif device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return "the kernels need a CUDA GPU, or TRITON_INTERPRET=1 on the CPU"
    return None


@cache
def triton_installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec("triton") is not None

"""Which engine runs an operation: the reference in plain torch, or Triton kernels.

The choice follows from the device and the preset, never from the environment or from what happened
before, and `explain` says it in one sentence. An engine asked for by name runs or is refused.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvarn_core.layout import RecordLayout

ENGINES = ("reference", "triton")
TRITON_CAPABILITY = (8, 0)  # the oldest GPU whose tensor cores the kernels can use


def select(device: torch.device, layout: RecordLayout | None, engine: str | None = None) -> str:
    """Choose the engine of an operation.

    Parameters
    ----------
    device : torch.device
        Where the cache lives.
    layout : RecordLayout, optional
        Byte layout of the preset; None for an operation without records.
    engine : str, optional
        ``"reference"`` or ``"triton"`` forces one; None takes Triton where a GPU can run it.

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
    On the CPU Triton must be asked for, and runs in its interpreter (``TRITON_INTERPRET=1``).
    """
    if engine not in (None, *ENGINES):
        raise ValueError(f"There is no engine {engine!r}. Choose one of {', '.join(ENGINES)}.")
    if engine is None:
        usable = device.type == "cuda" and _obstacle(device, layout) is None
        return "triton" if usable else "reference"
    if engine == "triton" and (obstacle := _obstacle(device, layout)):
        error = ValueError if layout and layout.preset.is_debug else RuntimeError
        raise error(f"The triton engine cannot run: {obstacle}. Use the reference engine.")
    return engine


def explain(device: torch.device, layout: RecordLayout | None, engine: str | None = None) -> str:
    """Say in one sentence which engine `select` chooses and why; same parameters and errors."""
    chosen = select(device, layout, engine)
    if engine is not None:
        return f"The {chosen} engine runs on {device}, as asked for."
    if chosen == "triton":
        return f"The triton engine runs on {device} ({torch.cuda.get_device_name(device)})."
    return f"The reference engine runs on {device}, because {_obstacle(device, layout)}."


def _obstacle(device: torch.device, layout: RecordLayout | None) -> str | None:
    """Why Triton kernels cannot run, as a clause, or None."""
    if layout and layout.preset.is_debug:
        return f"{layout.preset.name} stores fp32 rows, which no kernel reads"
    if not _triton_installed():
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
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None

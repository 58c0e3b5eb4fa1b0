"""Timings of a GPU that slowed itself down say nothing; the driver counts how long it did."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

COMMAND = ("nvidia-smi", "-q", "-d", "PERFORMANCE")
# counters, unlike the states of the same names; a power cap is how a loaded GPU normally runs
COUNTED = re.compile(r"(?:[SH]W Thermal Slowdown|HW Power Braking)\s*:\s*(\d+) us")
ATTEMPTS = 3

T = TypeVar("T")


def counted(report: str) -> int | None:
    """Sum of the counters in what `COMMAND` prints, microseconds; None if it has none."""
    found = COUNTED.findall(report)
    return sum(map(int, found)) if found else None


def slowdown_us() -> int | None:
    """How long the GPUs have run slower so far, for heat or a power brake.

    Returns
    -------
    int or None
        Microseconds over all GPUs since the driver started; None without a driver that counts.
    """
    try:
        done = subprocess.run(COMMAND, capture_output=True, text=True, check=False)  # noqa: S603
    except FileNotFoundError:
        return None
    return counted(done.stdout)


def slowed(before: int | None) -> int | None:
    """Microseconds of slowdown since `slowdown_us` said `before`; None where nobody counts."""
    now = slowdown_us()
    return None if before is None or now is None else now - before


def unthrottled(measure: Callable[[], T]) -> T:
    """What `measure` returns, measured again if the GPU slowed down meanwhile.

    Raises
    ------
    RuntimeError
        If it slowed down in each of `ATTEMPTS` attempts.
    """
    for _ in range(ATTEMPTS):
        before = slowdown_us()
        found = measure()
        if not slowed(before):
            return found
    raise RuntimeError(
        f"The GPU slowed down for heat or power in each of {ATTEMPTS} attempts. Cool it first."
    )

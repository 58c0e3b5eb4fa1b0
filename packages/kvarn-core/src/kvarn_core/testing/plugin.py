"""pytest plugin: unwritten memory is never zero, and GPUs can be demanded.

Load it with ``-p kvarn_core.testing.plugin``.
"""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

POISONED = ("empty", "empty_like", "empty_strided")
POISONED_METHODS = ("new_empty",)
POISON_BYTE = 0xFF  # NaN in every floating dtype, the largest code in a record
COUNTS = {"a": 1, "two": 2, "four": 4, "eight": 8}
WANT_OF_GPUS = re.compile(rf"needs ({'|'.join(COUNTS)}) CUDA GPUs?\b")  # why a test was skipped


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--require-gpu``."""
    parser.addoption(
        "--require-gpu",
        nargs="?",
        type=int,
        const=1,
        default=0,
        metavar="N",
        help="fail without N GPUs (default 1), if no GPU test ran, or if one was skipped for want"
        " of no more than N",
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse a machine with fewer GPUs than are required."""
    required = session.config.getoption("--require-gpu")
    if required and (found := torch.cuda.device_count()) < required:
        raise pytest.UsageError(f"--require-gpu: torch sees {found} of {required} CUDA GPUs.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests on a machine without one, and kernels that can run nowhere."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; none is visible"))
        elif item.get_closest_marker("kernel") and not _interpreted():
            reason = "needs a CUDA GPU, or TRITON_INTERPRET=1 to interpret Triton kernels"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def kernel_device() -> torch.device:
    """Where Triton kernels run: the GPU, or the CPU through Triton's interpreter."""
    return torch.device("cpu" if _interpreted() else "cuda")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count the GPU tests that ran, and note those that lacked GPUs."""
    if report.when == "call" and not report.skipped and {"gpu", "kernel"} & set(report.keywords):
        _GPU_TESTS.append(report.nodeid)
    want = WANT_OF_GPUS.search(report.longreprtext) if report.skipped else None
    if want and "gpu" in report.keywords:
        _LACKING[report.nodeid] = COUNTS[want[1]]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Turn GPU tests that did not run into a failure if GPUs are required."""
    required = session.config.getoption("--require-gpu")
    if not required or hasattr(session.config, "workerinput"):
        return
    lacking = [test for test, count in _LACKING.items() if count <= required]
    if lacking or not _GPU_TESTS:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        what = f"{lacking[0]} saw too few GPUs" if lacking else "no GPU test ran"
        print(f"\n--require-gpu: {what}.", file=sys.stderr)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what kvarn_core gets from ``torch.empty`` and its relatives with 0xFF.

    Calls from anywhere else are untouched.
    """
    for name in POISONED:
        monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name)))
    for name in POISONED_METHODS:
        monkeypatch.setattr(torch.Tensor, name, _poisoning(getattr(torch.Tensor, name)))


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill the memory of a dense tensor with 0xFF bytes, in place.

    Parameters
    ----------
    tensor : Tensor, any shape and dtype

    Returns
    -------
    Tensor
        The same tensor.
    """
    if tensor.numel():
        storage = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        storage.set_(tensor.untyped_storage()).fill_(POISON_BYTE)
    return tensor


_GPU_TESTS: list[str] = []
_LACKING: dict[str, int] = {}  # GPUs that a skipped test needs, by its name


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _poisoning(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = original(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return poison(tensor) if caller.startswith("kvarn_core.") else tensor

    return empty

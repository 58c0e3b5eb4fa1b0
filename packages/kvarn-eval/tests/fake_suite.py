"""The smoke suite against the stand-in server and load generator."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from kvarn_eval.small_model import SMALL_MODEL
from kvarn_eval.suite import load_suite
from kvarn_eval.suite_arm import Setup

HERE = Path(__file__).parent
FAKE_SERVER = (sys.executable, str(HERE / "fake_server.py"))
FAKE_BENCH = (sys.executable, str(HERE / "fake_bench.py"))


def setup(folder: Path, **more: Any) -> Setup:
    """The smoke suite without lm-eval, against the stand-in server and load generator."""
    suite = load_suite("smoke")
    fields = {"parts": ("capacity", "throughput"), "serve": FAKE_SERVER, "bench": FAKE_BENCH}
    return Setup(suite, SMALL_MODEL, SMALL_MODEL, folder, **{**fields, **more})


def quiet(what: str, done: int, steps: int) -> None:
    """No progress."""

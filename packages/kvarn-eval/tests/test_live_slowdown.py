"""A real engine that loses 10 % of its speed is noticed, and one that loses nothing is not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvarn_eval.compare import compare
from kvarn_eval.schema import Verdict
from kvarn_eval.sides import Document, pool
from kvarn_eval.small_model import SMALL_MODEL
from kvarn_eval.throughput import Settings, run_throughput
from kvarn_eval.throughput_arm import CHILD

if TYPE_CHECKING:
    from kvarn_eval.compare import Change

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.slow]

SLOW = (sys.executable, str(Path(__file__).with_name("slow_engine.py")))
SETTINGS = Settings(
    str(SMALL_MODEL),
    arms=("kvarn",),
    prompt_tokens=2048,
    requests=16,
    output_tokens=512,
    capacity_tokens=0,
    engine={"max_model_len": 4096, "max_num_seqs": 16, "kv_cache_memory_bytes": 1 << 30},
    # one process, so that a rest of the caller is a rest of the engine
    environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
)


def decode_speed(base: list[Document], head: list[Document]) -> Change:
    found = compare(pool(base), pool(head))
    return next(change for change in found.changes if change.name == "decode_equal")


def test_a_tenth_slower_is_noticed(tmp_path: Path) -> None:
    runs = {}
    for name, command in (
        ("a1", CHILD),
        ("b1", SLOW),
        ("b2", SLOW),
        ("a2", CHILD),
        ("a3", CHILD),
        ("a4", CHILD),
    ):
        folder = tmp_path / name
        folder.mkdir()
        run_throughput(SETTINGS, folder, lambda *_: None, command=command)
        runs[name] = Document.load(folder / "result.json")
    slower = decode_speed([runs["a1"], runs["a2"]], [runs["b1"], runs["b2"]])
    assert slower.verdict is Verdict.FAIL, slower
    same = decode_speed([runs["a1"], runs["a4"]], [runs["a2"], runs["a3"]])
    assert same.verdict is not Verdict.FAIL, same

"""One arm of the rehearsal on a real engine of two ranks: lm-eval and a primed load.

Both arms, every scenario and the texts take many times as long: `nox -s "gate(suite='rehearsal')"`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvarn_core import PRESETS, RecordLayout
from kvarn_eval.small_model import SMALL_MODEL
from kvarn_eval.suite import load_suite
from kvarn_eval.suite_arm import Setup, observe
from kvarn_eval.suite_run import check_all

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine


def quiet(what: str, done: int, steps: int) -> None:
    """No progress."""


def test_a_server_answers_a_task_and_a_load(tmp_path: Path) -> None:
    suite = load_suite("rehearsal")
    task = suite.tasks[0].model_copy(update={"seeds": 1})
    primed = next(s for s in suite.scenarios if s.name == "primed-equal")
    suite = suite.model_copy(update={"tasks": (task,), "scenarios": (primed,), "traces": None})
    setup = Setup(suite, SMALL_MODEL, SMALL_MODEL, tmp_path, tensor_parallel=2)
    checked = check_all(setup, quiet)
    found = observe(setup, "plain", "kvarn", SMALL_MODEL, checked, None, quiet)
    assert all(values == [1.0] for values in found["tasks"][0]["scores"].values())
    assert len(found["tasks"][0]["scores"]) == task.items
    (load,) = found["loads"]
    assert load["requests"] == int(suite.server["max-num-seqs"])
    assert load["hit_share"] >= primed.min_hit_share
    assert load["output_throughput"] > 0
    layout = RecordLayout(PRESETS["kvarn_k4v2_g128"], 128)
    page = 6 * layout.record_bytes  # six layers, one of two KV heads on each rank
    assert found["pool"]["pages"] == int(suite.server["kv-cache-memory-bytes"]) // page

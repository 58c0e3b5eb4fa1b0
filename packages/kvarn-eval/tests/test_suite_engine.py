"""The rehearsal of the public suite on real engines: two servers of two ranks, lm-eval, a load."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvarn_eval.cli import SMALL_MODEL
from kvarn_eval.schema import Verdict
from kvarn_eval.suite import load_suite
from kvarn_eval.suite_arm import Setup
from kvarn_eval.suite_run import run_suite

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine


def test_servers_answer_a_task_and_a_load(tmp_path: Path) -> None:
    suite = load_suite("rehearsal")
    task = suite.tasks[0].model_copy(update={"seeds": 1})
    primed = next(s for s in suite.scenarios if s.name == "primed-equal")
    suite = suite.model_copy(update={"tasks": (task,), "scenarios": (primed,), "traces": None})
    suite = suite.model_copy(update={"limits": suite.limits[:1]})
    setup = Setup(suite, SMALL_MODEL, SMALL_MODEL, tmp_path, tensor_parallel=2)
    run = run_suite(setup, lambda what, done, steps: print(what))
    verdicts = {gate.name: gate.verdict for gate in run.gates}
    assert verdicts["pool_tokens.kvarn"] is Verdict.PASS
    assert verdicts["primed-equal.valid.kvarn"] is Verdict.PASS
    assert run.value("kvarn", "plain.accuracy") == run.value("fp16", "plain.accuracy") == 1
    assert run.value("kvarn", "primed-equal.decode") > 0
    assert run.model.tensor_parallel == 2

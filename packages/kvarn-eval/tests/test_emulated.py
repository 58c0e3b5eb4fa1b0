from __future__ import annotations

from typing import TYPE_CHECKING

from kvarn_core import PRESETS, RecordLayout
from kvarn_eval.emulated import describe, run_emulated
from kvarn_eval.suite import load_suite

if TYPE_CHECKING:
    from pathlib import Path

    from kvarn_eval.small_model.model import SmallModel

SINK = RecordLayout(PRESETS["kvarn_k4v2_g128"], 128).sink_rows


def test_every_emulated_arm_reads_every_item(tmp_path: Path, tiny_model: SmallModel) -> None:
    tiny_model.save(tmp_path)
    suite = load_suite("sensitivity")
    names = ("fp16", "kvarn k4v2", "rtn k4v2")
    short = tuple(task.model_copy(update={"prompt_tokens": (300, 320)}) for task in suite.tasks)
    suite = suite.model_copy(
        update={
            "tasks": short,
            "profiles": ("plain",),
            "emulated_items": 1,
            "emulated": {name: suite.emulated[name] for name in names},
        }
    )
    steps: list[int] = []
    found = run_emulated(suite, tmp_path, "cpu", lambda what, done, total: steps.append(done))
    assert [m.arm for m in found if m.name == "plain.accuracy"] == list(names)
    assert steps == [1, 2, 3, 4] * 3
    assert all(0 <= m.median <= 1 for m in found)


def test_an_emulated_arm_says_what_it_keeps_exact() -> None:
    arms = load_suite("sensitivity").emulated
    assert describe(arms["rtn k4v2"], 128).sink_rows == 0
    assert describe(arms["kvarn k4v2"], 128).sink_rows == SINK
    assert describe(arms["kivi k2v2"], 128).kv_cache_dtype == "kvarn_k2v2_g128"

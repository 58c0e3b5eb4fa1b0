from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from kvarn_eval.lm_tasks import Scores
from kvarn_eval.schema import Verdict
from kvarn_eval.task_gates import ANSWERS, compare, floors, measurements, save_answers, validity

if TYPE_CHECKING:
    from pathlib import Path


def scores(right: int, items: int = 2000, task: str = "recall", prompt: int = 400) -> Scores:
    values = {f"{task}-{i}": [float(i < right)] for i in range(items)}
    return Scores(task, values, [prompt] * items, generated=100, truncated=0, raw=["a.json"])


@pytest.mark.parametrize(
    ("right", "items", "verdict"),
    [
        (1960, 2000, Verdict.FAIL),  # two points lost
        (2000, 2000, Verdict.PASS),
        (199, 200, Verdict.INCONCLUSIVE),  # half a point on too few
        (198, 200, Verdict.FAIL),
    ],
)
def test_lost_answers_decide(right: int, items: int, verdict: Verdict) -> None:
    gate, _ = compare(
        "plain", ("fp16", [scores(items, items)]), ("kvarn", [scores(right, items)]), 0.01,
        required=True,
    )  # fmt: skip
    assert gate.verdict is verdict
    assert gate.evidence == ["fp16:plain.accuracy", "kvarn:plain.accuracy"]


def test_items_are_paired_by_name_and_not_by_order() -> None:
    mixed = Scores("recall", dict(reversed(scores(1000).scores.items())), [400] * 2000, 100, 0, [])
    gate, _ = compare("plain", ("a", [scores(1000)]), ("b", [mixed]), 0.01, required=True)
    assert "0 lost, 0 won" in gate.reason


def test_a_small_task_cannot_hide_in_the_pool() -> None:
    whole = [scores(2000), scores(30, 30, "hard")]
    lossy = [scores(2000), scores(24, 30, "hard")]
    gates = compare("plain", ("fp16", whole), ("kvarn", lossy), 0.01, required=True)
    assert {gate.name: gate.verdict for gate in gates} == {
        "plain.accuracy.kvarn": Verdict.PASS,
        "plain.accuracy.recall.kvarn": Verdict.PASS,
        "plain.accuracy.hard.kvarn": Verdict.FAIL,
    }
    assert all(gate.required for gate in gates)


def test_a_task_that_the_reference_fails_says_nothing() -> None:
    found, least = [scores(2000), scores(9, 20, "hard")], {"recall": 0.5, "hard": 0.5}
    gates = floors("plain", "fp16", found, least)
    assert [gate.verdict for gate in gates] == [Verdict.PASS, Verdict.FAIL]
    assert gates[1].name == "plain.accuracy.hard.fp16"


def test_answers_are_kept_for_later_comparisons(tmp_path: Path) -> None:
    twice = Scores("hard", {"a": [1.0, 0.0]}, [400], generated=9, truncated=0, raw=[])
    save_answers(tmp_path, [scores(1, 2), twice])
    lines = (tmp_path / ANSWERS).read_text(encoding="utf-8").splitlines()
    assert [tuple(json.loads(line).values()) for line in lines] == [
        ("recall", "recall-0", 1.0),
        ("recall", "recall-1", 0.0),
        ("hard", "a", 0.5),
    ]
    found = measurements("kvarn", "plain", [scores(1, 2), twice], 256, "plain-kvarn")
    assert {m.raw for m in found if "accuracy" in m.name} == {f"plain-kvarn/{ANSWERS}"}


def test_different_items_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="different items"):
        compare("plain", ("a", [scores(9, 10)]), ("b", [scores(9, 11)]), 0.01, required=True)


def test_short_texts_are_invalid() -> None:
    assert validity("plain", "fp16", [scores(1)], 256).verdict is Verdict.PASS
    assert validity("plain", "fp16", [scores(1, prompt=100)], 256).verdict is Verdict.FAIL


def test_accuracy_is_pooled_over_items() -> None:
    found = measurements("kvarn", "large", [scores(10, 10), scores(0, 30, "arith")], 256, "raw")
    value = {m.name: m.median for m in found}
    assert value["large.accuracy.recall"] == 1
    assert value["large.accuracy"] == 0.25
    assert value["large.reading_records.arith"] == 1

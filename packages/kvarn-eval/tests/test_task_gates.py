from __future__ import annotations

import pytest

from kvarn_eval.lm_tasks import Scores
from kvarn_eval.schema import Verdict
from kvarn_eval.task_gates import compare, measurements, validity


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
    gate = compare(
        "plain", ("fp16", [scores(items, items)]), ("kvarn", [scores(right, items)]), 0.01,
        required=True,
    )  # fmt: skip
    assert gate.verdict is verdict
    assert gate.evidence == ["fp16:plain.accuracy", "kvarn:plain.accuracy"]


def test_items_are_paired_by_name_and_not_by_order() -> None:
    mixed = Scores("recall", dict(reversed(scores(1000).scores.items())), [400] * 2000, 100, 0, [])
    gate = compare("plain", ("a", [scores(1000)]), ("b", [mixed]), 0.01, required=True)
    assert "0 lost, 0 won" in gate.reason


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

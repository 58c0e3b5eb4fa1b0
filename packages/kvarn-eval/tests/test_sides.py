"""Sides that did not measure the same thing are refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvarn_eval.compare import compare
from kvarn_eval.schema import Unit, Verdict, measure
from kvarn_eval.sides import Document, differences, family_of, is_accuracy, pool

sys.path.insert(0, str(Path(__file__).parent))
from injected import OURS, RECORDED, RESULTS, write, write_answers

if TYPE_CHECKING:
    from collections.abc import Callable


def lose_a_case(data: dict[str, Any]) -> None:
    data["measurements"] = [m for m in data["measurements"] if m["name"] != "seal.step.b32"]


def lose_an_arm(data: dict[str, Any]) -> None:
    data["measurements"] = [m for m in data["measurements"] if m["arm"] != "flash-fp16"]
    data["arms"].pop("flash-fp16")
    data["gates"] = []


def other_suite(data: dict[str, Any]) -> None:
    data["suite"] = "bench_ops quick"


def other_dtype(data: dict[str, Any]) -> None:
    data["model"]["dtype"] = "bfloat16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_a_case, "lacks kvarn_k4v2_g128:seal.step.b32 in us"),
        (lose_an_arm, "lacks the arm flash-fp16"),
        (other_suite, "different suites"),
        (other_dtype, "different models"),
    ],
)
def test_a_smaller_head_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    head = pool([Document.load(write(tmp_path / "head.json", change))])
    with pytest.raises(ValueError, match=message):
        compare(pool([Document.load(RECORDED)]), head)


def test_a_head_with_more_cases_is_compared(tmp_path: Path) -> None:
    base = pool([Document.load(write(tmp_path / "base.json", lose_a_case))])
    found = compare(base, pool([Document.load(RECORDED)]))
    assert "seal.step.b32" not in {change.name for change in found.changes}


def test_a_run_is_not_compared_with_itself() -> None:
    side = pool([Document.load(RECORDED)])
    with pytest.raises(ValueError, match="Both sides hold the run"):
        compare(side, side)


def test_other_texts_are_refused(tmp_path: Path) -> None:
    def other(data: dict[str, Any]) -> None:
        data["suite_sha256"] = "1" * 64

    base = RESULTS / "fidelity" / "result.json"
    head = pool([Document.load(write(tmp_path / "head.json", other, source=base))])
    with pytest.raises(ValueError, match="other texts, problems or settings"):
        compare(pool([Document.load(base)]), head)


def test_an_arm_with_other_options_is_refused(tmp_path: Path) -> None:
    def other(data: dict[str, Any]) -> None:
        data["arms"]["kvarn"]["sink_rows"] = 128

    base = RESULTS / "fidelity" / "result.json"
    head = pool([Document.load(write(tmp_path / "head.json", other, source=base))])
    with pytest.raises(ValueError, match="describe the arm kvarn differently"):
        compare(pool([Document.load(base)]), head)


def commit(data: dict[str, Any]) -> None:
    data["git"]["sha"] = "1" * 40


def gpu(data: dict[str, Any]) -> None:
    data["environment"]["gpus"][0]["name"] = "NVIDIA H200"


@pytest.mark.parametrize(
    ("change", "run_id", "message"),
    [
        (commit, "b", "different commits"),
        (lose_a_case, "b", "lacks"),
        (lambda data: None, "a", "the same run"),
    ],
)
def test_runs_of_two_sides_are_not_pooled(
    change: Any, run_id: str, message: str, tmp_path: Path
) -> None:
    first = write(tmp_path / "a.json")
    second = write(tmp_path / "b.json", change, run_id=run_id)
    with pytest.raises(ValueError, match=message):
        pool([Document.load(first), Document.load(second)])


def test_runs_of_several_machines_are_pooled_and_decide_nothing(tmp_path: Path) -> None:
    base = pool([Document.load(write(tmp_path / f"{name}.json", *changes))
                 for name, changes in (("a", ()), ("b", (gpu,)))])  # fmt: skip
    assert base.differences == ["GPU was NVIDIA H100 80GB HBM3, is NVIDIA H200"]
    found = compare(base, pool([Document.load(RECORDED)]))
    assert found.differences == base.differences
    assert found.verdict is Verdict.INCONCLUSIVE


def beside_another(data: dict[str, Any]) -> None:
    data["environment"]["cores"] = 64
    data["environment"]["gpus"] *= 2


def test_a_second_gpu_matters_to_servers_and_not_to_kernels(tmp_path: Path) -> None:
    one, two = (
        Document.load(RECORDED).run,
        Document.load(write(tmp_path / "a.json", beside_another)),
    )
    assert differences(one, two.run) == []
    served = [run.model_copy(update={"suite": "throughput"}) for run in (one, two.run)]
    assert differences(*served) == [
        "number of GPUs was 1, is 2",
        "number of cores was 16, is 64",
    ]


def test_a_file_that_is_no_result_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.json is not a result of this version"):
        Document.load(file)


ANSWERS = {"fp16": [("recall", 0, True), ("recall", 1, False)]}


def test_answers_are_read_beside_the_result(tmp_path: Path) -> None:
    document = Document.load(write_answers(tmp_path / "result.json", ANSWERS))
    scores = document.right(document.run.measurements[0])
    assert scores == {("recall", 0): 1.0, ("recall", 1): 0.0}


def test_missing_or_foreign_answers_are_refused(tmp_path: Path) -> None:
    document = Document.load(write_answers(tmp_path / "result.json", ANSWERS))
    file = tmp_path / "answers-fp16.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace("false", "true"), encoding="utf-8")
    with pytest.raises(ValueError, match="does not hold the answers behind fp16:accuracy"):
        document.right(document.run.measurements[0])
    file.unlink()
    with pytest.raises(ValueError, match="not beside it"):
        document.right(document.run.measurements[0])


def test_answers_of_several_runs_are_averaged(tmp_path: Path) -> None:
    second = {"fp16": [("recall", 0, False), ("recall", 1, False)]}
    paths = [
        write_answers(tmp_path / name / "result.json", answers)
        for name, answers in (("a", ANSWERS), ("b", second))
    ]
    side = pool([Document.load(path) for path in paths])
    assert side.right("fp16:accuracy") == {("recall", 0): 0.5, ("recall", 1): 0.0}


def test_other_problems_are_refused(tmp_path: Path) -> None:
    other = {"fp16": [("recall", 0, True), ("recall", 7, False)]}
    paths = [
        write_answers(tmp_path / name / "result.json", answers)
        for name, answers in (("a", ANSWERS), ("b", other))
    ]
    with pytest.raises(ValueError, match="different problems"):
        compare(*(pool([Document.load(path)]) for path in paths))


def test_the_recorded_run_is_ours_and_clean() -> None:
    run = Document.load(RECORDED).run
    assert not run.git.dirty
    assert OURS in run.arms


@pytest.mark.parametrize(
    ("name", "unit", "accuracy", "family"),
    [
        ("accuracy", Unit.SHARE, True, ""),
        ("accuracy.recall", Unit.SHARE, True, "recall"),
        ("plain.accuracy", Unit.SHARE, True, ""),
        ("large.accuracy.arith", Unit.SHARE, True, "arith"),
        ("accuracy", Unit.COUNT, False, ""),
        ("top1", Unit.SHARE, False, ""),
    ],
)
def test_accuracies_are_found_by_their_names(
    name: str, unit: Unit, accuracy: bool, family: str
) -> None:
    measurement = measure(name, "kvarn", unit, 1.0)
    assert is_accuracy(measurement) is accuracy
    assert family_of(measurement) == family

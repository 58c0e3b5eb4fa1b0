"""Sides that did not measure the same thing are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvarn_eval.compare import compare
from kvarn_eval.compare_report import markdown
from kvarn_eval.lm_tasks import Scores
from kvarn_eval.schema import Arm, Model, Run, Unit, Verdict, describe_run, measure
from kvarn_eval.sides import Document, Pool, differences, family_of, is_accuracy, is_ours, pool
from kvarn_eval.suite import command_line, load_suite
from kvarn_eval.task_gates import measurements, save_answers
from kvarn_eval.throughput import Settings

sys.path.insert(0, str(Path(__file__).parent))
from injected import OURS, RECORDED, RESULTS, write, write_answers

if TYPE_CHECKING:
    from collections.abc import Callable

RECORDED_COMMIT = "f74315d0eca3596c1823aa9c43643ce02225a428"


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


def interrupted(data: dict[str, Any]) -> None:
    """Of ours, the run got as far as one case."""
    kept = [m for m in data["measurements"] if m["arm"] != OURS or m["name"] == "seal.step.b32"]
    missing = {"name": "complete", "rule": "number of things that were not measured <= limit",
               "value": 1, "limit": 0, "verdict": "inconclusive",
               "reason": "not measured: plain kvarn", "evidence": []}  # fmt: skip
    data.update(measurements=kept, gates=[missing])


def finished(data: dict[str, Any]) -> None:
    interrupted(data)
    data["gates"][0].update(value=0, verdict="pass")


def test_an_interrupted_run_is_no_side(tmp_path: Path) -> None:
    part = Document.load(write(tmp_path / "part.json", interrupted))
    whole = Document.load(write(tmp_path / "whole.json", finished))
    for documents in ([part], [whole, part]):
        with pytest.raises(ValueError, match=r"part\.json is of an interrupted run \(not measured"):
            pool(documents)
    pool([whole])


def failed(data: dict[str, Any]) -> None:
    data["failed"] = {"fp8": "Arm fp8 took too long."}


def test_a_run_of_which_an_arm_failed_is_no_side(tmp_path: Path) -> None:
    whole = Document.load(write(tmp_path / "whole.json"))
    part = Document.load(write(tmp_path / "part.json", failed))
    for documents in ([part], [whole, part]):
        with pytest.raises(
            ValueError, match=r"part\.json did not measure all of fp8 \(Arm fp8 took"
        ):
            pool(documents)


def kept(arm: str, *commits: str) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update(commits={arm: list(commits)})


@pytest.mark.parametrize("commits", [("1" * 40,), ("unknown",), (RECORDED_COMMIT, "1" * 40)])
def test_a_side_does_not_keep_our_arm_of_another_commit(
    commits: tuple[str, ...], tmp_path: Path
) -> None:
    mixed = Document.load(write(tmp_path / "mixed.json", kept(OURS, *commits)))
    with pytest.raises(
        ValueError, match=f"mixed.json kept {OURS} of another commit .{commits[-1]}"
    ):
        pool([mixed])


def test_controls_of_other_commits_are_named(tmp_path: Path) -> None:
    pool([Document.load(write(tmp_path / "own.json", kept(OURS, RECORDED_COMMIT)))])
    mixed = [
        Document.load(write(tmp_path / f"{name}.json", kept("flash-fp16", name * 40)))
        for name in ("2", "1")
    ]
    side = pool(mixed)
    assert side.describe().commits == {"flash-fp16": ["1" * 40, "2" * 40]}
    report = markdown(compare(pool([Document.load(RECORDED)]), side))
    assert f"2 runs; flash-fp16 of commit {'1' * 40}, {'2' * 40}\n" in report


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


def test_foreign_answers_are_refused_and_missing_ones_are_none(tmp_path: Path) -> None:
    document = Document.load(write_answers(tmp_path / "result.json", ANSWERS))
    file = tmp_path / "answers-fp16.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace("false", "true"), encoding="utf-8")
    with pytest.raises(ValueError, match="does not hold the answers behind fp16:accuracy"):
        document.right(document.run.measurements[0])
    file.unlink()
    assert document.right(document.run.measurements[0]) is None


def forget(file: Path) -> None:
    file.unlink()


def lm_eval(file: Path) -> None:
    """What a suite named as its raw data before it kept answers."""
    file.write_text(json.dumps({"samples": {"recall": [{"doc_id": 0}]}}, indent=1), "utf-8")


def one_line(file: Path) -> None:
    file.write_text('{"samples": []}', encoding="utf-8")


def a_list(file: Path) -> None:
    file.write_text("[[1, 2], [3]]", encoding="utf-8")


def cut(file: Path) -> None:
    file.write_text(file.read_text(encoding="utf-8")[:-9], encoding="utf-8")


@pytest.mark.parametrize("damage", [None, forget, lm_eval, one_line, a_list, cut])
@pytest.mark.parametrize("damaged", ["base", "head"])
def test_accuracy_without_answers_is_undecided(
    damage: Callable[[Path], None] | None, damaged: str, tmp_path: Path
) -> None:
    answers = {"kvarn": [("recall", seed, True) for seed in range(9)]}
    paths = {
        side: write_answers(tmp_path / side / "result.json", answers, keep=bool(damage))
        for side in ("base", "head")
    }
    if damage:
        damage(paths[damaged].parent / "answers-kvarn.jsonl")
    found = compare(*(pool([Document.load(path)]) for path in paths.values()))
    assert found.verdict is Verdict.INCONCLUSIVE
    assert found.changes[0].reason == "+0.0 points; no answers were kept to pair"


def suite_answers(folder: Path, right: dict[tuple[str, str], dict[str, list[float]]]) -> Pool:
    """A side as a suite writes it, by profile, arm and task; of two seeds the second is right."""
    found = []
    for (profile, arm), tasks in right.items():
        answered = [
            Scores(
                task=task,
                scores={f"{task}-{item}": [value, 1.0] for item, value in enumerate(values)},
                prompt_tokens=[2000] * len(values),
                generated=9.0,
                truncated=0,
                raw=["a.json", "b.json"],
            )
            for task, values in tasks.items()
        ]
        where = folder / f"{profile}-{arm}"
        where.mkdir(parents=True)
        save_answers(where, answered)
        found += measurements(arm, profile, answered, 256, where.name)
    header = describe_run("s", "0" * 64, Model(name="m", weights_sha256=None, dtype="float16"))
    arms = {"fp16": Arm(), "kvarn": Arm(kv_cache_dtype=OURS)}
    fields = {"seconds": 1.0, "measurements": found, "gates": [], "arms": arms}
    return pool([Document(Run.model_validate({**header, **fields}), folder / "result.json")])


def test_answers_of_a_suite_are_paired_by_profile_and_task(tmp_path: Path) -> None:
    good = {"recall": [1.0, 0.0] * 100, "arith": [1.0] * 100}
    bad = {"recall": [1.0] * 2 + [1.0, 0.0] * 99, "arith": [0.0] * 20 + [1.0] * 80}
    everywhere = {
        (profile, arm): good for profile in ("plain", "large") for arm in ("fp16", "kvarn")
    }
    base = suite_answers(tmp_path / "base", everywhere)
    head = suite_answers(tmp_path / "head", {**everywhere, ("large", "kvarn"): bad})
    found = compare(base, head)
    reasons = {c.name: c.reason.partition(" (")[0] for c in found.changes if c.arm == "kvarn"}
    assert reasons == {
        "plain.accuracy.recall": "+0.0 points on 200 problems: 0 lost, 0 won",
        "plain.accuracy.arith": "+0.0 points on 100 problems: 0 lost, 0 won",
        "plain.accuracy": "+0.0 points on 300 problems: 0 lost, 0 won",
        "large.accuracy.recall": "+0.2 points on 200 problems: 0 lost, 1 won",
        "large.accuracy.arith": "-10.0 points on 100 problems: 20 lost, 0 won",
        "large.accuracy": "-3.2 points on 300 problems: 20 lost, 1 won",
    }
    verdicts = {c.name: c.verdict for c in found.changes if c.arm == "kvarn"}
    assert verdicts["large.accuracy.arith"] is verdicts["large.accuracy"] is Verdict.FAIL
    assert {c.name for c in found.changes if c.required} == {"plain.accuracy", "large.accuracy"}


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


def engine_arm(**options: str) -> Arm:
    settings = Settings("m", engine={"additional_config": {"kvarn": options}} if options else {})
    return settings.describe("kvarn")


@pytest.mark.parametrize(
    ("name", "arm", "ours"),
    [
        *(
            (name, Arm(kv_cache_dtype=arm.kv_cache_dtype, options=list(command_line(options))),
             name.startswith("kvarn"))
            for suite in map(load_suite, ("small-model", "small-model-cpu", "qwen3-32b-tp2"))
            for name, arm in suite.arms.items()
            for options in [suite.options(name)]
        ),
        ("kvarn", engine_arm(), True),
        ("kvarn", engine_arm(recipe="kvarn"), True),
        ("kvarn", engine_arm(recipe="paper"), False),
        ("kvarn", engine_arm(engine="triton", recipe="paper"), False),
    ],
)  # fmt: skip
def test_the_published_recipe_is_a_control(name: str, arm: Arm, ours: bool) -> None:
    assert is_ours(name, arm) is ours


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

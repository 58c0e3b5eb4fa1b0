from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

import pytest

from kvarn_eval.lm_tasks import Scores, check_tasks, chosen, identity, score, write_family
from kvarn_eval.small_model import SMALL_MODEL, tokenizer
from kvarn_eval.suite import Suite, Task, load_suite

if TYPE_CHECKING:
    from pathlib import Path

TASK = Task(name="recall", source="family", items=3, prompt_tokens=(300, 400), questions=4)


def suite(longest: int = 2048) -> Suite:
    update = {"server": {"max-model-len": longest}, "tasks": (TASK,)}
    return load_suite("smoke").model_copy(update=update)


def test_a_math_answer_in_a_box_is_right() -> None:
    from lm_eval.tasks.minerva_math.utils import process_results

    [task] = [task for task in load_suite("qwen3-32b-tp2").tasks if "math500" in task.name]
    assert task.name == "minerva_math500"
    problem = {"solution": "So it is $\\boxed{5}$.", "answer": "5"}
    for answer, right in (("Hence\n$$\n\\boxed{5}\n$$", 1), ("Hence $\\boxed{6}$.", 0)):
        assert process_results(problem, [answer])[task.score] == right


def test_a_family_becomes_items_and_a_task_file(tmp_path: Path) -> None:
    write_family(TASK, tmp_path)
    lines = (tmp_path / "recall.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    config = json.loads((tmp_path / "recall.yaml").read_text(encoding="utf-8"))
    assert len({item["id"] for item in items}) == 3
    room = config["generation_kwargs"]["max_gen_toks"]
    assert all(len(tokenizer.encode(item["answer"])) < room for item in items)
    with pytest.raises(ValueError, match="not a task family"):
        write_family(TASK.model_copy(update={"name": "riddles"}), tmp_path)


def test_lm_eval_loads_the_family_and_counts_its_prompts(tmp_path: Path) -> None:
    found = check_tasks(suite(), SMALL_MODEL, tmp_path)
    lines = (tmp_path / "recall.jsonl").read_text(encoding="utf-8").splitlines()
    assert found["recall"].prompt_tokens == [
        len(tokenizer.encode(json.loads(line)["prompt"])) for line in lines
    ]
    kept = shutil.copy(tmp_path / "check-recall.json", tmp_path / "kept.json")
    wanted = str(tmp_path / "check-recall.json")
    again = (sys.executable, "-c", f"import shutil; shutil.copy({str(kept)!r}, {wanted!r})")
    assert check_tasks(suite(), SMALL_MODEL, tmp_path, again) == found
    with pytest.raises(ValueError, match="Raise max-model-len"):
        check_tasks(suite(400), SMALL_MODEL, tmp_path, again)


def test_a_task_that_cannot_be_loaded_says_how_to_get_it(tmp_path: Path) -> None:
    unknown = suite().model_copy(update={"tasks": (TASK, Task(name="riddles"))})
    with pytest.raises(RuntimeError, match=r"Task riddles cannot.*Load it once with access.*Error"):
        check_tasks(unknown, SMALL_MODEL, tmp_path)


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    broken = (sys.executable, "-c", "raise MemoryError('too many items')")
    with pytest.raises(RuntimeError, match=r"lm-eval ended with status 1(?s:.)*too many items"):
        check_tasks(suite(), SMALL_MODEL, tmp_path, broken)


def sample(filter_name: str, value: float, **doc: Any) -> dict[str, Any]:
    return {"filter": filter_name, "doc": doc, "doc_hash": "h", "exact_match": value, "4096": 0.5}


def test_the_filter_that_counts_is_chosen() -> None:
    samples = [sample("strict", 0, id="a"), sample("flexible", 1, id="a")]
    task = Task(name="gsm8k", filter="flexible")
    assert [score(s, task) for s in chosen(samples, task)] == [1]
    with pytest.raises(RuntimeError, match="it has strict, flexible"):
        chosen(samples, Task(name="gsm8k", filter="loose"))


def test_items_are_named_by_themselves_or_by_their_content() -> None:
    assert identity(sample("x", 1, id="arith-3")) == "arith-3"
    assert identity(sample("x", 1)) == "h"


def test_a_score_may_be_named_by_its_item() -> None:
    task = Task(name="niah_single_1", score="max_length")
    assert score(sample("x", 1, max_length=4096), task) == 0.5


def test_share_reading_records_is_a_lower_bound() -> None:
    found = Scores("t", {"a": [1.0], "b": [1.0]}, [300, 156], generated=100, truncated=0, raw=[])
    assert found.share_reading_records(256) == pytest.approx((100 + 0) / 200, abs=0.01)
    assert found.share_reading_records(10_000) == 0

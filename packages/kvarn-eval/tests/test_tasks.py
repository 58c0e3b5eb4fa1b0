"""Task families: every answer worked out again from the prompt as text, by other means."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvarn_eval.small_model import SMALL_MODEL, tasks, tokenizer
from kvarn_eval.small_model.tasks import (
    FAMILIES,
    PROMPT_WEIGHT,
    grade,
    held_out,
    make_item,
    training_batch,
)

if TYPE_CHECKING:
    from pathlib import Path


def number(text: str) -> int:
    return int(text[::-1])


def digits(value: int) -> str:
    return f"{value % 1000:03d}"[::-1]


def solve_recall(table: dict[str, str], questions: str) -> str:
    lines = []
    for label, name in re.findall(r"(\[\d+\])(..)", questions):
        value = table[name]
        hop = f":{table[value[1:]]}" if value.startswith("@") else ""
        lines.append(f"{label}{name}:{value}{hop};")
    return "".join(lines)


def solve_arith(table: dict[str, str], questions: str) -> str:
    lines, results = [], dict[str, str]()
    for label, left, sign, right in re.findall(r"(\[\d+\])(\[\d+\]|..)([+-])(..);", questions):
        a, b = results.get(left) or table[left], table[right]
        x, y = number(a), number(b)
        results[label] = digits(x + y if sign == "+" else x - y)
        lines.append(f"{label}{left}:{a}{sign}{right}:{b}={label}:{results[label]};")
    return "".join(lines)


def solve_program(table: dict[str, str], questions: str) -> str:
    memory = {name: number(value) for name, value in table.items()}
    lines = []

    def shown(name: str) -> str:
        return f"{name}:{digits(memory[name])}"

    for instruction in questions.removesuffix("=").split(";")[:-1]:
        label, body = re.fullmatch(r"(\[\d+\])(.*)", instruction).groups()  # type: ignore[union-attr]
        condition, _, operation = body.rpartition("?")
        left, what, right = re.fullmatch("(..)(.)(..)", operation).groups()  # type: ignore[union-attr]
        said = f"{label}{shown(condition)}?" if condition else label
        if what == "=":
            said += shown(left)
            memory[right] = memory[left]
            said += f"={shown(right)}"
        elif what == "~":
            said += f"{shown(left)}~{shown(right)}"
            memory[left], memory[right] = memory[right], memory[left]
            said += f"={shown(left)},{shown(right)}"
        else:
            if condition:
                what = "+" if memory[condition] % 2 else "-"
            said += f"{shown(left)}{what}{shown(right)}"
            change = memory[right] if what == "+" else -memory[right]
            memory[left] = (memory[left] + change) % 1000
            said += f"={shown(left)}"
        lines.append(f"{said};")
    return "".join(lines)


def solve_graph(table: dict[str, str], questions: str) -> str:
    hops, node = re.fullmatch(r"\[(\d+)\](..)=", questions).groups()  # type: ignore[union-attr]
    lines = []
    for hop in range(1, int(hops) + 1):
        lines.append(f"[{hop}]{node}:{table[node]};")
        node = table[node].removeprefix("@")
    return "".join(lines)


SOLVERS = {
    "recall": solve_recall,
    "arith": solve_arith,
    "program": solve_program,
    "graph": solve_graph,
}


def solve(prompt: str) -> str:
    """The answer, worked out from the prompt as text."""
    name, text = re.fullmatch("<([a-z]+)>(.*)", prompt).groups()  # type: ignore[union-attr]
    table, questions = text.split("?", 1)
    return SOLVERS[name]({row[:2]: row[3:] for row in table.split(";") if row}, questions)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rewrites", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("questions", [1, 9, 64])
def test_an_independent_solver_finds_every_answer(
    family: str, rewrites: float, questions: int
) -> None:
    items = held_out(
        family, 12, min_tokens=900, max_tokens=2500, questions=questions, rewrites=rewrites
    )
    assert [solve(item.prompt) for item in items] == [item.answer for item in items]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_item_and_others_differ(family: str) -> None:
    prompts = [make_item(family, seed).prompt for seed in (5, 5, 6)]
    assert prompts[0] == prompts[1] != prompts[2]


def test_items_are_those_that_published_results_were_made_of() -> None:
    item = make_item("recall", 3, prompt_tokens=300, questions=4)
    assert item.prompt.startswith("<recall>Ih:641;Ui:410;pb:814;")
    item = make_item("arith", 3, prompt_tokens=300, questions=4)
    assert item.prompt.startswith("<arith>xs:235;YP:686;Qw:583;")


@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_tables_are_odd_and_training_tables_even(family: str) -> None:
    def rows(prompt: str) -> int:
        return prompt.split("?")[0].count(";")

    items = held_out(family, 9, min_tokens=700, max_tokens=1200)
    assert all(rows(item.prompt) % 2 == 1 for item in items)
    for step in range(5):
        ids, _, _ = training_batch(np.random.default_rng(step), 8, 512)
        assert all(rows(tokenizer.decode(row)) % 2 == 0 for row in ids)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("questions", [5, 16, 64])
def test_items_have_the_length_they_state_and_names_are_near_duplicates(
    family: str, questions: int
) -> None:
    items = held_out(
        family, 5, min_tokens=1400, max_tokens=7000, questions=questions, rewrites=0.25
    )
    for item in items:
        assert len(tokenizer.encode(item.prompt)) == item.prompt_tokens
        assert len(tokenizer.encode(item.answer)) + 1 == item.answer_tokens
        assert item.answer_tokens == tasks.question_tokens(family, questions)[1]
        names = set(re.findall(r"[>;](\w\w):", item.prompt))
        firsts = [sum(other[0] == name[0] for other in names) for name in names]
        assert np.mean(firsts) > 5
    assert 1024 - 13 <= make_item(family, 0, prompt_tokens=1024).prompt_tokens <= 1024


@pytest.mark.parametrize("family", FAMILIES)
def test_text_and_ids_determine_each_other(family: str) -> None:
    for text in (make_item(family, 3).prompt, make_item(family, 3).answer):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("family", ["program", "graph"])
def test_long_answers_are_long(family: str) -> None:
    assert make_item(family, 0).answer_tokens >= 500


def test_a_program_reads_what_it_has_written() -> None:
    item = make_item("program", 1, rewrites=0)
    first = dict(re.findall(r"[>;](\w\w):(\d{3})", item.prompt))
    read = re.findall(r"(?<![=,])(\w\w):(\d{3})", item.answer)
    changed = [value != first[name] for name, value in read]
    assert 0.3 < np.mean(changed) < 0.9


def test_a_walk_does_not_come_back() -> None:
    item = make_item("graph", 1, prompt_tokens=2048, questions=64, rewrites=0.5)
    assert len(set(re.findall(r"\](\w\w):", item.answer))) == 64


def test_a_grade_asks_for_the_whole_answer() -> None:
    item = make_item("recall", 1)
    assert grade(item, item.answer + "\n")
    assert not grade(item, item.answer[:-1])
    assert not grade(item, item.answer + item.answer[:5])
    digit = next(i for i, c in enumerate(item.answer) if c.isdigit() and item.answer[i - 1] == ":")
    other = str((int(item.answer[digit]) + 1) % 10)
    assert not grade(item, item.answer[:digit] + other + item.answer[digit + 1 :])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"questions": 65}, "65 questions cannot be labelled. Choose 1 to 64."),
        ({"prompt_tokens": 100}, "gives recall a table of 7 rows. Choose prompt_tokens for 16"),
        ({"prompt_tokens": 30_000, "rewrites": 0.0}, "to 2704 rows of 7 tokens."),
    ],
)
def test_impossible_items_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_item("recall", 0, **settings)  # type: ignore[arg-type]


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="riddles is not a task family"):
        make_item("riddles", 0)


def test_a_checkpoint_says_what_it_was_trained_on(tmp_path: Path) -> None:
    assert tasks.trained(tmp_path) == FAMILIES
    (tmp_path / "training.json").write_text(json.dumps({"families": ["arith"]}))
    assert tasks.trained(tmp_path) == ("arith",)
    assert set(tasks.trained(SMALL_MODEL)) <= set(FAMILIES)


@pytest.mark.parametrize("length", [256, 1024, 4096])
def test_training_asks_for_answers_and_lightly_for_prompts(length: int) -> None:
    for step in range(3):
        ids, targets, weights = training_batch(np.random.default_rng(step), 16, length)
        assert np.array_equal(ids[:, 1:], targets[:, :-1])
        for place, (row, target, weight) in enumerate(zip(ids, targets, weights, strict=True)):
            where = np.flatnonzero(weight == 1)
            assert (np.diff(where) == 1).all()
            assert (weight[: where[0]] == np.float32(PROMPT_WEIGHT)).all()
            assert (weight[where[-1] + 1 :] == 0).all()
            prompt = tokenizer.decode(row[: where[0] + 1])
            assert prompt.startswith(f"<{FAMILIES[place % len(FAMILIES)]}>")
            assert prompt.endswith("=")
            assert target[where[-1]] == tokenizer.EOS
            assert solve(prompt) == tokenizer.decode(target[where[:-1]])

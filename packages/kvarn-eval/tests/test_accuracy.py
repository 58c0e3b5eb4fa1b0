from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest

from kvarn_eval.accuracy import Answer, ask, ask_all, gates, summarise
from kvarn_eval.schema import Verdict
from kvarn_eval.small_model.tasks import Item, make_item

if TYPE_CHECKING:
    from kvarn_eval.server import Server


class Parrot:
    """Answers every problem with the text it was given for it."""

    model = "small"

    def __init__(self, texts: dict[str, str], prompt_tokens: int | None = None) -> None:
        self.texts, self.prompt_tokens = texts, prompt_tokens

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        assert path == "/v1/completions"
        assert body["temperature"] == 0
        text = self.texts[body["prompt"]]
        usage = {"prompt_tokens": self.prompt_tokens or 0, "completion_tokens": len(text)}
        return {"choices": [{"text": text, "finish_reason": "stop"}], "usage": usage}


def parrot(item: Item, text: str, prompt_tokens: int | None = None) -> Server:
    known = Parrot({item.prompt: text}, prompt_tokens or item.prompt_tokens)
    return cast("Server", known)


def answers(right: list[bool], prompt_tokens: int = 600, family: str = "recall") -> list[Answer]:
    return [Answer(family, i, "", ok, False, prompt_tokens, 100) for i, ok in enumerate(right)]


def test_a_right_answer_counts_and_a_wrong_one_does_not() -> None:
    item = make_item("recall", 1, prompt_tokens=300, questions=4)
    assert ask(parrot(item, item.answer), item).right
    wrong = ask(parrot(item, item.answer[:-2] + "0;"), item)
    assert wrong.right == (item.answer[:-2] + "0;" == item.answer)


def test_a_prompt_cut_by_the_server_is_an_error() -> None:
    item = make_item("arith", 1, prompt_tokens=300, questions=4)
    with pytest.raises(RuntimeError, match="read 100 prompt tokens, not"):
        ask(parrot(item, item.answer, prompt_tokens=100), item)


def test_answers_keep_the_order_of_the_problems() -> None:
    items = [make_item("recall", seed, prompt_tokens=300, questions=4) for seed in range(12)]
    known = Parrot({item.prompt: item.answer for item in items}, items[0].prompt_tokens)
    seen: list[int] = []
    found = ask_all(cast("Server", known), items, seen.append)
    assert [answer.seed for answer in found] == list(range(12))
    assert seen == list(range(1, 13))


def test_one_failed_request_ends_the_run() -> None:
    items = [make_item("recall", seed, prompt_tokens=300, questions=4) for seed in range(3)]
    known = Parrot({item.prompt: item.answer for item in items[:2]}, items[0].prompt_tokens)
    with pytest.raises(KeyError):
        ask_all(cast("Server", known), items)


@pytest.mark.parametrize(
    ("prompt_tokens", "reading"), [(600, 100), (257, 100), (256, 99), (200, 43), (100, 0)]
)
def test_tokens_that_read_records(prompt_tokens: int, reading: int) -> None:
    answer = answers([True], prompt_tokens)[0]
    assert answer.tokens_reading_records(256) == reading


def test_the_summary_names_families_and_lengths() -> None:
    both = answers([True, False]) + answers([True], family="arith")
    found = {m.name: m.median for m in summarise("kvarn", both, 256, "raw")}
    assert found["accuracy.recall"] == 0.5
    assert found["accuracy.arith"] == 1.0
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["reading_records"] == 1.0


def verdicts(reference: list[Answer], tested: list[Answer]) -> dict[str, Verdict]:
    found = gates(("fp16", reference), ("kvarn", tested), 0.05, 256)
    return {gate.name: gate.verdict for gate in found}


def test_equal_answers_pass() -> None:
    both = answers([True] * 60)
    assert set(verdicts(both, both).values()) == {Verdict.PASS}


def test_lost_answers_fail() -> None:
    lost = answers([False] * 6 + [True] * 54)
    assert verdicts(answers([True] * 60), lost)["accuracy"] is Verdict.FAIL


def test_short_texts_make_a_run_invalid() -> None:
    short = answers([True] * 60, prompt_tokens=50)
    assert verdicts(short, short)["reading_records"] is Verdict.FAIL


def test_different_problems_cannot_be_paired() -> None:
    both = answers([True, True])
    other = [both[0], replace(both[1], seed=9)]
    with pytest.raises(ValueError, match="different problems"):
        gates(("fp16", both), ("kvarn", other), 0.05, 256)

"""Two task families whose answers a damaged KV cache gets wrong.

Both open with a table of names and three-digit values, and one rule holds throughout: a name followed
by a colon is followed by its value. Names are pairs of letters from one grid, so every name has many
neighbours that differ in one letter, and each look-up must pick one row among hundreds.

`recall`   `<recall>qB:417;xB:@qZ;...?[1]xB[2]qB...=` asks `[1]xB:@qZ:903;[2]qB:417;...`
           A value `@name` is a link: the answer goes on with that name's value, a dependent read.
`arith`    `<arith>qB:417;...?[1]qB+xZ;[2][1]-cB;...=` asks `[1]qB:417+xZ:209=[1]:616;[2][1]:616-cB:...`
           Sums and differences modulo 1,000; every step but the first reads the result of an earlier one.

Numbers are written least significant digit first, so that a carry travels in reading order. Training
tables have an even number of rows and held-out tables an odd number: no item is in both splits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvarn_eval.small_model.tokenizer import DIGITS, EOS, IDS, LETTERS, MAX_LABEL, PAD, decode

Ids = NDArray[np.int64]
Family = Literal["recall", "arith"]
FAMILIES: tuple[Family, ...] = ("recall", "arith")

IGNORE = -100
"""Target of positions without loss, as in `torch.nn.functional.cross_entropy`."""

_DIGIT, _LETTER, _LABEL = IDS[DIGITS[0]], IDS[LETTERS[0]], IDS["[1]"]
_ROW_TOKENS = 7  # q B : 4 1 7 ;
_LINK_SHARE = 4  # one row and one query in four is a link


@dataclasses.dataclass(frozen=True)
class Item:
    """One problem: `prompt` is sent, `answer` is the only right continuation."""

    family: Family
    seed: int
    prompt: str
    answer: str
    prompt_tokens: int
    answer_tokens: int
    """Includes the end-of-sequence token."""


def _shuffled(rng: np.random.Generator, count: int, size: int) -> Ids:
    """`count` random orders of `range(size)`."""
    return rng.random((count, size)).argsort(1)


def _take(rows: Ids, index: Ids) -> Ids:
    """`rows[b, index[b]]` for every b; rows `[B, N, ...]`, index `[B, M]` → `[B, M, ...]`."""
    return rows[np.arange(len(rows))[:, None], index]


def _join(*columns: Ids | int) -> Ids:
    """Concatenate `[B, M, w]` columns and single tokens along the last axis."""
    shape = next(c for c in columns if not isinstance(c, int)).shape[:2]
    return np.concatenate(
        [np.full((*shape, 1), c) if isinstance(c, int) else c for c in columns], axis=2
    )


def _flat(*parts: Ids | int) -> Ids:
    """Concatenate `[B, ...]` parts and single tokens into one row of tokens per item."""
    count = next(len(p) for p in parts if not isinstance(p, int))
    return np.concatenate(
        [np.full((count, 1), p) if isinstance(p, int) else p.reshape(count, -1) for p in parts], axis=1
    )


def _names(rng: np.random.Generator, count: int, pairs: int) -> Ids:
    """`pairs` distinct two-letter names per item from a nearly full grid of letters: `[B, N, 2]`."""
    side = min(len(LETTERS), math.isqrt(pairs + pairs // 4) + 1)
    cell = _shuffled(rng, count, side * side)[:, :pairs]
    first, second = _shuffled(rng, count, len(LETTERS)), _shuffled(rng, count, len(LETTERS))
    return _LETTER + np.stack((_take(first, cell // side), _take(second, cell % side)), 2)


def _digits(number: Ids) -> Ids:
    """Three digit tokens per number, least significant first."""
    return _DIGIT + np.stack((number % 10, number // 10 % 10, number // 100), -1)


def _labels(count: int, questions: int) -> Ids:
    return np.broadcast_to(_LABEL + np.arange(questions)[:, None], (count, questions, 1))


def _recall(rng: np.random.Generator, count: int, pairs: int, questions: int) -> tuple[Ids, Ids]:
    names = _names(rng, count, pairs)
    value = _digits(rng.integers(0, 1000, (count, pairs)))
    links, linked = pairs // _LINK_SHARE, questions // _LINK_SHARE
    target = rng.integers(links, pairs, (count, links))
    shown = value.copy()
    shown[:, :links] = _join(IDS["@"], _take(names, target))
    value[:, :links] = _take(value, target)

    asked = np.concatenate(
        (
            _shuffled(rng, count, links)[:, :linked],
            links + _shuffled(rng, count, pairs - links)[:, : questions - linked],
        ),
        axis=1,
    )
    asked = _take(asked, _shuffled(rng, count, questions))
    label, name = _labels(count, questions), _take(names, asked)
    table = _join(names, IDS[":"], shown, IDS[";"])
    table = _take(table, _shuffled(rng, count, pairs))
    prompt = _flat(np.full(count, IDS["<recall>"]), table, IDS["?"], _join(label, name), IDS["="])

    hop = _join(IDS[":"], _take(value, asked))  # the second read of a link
    lines = _join(label, name, IDS[":"], _take(shown, asked), hop, IDS[";"])
    keep = np.ones(lines.shape, dtype=bool)
    keep[:, :, -5:-1] = (asked < links)[:, :, None]
    return prompt, _flat(lines[keep].reshape(count, -1), EOS)


def _arith(rng: np.random.Generator, count: int, pairs: int, questions: int) -> tuple[Ids, Ids]:
    names = _names(rng, count, pairs)
    value = rng.integers(0, 1000, (count, pairs))
    table = _join(names, IDS[":"], _digits(value), IDS[";"])

    asked = rng.integers(0, pairs, (count, questions + 1))  # the first step reads two rows
    name, right = _take(names, asked), _take(value, asked)
    step = np.arange(1, questions)
    earlier = np.where(
        rng.random((count, questions - 1)) < 0.5, step - 1, rng.integers(0, step, (count, questions - 1))
    )
    minus = rng.random((count, questions)) < 0.5
    left, result = np.empty_like(right[:, 1:]), np.empty_like(right[:, 1:])
    for i in range(questions):
        left[:, i] = _take(result, earlier[:, i - 1 : i])[:, 0] if i else right[:, 0]
        result[:, i] = (left[:, i] + np.where(minus[:, i], -1, 1) * right[:, i + 1]) % 1000

    label = _labels(count, questions)
    sign = np.where(minus, IDS["-"], IDS["+"])[:, :, None]
    second = name[:, 1:]
    cited = (_LABEL + earlier)[:, :, None]
    first_step = _join(label[:, :1], name[:, :1], sign[:, :1], second[:, :1], IDS[";"])
    steps = _join(label[:, 1:], cited, sign[:, 1:], second[:, 1:], IDS[";"])
    prompt = _flat(np.full(count, IDS["<arith>"]), table, IDS["?"], first_step, steps, IDS["="])

    a = _join(IDS[":"], _digits(left))
    b = _join(IDS[":"], _digits(right[:, 1:]), IDS["="], label, IDS[":"], _digits(result), IDS[";"])
    first_line = _join(label[:, :1], name[:, :1], a[:, :1], sign[:, :1], second[:, :1], b[:, :1])
    lines = _join(label[:, 1:], cited, a[:, 1:], sign[:, 1:], second[:, 1:], b[:, 1:])
    return prompt, _flat(first_line, lines, EOS)


_GENERATORS: dict[Family, Callable[[np.random.Generator, int, int, int], tuple[Ids, Ids]]] = {
    "recall": _recall,
    "arith": _arith,
}


def question_tokens(family: Family, questions: int) -> tuple[int, int]:
    """Tokens of everything but the table: in the prompt, and in the answer with its end token."""
    if family == "recall":
        return 3 + 3 * questions, 8 * questions + 4 * (questions // _LINK_SHARE) + 1
    return 4 + 6 * questions, 20 * questions + 2


def make_item(family: Family, seed: int, *, prompt_tokens: int = 1024, questions: int = 16) -> Item:
    """One held-out problem; the same arguments always give the same item.

    Parameters
    ----------
    family : str
        `recall` or `arith`.
    seed : int
        Number of the item, at least 0.
    prompt_tokens : int
        Upper bound of the prompt, in tokens; the prompt is at most 13 tokens shorter.
    questions : int
        Queries (`recall`, 9 answer tokens each) or steps (`arith`, 20 answer tokens each), 1 to 64.

    Returns
    -------
    Item

    Raises
    ------
    ValueError
        If `questions` is out of range, or the prompt is too short for a table of as many rows or too
        long for one name per row.
    """
    if not 1 <= questions <= MAX_LABEL:
        raise ValueError(f"{questions} questions cannot be labelled. Choose 1 to {MAX_LABEL}.")
    pairs = (prompt_tokens - question_tokens(family, questions)[0]) // _ROW_TOKENS
    pairs -= 1 - pairs % 2
    if not max(questions, 5) <= pairs <= len(LETTERS) ** 2:
        raise ValueError(
            f"A prompt of {prompt_tokens} tokens gives {family} a table of {pairs} rows. Choose prompt_tokens for "
            f"{max(questions, 5)} to {len(LETTERS) ** 2} rows of {_ROW_TOKENS} tokens."
        )
    rng = np.random.default_rng([FAMILIES.index(family), prompt_tokens, questions, seed])
    prompt, answer = _GENERATORS[family](rng, 1, pairs, questions)
    return Item(family, seed, decode(prompt[0]), decode(answer[0]), prompt.size, answer.size)


def held_out(
    family: Family, count: int, *, min_tokens: int, max_tokens: int, questions: int = 16, first_seed: int = 0
) -> list[Item]:
    """Held-out problems with prompt lengths spread evenly over a range.

    Parameters
    ----------
    family : str
        `recall` or `arith`.
    count : int
        Number of items.
    min_tokens, max_tokens : int
        Prompt length of the shortest and of the longest item, in tokens (see `make_item`).
    questions : int
        Queries or steps per item.
    first_seed : int
        Seed of the first item; the others follow.

    Returns
    -------
    list of Item
    """
    lengths = np.linspace(min_tokens, max_tokens, count).astype(int).tolist()
    return [
        make_item(family, first_seed + i, prompt_tokens=length, questions=questions)
        for i, length in enumerate(lengths)
    ]


def grade(item: Item, text: str) -> bool:
    """Whether `text` is the whole answer, nothing missing and nothing added but surrounding space."""
    return text.strip() == item.answer


def training_batch(rng: np.random.Generator, count: int, length: int) -> tuple[Ids, Ids]:
    """Training items of both families in equal parts, one per row.

    Half of the rows fill `length`, half are shorter; the share of table and questions varies.

    Parameters
    ----------
    rng : numpy Generator
        Source of everything random.
    count : int
        Rows, a multiple of 4.
    length : int
        Tokens per row, at least 256.

    Returns
    -------
    ids : int64 [count, length]
        Inputs, padded at the end.
    targets : int64 [count, length]
        Next token where it belongs to an answer, `IGNORE` elsewhere.
    """
    ids = np.full((count, length + 1), PAD)
    is_answer = np.zeros((count, length + 1), dtype=bool)
    for group in range(4):
        family = FAMILIES[group % 2]
        room = length + 1 if group < 2 else int(rng.integers(length // 2, length + 2))
        per_question = sum(question_tokens(family, 8)) / 8
        questions = int(np.clip(room * rng.uniform(0.1, 0.6) / per_question, 2, MAX_LABEL))
        pairs = (room - sum(question_tokens(family, questions))) // _ROW_TOKENS
        prompt, answer = _GENERATORS[family](rng, count // 4, pairs - pairs % 2, questions)
        start, end = prompt.shape[1], prompt.shape[1] + answer.shape[1]
        ids[group::4, :end] = np.concatenate((prompt, answer), 1)
        is_answer[group::4, start:end] = True
    return ids[:, :-1], np.where(is_answer, ids, IGNORE)[:, 1:]

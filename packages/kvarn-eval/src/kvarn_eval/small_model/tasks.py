"""Two task families whose answers a damaged KV cache gets wrong.

Both open with a table of names and three-digit values. A name may be written again: its last value
counts. One rule holds throughout: a name followed by a colon is followed by its value. Names are
pairs of letters from one grid, so every name has many neighbours that differ in one letter, and
each look-up must pick one row among hundreds.

`recall`
    `<recall>qB:417;xB:@qZ;...?[1]xB[2]qB...=` asks for `[1]xB:@qZ:903;[2]qB:417;...`
    A value `@name` is a link: the answer goes on with that name's value, a dependent read.
`arith`
    `<arith>qB:417;...?[1]qB+xZ;[2][1]-cB;...=` asks for `[1]qB:417+xZ:209=[1]:616;[2][1]:616-...`
    Sums and differences modulo 1,000; every step but the first reads an earlier result.

Numbers are written least significant digit first, so that a carry travels in reading order.
Training tables have an even number of rows and held-out tables an odd number: no item is in both
splits.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from kvarn_eval.small_model.tokenizer import DIGITS, EOS, IDS, LETTERS, MAX_LABEL, PAD, decode

if TYPE_CHECKING:
    from collections.abc import Callable

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
Family = Literal["recall", "arith"]
FAMILIES: tuple[Family, ...] = ("recall", "arith")

PROMPT_WEIGHT = 0.05
"""Weight of the loss on a prompt token; an answer token has 1."""

_DIGIT, _LETTER, _LABEL = IDS[DIGITS[0]], IDS[LETTERS[0]], IDS["[1]"]
_ROW_TOKENS = 7  # q B : 4 1 7 ;
_LINK_SHARE = 4  # one name and one query in four is a link

REWRITES = 0.5
"""Share of table rows that write a name again, in held-out items unless asked otherwise."""


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
    taken: Ids = rows[np.arange(len(rows))[:, None], index]
    return taken


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
        [np.full((count, 1), p) if isinstance(p, int) else p.reshape(count, -1) for p in parts],
        axis=1,
    )


def _names(rng: np.random.Generator, count: int, names: int) -> Ids:
    """Distinct two-letter names per item from a nearly full grid of letters: `[B, M, 2]`."""
    side = min(len(LETTERS), math.isqrt(names + names // 4) + 1)
    cell = _shuffled(rng, count, side * side)[:, :names]
    first, second = _shuffled(rng, count, len(LETTERS)), _shuffled(rng, count, len(LETTERS))
    return _LETTER + np.stack((_take(first, cell // side), _take(second, cell % side)), 2)


def _digits(number: Ids) -> Ids:
    """Three digit tokens per number, least significant first."""
    return _DIGIT + np.stack((number % 10, number // 10 % 10, number // 100), -1)


def _labels(count: int, questions: int) -> Ids:
    return np.broadcast_to(_LABEL + np.arange(questions)[:, None], (count, questions, 1))


@dataclasses.dataclass(frozen=True)
class _Table:
    """Names and, row by row, what is written to them; `B` items, `M` names, `N >= M` rows."""

    names: Ids  # [B, M, 2] tokens
    row_name: Ids  # [B, N] which name a row writes
    last_row: Ids  # [B, M] the row that counts

    @classmethod
    def draw(cls, rng: np.random.Generator, count: int, rows: int, rewrites: int) -> _Table:
        names = rows - rewrites
        written = np.concatenate(
            (np.tile(np.arange(names), (count, 1)), rng.integers(0, names, (count, rewrites))),
            axis=1,
        )
        written = _take(written, _shuffled(rng, count, rows))
        last_row = np.zeros((count, names), dtype=np.int64)
        np.maximum.at(last_row, (np.arange(count)[:, None], written), np.arange(rows))
        return cls(_names(rng, count, names), written, last_row)

    def tokens(self, value: Ids) -> Ids:
        """The table as text; value `[B, N, 3]`."""
        return _join(_take(self.names, self.row_name), IDS[":"], value, IDS[";"])


def _recall(
    rng: np.random.Generator, count: int, rows: int, rewrites: int, questions: int
) -> tuple[Ids, Ids]:
    table = _Table.draw(rng, count, rows, rewrites)
    names = rows - rewrites
    links, linked = names // _LINK_SHARE, questions // _LINK_SHARE
    number = _digits(rng.integers(0, 1000, (count, rows)))
    target = rng.integers(links, names, (count, rows))
    is_link = table.row_name < links
    value = np.where(is_link[:, :, None], _join(IDS["@"], _take(table.names, target)), number)

    asked = np.concatenate(
        (
            _shuffled(rng, count, links)[:, :linked],
            links + _shuffled(rng, count, names - links)[:, : questions - linked],
        ),
        axis=1,
    )
    asked = _take(asked, _shuffled(rng, count, questions))
    label, name = _labels(count, questions), _take(table.names, asked)
    prompt = _flat(
        np.full(count, IDS["<recall>"]), table.tokens(value), IDS["?"], _join(label, name), IDS["="]
    )

    row = _take(table.last_row, asked)
    end_row = _take(table.last_row, _take(target, row))  # the second read of a link
    second = _join(IDS[":"], _take(number, end_row))
    lines = _join(label, name, IDS[":"], _take(value, row), second, IDS[";"])
    keep = np.ones(lines.shape, dtype=bool)
    keep[:, :, -5:-1] = (asked < links)[:, :, None]
    return prompt, _flat(lines[keep].reshape(count, -1), EOS)


def _arith(
    rng: np.random.Generator, count: int, rows: int, rewrites: int, questions: int
) -> tuple[Ids, Ids]:
    table = _Table.draw(rng, count, rows, rewrites)
    value = rng.integers(0, 1000, (count, rows))
    asked = rng.integers(
        0, rows - rewrites, (count, questions + 1)
    )  # the first step reads two names
    name, operand = _take(table.names, asked), _take(value, _take(table.last_row, asked))
    step = np.arange(1, questions)
    earlier = np.where(
        rng.random((count, questions - 1)) < 0.5,
        step - 1,
        rng.integers(0, step, (count, questions - 1)),
    )
    minus = rng.random((count, questions)) < 0.5
    right = operand[:, 1:]
    left, result = np.empty_like(right), np.empty_like(right)
    for i in range(questions):
        left[:, i] = _take(result, earlier[:, i - 1 : i])[:, 0] if i else operand[:, 0]
        result[:, i] = (left[:, i] + np.where(minus[:, i], -1, 1) * right[:, i]) % 1000

    label, cited = _labels(count, questions), (_LABEL + earlier)[:, :, None]
    sign = np.where(minus, IDS["-"], IDS["+"])[:, :, None]
    a = _join(IDS[":"], _digits(left))
    b = _join(
        name[:, 1:], IDS[":"], _digits(right), IDS["="], label, IDS[":"], _digits(result), IDS[";"]
    )
    prompt = _flat(
        np.full(count, IDS["<arith>"]),
        table.tokens(_digits(value)),
        IDS["?"],
        _join(label[:, :1], name[:, :1], sign[:, :1], name[:, 1:2], IDS[";"]),
        _join(label[:, 1:], cited, sign[:, 1:], name[:, 2:], IDS[";"]),
        IDS["="],
    )
    answer = _flat(
        _join(label[:, :1], name[:, :1], a[:, :1], sign[:, :1], b[:, :1]),
        _join(label[:, 1:], cited, a[:, 1:], sign[:, 1:], b[:, 1:]),
        EOS,
    )
    return prompt, answer


_GENERATORS: dict[Family, Callable[[np.random.Generator, int, int, int, int], tuple[Ids, Ids]]] = {
    "recall": _recall,
    "arith": _arith,
}


def question_tokens(family: Family, questions: int) -> tuple[int, int]:
    """Tokens of everything but the table: in the prompt, and in the answer with its end token."""
    if family == "recall":
        return 3 + 3 * questions, 8 * questions + 4 * (questions // _LINK_SHARE) + 1
    return 4 + 6 * questions, 20 * questions + 2


def make_item(
    family: Family,
    seed: int,
    *,
    prompt_tokens: int = 1024,
    questions: int = 16,
    rewrites: float = REWRITES,
) -> Item:
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
    rewrites : float
        Share of rows that write a name again, 0 to 1; less where each query of `recall` could not
        have a name of its own. More of them make look-ups harder.

    Returns
    -------
    Item

    Raises
    ------
    ValueError
        If `questions` is out of range, or the prompt has room for too few names or for too many.
    """
    if not 1 <= questions <= MAX_LABEL:
        raise ValueError(f"{questions} questions cannot be labelled. Choose 1 to {MAX_LABEL}.")
    rows = (prompt_tokens - question_tokens(family, questions)[0]) // _ROW_TOKENS
    rows -= 1 - rows % 2
    fewest = questions if family == "recall" else 5
    names = max(rows - int(rows * rewrites), fewest)
    if not fewest <= names <= min(rows, len(LETTERS) ** 2):
        raise ValueError(
            f"A prompt of {prompt_tokens} tokens gives {family} a table of {rows} rows. Choose "
            f"prompt_tokens for {fewest} to {len(LETTERS) ** 2} rows of {_ROW_TOKENS} tokens."
        )
    rng = np.random.default_rng([FAMILIES.index(family), prompt_tokens, questions, names, seed])
    prompt, answer = _GENERATORS[family](rng, 1, rows, rows - names, questions)
    return Item(family, seed, decode(prompt[0]), decode(answer[0]), prompt.size, answer.size)


def held_out(
    family: Family,
    count: int,
    *,
    min_tokens: int,
    max_tokens: int,
    questions: int = 16,
    first_seed: int = 0,
    rewrites: float = REWRITES,
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
    rewrites : float
        Share of rows that write a name again.

    Returns
    -------
    list of Item
    """
    lengths = np.linspace(min_tokens, max_tokens, count).astype(int).tolist()
    return [
        make_item(
            family, first_seed + i, prompt_tokens=length, questions=questions, rewrites=rewrites
        )
        for i, length in enumerate(lengths)
    ]


def grade(item: Item, text: str) -> bool:
    """Whether `text` is the whole answer and nothing else; surrounding space is ignored."""
    return text.strip() == item.answer


def training_batch(rng: np.random.Generator, count: int, length: int) -> tuple[Ids, Ids, Floats]:
    """Training items of both families in equal parts, one per row.

    Half of the rows fill `length`, half are shorter; the share of table and questions varies.

    Parameters
    ----------
    rng : numpy Generator
        Source of everything random.
    count : int
        Rows, a multiple of 4; families take turns.
    length : int
        Tokens per row, at least 256.

    Returns
    -------
    ids : int64 [count, length]
        Inputs, padded at the end.
    targets : int64 [count, length]
        Next tokens.
    weights : float32 [count, length]
        Of the loss: 1 where the next token belongs to an answer, `PROMPT_WEIGHT` where it belongs
        to a prompt, 0 where there is none.
    """
    ids = np.full((count, length + 1), PAD)
    weights = np.zeros((count, length + 1), dtype=np.float32)
    for group in range(4):
        family = FAMILIES[group % 2]
        room = length + 1 if group < 2 else int(rng.integers(length // 2, length + 2))
        per_question = sum(question_tokens(family, 8)) / 8
        questions = int(np.clip(room * rng.uniform(0.1, 0.6) / per_question, 2, MAX_LABEL))
        rows = (room - sum(question_tokens(family, questions))) // _ROW_TOKENS
        rows -= rows % 2
        rewrites = min(int(rows * rng.uniform(0, 0.95)), rows - questions)
        prompt, answer = _GENERATORS[family](rng, count // 4, rows, rewrites, questions)
        start, end = prompt.shape[1], prompt.shape[1] + answer.shape[1]
        ids[group::4, :end] = np.concatenate((prompt, answer), 1)
        weights[group::4, :start] = PROMPT_WEIGHT
        weights[group::4, start:end] = 1
    return ids[:, :-1], ids[:, 1:], weights[:, 1:]

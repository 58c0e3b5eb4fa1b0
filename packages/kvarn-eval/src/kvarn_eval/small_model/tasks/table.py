"""What all task families share: names, values, and the table that opens every prompt.

A row of the table is `qB:417;` or, where the value is another name, `qB:@xZ;`. Arrays hold a batch:
`B` items, `M` names, `N >= M` rows, `Q` questions; tokens are along the last axis.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvarn_eval.small_model.tokenizer import DIGITS, IDS, LETTERS

if TYPE_CHECKING:
    from collections.abc import Callable

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]

ROW_TOKENS = 7  # q B : 4 1 7 ;
LABEL = IDS["[1]"]
_DIGIT, _LETTER = IDS[DIGITS[0]], IDS[LETTERS[0]]


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of problem.

    Parameters
    ----------
    name : str
        Also its keyword, in angle brackets.
    generate : callable
        `generate(rng, count, rows, rewrites, questions)` gives prompts and answers `[count, *]`;
        all prompts are equally long, and all answers.
    tokens : callable
        `tokens(questions)`: tokens of the prompt without its table, and of the answer with its end
        token.
    fewest : callable
        `fewest(questions)`: names that a table needs at least.
    questions : int
        Questions of a held-out item unless asked otherwise.
    """

    name: str
    generate: Callable[[np.random.Generator, int, int, int, int], tuple[Ids, Ids]]
    tokens: Callable[[int], tuple[int, int]]
    fewest: Callable[[int], int]
    questions: int


def shuffled(rng: np.random.Generator, count: int, size: int) -> Ids:
    """`count` random orders of `range(size)`."""
    return rng.random((count, size)).argsort(1)


def take(rows: Ids, index: Ids) -> Ids:
    """`rows[b, index[b]]` for every b; rows `[B, N, ...]`, index `[B, M]` → `[B, M, ...]`."""
    taken: Ids = rows[np.arange(len(rows))[:, None], index]
    return taken


def join(*columns: Ids | int) -> Ids:
    """Concatenate `[B, M, w]` columns and single tokens along the last axis."""
    shape = next(c for c in columns if not isinstance(c, int)).shape[:2]
    return np.concatenate(
        [np.full((*shape, 1), c) if isinstance(c, int) else c for c in columns], axis=2
    )


def flat(*parts: Ids | int) -> Ids:
    """Concatenate `[B, ...]` parts and single tokens into one row of tokens per item."""
    count = next(len(p) for p in parts if not isinstance(p, int))
    return np.concatenate(
        [np.full((count, 1), p) if isinstance(p, int) else p.reshape(count, -1) for p in parts],
        axis=1,
    )


def digits(number: Ids) -> Ids:
    """Three digit tokens per number, least significant first."""
    return _DIGIT + np.stack((number % 10, number // 10 % 10, number // 100), -1)


def labels(count: int, questions: int) -> Ids:
    """`[1]`, `[2]`, ... for every item: `[B, Q, 1]`."""
    return np.broadcast_to(LABEL + np.arange(questions)[:, None], (count, questions, 1))


def _names(rng: np.random.Generator, count: int, names: int) -> Ids:
    """Distinct two-letter names per item from a nearly full grid of letters: `[B, M, 2]`."""
    side = min(len(LETTERS), math.isqrt(names + names // 4) + 1)
    cell = shuffled(rng, count, side * side)[:, :names]
    first, second = shuffled(rng, count, len(LETTERS)), shuffled(rng, count, len(LETTERS))
    return _LETTER + np.stack((take(first, cell // side), take(second, cell % side)), 2)


@dataclasses.dataclass(frozen=True)
class Table:
    """Names and, row by row, what is written to them."""

    names: Ids  # [B, M, 2] tokens
    row_name: Ids  # [B, N] which name a row writes
    last_row: Ids  # [B, M] the row that counts

    @classmethod
    def draw(cls, rng: np.random.Generator, count: int, rows: int, rewrites: int) -> Table:
        """Names in random order, `rewrites` of the rows writing one again."""
        names = rows - rewrites
        written = np.concatenate(
            (np.tile(np.arange(names), (count, 1)), rng.integers(0, names, (count, rewrites))),
            axis=1,
        )
        written = take(written, shuffled(rng, count, rows))
        last_row = np.zeros((count, names), dtype=np.int64)
        np.maximum.at(last_row, (np.arange(count)[:, None], written), np.arange(rows))
        return cls(_names(rng, count, names), written, last_row)

    def links(self, target: Ids) -> Ids:
        """Values that are names; target `[B, N]` → `[B, N, 3]`."""
        return join(IDS["@"], take(self.names, target))

    def tokens(self, value: Ids) -> Ids:
        """The table as text; value `[B, N, 3]`."""
        return join(take(self.names, self.row_name), IDS[":"], value, IDS[";"])

"""`program`: instructions that overwrite registers, carried out one by one.

`<program>qB:417;...?[1]qB+xZ;...=` lists up to 64 instructions. Some names of the table are
registers; it holds their first values. The answer repeats each instruction with the values that it
reads and writes:

| instruction | answer | meaning |
|---|---|---|
| `[1]qB+xZ;` | `[1]qB:417+xZ:209=qB:616;` | qB becomes the sum, or with `-` the difference |
| `[2]xZ=cB;` | `[2]xZ:209=cB:209;` | cB becomes a copy of xZ |
| `[3]qB~xZ;` | `[3]qB:616~xZ:209=qB:209,xZ:616;` | both change places |
| `[4]cB?qB,xZ;` | `[4]cB:209?qB:209-xZ:616=qB:395;` | sum if cB is odd, else difference |

Modulo 1,000. The value of a register is the one written last, in the table or in the answer. Every
read depends on all writes before it, so an error goes on to the end. One instruction in eight is a
copy, one in eight a swap, one in four a condition: answers of one length have one number of tokens.
(The numbers above are written most significant digit first, for people.)
"""

from __future__ import annotations

import numpy as np

from kvarn_eval.small_model.tasks.table import (
    Family,
    Ids,
    Table,
    digits,
    flat,
    join,
    labels,
    shuffled,
    take,
)
from kvarn_eval.small_model.tokenizer import EOS, IDS, PAD

_SUM, _COPY, _SWAP, _CONDITION = range(4)


def _counts(questions: int) -> tuple[int, int, int, int]:
    """How many sums, copies, swaps and conditions a program of this length has."""
    eighth, quarter = questions // 8, questions // 4
    return questions - 2 * eighth - quarter, eighth, eighth, quarter


def _registers(questions: int) -> int:
    return max(4, questions // 2)


def _choose(kind: Ids, lines: tuple[Ids, ...]) -> Ids:
    """The line of each instruction's kind, kinds `[B, Q]`, lines `[B, Q, *]` → `[B, tokens]`."""
    width = max(line.shape[2] for line in lines)
    wide = [np.pad(line, ((0, 0), (0, 0), (0, width - line.shape[2]))) for line in lines]
    chosen = np.choose(kind[:, :, None], wide)
    tokens: Ids = chosen[chosen != PAD].reshape(len(kind), -1)
    return tokens


def _generate(
    rng: np.random.Generator, count: int, rows: int, rewrites: int, questions: int
) -> tuple[Ids, Ids]:
    table = Table.draw(rng, count, rows, rewrites)
    value = rng.integers(0, 1000, (count, rows))
    registers = _registers(questions)
    register = shuffled(rng, count, rows - rewrites)[:, :registers]
    kind = take(
        np.tile(np.repeat(np.arange(4), _counts(questions)), (count, 1)),
        shuffled(rng, count, questions),
    )
    used = rng.random((count, questions, registers)).argsort(2)[:, :, :3]
    minus = rng.random((count, questions)) < 0.5

    state = take(value, take(table.last_row, register))  # [B, registers]
    item = np.arange(count)
    read = np.empty((count, questions, 3), dtype=np.int64)
    result = np.empty((count, questions), dtype=np.int64)
    for i in range(questions):
        first, second = used[:, i, 0], used[:, i, 1]
        read[:, i] = take(state, used[:, i])
        a, b, c = read[:, i].T
        what = kind[:, i]
        minus[:, i] = np.where(what == _CONDITION, c % 2 == 0, minus[:, i])
        total = (a + np.where(minus[:, i], -1, 1) * b) % 1000
        result[:, i] = np.where((what == _COPY) | (what == _SWAP), b, total)
        state[item, first] = result[:, i]
        state[item, second] = np.where(what == _SWAP, a, b)

    label, sign = labels(count, questions), np.where(minus, IDS["-"], IDS["+"])[:, :, None]
    a, b, c = (take(table.names, take(register, used[:, :, i])) for i in range(3))
    was_a, was_b, was_c = (join(IDS[":"], digits(read[:, :, i])) for i in range(3))
    now = join(IDS["="], a, IDS[":"], digits(result))
    end = IDS[";"]
    prompt = _choose(
        kind,
        (
            join(label, a, sign, b, end),
            join(label, b, IDS["="], a, end),
            join(label, a, IDS["~"], b, end),
            join(label, c, IDS["?"], a, IDS[","], b, end),
        ),
    )
    answer = _choose(
        kind,
        (
            join(label, a, was_a, sign, b, was_b, now, end),
            join(label, b, was_b, now, end),
            join(label, a, was_a, IDS["~"], b, was_b, now, IDS[","], b, was_a, end),
            join(label, c, was_c, IDS["?"], a, was_a, sign, b, was_b, now, end),
        ),
    )
    opening = np.full(count, IDS["<program>"])
    return (
        flat(opening, table.tokens(digits(value)), IDS["?"], prompt, IDS["="]),
        flat(answer, EOS),
    )


def _tokens(questions: int) -> tuple[int, int]:
    sums, copies, swaps, conditions = _counts(questions)
    prompt = 7 * (sums + copies + swaps) + 10 * conditions
    return 3 + prompt, 22 * sums + 15 * copies + 29 * (swaps + conditions) + 1


PROGRAM = Family("program", _generate, _tokens, fewest=_registers, questions=24)

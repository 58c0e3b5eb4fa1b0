"""`arith`: a chain of sums in which every step reads an earlier result.

`<arith>qB:417;...?[1]qB+xZ;[2][1]-cB;...=` asks for `[1]qB:417+xZ:209=[1]:616;[2][1]:616-...`
Sums and differences modulo 1,000; every step but the first reads an earlier result.
"""

from __future__ import annotations

import numpy as np

from kvarn_eval.small_model.tasks.table import (
    LABEL,
    Family,
    Ids,
    Table,
    digits,
    flat,
    join,
    labels,
    take,
)
from kvarn_eval.small_model.tokenizer import EOS, IDS


def _generate(
    rng: np.random.Generator, count: int, rows: int, rewrites: int, questions: int
) -> tuple[Ids, Ids]:
    table = Table.draw(rng, count, rows, rewrites)
    value = rng.integers(0, 1000, (count, rows))
    asked = rng.integers(
        0, rows - rewrites, (count, questions + 1)
    )  # the first step reads two names
    name, operand = take(table.names, asked), take(value, take(table.last_row, asked))
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
        left[:, i] = take(result, earlier[:, i - 1 : i])[:, 0] if i else operand[:, 0]
        result[:, i] = (left[:, i] + np.where(minus[:, i], -1, 1) * right[:, i]) % 1000

    label, cited = labels(count, questions), (LABEL + earlier)[:, :, None]
    sign = np.where(minus, IDS["-"], IDS["+"])[:, :, None]
    a = join(IDS[":"], digits(left))
    b = join(
        name[:, 1:], IDS[":"], digits(right), IDS["="], label, IDS[":"], digits(result), IDS[";"]
    )
    prompt = flat(
        np.full(count, IDS["<arith>"]),
        table.tokens(digits(value)),
        IDS["?"],
        join(label[:, :1], name[:, :1], sign[:, :1], name[:, 1:2], IDS[";"]),
        join(label[:, 1:], cited, sign[:, 1:], name[:, 2:], IDS[";"]),
        IDS["="],
    )
    answer = flat(
        join(label[:, :1], name[:, :1], a[:, :1], sign[:, :1], b[:, :1]),
        join(label[:, 1:], cited, a[:, 1:], sign[:, 1:], b[:, 1:]),
        EOS,
    )
    return prompt, answer


def _tokens(questions: int) -> tuple[int, int]:
    return 4 + 6 * questions, 20 * questions + 2


ARITH = Family("arith", _generate, _tokens, fewest=lambda questions: 5, questions=16)

"""`recall`: values by name, some of them behind a link.

`<recall>qB:417;xB:@qZ;...?[1]xB[2]qB...=` asks for `[1]xB:@qZ:903;[2]qB:417;...`
A value `@name` is a link: the answer goes on with that name's value, a dependent read.
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
from kvarn_eval.small_model.tokenizer import EOS, IDS

_LINK_SHARE = 4  # one name and one query in four is a link


def _generate(
    rng: np.random.Generator, count: int, rows: int, rewrites: int, questions: int
) -> tuple[Ids, Ids]:
    table = Table.draw(rng, count, rows, rewrites)
    names = rows - rewrites
    links, linked = names // _LINK_SHARE, questions // _LINK_SHARE
    number = digits(rng.integers(0, 1000, (count, rows)))
    target = rng.integers(links, names, (count, rows))
    is_link = table.row_name < links
    value = np.where(is_link[:, :, None], table.links(target), number)

    asked = np.concatenate(
        (
            shuffled(rng, count, links)[:, :linked],
            links + shuffled(rng, count, names - links)[:, : questions - linked],
        ),
        axis=1,
    )
    asked = take(asked, shuffled(rng, count, questions))
    label, name = labels(count, questions), take(table.names, asked)
    prompt = flat(
        np.full(count, IDS["<recall>"]), table.tokens(value), IDS["?"], join(label, name), IDS["="]
    )

    row = take(table.last_row, asked)
    end_row = take(table.last_row, take(target, row))  # the second read of a link
    second = join(IDS[":"], take(number, end_row))
    lines = join(label, name, IDS[":"], take(value, row), second, IDS[";"])
    keep = np.ones(lines.shape, dtype=bool)
    keep[:, :, -5:-1] = (asked < links)[:, :, None]
    return prompt, flat(lines[keep].reshape(count, -1), EOS)


def _tokens(questions: int) -> tuple[int, int]:
    return 3 + 3 * questions, 8 * questions + 4 * (questions // _LINK_SHARE) + 1


RECALL = Family("recall", _generate, _tokens, fewest=lambda questions: questions, questions=16)

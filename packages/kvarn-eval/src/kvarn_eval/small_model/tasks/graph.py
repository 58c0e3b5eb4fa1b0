"""`graph`: a walk along the edges of a permutation.

`<graph>qB:@xZ;xZ:@cD;...?[64]qB=` asks for 64 steps from qB: `[1]qB:@xZ;[2]xZ:@cD;...`
Every name has one edge that counts, and all edges together are one ring; rows that write a name
again lead astray. Nothing tells a wrong step from a right one, so one error spoils the rest.
"""

from __future__ import annotations

import numpy as np

from kvarn_eval.small_model.tasks.table import (
    LABEL,
    Family,
    Ids,
    Table,
    flat,
    join,
    labels,
    shuffled,
    take,
)
from kvarn_eval.small_model.tokenizer import EOS, IDS


def _generate(
    rng: np.random.Generator, count: int, rows: int, rewrites: int, questions: int
) -> tuple[Ids, Ids]:
    table = Table.draw(rng, count, rows, rewrites)
    names, item = rows - rewrites, np.arange(count)[:, None]
    ring = shuffled(rng, count, names)
    following = np.empty_like(ring)
    following[item, ring] = np.roll(ring, -1, axis=1)
    target = rng.integers(0, names, (count, rows))
    target[item, table.last_row] = following

    passed = ring[:, np.arange(questions + 1) % names]  # nodes of the walk
    node = take(table.names, passed)
    prompt = flat(
        np.full(count, IDS["<graph>"]),
        table.tokens(table.links(target)),
        IDS["?"],
        LABEL + questions - 1,
        node[:, 0],
        IDS["="],
    )
    lines = join(labels(count, questions), node[:, :-1], IDS[":"], IDS["@"], node[:, 1:], IDS[";"])
    return prompt, flat(lines, EOS)


def _tokens(questions: int) -> tuple[int, int]:
    return 6, 8 * questions + 1


GRAPH = Family("graph", _generate, _tokens, fewest=lambda questions: 5, questions=64)

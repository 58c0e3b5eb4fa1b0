"""Cutting the context of a prefill into passes that fit the workspace.

New tokens attend to older ones through a workspace of fixed size, so the contexts of a step are
read in passes. A pass takes consecutive prefill rows, in whole or in part; cuts lie between tiles,
so no tile is read twice. Plain integers: this runs once per step, on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass(frozen=True)
class Pass:
    """Context tokens read together.

    Parameters
    ----------
    first_row : int
        First of the prefill rows that read something.
    starts, counts : tuple of int
        Per row from the first to the last one reading: its first context token, and how many. A
        row in between that has no context reads 0.
    """

    first_row: int
    starts: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def rows(self) -> slice:
        """The rows, among the prefill rows."""
        return slice(self.first_row, self.first_row + len(self.counts))


def plan(contexts: Sequence[int], width: int, group: int) -> list[Pass]:
    """Cut contexts into passes.

    Parameters
    ----------
    contexts : sequence of int
        Context tokens of each prefill row, in order; 0 where there is none.
    width : int
        Tokens of the workspace, a multiple of `group`.
    group : int
        Tokens per tile.

    Returns
    -------
    list of Pass
        Together they read every context token once, in order.
    """
    assert width >= group > 0 == width % group
    passes: list[list[tuple[int, int, int]]] = []
    room = 0
    for row, start, count in _pieces(contexts, width, group):
        if count > room:
            passes.append([])
            room = width
        passes[-1].append((row, start, count))
        room -= count
    return [_spread(pieces) for pieces in passes]


def prefix_sum(counts: Sequence[int]) -> list[int]:
    """Return [0, c0, c0 + c1, ...]."""
    return [0, *accumulate(counts)]


def _pieces(contexts: Sequence[int], width: int, group: int) -> Iterator[tuple[int, int, int]]:
    """Yield (row, first token, tokens)."""
    for row, context in enumerate(contexts):
        for start in range(0, context, width):
            yield row, start, min(width, context - start)


def _spread(pieces: list[tuple[int, int, int]]) -> Pass:
    """Pieces of one pass, with the rows between them."""
    first, last = pieces[0][0], pieces[-1][0]
    found = {row: (start, count) for row, start, count in pieces}
    columns = [found.get(row, (0, 0)) for row in range(first, last + 1)]
    starts, counts = zip(*columns, strict=True)
    return Pass(first, starts, counts)

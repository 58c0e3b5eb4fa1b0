from __future__ import annotations

import random

import pytest

from kvarn_vllm.passes import plan, prefix_sum


def tokens_read(contexts: list[int], width: int, group: int) -> list[tuple[int, int]]:
    """(row, token) in reading order; checks each pass on its own."""
    read = []
    for one in plan(contexts, width, group):
        assert one.rows.start == one.first_row
        assert one.rows.stop <= len(contexts)
        assert 0 < sum(one.counts) <= width
        assert one.counts[0] > 0, "a pass begins with a row that reads"
        assert one.counts[-1] > 0, "a pass ends with a row that reads"
        assert all(start % group == 0 for start in one.starts), "a tile would be read twice"
        for row, start, count in zip(
            range(one.rows.start, one.rows.stop), one.starts, one.counts, strict=True
        ):
            assert count or not contexts[row] or start == 0
            read += [(row, token) for token in range(start, start + count)]
    return read


@pytest.mark.parametrize("seed", range(200))
def test_every_context_token_is_read_once_and_in_order(seed: int) -> None:
    draw = random.Random(seed)  # noqa: S311
    group = draw.choice([64, 128])
    width = group * draw.randint(1, 6)
    lengths = [0, 1, group - 1, group, group + 1, width - 1, width, width + 1, 3 * width + 5]
    contexts = [draw.choice([*lengths, draw.randint(0, 900)]) for _ in range(draw.randint(1, 12))]
    expected = [(row, token) for row, context in enumerate(contexts) for token in range(context)]
    assert tokens_read(contexts, width, group) == expected


def test_rows_share_a_pass_and_a_long_row_takes_several() -> None:
    assert len(plan([100, 0, 28], 128, 64)) == 1
    assert plan([100, 0, 28], 128, 64)[0].counts == (100, 0, 28)
    assert [one.counts for one in plan([300], 128, 64)] == [(128,), (128,), (44,)]
    assert plan([0, 0], 128, 64) == []


def test_a_row_without_context_between_two_passes_is_in_neither() -> None:
    first, second = plan([128, 0, 128], 128, 64)
    assert (first.rows, second.rows) == (slice(0, 1), slice(2, 3))


def test_prefix_sum() -> None:
    assert prefix_sum([3, 0, 5]) == [0, 3, 3, 8]
    assert prefix_sum([]) == [0]

"""The schedule of decode in CUDA C++, run by the emulator over random batches.

What is expected is written here from the definition of the cache (docs/explanation/paging.md):
every record and every exact row that a query sees is read once per head block, by one warp of one
CTA, and no two CTAs leave a partial result in the same place.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from emulator.build import EmulatedKernel

import kvarn_core
from kvarn_core.layout import HIT_COLUMN, RING_COLUMN, SINK_COLUMN, RecordLayout
from kvarn_core.layout_header import HEADER_NAME, layout_header
from kvarn_core.nvrtc import Program, Variant
from kvarn_core.ops.decode.cuda import inverses
from kvarn_core.spec import PRESETS

pytest.importorskip("ziglang", reason="builds C++ for the CPU; the package ziglang is missing")
pytestmark = pytest.mark.emulate

SOURCE = Path(__file__).parent.parent / "emulator" / "schedule_probe.cu"
SCHEDULE = Path(kvarn_core.__file__).parent / "ops" / "decode" / "schedule.cuh"
ARGUMENTS = ("pointer",) * 5 + ("i32",) * 7 + ("u32",) * 4
UNIT_WORDS, SEGMENT_WORDS = 10, 8
LAYOUTS = [
    RecordLayout(PRESETS[f"kvarn_{name}"], dim)
    for name, dim in (("k4v2_g64", 64), ("k4v2_g128", 128), ("k2v2_g64", 256))
]
BATCHES = 3400  # of each layout
LONGEST = 14  # tiles


class Batch(NamedTuple):
    """A random batch on a random grid."""

    lengths: np.ndarray
    table: np.ndarray
    kv_heads: int
    blocks: int
    ctas: int
    warps: int
    least: int
    slack: int

    @property
    def pairs(self) -> int:
        """Head blocks of a request."""
        return self.kv_heads * self.blocks


def _draw(layout: RecordLayout, random: np.random.Generator) -> Batch:
    """Lengths at and around multiples of the group, padded rows, hits, missing sinks."""
    group, crowded = layout.group, random.random() < 0.1
    size = int(
        random.integers(33, 100)
        if crowded
        else random.choice([1, 2, 8, 32], p=(0.2, 0.3, 0.4, 0.1))
    )
    tiles = random.integers(0, 3 if crowded else LONGEST, size)
    edge = random.choice([0, 1, group - 1, layout.rows_per_page, group // 2], size)
    lengths = np.where(random.random(size) < 0.15, 0, tiles * group + edge).astype(np.int32)
    columns = layout.header_columns + LONGEST + 2
    table = random.permutation(size * columns).astype(np.int32).reshape(size, columns) + 1
    table[random.random(size) < 0.3, SINK_COLUMN] = 0
    table[:, HIT_COLUMN] = np.where(random.random(size) < 0.3, random.integers(0, 40, size), 0)
    heads, blocks, ctas, warps = (int(random.integers(1, n)) for n in (5, 4, 80, 6))
    ctas = 132 if random.random() < 0.2 else ctas
    least, slack = int(random.integers(1, 7)), int(random.choice([0, 1, 4, 40]))
    return Batch(lengths, table, heads, blocks, ctas, warps, least, slack)


def _run(
    kernel: EmulatedKernel, layout: RecordLayout, batch: Batch
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of units and of segments, as schedule_probe.cu writes them."""
    most = len(batch.lengths) * batch.pairs * (LONGEST + 2 + 2 * layout.ring_pages)
    units = np.full((2 * most, UNIT_WORDS), -1, np.int32)
    segments = np.full((len(batch.lengths) * batch.pairs + batch.ctas, SEGMENT_WORDS), -1, np.int32)
    counts = np.zeros(2, np.int32)
    arrays = (batch.table, batch.lengths, units, segments, counts)
    kernel.launch(
        (batch.ctas, 1, 1), *(x.ctypes.data for x in arrays), batch.table.shape[1],
        len(batch.lengths), batch.kv_heads, batch.blocks, batch.least, batch.slack,
        batch.warps, *inverses(batch.ctas, batch.kv_heads, batch.blocks),
    )  # fmt: skip
    return units[: counts[0]], segments[: counts[1]]


def _visible(layout: RecordLayout, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """What queries see: records (request, page, hidden tokens), exact rows (request, page, row)."""
    records, rows = [], []
    for request, length in enumerate(batch.lengths.tolist()):
        if not length:
            continue
        line = batch.table[request]
        last = (length - 1) // layout.group
        packed = layout.packed_tiles(length - 1, min(int(line[HIT_COLUMN]), last))
        sink = int(line[SINK_COLUMN]) if packed else 0
        for tile in range(packed):
            hidden = layout.sink_rows if sink and not tile else 0
            records.append((request, line[layout.header_columns + tile], hidden))
        ring = np.arange(packed * layout.group, length) % layout.ring_rows
        pages = line[RING_COLUMN + ring // layout.rows_per_page]
        rows.append(np.stack([np.full_like(pages, request), pages, ring % layout.rows_per_page], 1))
        if sink:
            rows.append([(request, sink, row) for row in range(layout.sink_rows)])
    return np.array(records, np.int64).reshape(-1, 3), np.concatenate(
        [*rows, np.empty((0, 3), int)]
    )


def _sorted(columns: np.ndarray) -> np.ndarray:
    return columns[np.lexsort(columns.T[::-1])]


def _for_every_pair(rows: np.ndarray, batch: Batch) -> np.ndarray:
    """Rows (request, ...) as rows (head, block, request, ...) of every head and block."""
    pairs = np.indices((batch.kv_heads, batch.blocks)).reshape(2, -1).T
    return np.hstack([pairs.repeat(len(rows), 0), np.tile(rows, (len(pairs), 1))])


def _check(layout: RecordLayout, batch: Batch, units: np.ndarray, segments: np.ndarray) -> None:
    cta, warp, request, head, block, _, line, offset, first, count = units.T
    records, rows = _visible(layout, batch)

    is_record = count == 0
    got = np.stack([head, block, request, line // batch.kv_heads, first], 1)[is_record]
    assert np.array_equal(_sorted(got), _sorted(_for_every_pair(records, batch)))
    assert not offset[is_record].any()
    assert np.array_equal(line % batch.kv_heads, head)

    exact = units[~is_record]
    assert (exact[:, 9] <= layout.rows_per_page).all()
    assert np.array_equal(exact[:, 7], exact[:, 8] * layout.row_bytes)
    each = exact.repeat(exact[:, 9], 0)
    begins = np.cumsum(exact[:, 9]) - exact[:, 9]
    row = each[:, 8] + np.arange(len(each)) - begins.repeat(exact[:, 9])
    got = np.stack([each[:, 3], each[:, 4], each[:, 2], each[:, 6] // batch.kv_heads, row], 1)
    assert np.array_equal(_sorted(got), _sorted(_for_every_pair(rows, batch)))

    # warps of a share differ by one unit at most
    by_warp = np.bincount(cta * batch.warps + warp, minlength=batch.ctas * batch.warps)
    by_warp = by_warp.reshape(batch.ctas, batch.warps)
    assert (by_warp.max(1) - by_warp.min(1) <= 1).all()
    shares = np.bincount(cta, minlength=batch.ctas)
    units_of = np.bincount(request, minlength=len(batch.lengths)) // batch.pairs
    want, in_columns = _shares(batch, units_of)
    assert shares.tolist() == want

    # segments: parts are counted right, CTAs follow one another, slots are where they are read
    owner, request, head, block, units_of, parts, part, slot = segments.T
    assert units_of.sum() == len(units)
    key = (request * batch.kv_heads + head) * batch.blocks + block
    order = np.lexsort((part, key))
    _, start, number = np.unique(key[order], return_index=True, return_counts=True)
    assert len(number) == (batch.lengths > 0).sum() * batch.pairs
    assert np.array_equal(parts[order], number.repeat(number))
    assert np.array_equal(part[order], np.arange(len(order)) - start.repeat(number))
    zeroth = slot[order][start].repeat(number) - batch.ctas
    behind = part[order] > 0
    assert np.array_equal(slot[order][behind], (zeroth + part[order])[behind])
    step = batch.pairs if in_columns else 1
    begin = owner[order][start].repeat(number)
    assert np.array_equal(owner[order], begin + step * part[order])
    used = slot[parts > 1]
    assert len(set(used.tolist())) == len(used)
    assert (used >= 0).all()
    assert (used < 2 * batch.ctas).all()
    if in_columns:  # one head block for a CTA
        assert len(set(owner.tolist())) == len(owner)


def _shares(batch: Batch, units: np.ndarray) -> tuple[list[int], bool]:
    """Units of each CTA, and whether it is in a column. `units` are those of one head block."""
    total = int(units.sum()) * batch.pairs
    line = max(batch.least, -(-total // batch.ctas))
    columns = _columns(batch, units, line)
    if columns is None:
        full, rest = divmod(total, line)
        return ([line] * full + [rest] + [0] * batch.ctas)[: batch.ctas], False
    size, needed = columns
    shares = []
    for n, many in zip(units.tolist(), needed.tolist(), strict=True):
        for i in range(many):
            shares += [min(size, n - i * size)] * batch.pairs
    return shares + [0] * (batch.ctas - len(shares)), True


def _columns(batch: Batch, units: np.ndarray, line: int) -> tuple[int, np.ndarray] | None:
    """Share and columns of each request, if 32 requests or fewer fit in the columns."""
    there, most = batch.ctas // batch.pairs, line + batch.slack
    if len(units) > 32 or not there:
        return None
    for size in range(batch.least, most + 1):
        needed = -(-units // size)
        if needed.sum() <= there:
            return size, needed
    return None


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.preset.name[6:]}-d{x.head_dim}")
def test_every_unit_is_taken_once_and_no_partial_is_overwritten(layout: RecordLayout) -> None:
    headers = {HEADER_NAME: layout_header(layout), SCHEDULE.name: SCHEDULE.read_text()}
    variant = Variant("schedule", Program("schedule_probe", SOURCE, headers), ARGUMENTS, 32, 1)
    kernel = EmulatedKernel(variant)
    random = np.random.default_rng(layout.record_bytes)
    for number in range(BATCHES):
        batch = _draw(layout, random)
        kernel.seed = number
        units, segments = _run(kernel, layout, batch)
        try:
            _check(layout, batch, units, segments)
        except AssertionError as error:
            raise AssertionError(f"batch {number}, {batch}") from error

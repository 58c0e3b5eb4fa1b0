"""Decode of random batches: presets, heads, lengths, hits, missing sinks, page tables.

A batch follows from its number. It is stored in one step, in a cache of NaN bytes, so that a kernel
that reads a byte nobody wrote answers NaN. On a GPU of compute capability 9.0 the kernel in CUDA
C++ is compared with the reference on 10,000 of them, and in the emulator on a few small ones; on
the CPU the reference is held against another fill of the cache, which shows that batches are valid.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, replace

import pytest
import torch
from emulator.decoding import Emulated

from kvarn_core import nvrtc
from kvarn_core.layout import HEAD_DIMS, SINK_COLUMN, RecordLayout
from kvarn_core.ops.decode import decode
from kvarn_core.ops.store import append, seal, write_sink
from kvarn_core.spec import PRESETS
from kvarn_core.testing.compare import assert_same_bits, relative_error
from kvarn_core.testing.paging import Paging, allocate

RATIOS = (1, 2, 4, 5, 7, 8, 12, 16, 20)
BATCHES, AT_ONCE = 10_000, 500
ERROR, LSE_ERROR = 4e-3, 4e-3  # of a request and head; natural log; both grow with the query


@dataclass
class Batch:
    """Requests of one decode step: stored rows, query, and tokens of each."""

    paging: Paging
    query: torch.Tensor
    lengths: list[int]
    number: int
    spread: float  # standard deviation of the query

    def decode(self, engine: str) -> tuple[torch.Tensor, torch.Tensor]:
        where = self.query, self.paging.cache, self.paging.page_table
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=self.query.device)
        scale = self.query.shape[-1] ** -0.5
        layout = self.paging.layout
        return decode(*where, lengths, layout=layout, sm_scale=scale, engine=engine)

    def on(self, device: torch.device) -> Batch:
        """The same on another device."""
        paging = copy.copy(self.paging)
        paging.cache, paging.page_table = paging.cache.to(device), paging.page_table.to(device)
        return replace(self, paging=paging, query=self.query.to(device))

    def __str__(self) -> str:
        layout, heads = self.paging.layout, self.paging.cache.shape[1]
        ratio = self.query.shape[1] // heads
        return (
            f"batch {self.number}: {layout.preset.name}, D {layout.head_dim}, {heads} KV heads, "
            f"{ratio} query heads each, {self.query.dtype}, lengths {self.lengths}, "
            f"hits {self.paging.hits}"
        )


def any_length(draw: random.Random, layout: RecordLayout, longest: int) -> int:
    """A length, often one at which something begins: a sink, a tile, a record."""
    group, sink = layout.group, layout.sink_rows
    special = [1, sink, sink + 1, *(k * group + d for k in (1, 2, 3) for d in (-1, 0, 1))]
    return draw.choice([0, draw.choice(special), draw.randint(1, longest)])


def any_batch(number: int, device: torch.device, longest: int, fill: int | None = 0xFF) -> Batch:
    """Batch of a number; its rows do not depend on `fill`, and with None nothing is stored."""
    draw = random.Random(number)  # noqa: S311 - test data
    layout = RecordLayout(draw.choice(list(PRESETS.values())), draw.choice(HEAD_DIMS))
    heads, ratio = draw.randint(1, 4), draw.choice(RATIOS)
    lengths = [any_length(draw, layout, longest) for _ in range(draw.choice((1, 2, 5, 12)))]
    hits, donors = [0] * len(lengths), [0] * len(lengths)
    for i in range(1, len(lengths)):
        donors[i] = draw.randrange(i)
        # a donor has written whole tiles, and a reader keeps at least one token of its own
        most = min(lengths[donors[i]], max(lengths[i] - 1, 0)) // layout.group
        whole = layout.packed_tiles(max(lengths[donors[i]] - 1, 0))
        hits[i] = draw.choice((0, draw.randint(0, min(most, whole))))
    capacities = [max(length, 1) + draw.choice((0, 0, 300)) for length in lengths]
    how = {"num_kv_heads": heads, "hits": hits, "donors": donors, "seed": number}
    paging = allocate(layout, capacities, **how, fill=fill or 0)
    for i, hit in enumerate(hits):
        if not hit and draw.random() < 0.2:
            paging.page_table[i, SINK_COLUMN] = 0  # then tile 0 is read from its record
    paging.cache, paging.page_table = paging.cache.to(device), paging.page_table.to(device)
    if fill is not None:
        store(paging, lengths, number, device)
    dtype = draw.choice((torch.float16, torch.float16, torch.bfloat16))
    generator = torch.Generator().manual_seed(number)
    shape = (len(lengths), heads * ratio, layout.head_dim)
    spread = draw.choice((0.3, 1.0, 4.0))
    query = spread * torch.randn(shape, generator=generator)
    return Batch(paging, query.to(dtype).to(device), lengths, number, spread)


def store(paging: Paging, lengths: list[int], seed: int, device: torch.device) -> None:
    """Store all rows of all requests behind their hits, in one step."""
    layout, heads = paging.layout, paging.cache.shape[1]
    new = [n - hit * layout.group for n, hit in zip(lengths, paging.hits, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    shape = (2, sum(new), heads, layout.head_dim)
    key, value = torch.randn(shape, generator=generator).to(device).half()
    starts = torch.tensor([0, *new]).cumsum(0).int().to(device)
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    where = paging.cache, paging.page_table, lens, starts
    write_sink(key, value, *where, layout=layout)
    seal(key, value, *where, layout=layout)
    append(key, value, *where, layout=layout)


def faults(batch: Batch, found: tuple[torch.Tensor, torch.Tensor]) -> list[str]:
    """What is wrong with an output and its log-sum-exp, a line for each request; on the CPU."""
    unit = 2.0**-8 if batch.query.dtype == torch.bfloat16 else 0.0
    cpu = torch.device("cpu")  # many small steps, for which a GPU shared by many tests is slow
    (got, lse), (want, true_lse) = (x.to(cpu) for x in found), batch.on(cpu).decode("reference")
    lines = []
    for i, length in enumerate(batch.lengths):
        if not length:
            if got[i].any() or not lse[i].isneginf().all():
                lines.append(f"{batch}: padded row {i} is not zero")
            continue
        distance = float((lse[i] - true_lse[i]).abs().max())
        error = max(
            relative_error(a.float(), b.float()) for a, b in zip(got[i], want[i], strict=True)
        )
        # written so that NaN is wrong
        allowed = ERROR * max(1.0, batch.spread / 2) + unit
        near = error <= allowed and distance <= LSE_ERROR * max(1.0, batch.spread)
        if not near or not got[i].isfinite().all():
            lines.append(f"{batch}: request {i}: error {error:.1e}, lse off by {distance:.1e}")
    return lines


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != nvrtc.CAPABILITY,
    reason="needs a GPU of compute capability 9.0",
)
@pytest.mark.parametrize("first", range(0, BATCHES, AT_ONCE))
def test_batches_agree_with_the_reference(first: int) -> None:
    device = torch.device("cuda", 0)
    found = []
    for number in range(first, first + AT_ONCE):
        batch = any_batch(number, device, 2500)
        found += faults(batch, batch.decode("cuda"))
    assert not found, f"{len(found)} requests are wrong\n" + "\n".join(found[:10])


@pytest.mark.emulate
@pytest.mark.parametrize("number", range(12))
def test_small_batches_agree_in_the_emulator(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ziglang", reason="builds C++ for the CPU; the package ziglang is missing")
    batch = any_batch(number, torch.device("cpu"), 300)
    emulated = Emulated(monkeypatch)
    emulated.processors, emulated.seed = number % 4 + 1, number
    found = emulated.decode(batch.paging, batch.query, batch.lengths)
    assert faults(batch, found) == []
    broken = found[0].clone()
    broken[batch.lengths.index(max(batch.lengths)), 0] *= 1.1
    assert len(faults(batch, (broken, found[1]))) == (max(batch.lengths) > 0)


@pytest.mark.parametrize("number", range(8))
def test_batches_read_only_what_was_written(number: int) -> None:
    device = torch.device("cpu")
    (out, lse), (other, other_lse) = (
        any_batch(number, device, 300, fill).decode("reference") for fill in (0xFF, 0x3C)
    )
    assert out.isfinite().all()
    assert_same_bits(out, other)
    assert_same_bits(lse, other_lse)


def test_batches_are_of_all_kinds() -> None:
    seen = [any_batch(number, torch.device("cpu"), 2500, None) for number in range(40)]
    assert {batch.paging.layout.preset.name for batch in seen} == set(PRESETS)
    assert {batch.paging.layout.head_dim for batch in seen} == set(HEAD_DIMS)
    assert any(any(batch.paging.hits) for batch in seen)
    assert any(0 in batch.lengths for batch in seen)
    for batch in seen:  # a missing sink of a cold request that has records
        missing = (batch.paging.page_table[:, SINK_COLUMN] == 0).tolist()
        if any(m and not h for m, h in zip(missing, batch.paging.hits, strict=True)):
            return
    pytest.fail("no sink page is missing")

"""The last units of a launch of decode, taken by whoever is free: run by the emulator.

It runs 1 + seed mod 4 CTAs at once. With one at a time the first takes all pieces of the tail, with
four they share them: results must have the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from emulator.build import EmulationError
from emulator.decoding import ROUNDING, Emulated, expected, mutated, query_of, stored

from kvarn_core.layout import RecordLayout
from kvarn_core.ops.decode import cuda
from kvarn_core.spec import PRESETS
from kvarn_core.testing.compare import assert_close, assert_same_bits

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("ziglang", reason="builds C++ for the CPU; the package ziglang is missing")
pytestmark = pytest.mark.emulate

SMALL = RecordLayout(PRESETS["kvarn_k4v2_g64"], 64)
LINE = -16  # a slack with which columns never fit
SEEDS = 5

# preset, head_dim, KV heads, query heads per KV head, tokens of each request, processors, tail
CASES = [
    ("kvarn_k4v2_g64", 64, 2, 3, (1560, 0, 40, 263, 200), 1, 2),
    ("kvarn_k4v2_g64", 64, 2, 16, (1560, 0, 40, 263, 200), 2, 3),
    ("kvarn_k4v2_g64", 64, 1, 8, (3000,), 2, 1),
    ("kvarn_k4v2_g64", 64, 3, 20, (900, 1, 1, 1), 1, 8),
    ("kvarn_k4v2_g64", 64, 4, 8, tuple(range(1, 450, 14)), 3, 4),
    ("kvarn_k4v2_g128", 128, 2, 8, (1700, 900), 1, 4),
    ("kvarn_k4v4_g64", 256, 1, 8, (1500, 700), 2, 5),
]


def _same_bits_whoever_takes_what(
    emulated: Emulated, layout: RecordLayout, heads: int, ratio: int, tokens: tuple[int, ...]
) -> None:
    """Launches one after the other in one workspace, as in a graph."""
    paging = stored(layout, tokens, heads)
    query = query_of(paging, ratio) * 3
    want, want_lse = expected(paging, query, tokens)
    cuda._scratch.cache_clear()
    sizes = len(tokens), heads * ratio, heads, layout, torch.device("cpu")
    workspace = torch.zeros(cuda.workspace_bytes(*sizes), dtype=torch.uint8)
    counters = workspace[cuda._scratch(*sizes, cuda.TAIL).partial_bytes :]
    results = []
    for emulated.seed in range(SEEDS):
        results.append(emulated.decode(paging, query, tokens, workspace))
        assert_close(results[-1][0], want, tolerance=ROUNDING)
        assert_close(results[-1][1], want_lse, tolerance=ROUNDING)
        assert_same_bits(results[-1][0], results[0][0])
        assert_same_bits(results[-1][1], results[0][1])
        assert not counters.any()


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Emulated:
    monkeypatch.setattr(cuda, "SLACK", LINE)
    monkeypatch.setattr(cuda, "TAIL", 4)
    return Emulated(monkeypatch)


@pytest.mark.parametrize(
    ("name", "dim", "heads", "ratio", "tokens", "processors", "tail"),
    [pytest.param(*c, id=f"{c[0][6:]}-d{c[1]}-kv{c[2]}-gqa{c[3]}-tail{c[6]}") for c in CASES],
)
def test_pieces_have_the_same_bits_whoever_takes_them(
    name: str,
    dim: int,
    heads: int,
    ratio: int,
    tokens: tuple[int, ...],
    processors: int,
    tail: int,
    emulated: Emulated,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "TAIL", tail)
    emulated.processors = processors
    layout = RecordLayout(PRESETS[name], dim)
    _same_bits_whoever_takes_what(emulated, layout, heads, ratio, tokens)


@pytest.mark.parametrize(
    ("tokens", "slack", "processors"),
    [((700, 0, 330), 16, 2), ((40, 3), LINE, 4), ((70, 0, 1) * 12, LINE, 1)],
    ids=["columns", "less-than-a-unit-per-warp", "many-requests"],
)
def test_other_batches_have_no_tail(
    tokens: tuple[int, ...],
    slack: int,
    processors: int,
    emulated: Emulated,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And then the bits of a kernel that knows of none."""
    monkeypatch.setattr(cuda, "SLACK", slack)
    emulated.processors = processors
    _same_bits_whoever_takes_what(emulated, SMALL, 2, 8, tokens)
    paging = stored(SMALL, tokens, 2)
    query = query_of(paging, 8)
    got, _ = emulated.decode(paging, query, tokens)
    monkeypatch.setattr(cuda, "TAIL", 0)
    want, _ = emulated.decode(paging, query, tokens)
    assert_same_bits(got, want)


def test_a_workspace_has_places_for_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_processors", lambda device: 3)
    device = torch.device("cpu")
    plain = cuda._scratch(5, 8, 2, SMALL, device, 0)
    tail = cuda._scratch(5, 8, 2, SMALL, device, 2)
    assert tail.partial_bytes == (1 + cuda.PIECES) * plain.partial_bytes
    assert tail.nbytes - tail.partial_bytes == plain.nbytes - plain.partial_bytes + 4


# name, file beside decode.cu, text there, text of the mutant
MUTANTS = [
    ("pieces-begin-one-unit-late", "schedule.cuh", "number * piece", "number * piece + 1"),
    ("pieces-begin-at-the-second", "schedule.cuh", "number * piece", "(number + 1) * piece"),
    ("the-counter-is-left", "tail.cuh", "*next = 0;", ";"),
    ("the-counter-is-reset-early", "tail.cuh", "behind >= 0", "behind >= -line.piece"),
    ("a-piece-stays-the-next", "decode.cu", "tell_shared(line_at, UNASKED)", "(void)0"),
    ("every-warp-asks", "tail.cuh", "if (!turn_shared(shared, UNASKED, ASKED)) return;", ""),
    ("a-piece-is-of-another-request", "tail.cuh", "stop > at", "stop >= at"),
    ("a-piece-has-the-slot-of-the-share", "decode.cu", "+ segment.own", "+ blockIdx.x"),
    ("parts-count-no-pieces", "tail.cuh", "ctas + piece.floor", "ctas - 1 + piece.floor"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "other"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS]
)
def test_a_mutant_is_found_out(
    name: str, text: str, other: str, tmp_path: Path, emulated: Emulated
) -> None:
    emulated.changed = lambda variant: mutated(variant, tmp_path / "decode", name, text, other)
    with pytest.raises((AssertionError, EmulationError)) as found:
        _same_bits_whoever_takes_what(emulated, SMALL, 2, 3, (1560, 0, 40, 263, 200))
    assert text not in str(found.value)  # the mutant, not the assertion of its text

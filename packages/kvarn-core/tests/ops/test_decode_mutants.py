"""The tests of decode in CUDA C++ can fail: a kernel with one small error is found out."""

from __future__ import annotations

import dataclasses
import shutil
from typing import TYPE_CHECKING

import pytest
from emulator.build import EmulationError
from emulator.decoding import ROUNDING, Emulated, expected, query_of, stored

from kvarn_core.layout import RecordLayout
from kvarn_core.spec import PRESETS
from kvarn_core.testing.compare import assert_close

if TYPE_CHECKING:
    from pathlib import Path

    from kvarn_core.nvrtc import Variant

pytest.importorskip("ziglang", reason="builds C++ for the CPU; the package ziglang is missing")
pytestmark = pytest.mark.emulate

SMALL = RecordLayout(PRESETS["kvarn_k4v2_g64"], 64)
TOKENS = (1560, 0, 40, 263, 200)  # several units per warp; rings that wrap

# name, file beside decode.cu, text there, text of the mutant; "wide" has 12 heads per KV head
MUTANTS = [
    ("tokens-under-the-sink-show", "attend.cuh", "row < hidden", "row < hidden / 2"),
    ("rows-past-the-last-show", "attend.cuh", ">= unit.count)", "> unit.count)"),
    ("one-barrier-phase-is-skipped", "decode.cu", "parity ^= 1", "parity ^= unit.count == 0"),
    ("sums-are-not-rescaled", "attend.cuh", "s.sum[n][e] *= factor", "(void)factor"),
    ("keys-are-fetched-too-early", "decode.cu", "more && !unit.count && !next.count", "more"),
    ("parts-share-a-slot", "schedule.cuh", "slot == first ? ctas : 0", "0 * ctas"),
    ("columns-overlap", "schedule.cuh", "at.index + share.size)", "at.index + share.size + 1)"),
    ("wide-tiles-share-a-query", "attend.cuh", "tile * QUERY_BYTES", "0 * tile"),
    ("wide-tiles-share-a-strip", "attend.cuh", "n * STRIP_BYTES", "0 * n"),
    ("a-part-loses-its-weight", "merge.cuh", "at + k < 32 ?", "at + k < 1 ?"),
]  # fmt: skip


def _check(emulated: Emulated, ratio: int) -> None:
    paging = stored(SMALL, TOKENS, 2)
    query = query_of(paging, ratio) * 5  # so that maxima grow
    want, want_lse = expected(paging, query, TOKENS)
    for emulated.processors, emulated.seed in ((1, 1), (3, 2)):
        out, lse = emulated.decode(paging, query, TOKENS)
        for request in range(len(TOKENS)):
            assert_close(out[request], want[request], tolerance=ROUNDING)
            assert_close(lse[request], want_lse[request], tolerance=ROUNDING)


@pytest.mark.parametrize("ratio", [3, 12])
def test_the_kernel_passes(ratio: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _check(Emulated(monkeypatch), ratio)


@pytest.mark.parametrize(
    ("ratio", "name", "text", "other"),
    [(12 if m[0].startswith("wide") else 3, *m[1:]) for m in MUTANTS],
    ids=[m[0] for m in MUTANTS],
)
def test_a_mutant_is_found_out(
    ratio: int, name: str, text: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mutated(variant: Variant) -> Variant:
        source = variant.program.source
        folder = tmp_path / "decode"
        shutil.copytree(source.parent, folder, dirs_exist_ok=True)
        lines = (folder / name).read_text()
        assert text in lines
        (folder / name).write_text(lines.replace(text, other))
        program = dataclasses.replace(variant.program, source=folder / source.name)
        return dataclasses.replace(variant, program=program)

    emulated = Emulated(monkeypatch)
    emulated.changed = mutated
    with pytest.raises((AssertionError, EmulationError)) as found:
        _check(emulated, ratio)
    assert text not in str(found.value)  # the mutant, not the assertion above

"""Every form of every kernel compiles, spills nothing and occupies what the table says.

The table `golden/resources.json` is written by this file: `nox -s compile -- rewrite`. A change of
a row is a change of speed somewhere; look at it before committing.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import kvarn_core
from kvarn_core.layout import HEAD_DIMS, RecordLayout
from kvarn_core.spec import PRESETS
from kvarn_core.variants import Resources, Variant, compile

pytest.importorskip("triton", reason="compiles Triton kernels; the package triton is missing")
pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs compiled kernels"),
]

TABLE = Path(__file__).parent / "golden" / "resources.json"
OPS = Path(kvarn_core.__file__).parent / "ops"
KERNEL_FILES = sorted(path.parent.name for path in OPS.glob("*/triton.py"))
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of one program
REGISTER_FILE = 65536  # of one processor
PROCESSOR_SHARED_BYTES = (
    228 * 1024
)  # of one sm_90 processor, of which each program costs 1 KiB more
REGISTER_TOLERANCE = 0.08  # the assembler's choice moves a little with unrelated edits
OTHER_PRESETS = [name.removeprefix("kvarn_") for name in PRESETS if name != "kvarn_k4v2_g128"]
RARE = {"bf16", "fp32", "paper", "ring", "rows1"}  # compiled for the default preset only
NOT_MAIN = {"d64", "d256", "bf16", "fp32", "paper"}  # compiled for the main architecture only


# One register, spilled before a tile of 128 registers per thread is encoded and read back after it,
# outside all loops; sealing in decode steps (`ring`) and all other variants spill nothing.
SPILLED_BYTES = {f"seal-kvarn_k4v2_g128-d256-{dtype}-kvarn-raw": 8 for dtype in ("fp16", "bf16")}


def _variants() -> list[Variant]:
    modules = (importlib.import_module(f"kvarn_core.ops.{op}.triton") for op in KERNEL_FILES)
    return [variant for module in modules for variant in module.variants()]


def _cases() -> dict[str, tuple[Variant, int]]:
    """What is compiled: all that differs in kind for sm_90, the main shapes for its neighbours."""
    cases = {}
    for variant in _variants():
        words = set(variant.name.split("-"))
        default = not any(preset in variant.name for preset in OTHER_PRESETS)
        if default or not words & RARE:
            cases[f"{variant.name} sm_90"] = (variant, 90)
        if default and not words & NOT_MAIN:
            cases |= {f"{variant.name} sm_{arch}": (variant, arch) for arch in (80, 100)}
    return cases


def _problems(
    got: Resources, want: dict[str, int] | None, variant: Variant, arch: int
) -> list[str]:
    """What is wrong with a compiled variant, given its row in the table."""
    found = []
    if got.stack_bytes > SPILLED_BYTES.get(variant.name, 0):
        found.append(f"{got.stack_bytes} bytes of registers spill")
    if got.shared > SHARED_BYTES[arch]:
        found.append(f"{got.shared} bytes of shared memory, at most {SHARED_BYTES[arch]} exist")
    if got.registers * variant.num_warps * 32 > REGISTER_FILE:
        found.append(f"{got.registers} registers, too many for {variant.num_warps} warps")
    if want is None:
        return [*found, f"no row in {TABLE.name}"]
    if got.shared != want["shared"]:
        found.append(f"{got.shared} bytes of shared memory, {want['shared']} in {TABLE.name}")
    if abs(got.registers - want["registers"]) > REGISTER_TOLERANCE * want["registers"]:
        found.append(f"{got.registers} registers, {want['registers']} in {TABLE.name}")
    return found


def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table


CASES = _cases()


@pytest.mark.parametrize("case", CASES)
def test_a_variant_spills_nothing_and_fits_the_table(case: str) -> None:
    variant, arch = CASES[case]
    problems = _problems(compile(variant, arch), _table()["kernels"].get(case), variant, arch)
    assert problems == []


def test_the_table_has_no_other_rows_and_names_its_compiler() -> None:
    table = _table()
    assert sorted(table["kernels"]) == sorted(CASES)
    assert table["triton"] == version("triton"), "made by another Triton; write the table again"


def test_names_are_unique() -> None:
    names = [variant.name for variant in _variants()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("preset", "dim"), [(p, d) for p in PRESETS for d in HEAD_DIMS])
def test_as_many_decode_programs_are_resident_as_the_splits_assume(preset: str, dim: int) -> None:
    from kvarn_core.ops.decode.triton import resident_programs

    variant, arch = CASES[f"decode-{preset.removeprefix('kvarn_')}-d{dim}-gqa8-fp16 sm_90"]
    found = compile(variant, arch)
    registers = -(-found.registers // 8) * 8  # as they are allocated
    programs = resident_programs(RecordLayout(PRESETS[preset], dim))
    assert programs * variant.num_warps * 32 * registers <= REGISTER_FILE
    assert programs * (found.shared + 1024) <= PROCESSOR_SHARED_BYTES


@pytest.mark.parametrize("op", KERNEL_FILES)
def test_every_operation_with_kernels_lists_its_variants(op: str) -> None:
    module = importlib.import_module(f"kvarn_core.ops.{op}.triton")
    assert {type(variant) for variant in module.variants()} == {Variant}


# --- the gate itself ------------------------------------------------------------------------------

ROW = {"registers": 100, "shared": 4096}
FINE = Resources(registers=100, shared=4096, stack_bytes=0)
ANY = Variant("any", None, {}, {}, num_warps=4, num_stages=1)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"registers": 108}, None),
        ({"registers": 109}, "109 registers, 100 in"),
        ({"registers": 91}, "91 registers, 100 in"),
        ({"shared": 4112}, "4112 bytes of shared memory, 4096 in"),
        ({"stack_bytes": 8}, "8 bytes of registers spill"),
    ],
)
def test_the_gate_sees_a_change(change: dict[str, int], problem: str | None) -> None:
    found = _problems(dataclasses.replace(FINE, **change), ROW, ANY, 90)
    assert len(found) == (problem is not None)
    assert all(message.startswith(problem or "") for message in found)


def test_the_gate_sees_what_no_gpu_can_hold() -> None:
    crowded = dataclasses.replace(ANY, num_warps=32)
    assert "too many for 32 warps" in _problems(FINE, ROW, crowded, 90)[0]
    large = dataclasses.replace(FINE, shared=200 * 1024)
    row = {**ROW, "shared": large.shared}
    assert not _problems(large, row, ANY, 90)
    assert "at most 166912 exist" in _problems(large, row, ANY, 80)[0]
    assert _problems(FINE, None, ANY, 90) == ["no row in resources.json"]


def test_the_gate_sees_a_kernel_with_too_few_warps() -> None:
    case = "gather-k4v2_g128-d256-fp32 sm_90"
    starved = dataclasses.replace(CASES[case][0], num_warps=2)
    found = _problems(compile(starved, 90), _table()["kernels"][case], starved, 90)
    assert any("spill" in problem for problem in found)


def _resources(case: str) -> Resources:
    return compile(*CASES[case])


def main() -> None:
    """Write the table."""
    with ProcessPoolExecutor() as pool:
        resources = dict(zip(CASES, pool.map(_resources, CASES), strict=True))
    rows = {
        case: {"registers": found.registers, "shared": found.shared}
        for case, found in sorted(resources.items())
    }
    table = {
        "command": "nox -s compile -- rewrite",
        "triton": version("triton"),
        "kernels": rows,
    }
    TABLE.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""All CUDA C++ compiles, spills nothing and occupies what the table says.

The table `golden/resources_cuda.json` is written by this file: run it as a program. A change of
a row is a change of speed somewhere; look at it before committing.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvarn_core import nvrtc

pytest.importorskip("triton", reason="reads machine code; the package triton brings the tool")
if missing := nvrtc.obstacle():
    pytest.skip(f"compiles CUDA C++; {missing} is missing", allow_module_level=True)

from kvarn_core.ops.decode import cuda as decode
from kvarn_core.ops.quantize import cuda as quantize
from kvarn_core.ops.store import cuda as store

pytestmark = pytest.mark.compile

TABLE = Path(__file__).parent / "golden" / "resources_cuda.json"
REGISTER_FILE, PROCESSOR_SHARED_BYTES = 65536, 228 * 1024  # of which each CTA costs 1 KiB more
TOLERANCE = 0.08  # registers and instructions move a little with unrelated edits
# all of decode; of the encoder what differs in kind, the other forms have less to hold
NAMES = [
    *(variant.name for variant in decode.variants()),
    "quantize-k4v2_g128-d128-kvarn",
    *(f"rows-k4v2_g128-d{dim}-fp16" for dim in (64, 128, 256)),
    *(f"rows-k4v2_g128-d128-{dtype}" for dtype in ("bf16", "fp32")),
    *(f"seal-k4v2_g128-d128-{dtype}-kvarn" for dtype in ("bf16", "fp32")),
    *(f"seal-k4v2_g128-d{dim}-fp16-kvarn" for dim in (64, 128, 256)),
    *(f"seal-k4v2_g128-d{dim}-fp16-paper" for dim in (128, 256)),
    *(f"seal-k2v2_g128-d{dim}-fp16-kvarn" for dim in (64, 128, 256)),
    *(f"seal-{bits}_g64-d{dim}-fp16-kvarn" for bits in ("k4v2", "k2v2") for dim in (128, 256)),
    "seal-k4v4_g128-d128-fp16-kvarn",
]


def _variant(name: str) -> nvrtc.Variant:
    return next(v for op in (decode, quantize, store) for v in op.variants() if v.name == name)


INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z0-9_.]+)", re.M)


def _listing(variant: nvrtc.Variant) -> str:
    """Resources and machine code, as the tool prints them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(nvrtc.compile(variant.program))
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _resources(variant: nvrtc.Variant) -> dict[str, int]:
    """Registers and stack bytes of a thread, shared memory of a CTA, static instructions."""
    listing = _listing(variant)
    usage = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", listing))
    return {
        "registers": int(usage["REG"]),
        "stack_bytes": int(usage["STACK"]) + int(usage["LOCAL"]),
        "shared": int(usage["SHARED"]) + variant.shared_bytes,
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s", listing, re.M)),
    }


def _problems(got: dict[str, int], want: dict[str, int], variant: nvrtc.Variant) -> list[str]:
    """What is wrong with a compiled variant, given its row in the table."""
    found = []
    if got["stack_bytes"]:
        found.append(f"{got['stack_bytes']} bytes of registers spill")
    registers = -(-got["registers"] // 8) * 8  # as they are allocated
    if registers * variant.threads * variant.ctas > REGISTER_FILE:
        found.append(f"{registers} registers, too many for {variant.ctas} CTAs")
    if (got["shared"] + 1024) * variant.ctas > PROCESSOR_SHARED_BYTES:
        found.append(f"{got['shared']} bytes of shared memory, too many for {variant.ctas} CTAs")
    if got["shared"] != want["shared"]:
        found.append(f"{got['shared']} bytes of shared memory, {want['shared']} in {TABLE.name}")
    found += [
        f"{got[what]} {what}, {want[what]} in {TABLE.name}"
        for what in ("registers", "instructions")
        if abs(got[what] - want[what]) > TOLERANCE * want[what]
    ]
    return found


def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table


@pytest.mark.parametrize("name", NAMES)
def test_a_form_spills_nothing_and_fits_the_table(name: str) -> None:
    variant = _variant(name)
    assert _problems(_resources(variant), _table()["kernels"][name], variant) == []


def _loop_over_units(variant: nvrtc.Variant) -> list[str]:
    """Instructions from the barrier before the first wait to the last bulk copy."""
    code = INSTRUCTION.findall(_listing(variant))
    wait = next(i for i, name in enumerate(code) if name.startswith("SYNCS.PHASECHK"))
    begin = max(i for i, name in enumerate(code[:wait]) if name.startswith("BAR.SYNC"))
    end = max(i for i, name in enumerate(code) if name.startswith("UBLKCP"))
    return code[begin:end]


@pytest.mark.parametrize("name", [v.name for v in decode.variants() if "-d128-" in v.name])
def test_the_loop_of_decode_divides_nothing_and_loads_no_code_itself(name: str) -> None:
    """Codes come by bulk copy and go into the tensor cores; the loop finds pages, no more."""
    code = _loop_over_units(_variant(name))
    kinds = {kind: sum(n.startswith(kind) for n in code) for kind in ("LDG", "HMMA", "MOVM", "LDS")}
    unwanted = ("I2F", "F2I", "MUFU.RCP", "LDL", "STL", "BAR.SYNC", "CALL")
    assert not [n for n in code[1:] if n.startswith(unwanted)]
    assert kinds["LDG"] <= 6  # page, and lengths, hits and sinks of the next request
    assert kinds["HMMA"] >= 32
    assert kinds["MOVM"] >= 8
    assert kinds["LDS"] >= 10


def test_the_table_has_no_other_rows_and_names_its_compiler() -> None:
    table = _table()
    assert sorted(table["kernels"]) == sorted(NAMES)
    assert table["nvrtc"] == _compiler(), "made by another NVRTC; write the table again"


# --- the gate itself ------------------------------------------------------------------------------

FINE = {"registers": 100, "stack_bytes": 0, "shared": 32768, "instructions": 5000}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"registers": 108, "instructions": 5400}, None),
        ({"registers": 109}, "109 registers, 100 in"),
        ({"instructions": 4500}, "4500 instructions, 5000 in"),
        ({"shared": 32784}, "32784 bytes of shared memory, 32768 in"),
        ({"stack_bytes": 8}, "8 bytes of registers spill"),
    ],
)
def test_the_gate_sees_a_change(change: dict[str, int], problem: str | None) -> None:
    found = _problems({**FINE, **change}, FINE, _variant("seal-k4v2_g128-d128-fp16-kvarn"))
    assert len(found) == (problem is not None)
    assert all(message.startswith(problem or "") for message in found)


def test_the_gate_sees_what_a_processor_cannot_hold() -> None:
    variant = _variant("seal-k4v2_g128-d128-fp16-kvarn")
    for much in ({"registers": 129}, {"shared": 120 * 1024}):
        row = {**FINE, **much}
        assert "too many for 2 CTAs" in _problems(row, row, variant)[0]


def test_the_gate_sees_a_kernel_with_too_few_registers() -> None:
    """Three CTAs of a processor leave 80 registers to a thread."""
    variant = _variant("seal-k4v2_g128-d128-fp16-kvarn")
    defines = {**variant.program.defines, "CTAS": 3}
    starved = dataclasses.replace(
        variant, program=dataclasses.replace(variant.program, defines=defines)
    )
    found = _problems(_resources(starved), _table()["kernels"][variant.name], starved)
    assert any("spill" in problem for problem in found)


def _compiler() -> str:
    from cuda.bindings import nvrtc as compiler

    _, major, minor = compiler.nvrtcVersion()
    return f"{major}.{minor}"


def _row(name: str) -> dict[str, int]:
    found = _resources(_variant(name))
    assert not found.pop("stack_bytes"), f"{name} spills"
    return found


def main() -> None:
    """Write the table."""
    with ProcessPoolExecutor(2) as pool:
        rows = dict(zip(NAMES, pool.map(_row, NAMES), strict=True))
    command = f"python packages/kvarn-core/tests/{Path(__file__).name}"
    table = {"command": command, "nvrtc": _compiler(), "kernels": dict(sorted(rows.items()))}
    TABLE.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()

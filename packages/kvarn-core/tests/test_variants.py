from __future__ import annotations

import dataclasses
import os

import pytest

pytest.importorskip("triton", reason="compiles Triton kernels; the package triton is missing")

import triton
import triton.language as tl

from kvarn_core.variants import Variant, compile

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, not interprets"
    ),
]


@triton.jit
def _sum_rows(p_x, p_y, p_count, stride, COLS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    o = tl.arange(0, COLS)
    x = tl.load(p_x + row * stride + o, mask=o < tl.load(p_count), other=0.0)
    tl.store(p_y + row, tl.sum(x, 0))


@triton.jit
def _centre(p_x, COLS: tl.constexpr):  # type: ignore[no-untyped-def]
    o = tl.arange(0, COLS)
    x = tl.load(p_x + o)
    tl.store(p_x + o, x - tl.sum(x, 0) * tl.max(x, 0))


SIGNATURE = {"p_x": "*fp32", "p_y": "*fp32", "p_count": "*i32", "stride": "i32"}
GOOD = Variant("sum-1024", _sum_rows, SIGNATURE, {"COLS": 1024}, num_warps=4, num_stages=1)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_kernel_compiles_without_a_gpu(arch: int) -> None:
    resources = compile(GOOD, arch)
    assert 0 < resources.registers <= 64
    assert resources.shared == 4 * 4  # one fp32 of each warp
    assert resources.stack_bytes == 0


def test_spilled_registers_show() -> None:
    """16,384 elements that one warp reduces twice are 512 registers per thread; 255 exist."""
    spilling = Variant(
        "centre", _centre, {"p_x": "*fp32"}, {"COLS": 16384}, num_warps=1, num_stages=1
    )
    assert compile(spilling, 90).stack_bytes > 0


@pytest.mark.parametrize(
    "broken",
    [
        {"signature": {name: kind for name, kind in SIGNATURE.items() if name != "stride"}},
        {"constexprs": {"COLS": 1024, "ROWS": 1}},
    ],
    ids=["one-missing", "one-too-many"],
)
def test_a_variant_names_every_parameter(broken: dict[str, dict[str, object]]) -> None:
    with pytest.raises(ValueError, match="Name those of its kernel"):
        compile(dataclasses.replace(GOOD, **broken), 90)

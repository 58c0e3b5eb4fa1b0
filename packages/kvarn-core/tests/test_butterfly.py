"""The Triton rotation equals the reference in every bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from kvarn_core import PRESETS, RecordLayout
from kvarn_core.butterfly import rotate, sanitise, to_fp16
from kvarn_core.rotation import exact_rows

pytestmark = pytest.mark.kernel


@triton.jit
def _exact(p_x, p_y, ROWS: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    o = tl.program_id(0) * ROWS * DIM + tl.arange(0, ROWS)[:, None] * DIM + tl.arange(0, DIM)
    tl.store(p_y + o, to_fp16(rotate(sanitise(tl.load(p_x + o)), ROWS, DIM)))


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_have_the_bits_of_the_reference(
    dim: int, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    x = torch.randn(32, dim, generator=torch.Generator().manual_seed(dim)) * 10
    x[0, :5] = torch.tensor([float("nan"), float("inf"), -float("inf"), 65504.0, 7e-8])
    x[1] = 65504
    x = x.to(dtype).to(kernel_device)
    y = torch.empty(32, dim, dtype=torch.float16, device=kernel_device)
    _exact[(4,)](x, y, 8, dim)
    layout = RecordLayout(PRESETS["kvarn_k4v2_g128"], dim)
    assert torch.equal(y.view(torch.int16), exact_rows(x, layout).view(torch.int16))

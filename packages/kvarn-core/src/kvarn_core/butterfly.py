"""Triton functions that several kernels share: the rotation, and entry to fp16.

The butterflies are those of `kvarn_core.rotation`, stage by stage and rounding by rounding, so a
kernel and the reference agree in every bit whatever the thread mapping.
"""

from __future__ import annotations

import triton
import triton.language as tl

FP16_MAX = tl.constexpr(65504.0)


@triton.jit
def rotate(x, ROWS: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Multiply fp32 rows [ROWS, DIM] by the normalised Hadamard matrix."""
    for stage in tl.static_range(0, 8):
        if (1 << stage) < DIM:
            x = _butterfly(x, ROWS, DIM, 1 << stage)
    scale: tl.constexpr = 0.125 if DIM == 64 else (0.08838834764831845 if DIM == 128 else 0.0625)
    return x * scale


@triton.jit
def _butterfly(x, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """(a, b) -> (a + b, a - b) for elements WIDTH apart."""
    pairs = x.reshape(ROWS, DIM // (2 * WIDTH), 2, WIDTH).trans(0, 1, 3, 2)
    a, b = tl.split(pairs)
    return tl.join(a + b, a - b).trans(0, 1, 3, 2).reshape(ROWS, DIM)


@triton.jit
def sanitise(x):  # type: ignore[no-untyped-def]
    """To fp32; NaN becomes 0, values beyond fp16 saturate."""
    x = x.to(tl.float32)
    x = tl.where(x == x, x, 0.0)
    return tl.minimum(tl.maximum(x, -FP16_MAX), FP16_MAX)


@triton.jit
def to_fp16(x):  # type: ignore[no-untyped-def]
    """Round to fp16, half to even, saturating; of what cannot be NaN."""
    return tl.minimum(tl.maximum(x, -FP16_MAX), FP16_MAX).to(tl.float16)


@triton.jit
def cast(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round to a model's dtype; fp16 saturates, NaN stays NaN."""
    if dtype == tl.float16:
        x = tl.clamp(x, -FP16_MAX, FP16_MAX, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)

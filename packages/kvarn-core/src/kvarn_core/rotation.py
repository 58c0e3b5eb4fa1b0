"""The door to the cache: sanitise, rotate by a Hadamard matrix, round to fp16.

Every path into the cache goes through `exact_rows`, so a token has the same bits however it came.
The transform is a fixed sequence of butterflies in fp32: each rounding is determined, which a
matrix product could not promise. The matrix is symmetric and its own inverse.

Source: arXiv 2606.03458 (rotation); docs/explanation/algorithm.md.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvarn_core.layout import RecordLayout

FP16_MAX = 65504.0


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Multiply by the normalised Hadamard matrix along the last dimension.

    Parameters
    ----------
    x : Tensor [..., D], any floating dtype
        D is a power of two.

    Returns
    -------
    Tensor [..., D], fp32
        ``x @ H / sqrt(D)``, computed in butterfly stages 1, 2, 4, ..., D/2 and one multiplication.
    """
    dim = x.shape[-1]
    y, width = x.float(), 1
    while width < dim:
        pairs = y.reshape(*x.shape[:-1], dim // (2 * width), 2, width)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((a + b, a - b), dim=-2).reshape(x.shape)
        width *= 2
    return y * torch.tensor(1.0 / math.sqrt(dim), dtype=torch.float32)


def hadamard_matrix(dim: int) -> torch.Tensor:
    """Return the normalised Sylvester Hadamard matrix [dim, dim], fp64; an oracle for tests."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix / math.sqrt(dim)


def to_fp16(x: torch.Tensor) -> torch.Tensor:
    """Round to fp16, half to even, saturating at ±65504."""
    return x.clamp(-FP16_MAX, FP16_MAX).half()


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert fp32 to a model's dtype; fp16 saturates, NaN stays NaN."""
    return to_fp16(x) if dtype == torch.float16 else x.to(dtype)


def exact_rows(x: torch.Tensor, layout: RecordLayout) -> torch.Tensor:
    """Turn model keys or values into the rows that the cache keeps.

    Parameters
    ----------
    x : Tensor [..., D], fp16, bf16 or fp32
        K after RoPE, or V. NaN counts as 0; values beyond ±65504 saturate.
    layout : RecordLayout
        Decides the row dtype.

    Returns
    -------
    Tensor [..., D], fp16 (fp32 for the debug preset)
        Rotated rows, always finite.
    """
    sane = torch.nan_to_num(x.float(), nan=0.0).clamp(-FP16_MAX, FP16_MAX)
    rotated = rotate(sane)
    return rotated if layout.preset.is_debug else to_fp16(rotated)

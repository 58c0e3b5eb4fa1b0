from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kvarn_core.layout import RecordLayout
from kvarn_core.rotation import FP16_MAX, exact_rows, hadamard_matrix, rotate, to_fp16
from kvarn_core.spec import DEBUG_PRESETS, PRESETS
from kvarn_core.testing import naive
from kvarn_core.testing.compare import assert_close, assert_same_bits
from kvarn_core.testing.inputs import DISTRIBUTIONS, draw

DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _layout(dim: int) -> RecordLayout:
    return RecordLayout(PRESETS["kvarn_k4v2_g128"], dim)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
def test_rows_have_the_bits_of_a_scalar_butterfly(name: str, dim: int) -> None:
    x = draw(name, (9, dim), seed=dim)
    want = torch.from_numpy(naive.door(x.numpy()))
    assert_same_bits(exact_rows(x, _layout(dim)), want)


@pytest.mark.parametrize("dim", DIMS)
def test_rotation_is_the_hadamard_matrix_and_its_own_inverse(dim: int) -> None:
    x = draw("gaussian", (33, dim), seed=1)
    matrix = hadamard_matrix(dim)
    assert matrix.equal(matrix.T)
    assert_close(matrix @ matrix, torch.eye(dim, dtype=torch.float64), tolerance=1e-14)
    assert_close(rotate(x), (x.double() @ matrix).float(), tolerance=3e-7)
    assert_close(rotate(rotate(x)), x, tolerance=3e-7)


@pytest.mark.parametrize("dim", DIMS)
def test_products_of_queries_and_keys_survive(dim: int) -> None:
    q, k = draw("gaussian", (7, dim), seed=2), draw("gaussian", (11, dim), seed=3)
    assert_close(rotate(q) @ rotate(k).T, q @ k.T, tolerance=1e-6)


def test_a_view_and_any_batch_give_the_same_bits() -> None:
    wide = draw("gaussian", (6, 4, 2 * 128), seed=4)
    view = wide.transpose(0, 1)[:, :, :128]
    whole = exact_rows(view, _layout(128))
    for i in range(4):
        for j in range(6):
            assert_same_bits(whole[i, j], exact_rows(wide[j, i, :128].clone(), _layout(128)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_input_dtype_is_widened_exactly(dtype: torch.dtype) -> None:
    x = draw("gaussian", (5, 128), seed=5, dtype=dtype)
    assert_same_bits(exact_rows(x, _layout(128)), exact_rows(x.float(), _layout(128)))


# --- input policy: what a row of hostile values becomes -------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_counts_as_zero(dtype: torch.dtype) -> None:
    x = draw("gaussian", (3, 128), seed=6, dtype=dtype)
    clean = x.clone()
    x[1, 17], clean[1, 17] = float("nan"), 0
    assert_same_bits(exact_rows(x, _layout(128)), exact_rows(clean, _layout(128)))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("huge", [float("inf"), 3e38, 1e5])
def test_infinity_and_values_beyond_fp16_become_65504(huge: float, sign: int) -> None:
    x = draw("gaussian", (3, 128), seed=7, dtype=torch.bfloat16)
    x[2, 5] = sign * huge
    clean = x.float()
    clean[2, 5] = sign * FP16_MAX
    assert_same_bits(exact_rows(x, _layout(128)), exact_rows(clean, _layout(128)))


@pytest.mark.parametrize("dim", DIMS)
def test_all_65504_saturates_in_the_first_rotated_channel(dim: int) -> None:
    rows = exact_rows(torch.full((2, dim), FP16_MAX, dtype=torch.float16), _layout(dim))
    assert rows[:, 0].tolist() == [FP16_MAX] * 2  # 65504 * sqrt(dim) before rounding
    assert not rows[:, 1:].any()


@pytest.mark.parametrize("dim", DIMS)
def test_rotated_values_below_the_smallest_fp16_vanish(dim: int) -> None:
    one_hot = torch.zeros(1, dim)
    one_hot[0, 3] = 2e-8 * math.sqrt(dim)
    assert not exact_rows(one_hot, _layout(dim)).any()
    one_hot[0, 3] = 8e-8 * math.sqrt(dim)
    assert exact_rows(one_hot, _layout(dim)).all()


@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_always_finite(name: str, dtype: torch.dtype) -> None:
    rows = exact_rows(draw(name, (16, 64), seed=8, dtype=dtype), _layout(64))
    assert rows.dtype == torch.float16
    assert rows.isfinite().all()


def test_the_debug_preset_keeps_fp32() -> None:
    layout = RecordLayout(DEBUG_PRESETS["kvarn_debug32_g128"], 128)
    x = draw("gaussian", (3, 128), seed=9)
    assert_same_bits(exact_rows(x, layout), rotate(x))


def test_rounding_to_fp16_is_half_to_even_and_saturates() -> None:
    x = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 65519.0, 65520.0, -1e30, 2.0**-25, 3 * 2.0**-25])
    want = [1.0, 1 + 2**-9, FP16_MAX, FP16_MAX, -FP16_MAX, 0.0, 2.0**-23]
    assert to_fp16(x).tolist() == want
    assert np.float16(1 + 2**-11) == np.float16(1.0)

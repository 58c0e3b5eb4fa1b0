"""The oracle is checked by hand-made cases, not by the code it judges."""

from __future__ import annotations

import numpy as np
import pytest

from kvarn_core.testing import naive


def test_packing_one_code_sets_its_bits_only() -> None:
    for bits in (2, 4):
        codes = np.zeros((64, 128), np.int64)
        codes[37, 77] = 2**bits - 1
        packed = naive.pack(codes, bits)
        word, bit = naive.code_place(37, 77, 64, 128, bits)
        assert int(packed.view("<u4")[word]) == (2**bits - 1) << bit
        assert np.count_nonzero(packed) == 1
        assert (naive.unpack(packed, 64, 128, bits) == codes).all()


def test_a_row_on_a_four_bit_grid_is_found_exactly() -> None:
    row = np.arange(16, dtype=np.float32) * 0.25 - 1
    codes, scale, zero = naive.fit_row(row, 4, recipe="kvarn")
    assert codes.tolist() == list(range(16))
    assert (float(scale), float(zero)) == (0.25, -1.0)


def test_least_squares_finds_a_two_bit_grid() -> None:
    row = np.tile(np.array([-3, -1, 1, 3], np.float32), 16)
    codes, scale, zero = naive.fit_row(row, 2, recipe="kvarn")
    assert codes[:4].tolist() == [0, 1, 2, 3]
    assert (float(scale), float(zero)) == (2.0, -3.0)


def test_a_column_factor_is_refitted_within_its_bounds() -> None:
    codes = np.tile(np.array([[0, 3]]), (4, 1))
    scale, zero = np.ones(4, np.float16), np.full(4, -1.0, np.float16)  # decoded rows -1, 2
    tile = np.tile(np.array([[-1.125, 20.0]], np.float32), (4, 1))
    refitted = naive.refit_columns(tile, codes, scale, zero, np.ones(2, np.float16))
    assert refitted.tolist() == [1.125, 1.25]


def test_norms_are_restored() -> None:
    codes = np.array([[0, 3, 0, 3]])
    scale, zero = np.ones(1, np.float16), np.full(1, -1.5, np.float16)
    tile = np.array([[-1.75, 1.75, -1.75, 1.75]], np.float32)
    found = naive.restore_norms(tile, codes, scale, zero, np.ones(4, np.float16))
    assert [float(x[0]) for x in found] == pytest.approx([1.75 / 1.5, -1.75], rel=1e-3)


def test_column_factors_undo_column_scales() -> None:
    rng = np.random.default_rng(0)
    scales = np.exp(rng.uniform(-2, 2, 128)).astype(np.float32)
    tile = rng.choice([-1, 1], (128, 128)).astype(np.float32) * scales
    for recipe in (naive.factors_kvarn, naive.factors_paper):
        factors = recipe(tile)
        if recipe is naive.factors_kvarn:
            assert np.allclose(factors / factors[0], scales / scales[0], rtol=1e-5)
        else:  # its floor of exp(-0.3) per pass leaves small columns alone
            large = scales > 1
            assert np.corrcoef(np.log(factors[large]), np.log(scales[large]))[0, 1] > 0.95


@pytest.mark.parametrize("bits", [2, 4])
def test_the_gauge_puts_row_endpoints_where_fp16_is_comfortable(bits: int) -> None:
    rng = np.random.default_rng(1)
    for magnitude in (1e-2, 1.0, 1e2):
        tile = (magnitude * rng.standard_normal((128, 128))).astype(np.float32)
        w = naive.fix_gauge(tile, naive.factors_kvarn(tile), bits)
        top = np.abs(tile / w).max()
        assert (8 <= top < 16) if bits == 4 else (2 <= top < 4)


def test_the_door_on_a_one_hot_row_is_a_row_of_the_matrix() -> None:
    row = np.zeros((1, 64), np.float32)
    row[0, 3] = 8
    signs = [1 - 2 * (bin(i & 3).count("1") % 2) for i in range(64)]
    assert naive.door(row)[0].tolist() == signs

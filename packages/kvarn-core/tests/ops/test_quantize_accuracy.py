"""The published error tables of both recipes, on synthetic tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from kvarn_core.layout import HEAD_DIMS, RecordLayout
from kvarn_core.ops.quantize import dequantize, quantize
from kvarn_core.ops.quantize.reference import normalise_relative, raise_factors
from kvarn_core.rotation import to_fp16
from kvarn_core.spec import PRESETS, Recipe
from kvarn_core.testing.compare import assert_same_bits, relative_error
from kvarn_core.testing.inputs import gaussian, repeated_tiles, spread_tiles

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT = RecordLayout(PRESETS["kvarn_k4v2_g128"], 128)
TWO_BIT = RecordLayout(PRESETS["kvarn_k2v2_g128"], 128)
LEAST_SQUARES_ONLY = replace(Recipe.KVARN, restore_norm=False)
MIN_MAX = replace(Recipe.KVARN, range_refits=0, factor_refits=0, restore_norm=False)
NO_FACTOR_REFITS = replace(Recipe.KVARN, factor_refits=0)

# magnitude: relative squared error of paper, kvarn with min/max range, with least squares, kvarn
VALUE_ERRORS = {
    10: (0.249, 0.249, 0.108, 0.110),
    1: (0.245, 0.247, 0.108, 0.110),
    0.5: (0.263, 0.249, 0.108, 0.110),
    0.3: (0.318, 0.249, 0.108, 0.110),
    0.1: (0.418, 0.249, 0.108, 0.110),
    0.001: (0.418, 0.247, 0.108, 0.110),
}
KEY_ERRORS = {
    10: (0.00977, 0.00960),
    1: (0.00973, 0.00960),
    0.5: (0.01023, 0.00960),
    0.3: (0.01299, 0.00960),
    0.1: (0.01372, 0.00961),
    0.001: (0.01372, 0.00960),
}


def _squared_errors(tiles: torch.Tensor, decoded: torch.Tensor) -> float:
    return float(((tiles - decoded).square().sum((1, 2)) / tiles.square().sum((1, 2))).mean())


@pytest.mark.parametrize("magnitude", list(VALUE_ERRORS))
def test_error_of_two_bit_values(magnitude: float) -> None:
    tiles = magnitude * spread_tiles(12, 128, 128, row_spread=0.5, col_spread=0.4, seed=0)
    stored = to_fp16(tiles)
    recipes = (Recipe.PAPER, MIN_MAX, LEAST_SQUARES_ONLY, Recipe.KVARN)
    for recipe, want in zip(recipes, VALUE_ERRORS[magnitude], strict=True):
        _, decoded = dequantize(quantize(stored, stored, DEFAULT, recipe), DEFAULT)
        assert _squared_errors(tiles, decoded) == pytest.approx(want, rel=0.04), recipe


@pytest.mark.parametrize("magnitude", list(KEY_ERRORS))
def test_error_of_four_bit_keys(magnitude: float) -> None:
    tiles = magnitude * spread_tiles(12, 128, 128, row_spread=0.3, col_spread=0.15, seed=1)
    stored = to_fp16(tiles)
    for recipe, want in zip((Recipe.PAPER, Recipe.KVARN), KEY_ERRORS[magnitude], strict=True):
        decoded, _ = dequantize(quantize(stored, stored, DEFAULT, recipe), DEFAULT)
        assert _squared_errors(tiles, decoded) == pytest.approx(want, rel=0.04), recipe


def test_factors_fitted_to_the_codes_lose_less() -> None:
    tiles = spread_tiles(12, 128, 128, row_spread=0.5, col_spread=0.4, seed=0)
    stored = to_fp16(tiles)
    errors = []
    for recipe in (Recipe.KVARN, NO_FACTOR_REFITS):
        decoded = dequantize(quantize(stored, stored, DEFAULT, recipe), DEFAULT)
        errors.append([_squared_errors(tiles, half) for half in decoded])
    assert errors[0][0] < 0.985 * errors[1][0]
    assert errors[0][1] < 0.96 * errors[1][1]


@pytest.mark.parametrize("exponent", range(-7, 4))
def test_the_error_does_not_depend_on_the_scale(exponent: int) -> None:
    key = spread_tiles(8, 128, 128, row_spread=0.3, col_spread=0.15, seed=2) * 10.0**exponent
    value = spread_tiles(8, 128, 128, row_spread=0.5, col_spread=0.4, seed=3) * 10.0**exponent
    stored = to_fp16(key), to_fp16(value)
    decoded = dequantize(quantize(*stored, DEFAULT), DEFAULT)
    errors = [
        _squared_errors(tile.double(), got.double())
        for tile, got in zip(stored, decoded, strict=True)
    ]
    assert 0.0090 < errors[0] < 0.0102
    assert 0.105 < errors[1] < 0.119


def test_a_power_of_two_changes_nothing_but_the_scale() -> None:
    tile = to_fp16(spread_tiles(1, 128, 128, row_spread=0.4, col_spread=0.3, seed=4))
    tile = torch.where(tile.abs() < 2.0**-12, 0, tile)
    for layout in (DEFAULT, TWO_BIT):
        plain = dequantize(quantize(tile, tile, layout), layout)
        scaled = dequantize(quantize(tile * 64, tile * 64, layout), layout)
        for one, other in zip(plain, scaled, strict=True):
            assert_same_bits(64 * one, other)


# what happens to one token: bound on the squared error of the *other* tokens (paper, kvarn)
def _constant_token(tile: torch.Tensor) -> None:
    tile[5] = 3.0


def _zero_token(tile: torch.Tensor) -> None:
    tile[5] = 0.0


def _huge_token(tile: torch.Tensor) -> None:
    tile[5] *= 1000


def _mostly_zero(tile: torch.Tensor) -> None:
    tile[40:] = 0.0


@pytest.mark.parametrize(
    ("change", "paper", "kvarn"),
    [
        pytest.param(_constant_token, 0.0156, 0.0097, id="one-token-constant-over-channels"),
        pytest.param(_zero_token, 0.0097, 0.0098, id="one-zero-token"),
        pytest.param(_huge_token, 0.0098, 0.0097, id="one-token-times-1000"),
        pytest.param(_mostly_zero, 0.0104, 0.0067, id="88-of-128-tokens-zero"),
    ],
)
def test_one_odd_token_does_not_disturb_the_others(
    change: Callable[[torch.Tensor], None], paper: float, kvarn: float
) -> None:
    tiles = spread_tiles(12, 128, 128, row_spread=0.3, col_spread=0.15, seed=7)
    for tile in tiles:
        change(tile)
    stored = to_fp16(tiles)
    others = [token for token in range(128) if token != 5 or change is _mostly_zero]
    for recipe, want in ((Recipe.PAPER, paper), (Recipe.KVARN, kvarn)):
        decoded, _ = dequantize(quantize(stored, stored, DEFAULT, recipe), DEFAULT)
        error = _squared_errors(tiles[:, others], decoded[:, others])
        assert error == pytest.approx(want, rel=0.06), recipe


@pytest.mark.parametrize("preset", ["kvarn_k4v2_g128", "kvarn_k4v4_g128", "kvarn_k2v2_g64"])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_a_token_unlike_all_others_keeps_its_value(preset: str, dim: int) -> None:
    layout = RecordLayout(PRESETS[preset], dim)
    tiles = repeated_tiles(layout.group, dim)
    _, decoded = dequantize(quantize(tiles, tiles, layout), layout)
    tiles = tiles.float()
    errors = (decoded - tiles).norm(dim=2) / tiles.norm(dim=2)
    assert errors.max() < 1
    assert errors.median() < 0.05, "repetition is cheap"


def test_factors_of_ordinary_values_are_not_raised() -> None:
    tiles = spread_tiles(12, 128, 128, row_spread=0.5, col_spread=0.4, seed=3)
    factors = normalise_relative(tiles, 4)
    assert_same_bits(raise_factors(factors), factors)


# size of a common vector, spread of the logits: squared error of attention, norm restored and not
ATTENTION_ERRORS = {
    (0, 0): (0.114, 0.106),
    (0, 3): (0.109, 0.107),
    (0.5, 0): (0.0011, 0.0058),
    (0.5, 1): (0.0017, 0.0064),
    (0.5, 3): (0.042, 0.044),
    (2, 0): (0.0011, 0.0011),
    (2, 3): (0.0092, 0.0094),
}


@pytest.mark.parametrize(("common", "beta"), list(ATTENTION_ERRORS))
def test_restored_norms_help_attention_over_many_tokens(common: float, beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    errors = torch.zeros(2)
    repeats = 3
    for _ in range(repeats):
        tiles = gaussian((16, 128, 128), generator) + common * gaussian((128,), generator)
        tiles *= (0.5 * gaussian((16, 128, 1), generator)).exp()
        tiles *= (0.4 * gaussian((128,), generator)).exp()
        weights = (beta * gaussian((8, 2048), generator)).softmax(-1)
        want = weights @ tiles.view(2048, 128)
        for i, recipe in enumerate((Recipe.KVARN, LEAST_SQUARES_ONLY)):
            stored = to_fp16(tiles)
            _, decoded = dequantize(quantize(stored, stored, DEFAULT, recipe), DEFAULT)
            errors[i] += relative_error(weights @ decoded.reshape(2048, 128), want) ** 2 / repeats
    for got, expected in zip(errors.tolist(), ATTENTION_ERRORS[common, beta], strict=True):
        assert got == pytest.approx(expected, rel=0.35)
    if (common, beta) == (0.5, 0):
        assert errors[0] < errors[1] / 3, "the one case where least squares alone is bad"

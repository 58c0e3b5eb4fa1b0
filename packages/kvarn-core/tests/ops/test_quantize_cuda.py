"""The CUDA encoder on a GPU: the records of the reference, and the same ones every time."""

from __future__ import annotations

import pytest
import torch

from kvarn_core import nvrtc
from kvarn_core.layout import HEAD_DIMS, RecordLayout
from kvarn_core.ops.quantize import dequantize, quantize
from kvarn_core.spec import PRESETS, Recipe
from kvarn_core.testing.compare import assert_same_bits
from kvarn_core.testing.inputs import repeated_tiles, spread_tiles
from kvarn_core.testing.records import assert_equivalent_records

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != nvrtc.CAPABILITY,
        reason="needs a GPU of compute capability 9.0",
    ),
]


def _records(
    key: torch.Tensor, value: torch.Tensor, layout: RecordLayout, recipe: Recipe
) -> torch.Tensor:
    return quantize(key.cuda(), value.cuda(), layout, recipe, engine="cuda")


def _tiles(layout: RecordLayout, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (count, layout.group, layout.head_dim)
    key, value = (
        spread_tiles(*shape, row_spread=0.5, col_spread=0.4, seed=seed).half() for seed in (1, 2)
    )
    return key, value


@pytest.mark.parametrize("recipe", [Recipe.KVARN, Recipe.PAPER], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_records_are_those_of_the_reference(preset: str, dim: int, recipe: Recipe) -> None:
    layout = RecordLayout(PRESETS[preset], dim)
    key, value = _tiles(layout, 8)
    want = quantize(key, value, layout, recipe, engine="reference")
    got = _records(key, value, layout, recipe)
    assert_equivalent_records(got, want, key, value, layout, recipe)


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_repeated_tokens_are_stored_as_well_as_by_the_reference(preset: str, dim: int) -> None:
    """Not as the same bytes: passes of the normalisation are equally good there, up to rounding."""
    layout = RecordLayout(PRESETS[preset], dim)
    tiles = repeated_tiles(layout.group, dim)
    want = quantize(tiles, tiles, layout, engine="reference")
    got = _records(tiles, tiles, layout, Recipe.KVARN).cpu()
    tiles = tiles.float()
    norm = tiles.norm(dim=2)
    lost = 2.0**-22 * norm.square().sum(1)  # where only the rounding of fp16 is left
    for mine, theirs in zip(dequantize(got, layout), dequantize(want, layout), strict=True):
        errors, expected = ((x - tiles).norm(dim=2) for x in (mine, theirs))
        assert (errors.square().sum(1) <= 1.25 * expected.square().sum(1) + lost).all()
    assert (errors / norm).max() < 1.1  # of a value


def test_a_thousand_runs_give_one_result() -> None:
    layout = RecordLayout(PRESETS["kvarn_k4v2_g128"], 128)
    key, value = _tiles(layout, 300)
    first = _records(key, value, layout, Recipe.KVARN)
    for _ in range(999):
        assert_same_bits(_records(key, value, layout, Recipe.KVARN), first)

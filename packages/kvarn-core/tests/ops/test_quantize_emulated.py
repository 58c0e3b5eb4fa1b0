"""The CUDA source of the encoder, run by the emulator, against the reference."""

from __future__ import annotations

import pytest
import torch
from emulator.build import EmulatedKernel

from kvarn_core.layout import RecordLayout, k_order
from kvarn_core.ops.quantize import cuda, dequantize, quantize
from kvarn_core.rotation import exact_rows
from kvarn_core.spec import PRESETS, Recipe
from kvarn_core.testing.compare import assert_same_bits
from kvarn_core.testing.inputs import DISTRIBUTIONS, draw, gaussian, repeated_tiles, uneven_tiles
from kvarn_core.testing.records import assert_equivalent_records

pytest.importorskip("ziglang", reason="builds C++ for the CPU; the package ziglang is missing")
pytestmark = pytest.mark.emulate

SMALL = RecordLayout(PRESETS["kvarn_k4v2_g64"], 64)
TWO_BIT = RecordLayout(PRESETS["kvarn_k2v2_g64"], 64)
each_recipe = pytest.mark.parametrize(
    "recipe", [Recipe.KVARN, Recipe.PAPER], ids=lambda recipe: recipe.name
)


@pytest.fixture(autouse=True)
def seed(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Runs the launcher on the CPU; the order of threads and CTAs follows the seed."""
    order = {"seed": 0}

    def kernel(layout: RecordLayout, recipe: Recipe, device: torch.device) -> EmulatedKernel:
        return EmulatedKernel(cuda.variant(layout, recipe), seed=order["seed"])

    monkeypatch.setattr(cuda, "_kernel", kernel)
    return order


def _records(
    key: torch.Tensor, value: torch.Tensor, layout: RecordLayout, recipe: Recipe = Recipe.KVARN
) -> torch.Tensor:
    halves = cuda.encode_key(key, layout, recipe), cuda.encode_value(value, layout, recipe)
    return torch.cat(halves, dim=1)


def _check(
    key: torch.Tensor, value: torch.Tensor, layout: RecordLayout, recipe: Recipe = Recipe.KVARN
) -> None:
    want = quantize(key, value, layout, recipe, engine="reference")
    assert_equivalent_records(
        _records(key, value, layout, recipe), want, key, value, layout, recipe
    )


# what differs in kind; test_store_kernels.py has more, a GPU every preset and head dimension
@pytest.mark.parametrize(
    ("preset", "dim", "recipe"),
    [
        pytest.param(name, dim, recipe, id=f"{name[6:]}-d{dim}-{recipe.name}")
        for name, dim, recipe in (
            ("kvarn_k4v2_g64", 64, Recipe.KVARN),
            ("kvarn_k4v2_g64", 64, Recipe.PAPER),
            ("kvarn_k2v2_g64", 64, Recipe.KVARN),
            ("kvarn_k2v2_g64", 64, Recipe.PAPER),
            ("kvarn_k4v4_g64", 256, Recipe.PAPER),
            ("kvarn_k4v2_g64", 128, Recipe.KVARN),
            ("kvarn_k2v2_g128", 64, Recipe.KVARN),
            ("kvarn_k4v2_g128", 128, Recipe.KVARN),
            ("kvarn_k2v2_g128", 128, Recipe.PAPER),
            ("kvarn_k4v4_g128", 128, Recipe.KVARN),
            ("kvarn_k2v2_g128", 256, Recipe.KVARN),
            ("kvarn_k4v2_g64", 256, Recipe.KVARN),
        )
    ],
)
def test_records_are_those_of_the_reference(preset: str, dim: int, recipe: Recipe) -> None:
    layout = RecordLayout(PRESETS[preset], dim)
    _check(*uneven_tiles(layout, 2), layout, recipe)


@pytest.mark.parametrize("layout", [SMALL, TWO_BIT], ids=lambda layout: layout.preset.name[6:])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_hostile_tiles_are_those_of_the_reference(name: str, layout: RecordLayout) -> None:
    shape = (2, layout.group, layout.head_dim)
    key, value = (exact_rows(draw(name, shape, seed=seed), layout) for seed in (1, 2))
    _check(key, value, layout)


@pytest.mark.parametrize("layout", [SMALL, TWO_BIT], ids=lambda layout: layout.preset.name[6:])
def test_repeated_tokens_are_those_of_the_reference(layout: RecordLayout) -> None:
    tiles = repeated_tiles(layout.group, layout.head_dim)
    _check(tiles, tiles, layout)


@pytest.mark.parametrize("scale", [1e-7, 1e-4, 1e-2, 1e3])
def test_magnitudes_are_those_of_the_reference(scale: float) -> None:
    key, value = (scale * tiles.float() for tiles in uneven_tiles(SMALL, 2))
    _check(key.half(), value.half(), SMALL)


def test_a_row_or_column_of_zeros_is_that_of_the_reference() -> None:
    key, value = uneven_tiles(SMALL, 4)
    for tiles in (key, value):
        tiles[0, 5] = 0
        tiles[1, :, 5] = 0
        tiles[2] = 0
        tiles[2, 3, 7] = 1
        tiles[3, 40:] = 0
    _check(key, value, SMALL)


def test_a_row_too_narrow_for_a_scale_is_its_middle() -> None:
    key, value = torch.zeros(2, 1, 64, 64, dtype=torch.float16)
    key[0, :, 3] = 2000 * gaussian((64,), torch.Generator().manual_seed(0))
    key[0, ::2, 5] = 1e-5  # its scale is less than half the smallest number of fp16
    want = quantize(key, value, SMALL, engine="reference")
    stored = []
    for records in (want, _records(key, value, SMALL)):
        fields = [SMALL.fields[name] for name in ("k_scale", "k_zero")]
        parts = [records[0, f.offset : f.end].view(torch.float16) for f in fields]
        stored.append([float(part[k_order(5)]) for part in parts])
    assert stored[0] == stored[1] == [0, 3 * 2.0**-24]


@each_recipe
def test_zero_and_constant_tiles_decode_exactly(recipe: Recipe) -> None:
    key, value = (torch.zeros(2, 64, 64, dtype=torch.float16) for _ in range(2))
    key[1] = torch.arange(64) - 20  # every channel constant over the tokens
    value[1] = 1.25  # every token constant over the channels
    records = _records(key, value, TWO_BIT, recipe)
    for got, want in zip(dequantize(records, TWO_BIT), (key, value), strict=True):
        assert torch.equal(got[0], want[0].float())
        assert torch.allclose(got[1], want[1].float(), rtol=2e-3, atol=0)


def test_neither_neighbours_nor_the_order_of_threads_matter(seed: dict[str, int]) -> None:
    key, value = uneven_tiles(SMALL, 3)
    first = _records(key, value, SMALL)
    for seed["seed"] in (1, 2, 3):
        assert_same_bits(_records(key[1:2], value[1:2], SMALL), first[1:2])


def test_strides_and_no_tiles() -> None:
    key, value = uneven_tiles(SMALL, 2)
    strided = torch.stack((key, value), dim=2)  # [N, G, 2, D]
    whole = _records(key, value, SMALL)
    assert_same_bits(_records(strided[:, :, 0], strided[:, :, 1], SMALL), whole)
    assert _records(key[:0], value[:0], SMALL).shape == whole[:0].shape

"""The Triton encoder writes the records of the reference, up to the order of sums."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from kvarn_core.layout import HEAD_DIMS, RecordLayout
from kvarn_core.layout import k_order as expected_k_order
from kvarn_core.layout import m_order as expected_m_order
from kvarn_core.ops.quantize import dequantize, quantize, quantize_key, quantize_value, reference
from kvarn_core.ops.quantize.triton import GAUSSIAN_STEP, _round, k_order, m_order
from kvarn_core.rotation import exact_rows
from kvarn_core.spec import PRESETS, Recipe
from kvarn_core.testing.compare import assert_same_bits
from kvarn_core.testing.inputs import DISTRIBUTIONS, draw, repeated_tiles, uneven_tiles
from kvarn_core.testing.records import assert_equivalent_records

pytestmark = pytest.mark.kernel

SMALL = RecordLayout(PRESETS["kvarn_k4v2_g64"], 64)
TWO_BIT = RecordLayout(PRESETS["kvarn_k2v2_g64"], 64)
SHAPES = [
    pytest.param(name, dim, recipe, id=f"{name[6:]}-d{dim}-{recipe.name}")
    for name, dim, recipe in (
        ("kvarn_k4v2_g64", 64, Recipe.KVARN),
        ("kvarn_k4v2_g64", 64, Recipe.PAPER),
        ("kvarn_k4v4_g64", 64, Recipe.KVARN),
        ("kvarn_k2v2_g64", 64, Recipe.KVARN),
        ("kvarn_k2v2_g64", 64, Recipe.PAPER),
        ("kvarn_k4v2_g128", 64, Recipe.KVARN),
        ("kvarn_k2v2_g128", 64, Recipe.KVARN),
        ("kvarn_k4v2_g64", 128, Recipe.KVARN),
        ("kvarn_k4v2_g128", 128, Recipe.KVARN),
        ("kvarn_k4v4_g128", 128, Recipe.PAPER),
        ("kvarn_k2v2_g64", 256, Recipe.KVARN),
    )
]


def _check(
    key: torch.Tensor,
    value: torch.Tensor,
    layout: RecordLayout,
    recipe: Recipe,
    device: torch.device,
) -> None:
    got = quantize(key.to(device), value.to(device), layout, recipe, engine="triton")
    want = quantize(key, value, layout, recipe, engine="reference")
    assert_equivalent_records(got, want, key, value, layout, recipe)


@pytest.mark.parametrize(("preset", "dim", "recipe"), SHAPES)
def test_records_are_those_of_the_reference(
    preset: str, dim: int, recipe: Recipe, kernel_device: torch.device
) -> None:
    layout = RecordLayout(PRESETS[preset], dim)
    _check(*uneven_tiles(layout, 2), layout, recipe, kernel_device)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [Recipe.KVARN, Recipe.PAPER], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_many_records_are_those_of_the_reference(preset: str, dim: int, recipe: Recipe) -> None:
    layout = RecordLayout(PRESETS[preset], dim)
    _check(*uneven_tiles(layout, 8, seed=1), layout, recipe, torch.device("cuda"))


@pytest.mark.parametrize("layout", [SMALL, TWO_BIT], ids=lambda layout: layout.preset.name[6:])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_hostile_tiles_are_those_of_the_reference(
    name: str, layout: RecordLayout, kernel_device: torch.device
) -> None:
    shape = (2, layout.group, layout.head_dim)
    key, value = (exact_rows(draw(name, shape, seed=seed), layout) for seed in (1, 2))
    _check(key, value, layout, Recipe.KVARN, kernel_device)


@pytest.mark.parametrize("layout", [SMALL, TWO_BIT], ids=lambda layout: layout.preset.name[6:])
def test_repeated_tokens_are_those_of_the_reference(
    layout: RecordLayout, kernel_device: torch.device
) -> None:
    tiles = repeated_tiles(layout.group, layout.head_dim)
    _check(tiles, tiles, layout, Recipe.KVARN, kernel_device)


def test_a_row_or_column_of_zeros_is_that_of_the_reference(kernel_device: torch.device) -> None:
    key, value = uneven_tiles(SMALL, 4)
    for tiles in (key, value):
        tiles[0, 5] = 0
        tiles[1, :, 5] = 0
        tiles[2] = 0
        tiles[2, 3, 7] = 1
        tiles[3, 40:] = 0
    _check(key, value, SMALL, Recipe.KVARN, kernel_device)


@pytest.mark.parametrize("recipe", [Recipe.KVARN, Recipe.PAPER], ids=lambda recipe: recipe.name)
def test_zero_and_constant_tiles_decode_exactly(
    recipe: Recipe, kernel_device: torch.device
) -> None:
    key, value = (torch.zeros(2, 64, 64, dtype=torch.float16) for _ in range(2))
    key[1] = torch.arange(64) - 20  # every channel constant over the tokens
    value[1] = 1.25  # every token constant over the channels
    records = quantize(
        key.to(kernel_device), value.to(kernel_device), TWO_BIT, recipe, engine="triton"
    )
    for got, want in zip(dequantize(records.cpu(), TWO_BIT), (key, value), strict=True):
        assert torch.equal(got[0], want[0].float())
        assert torch.allclose(got[1], want[1].float(), rtol=2e-3, atol=0)


def test_magnitude_does_not_matter(kernel_device: torch.device) -> None:
    key, value = uneven_tiles(SMALL, 1)
    records = [
        quantize(
            (key * scale).to(kernel_device), (value * scale).to(kernel_device), SMALL,
            engine="triton",
        )
        for scale in (1.0, 2.0**-6, 2.0**6)
    ]  # fmt: skip
    for name in ("k_codes", "k_scale", "k_zero", "v_codes", "v_scale", "v_zero"):
        field = SMALL.fields[name]
        for other in records[1:]:
            assert_same_bits(
                other[:, field.offset : field.end], records[0][:, field.offset : field.end]
            )


def test_a_record_depends_on_its_own_tile_only(kernel_device: torch.device) -> None:
    key, value = (tiles.to(kernel_device) for tiles in uneven_tiles(SMALL, 3))
    together = quantize(key, value, SMALL, engine="triton")
    key[0], value[2] = 60000, 0
    alone = quantize(key[1:2], value[1:2], SMALL, engine="triton")
    assert_same_bits(alone, together[1:2])
    assert_same_bits(quantize(key, value, SMALL, engine="triton")[1:2], alone)


def test_halves_strides_and_no_tiles(kernel_device: torch.device) -> None:
    key, value = (tiles.to(kernel_device) for tiles in uneven_tiles(SMALL, 2))
    whole = quantize(key, value, SMALL, engine="triton")
    cut = SMALL.key_bytes
    strided = torch.stack((key, value), dim=2)  # [N, G, 2, D]
    for got, want in (
        (quantize_key(strided[:, :, 0], SMALL, engine="triton"), whole[:, :cut]),
        (quantize_value(strided[:, :, 1], SMALL, engine="triton"), whole[:, cut:]),
        (quantize(key[:0], value[:0], SMALL, engine="triton"), whole[:0]),
    ):
        assert_same_bits(got, want)


@pytest.mark.gpu
def test_a_thousand_runs_give_one_result() -> None:
    layout = RecordLayout(PRESETS["kvarn_k4v2_g128"], 128)
    key, value = (tiles.cuda() for tiles in uneven_tiles(layout, 300))
    first = quantize(key, value, layout, engine="triton")
    for _ in range(999):
        assert_same_bits(quantize(key, value, layout, engine="triton"), first)


# --- parts ----------------------------------------------------------------------------------------


@triton.jit
def _orders(p_k, p_m):  # type: ignore[no-untyped-def]
    o = tl.arange(0, 256)
    tl.store(p_k + o, k_order(o))
    tl.store(p_m + o, m_order(o))


def test_vectors_are_stored_in_the_orders_of_the_layout(kernel_device: torch.device) -> None:
    k, m = (torch.empty(256, dtype=torch.int32, device=kernel_device) for _ in range(2))
    _orders[(1,)](k, m)
    assert k.tolist() == [expected_k_order(i) for i in range(256)]
    assert m.tolist() == [expected_m_order(i) for i in range(256)]


@triton.jit
def _codes(p_y, p_codes):  # type: ignore[no-untyped-def]
    o = tl.arange(0, 64)
    rows = tl.zeros([1], tl.float32)
    codes = _round(tl.load(p_y + o)[None, :], rows + 0.5, rows - 1.0, 4)
    tl.store(p_codes + o[None, :], codes)


def test_codes_are_rounded_half_to_even_and_clamped(kernel_device: torch.device) -> None:
    y = torch.arange(64, device=kernel_device) / 4 - 4  # steps of half a code, from below 0
    codes = torch.empty_like(y)
    _codes[(1,)](y, codes)
    assert codes.tolist() == ((y + 1) / 0.5).round().clamp(0, 15).tolist()


def test_the_gaussian_step_is_that_of_the_reference() -> None:
    assert GAUSSIAN_STEP.value == reference.GAUSSIAN_STEP

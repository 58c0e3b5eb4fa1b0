from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from kvarn_core.layout import HEAD_DIMS, RecordLayout
from kvarn_core.ops.quantize import dequantize, quantize, quantize_key
from kvarn_core.ops.quantize.reference import normalise_relative, pack_codes, unpack_codes
from kvarn_core.rotation import FP16_MAX, exact_rows, to_fp16
from kvarn_core.spec import DEBUG_PRESETS, PRESETS, Recipe
from kvarn_core.testing import naive
from kvarn_core.testing.compare import assert_close, assert_same_bits, relative_error
from kvarn_core.testing.inputs import (
    DISTRIBUTIONS,
    draw,
    fixed_tile,
    gaussian,
    repeated_tiles,
    spread_tiles,
)
from kvarn_core.testing.records import assert_equivalent_records, sizes

Array = np.ndarray[Any, Any]
GOLDEN = Path(__file__).parent.parent / "golden"
DEFAULT = RecordLayout(PRESETS["kvarn_k4v2_g128"], 128)
TWO_BIT = RecordLayout(PRESETS["kvarn_k2v2_g128"], 128)
RECIPES = (Recipe.KVARN, Recipe.PAPER)
LAYOUTS = [
    pytest.param(RecordLayout(preset, dim), id=f"{name.removeprefix('kvarn_')}-d{dim}")
    for name, preset in PRESETS.items()
    for dim in HEAD_DIMS
]
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


def _coded(
    key: torch.Tensor, value: torch.Tensor, layout: RecordLayout, recipe: Recipe = Recipe.KVARN
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles [G, D] through a record and back."""
    record = quantize(to_fp16(key)[None], to_fp16(value)[None], layout, recipe)
    decoded_key, decoded_value = dequantize(record, layout)
    return decoded_key[0], decoded_value[0]


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("rows", "cols"), [(64, 64), (64, 256), (128, 128), (256, 64), (256, 128)])
def test_every_code_survives_at_every_place(rows: int, cols: int, bits: int) -> None:
    base = torch.arange(rows * cols).view(rows, cols)
    codes = torch.stack([(base + shift) % 2**bits for shift in range(2**bits)]).to(torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (2**bits, rows * cols * bits // 8)
    assert_same_bits(unpack_codes(packed, rows, cols, bits), codes)
    for one, stream in zip(codes, packed, strict=True):
        assert (naive.unpack(stream.numpy(), rows, cols, bits) == one.numpy()).all()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("rows", "cols"), [(64, 128), (128, 64), (256, 128)])
def test_packing_agrees_with_packing_bit_by_bit(rows: int, cols: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, cols), generator=generator, dtype=torch.uint8)
    want = naive.pack(codes.long().numpy(), bits)
    assert_same_bits(pack_codes(codes[None], bits)[0], torch.from_numpy(want))


@each_layout
def test_any_bytes_decode_like_the_naive_decoder_bit_for_bit(layout: RecordLayout) -> None:
    generator = torch.Generator().manual_seed(3)
    record = torch.randint(0, 256, (1, layout.record_bytes), generator=generator, dtype=torch.uint8)
    for name in set(layout.fields) - {"k_codes", "v_codes"}:  # finite vectors, random codes
        field = layout.fields[name]
        vector = to_fp16(torch.randn(field.nbytes // 2, generator=generator))
        record[0, field.offset : field.end] = vector.view(torch.uint8)
    got = dequantize(record, layout)
    want = naive.decode(record[0].numpy(), **sizes(layout))
    for mine, theirs in zip(got, want, strict=True):
        assert_same_bits(mine[0], torch.from_numpy(np.ascontiguousarray(theirs)))
    for mine, theirs in zip(dequantize(record, layout, torch.float16), want, strict=True):
        assert_same_bits(mine[0], torch.from_numpy(naive.to_fp16(theirs)))
    for mine, theirs in zip(dequantize(record, layout, torch.bfloat16), got, strict=True):
        assert_same_bits(mine, theirs.bfloat16())


@each_layout
@each_recipe
def test_golden_records(layout: RecordLayout, recipe: Recipe) -> None:
    path, case = GOLDEN / f"{layout.preset.name}.safetensors", f"d{layout.head_dim}-{recipe.name}"
    with safe_open(path, "pt") as golden:
        record, digest = golden.get_tensor(case), golden.metadata()[case]
    decoded = dequantize(record[None], layout)
    assert hashlib.sha256(torch.cat(decoded).numpy().tobytes()).hexdigest() == digest
    tiles = [
        fixed_tile(layout.group, layout.head_dim, seed=layout.head_dim + i)[None] for i in (0, 1)
    ]
    encoded = quantize(*tiles, layout, recipe)
    assert_equivalent_records(encoded, record[None], *tiles, layout, recipe)


# --- two encoders ---------------------------------------------------------------------------------


@each_layout
@each_recipe
def test_a_naive_encoder_agrees(layout: RecordLayout, recipe: Recipe) -> None:
    group, dim = layout.group, layout.head_dim
    key = spread_tiles(1, group, dim, row_spread=0.3, col_spread=0.15, seed=dim)[0]
    key += 3 * gaussian((1, dim), torch.Generator().manual_seed(group))  # channel means
    value = 0.2 * spread_tiles(1, group, dim, row_spread=0.5, col_spread=0.4, seed=group)[0]
    tiles = [to_fp16(key)[None], to_fp16(value)[None]]
    want = naive.encode(
        tiles[0][0].numpy(), tiles[1][0].numpy(), key_bits=layout.preset.key_bits,
        value_bits=layout.preset.value_bits, recipe=recipe.name,
    )  # fmt: skip
    got = quantize(*tiles, layout, recipe)
    assert_equivalent_records(got, torch.from_numpy(want)[None], *tiles, layout, recipe)


@pytest.mark.parametrize("layout", [DEFAULT, TWO_BIT], ids=["k4v2", "k2v2"])
def test_a_naive_encoder_agrees_on_repeated_tokens(layout: RecordLayout) -> None:
    tiles = repeated_tiles(128, 128)
    got = quantize(tiles, tiles, layout)
    want = [
        naive.encode(
            tile.numpy(), tile.numpy(), key_bits=layout.preset.key_bits,
            value_bits=layout.preset.value_bits, recipe="kvarn",
        )
        for tile in tiles
    ]  # fmt: skip
    assert_equivalent_records(got, torch.from_numpy(np.stack(want)), tiles, tiles, layout)


def test_the_best_pass_is_kept_on_a_tile_that_gets_worse() -> None:
    generator = torch.Generator().manual_seed(6)
    tile = gaussian((128, 128), generator) + 30 * gaussian((128, 1), generator)
    tile[:, 3] += 300
    tile = to_fp16(tile).float()
    best = torch.from_numpy(naive.factors_kvarn(tile.numpy()))
    last = torch.from_numpy(naive.factors_kvarn(tile.numpy(), keep_best=False))
    assert relative_error(last, best) > 0.5, "the tile must tell the two apart"
    assert_close(normalise_relative(tile[None], 4)[0], best, tolerance=1e-5)


@each_recipe
def test_a_record_depends_on_its_own_tile_only(recipe: Recipe) -> None:
    tiles = spread_tiles(66, 128, 128, row_spread=0.4, col_spread=0.4, seed=5)
    key, value = to_fp16(tiles[:33]), to_fp16(tiles[33:])
    alone = torch.cat(
        [quantize(key[i : i + 1], value[i : i + 1], TWO_BIT, recipe) for i in range(33)]
    )
    for size in (2, 5, 33):
        assert_same_bits(quantize(key[:size], value[:size], TWO_BIT, recipe), alone[:size])
    order = torch.randperm(33, generator=torch.Generator().manual_seed(1))
    assert_same_bits(quantize(key[order], value[order], TWO_BIT, recipe), alone[order])
    heads_inside = (
        key.transpose(0, 1).contiguous().transpose(0, 1)
    )  # rows of a cache: [G, heads, D]
    assert_same_bits(quantize_key(heads_inside, TWO_BIT, recipe), alone[:, : TWO_BIT.key_bytes])


# --- input policy ---------------------------------------------------------------------------------


@each_layout
@each_recipe
def test_a_zero_tile_has_unit_factors_and_decodes_to_zero(
    layout: RecordLayout, recipe: Recipe
) -> None:
    zero = torch.zeros(1, layout.group, layout.head_dim, dtype=torch.float16)
    record = quantize(zero, zero, layout, recipe)
    for name, field in layout.fields.items():
        part = record[0, field.offset : field.end]
        if name in ("k_token_scale", "v_channel_scale"):
            assert (part.clone().view(torch.float16) == 1).all(), name
        else:
            assert not part.any(), name
    assert not any(decoded.any() for decoded in dequantize(record, layout))


def test_a_zero_token_among_others() -> None:
    tile = to_fp16(spread_tiles(1, 128, 128, row_spread=0.3, col_spread=0.3, seed=8)[0])
    tile[9] = 0
    key, value = _coded(tile, tile, DEFAULT)
    assert not value[9].any()
    assert key[9].abs().max() < 3e-4


@each_recipe
def test_equal_tokens_keep_their_keys(recipe: Recipe) -> None:
    tile = gaussian((1, 128), torch.Generator().manual_seed(9)).expand(128, 128)
    key, _ = _coded(tile, tile, DEFAULT, recipe)
    assert_close(key, tile, tolerance=1e-3)  # a row is constant, so only fp16 rounding is left


def test_a_constant_row_is_exact_when_its_factors_are_equal() -> None:
    signs = gaussian((128, 128), torch.Generator().manual_seed(10)).sign()
    key, value = signs.clone(), signs.clone()
    key[:, 3] = 1  # a channel constant over tokens
    value[3] = 1  # a token constant over channels
    decoded_key, decoded_value = _coded(key, value, DEFAULT)
    assert_close(decoded_key[:, 3], key[:, 3], tolerance=1e-3)
    assert_close(decoded_value[3], value[3], tolerance=1e-3)


@each_recipe
@pytest.mark.parametrize("layout", [DEFAULT, TWO_BIT], ids=["k4v2", "k2v2"])
@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
def test_records_of_hostile_inputs_are_finite(
    name: str, layout: RecordLayout, recipe: Recipe
) -> None:
    rows = exact_rows(draw(name, (128, 128), seed=11), layout)
    record = quantize(rows[None], rows[None], layout, recipe)
    for field_name, field in layout.fields.items():
        if not field_name.endswith("codes"):
            vector = record[0, field.offset : field.end].clone().view(torch.float16)
            assert vector.isfinite().all(), field_name
    for decoded in dequantize(record, layout):
        assert decoded.isfinite().all()
        assert decoded.abs().max() <= 4 * FP16_MAX


def test_extreme_tiles() -> None:
    one = torch.zeros(128, 128)
    one[5, 7] = FP16_MAX
    smallest = torch.zeros(128, 128)
    smallest[5, 7] = 2.0**-24
    signs = FP16_MAX * gaussian((128, 128), torch.Generator().manual_seed(12)).sign()
    full = torch.full((128, 128), FP16_MAX)
    for tile, tolerance in ((one, 2e-3), (smallest, 1e-2), (signs, 2e-3), (full, 1e-3)):
        for decoded in _coded(tile, tile, DEFAULT):
            assert_close(decoded, tile, tolerance=tolerance)


# --- debug preset and refusals --------------------------------------------------------------------


@pytest.mark.parametrize("name", list(DEBUG_PRESETS))
def test_the_debug_preset_returns_its_input(name: str) -> None:
    layout = RecordLayout(DEBUG_PRESETS[name], 64)
    key, value = gaussian((2, 3, layout.group, 64), torch.Generator().manual_seed(13)).unbind(0)
    for got, want in zip(
        dequantize(quantize(key, value, layout), layout), (key, value), strict=True
    ):
        assert_same_bits(got, want)


def test_wrong_arguments_are_named() -> None:
    tile = torch.zeros(1, 128, 128, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"^key has dtype torch.float32 and shape \(1, 128, 128\)"):
        quantize(tile.float(), tile, DEFAULT)
    with pytest.raises(
        ValueError, match=r"^value has dtype torch.float16 and shape \(1, 64, 128\)"
    ):
        quantize(tile, tile[:, :64], DEFAULT)
    with pytest.raises(ValueError, match=r"Pass uint8 \[N, 13824\] for kvarn_k4v2_g128\.$"):
        dequantize(torch.zeros(1, 13825, dtype=torch.uint8), DEFAULT)

from __future__ import annotations

import pytest
import torch

from kvarn_core import PRESETS
from kvarn_core.rotation import rotate
from kvarn_eval.baselines import METHODS, round_to_grid

PRESET = PRESETS["kvarn_k4v2_g128"]


def tiles(outliers: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 4, 128, 128, generator=generator)
    if outliers:
        key[:, :, 7] *= 30
        value[:, :, 9] *= 30
    return key, value


def error(read: torch.Tensor, true: torch.Tensor) -> float:
    return float((read - true).square().mean() / true.square().mean())


def test_the_grid_holds_its_ends_and_no_more_levels_than_bits() -> None:
    x = torch.randn(3, 64)
    read = round_to_grid(x, 1, 2)
    assert all(len(row.unique()) <= 4 for row in read)
    assert torch.allclose(read.amin(1), x.amin(1), atol=2e-3)
    assert torch.allclose(read.amax(1), x.amax(1), atol=4e-3)


def test_a_constant_row_is_kept() -> None:
    x = torch.full((2, 8), 1.5)
    assert torch.equal(round_to_grid(x, 1, 4), x)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.quantise])
def test_each_method_reads_back_what_its_bits_allow(name: str) -> None:
    key, value = tiles()
    quantise = METHODS[name].quantise
    assert quantise is not None
    read_key, read_value = quantise(key, value, PRESET)
    assert read_key.shape == key.shape
    assert 1e-4 < error(read_key, key) < 0.02  # 4 bits
    assert 0.02 < error(read_value, value) < 0.45  # 2 bits


@pytest.mark.parametrize("name", METHODS)
def test_exact_rows_are_fp16_rows(name: str) -> None:
    rows = tiles()[0][0]
    assert error(METHODS[name].exact(rows, PRESET), rows) < 1e-6


def test_the_methods_rank_as_known_under_channel_outliers() -> None:
    key, value = tiles(outliers=True)
    found = {}
    for name in ("rtn", "kivi", "hadamard", "paper", "kvarn"):
        quantise = METHODS[name].quantise
        assert quantise is not None
        read_key, read_value = quantise(key, value, PRESET)
        quiet = torch.arange(128) != 7
        found[name] = (
            error(read_key[..., quiet], key[..., quiet]),
            error(read_value, value),
        )
    assert found["rtn"][0] > 20 * found["kivi"][0]  # per token, one channel spoils all others
    assert found["rtn"][1] > 2 * found["kvarn"][1]
    assert found["kvarn"][1] < found["paper"][1]


def test_kvarn_does_not_depend_on_scale() -> None:
    spread = torch.linspace(-2, 2, 128).exp2()  # of channels where tiles are normalised
    key, value = (rotate(x * spread) for x in tiles())
    quantise = METHODS["kvarn"].quantise
    assert quantise is not None
    plain, tiny = quantise(key, value, PRESET), quantise(key / 32, value / 32, PRESET)
    for a, b, true in zip(plain, tiny, (key, value), strict=True):
        assert error(b * 32, true) == pytest.approx(error(a, true), rel=0.01)

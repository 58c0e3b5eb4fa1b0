from __future__ import annotations

import hashlib

import pytest
import torch

from kvarn_core.testing.compare import assert_same_bits
from kvarn_core.testing.inputs import DISTRIBUTIONS, draw, fixed_tile, spread_tiles


@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
def test_a_seed_decides_everything(name: str) -> None:
    assert_same_bits(draw(name, (40, 64), seed=3), draw(name, (40, 64), seed=3))
    assert draw(name, (40, 64), seed=3, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_hostile_distributions_are_hostile() -> None:
    assert draw("nan", (40, 64), seed=0).isnan().any()
    assert draw("inf", (40, 64), seed=0).isinf().any()
    assert (draw("saturating", (40, 64), seed=0).abs() == 65504).all()
    assert draw("denormal", (40, 64), seed=0).abs().max() < 2.0**-14  # below fp16's normal range
    assert draw("tiny_scale", (40, 64), seed=0).std() < 2e-3
    assert draw("constant", (4, 64), seed=0).unique().numel() == 1
    token, channel = (
        draw("outlier_token", (40, 64), seed=0),
        draw("outlier_channel", (40, 64), seed=0),
    )
    assert token.std(1).max() > 100 * token.std(1).median()
    assert channel.std(0).max() > 20 * channel.std(0).median()


def test_spreads_are_those_asked_for() -> None:
    tiles = spread_tiles(20, 256, 256, row_spread=0.5, col_spread=0.2, seed=1)
    assert tiles.square().mean(2).log().div(2).std(1).mean() == pytest.approx(0.5, rel=0.1)
    assert tiles.square().mean(1).log().div(2).std(1).mean() == pytest.approx(0.2, rel=0.2)


def test_fixed_tiles_never_change() -> None:
    tile = fixed_tile(64, 128, seed=1)
    digest = hashlib.sha256(tile.numpy().tobytes()).hexdigest()
    assert digest.startswith("c31f587fc2213d3f")
    assert not tile.equal(fixed_tile(64, 128, seed=2))
    assert 0.5 < tile.float().std() < 10

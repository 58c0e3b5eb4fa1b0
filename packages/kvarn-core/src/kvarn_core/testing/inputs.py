"""Named input distributions, from ordinary to hostile, all reproducible from a seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvarn_core.layout import RecordLayout

FP16_MAX = 65504.0


def gaussian(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Independent N(0, 1)."""
    return torch.randn(shape, generator=generator)


def _outlier_channel(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    x = gaussian(shape, generator)
    x[..., 3] *= 50
    return x


def _outlier_token(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    x = gaussian(shape, generator)
    x[5 % shape[0]] *= 1000
    return x


def _with(value: float) -> Callable[[tuple[int, ...], torch.Generator], torch.Tensor]:
    """Gaussian with about one element in a thousand, and always the first, set to `value`."""

    def draw(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        x = gaussian(shape, generator)
        x[torch.rand(shape, generator=generator) < 1e-3] = value
        x.view(-1)[0] = value
        return x

    return draw


DISTRIBUTIONS: dict[str, Callable[[tuple[int, ...], torch.Generator], torch.Tensor]] = {
    "gaussian": gaussian,
    "outlier_channel": _outlier_channel,
    "outlier_token": _outlier_token,
    "tiny_scale": lambda shape, generator: 1e-3 * gaussian(shape, generator),
    "zero": lambda shape, generator: torch.zeros(shape),
    "constant": lambda shape, generator: torch.full(shape, 1.5),
    "denormal": lambda shape, generator: 2.0**-20 * gaussian(shape, generator),
    "nan": _with(float("nan")),
    "inf": _with(float("inf")),
    "saturating": lambda shape, generator: FP16_MAX * gaussian(shape, generator).sign(),
}


def draw(
    name: str, shape: tuple[int, ...], *, seed: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Draw a tensor of a named distribution.

    Parameters
    ----------
    name : str
        A key of `DISTRIBUTIONS`.
    shape : tuple of int
        First dimension: tokens; last dimension: channels.
    seed : int
        Equal seeds give equal tensors.
    dtype : torch.dtype
        Result dtype; drawn in fp32.

    Returns
    -------
    Tensor `shape`, `dtype`
    """
    return DISTRIBUTIONS[name](shape, torch.Generator().manual_seed(seed)).to(dtype)


def spread_tiles(
    count: int, rows: int, cols: int, *, row_spread: float, col_spread: float, seed: int
) -> torch.Tensor:
    """Draw tiles whose rows and columns have lognormal magnitudes.

    Parameters
    ----------
    count, rows, cols : int
        Tiles and their shape.
    row_spread, col_spread : float
        Standard deviations of the natural logarithms of row and column magnitudes.
    seed : int
        Equal seeds give equal tiles.

    Returns
    -------
    Tensor [count, rows, cols], fp32
    """
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randn(count, rows, cols, generator=generator)
    tiles *= (row_spread * torch.randn(count, rows, 1, generator=generator)).exp()
    tiles *= (col_spread * torch.randn(count, 1, cols, generator=generator)).exp()
    return tiles


def uneven_tiles(
    layout: RecordLayout, count: int, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles of K and of V with uneven tokens and channels; keys have channel means as well.

    Parameters
    ----------
    layout : RecordLayout
        Gives G and D.
    count : int
        N.
    seed : int
        Equal seeds give equal tiles.

    Returns
    -------
    key, value : Tensor [N, G, D], fp16
    """
    shape = (count, layout.group, layout.head_dim)
    key = spread_tiles(*shape, row_spread=0.3, col_spread=0.15, seed=2 * seed)
    key += 3 * gaussian((count, 1, layout.head_dim), torch.Generator().manual_seed(seed))
    value = 0.2 * spread_tiles(*shape, row_spread=0.5, col_spread=0.4, seed=2 * seed + 1)
    return key.half(), value.half()


def repeated_tiles(rows: int, cols: int, *, seed: int = 0) -> torch.Tensor:
    """Tiles whose tokens are alike, but for one or a few, as repeated text has them.

    In turn: one token throughout, but for another one; one 15 times in 16, and others; the same
    number in one channel alone, which is what a rotation makes of equal channels, and one token
    unlike that; tokens that differ by a hundredth of their size.

    Parameters
    ----------
    rows, cols : int
        Tokens and channels.
    seed : int
        Equal seeds give equal tiles.

    Returns
    -------
    Tensor [4, rows, cols], fp16
    """
    generator = torch.Generator().manual_seed(seed)
    tiles = gaussian((4, 1, cols), generator).repeat(1, rows, 1)
    tiles[0, 37 % rows] = gaussian((cols,), generator)
    tiles[1, ::16] = gaussian((len(range(0, rows, 16)), cols), generator)
    tiles[2] = 0
    tiles[2, :, 0] = 10
    tiles[2, 5] = gaussian((cols,), generator)
    tiles[3] += 0.01 * gaussian((rows, cols), generator)
    return tiles.half()


def fixed_tile(rows: int, cols: int, *, seed: int) -> torch.Tensor:
    """Make a tile from integer arithmetic alone: the same bits on every machine and version.

    Elements are nearly Gaussian, rows and columns differ in magnitude, rows have means.

    Parameters
    ----------
    rows, cols : int
        Shape.
    seed : int
        Equal seeds give equal tiles.

    Returns
    -------
    Tensor [rows, cols], fp16
    """
    state = np.arange(rows * cols, dtype=np.uint64) + np.uint64(seed << 32)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    noise = state.view(np.uint16).reshape(rows, cols, 4).astype(np.float64).sum(2) / 2**15 - 4
    row, col = np.arange(rows)[:, None], np.arange(cols)[None, :]
    tile = (noise + row % 5 / 4) * (1 + row % 7 / 4) * (1 + col % 11 / 8)
    return torch.from_numpy(tile.astype(np.float16))

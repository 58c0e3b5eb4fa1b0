"""Noise on keys and values in training, so that the model learns to live with a lossy cache.

A model trained on exact rows reads them by fine margins, and a good cache costs it answers that no
one would miss. Noise in some of the rows of a batch makes it read by wider ones. Its largest levels
lie somewhat above what KVarN's 4-bit keys and 2-bit values do under the `large` outliers: 0.25 to
0.36 of the root mean square for keys, 0.54 to 0.60 for values, on small-v2, which was trained
without noise (one-off, on a CPU).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvarn_eval.small_model.model import causal_attention

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

SHARE = 0.5
"""Of the rows of a batch that have noise; levels are even between 0 and 1."""


def levels(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Noise of each row as a share of the largest; 0 for the rows without: `[count]`."""
    drawn = rng.random(count) * (rng.random(count) < SHARE)
    return drawn.astype("float32")


def disturbed(x: Tensor, amount: Tensor) -> Tensor:
    """Rows `[B, H, T, D]` with normal noise of `amount` `[B]` times each row's root mean square."""
    size = x.detach().square().mean(-1, keepdim=True).sqrt()
    return x + (amount[:, None, None, None] * size * torch.randn_like(x)).to(x.dtype)


class Noise:
    """An attention hook that disturbs keys and values, then attends causally.

    Parameters
    ----------
    key, value : float
        Largest noise, relative to the root mean square of a row and head.
    """

    def __init__(self, key: float, value: float) -> None:
        self.key, self.value = key, value
        self.level = torch.zeros(1)

    def set(self, level: Tensor) -> None:
        """Choose the noise of the next step: `level` `[B]`, from 0 to 1."""
        self.level = level

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attend to disturbed rows; k and v `[B, Hkv, T, D]`."""
        k = disturbed(k, self.key * self.level)
        v = disturbed(v, self.value * self.level)
        return causal_attention(q, k, v, scale)

"""Outlier stress: put large channels into K and V without changing what the model computes.

Small models lack the channel outliers that make the caches of large models hard to compress. A key
channel pair that is scaled before RoPE, and the query pair scaled back, leaves every score as it
was; so does a value channel scaled in `v_proj` and back in `o_proj`. All factors are powers of
two, hence exact in bf16 and fp32; in fp16 values scaled below 6.1e-5 lose bits.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from kvarn_eval.small_model.model import ModelConfig, SmallModel

CACHE_LIMIT = 3e4
"""Largest magnitude allowed in K or V; fp16 ends at 65,504."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """One factor and the share of channels that carry it."""

    factor: float
    share: float

    def __post_init__(self) -> None:
        """Refuse factors that are not powers of two."""
        if self.factor <= 0 or math.frexp(self.factor)[0] != 0.5:
            raise ValueError(
                f"Factor {self.factor} is not a power of two. Use one, so that the stress is exact."
            )


@dataclasses.dataclass(frozen=True)
class Profile:
    """Which channels grow or shrink; shares of RoPE pairs for K, of channels for V."""

    key_pairs: tuple[Scale, ...]
    value_channels: tuple[Scale, ...]


PROFILES: dict[str, Profile] = {
    "moderate": Profile((Scale(8, 4 / 64), Scale(1 / 2, 8 / 64)), (Scale(4, 0.05),)),
    "large": Profile((Scale(16, 4 / 64), Scale(1 / 2, 8 / 64)), (Scale(8, 0.05),)),
    "tiny": Profile((Scale(2**-5, 1),), (Scale(2**-5, 1),)),
}


def _factors(scales: tuple[Scale, ...], size: int, generator: torch.Generator) -> Tensor:
    """One factor per channel `[size]`, at places drawn from `generator`."""
    factors = torch.ones(size)
    order = torch.randperm(size, generator=generator)
    start = 0
    for scale in scales:
        stop = start + max(1, round(scale.share * size))
        factors[order[start:stop]] = scale.factor
        start = stop
    return factors


def stress(
    weights: Mapping[str, Tensor], config: ModelConfig, profile: str, *, seed: int = 0
) -> dict[str, Tensor]:
    """Weights of the same function whose K and V have the outliers of `profile`.

    Parameters
    ----------
    weights : mapping of str to Tensor
        State dict of a Qwen3 model with QK-norm and split-form RoPE. Read only.
    config : ModelConfig
        Shape of that model.
    profile : str
        Key of `PROFILES`.
    seed : int
        Places of the outliers; they differ from layer to layer and, for V, from head to head.

    Returns
    -------
    dict of str to Tensor
        All weights, in the dtypes given; scaled tensors are new, the others are shared.

    Raises
    ------
    ValueError
        If the profile is unknown, or a layer has no QK-norm, without which the factors on queries
        and keys have no place that commutes with RoPE.
    """
    if profile not in PROFILES:
        raise ValueError(f"Profile {profile!r} is unknown. Choose one of {', '.join(PROFILES)}.")
    places = PROFILES[profile]
    generator = torch.Generator().manual_seed(seed)
    result = dict(weights)
    groups = config.num_attention_heads // config.num_key_value_heads

    def scale(name: str, factors: Tensor) -> None:
        weight = weights[name]
        result[name] = weight * factors.to(weight)

    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}.self_attn"
        if not {f"{prefix}.q_norm.weight", f"{prefix}.k_norm.weight"} <= weights.keys():
            raise ValueError(
                f"Layer {i} has no QK-norm, so its keys cannot be stressed. Choose a Qwen3 model."
            )
        pair = _factors(places.key_pairs, config.head_dim // 2, generator).repeat(2)
        scale(f"{prefix}.k_norm.weight", pair)
        scale(f"{prefix}.q_norm.weight", 1 / pair)
        channel = torch.stack(
            [
                _factors(places.value_channels, config.head_dim, generator)
                for _ in range(config.num_key_value_heads)
            ]
        )
        scale(f"{prefix}.v_proj.weight", channel.reshape(-1, 1))
        scale(f"{prefix}.o_proj.weight", 1 / channel.repeat_interleave(groups, 0).reshape(1, -1))
    return result


@torch.inference_mode()
def largest_rows(model: SmallModel, ids: Tensor) -> tuple[float, float]:
    """Largest magnitude in K and in V over all layers.

    Parameters
    ----------
    model : SmallModel
        Weights, plain or stressed.
    ids : Tensor [T] or [B, T], int64
        Tokens to look at.

    Returns
    -------
    (float, float)

    Raises
    ------
    ValueError
        If one of them exceeds `CACHE_LIMIT`, where an fp16 cache is about to overflow.
    """
    from kvarn_eval.small_model.model import causal_attention

    largest = [0.0, 0.0]

    def look(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        for i, x in enumerate((k, v)):
            largest[i] = max(largest[i], x.abs().max().item())
        return causal_attention(q, k, v, scale)

    model(ids, look)
    if max(largest) > CACHE_LIMIT:
        raise ValueError(
            f"K reaches {largest[0]:.3g} and V {largest[1]:.3g}; the limit is {CACHE_LIMIT:.0e}. "
            "Choose smaller factors."
        )
    return largest[0], largest[1]

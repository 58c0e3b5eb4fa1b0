"""Channels of keys and queries, balanced in the weights: the same scores, keys without outliers.

With QK-norm the size of every key channel is a weight, and so is the size of the query channel that
meets it. A rotation spreads an error evenly over the channels of a key, so the error of a score
grows with (sum of k_i^2) (sum of q_i^2), while the score itself only knows the products k_i q_i. By
Cauchy and Schwarz the smallest such product has k_i and q_i equal in size. RoPE turns a pair of
channels into each other, hence one factor per pair. Factors are powers of two, so every
product stays what it was bit by bit, in fp16 as far as numbers are not below 6.1e-5.

What is traded away: models without QK-norm gain nothing, and neither do channels that are large for
another reason than their weight.
"""

from __future__ import annotations

import torch

MAX_EXPONENT = 10


def balancing_factors(query: torch.Tensor, key: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """Powers of two by which to multiply query channels and divide key channels.

    Parameters
    ----------
    query, key : Tensor [D], any floating dtype
        Weights of the norms of queries and keys.
    rotary_dim : int
        Channels that RoPE turns, in split form: i and ``i + rotary_dim / 2`` are a pair.

    Returns
    -------
    Tensor [D], fp32
        Nearest powers of two to ``sqrt(abs(key) / abs(query))``, where both are root mean squares
        of a pair; 1 where one of the two is zero.
    """
    ratio = _pair_mean_square(key, rotary_dim) / _pair_mean_square(query, rotary_dim)
    exponent = (ratio.log2() / 4).round()
    usable = exponent.isfinite()
    exponent = torch.where(usable, exponent, 0.0).clamp(-MAX_EXPONENT, MAX_EXPONENT)
    return exponent.exp2().float()


def balance_(query: torch.Tensor, key: torch.Tensor, rotary_dim: int) -> torch.Tensor | None:
    """Balance the weights of two norms in place, if that changes no score.

    Parameters
    ----------
    query, key, rotary_dim
        As in `balancing_factors`.

    Returns
    -------
    Tensor [D], fp32, or None
        By what query weights were multiplied and key weights divided. None, and nothing is changed,
        if a product would not come out exactly: a weight would overflow or lose bits.
    """
    factors = balancing_factors(query, key, rotary_dim).to(query.device)
    new_query, new_key = (query * factors).to(query.dtype), (key / factors).to(key.dtype)
    back_query, back_key = new_query / factors, new_key * factors
    if not (torch.equal(back_query, query.float()) and torch.equal(back_key, key.float())):
        return None
    query.copy_(new_query)
    key.copy_(new_key)
    return factors


def _pair_mean_square(weight: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """Mean square [D] of the pair that a channel belongs to; its own square outside of RoPE."""
    squares = weight.double().square()
    turned = squares[:rotary_dim].reshape(2, -1).mean(0).repeat(2)
    return torch.cat([turned, squares[rotary_dim:]])

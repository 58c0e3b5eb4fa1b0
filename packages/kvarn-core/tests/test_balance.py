"""Balanced norms: scores are the same bit by bit, keys do not depend on how a model is scaled."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvarn_core.balance import balance_, balancing_factors

DIM = 16
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def norms(seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.rand(DIM, generator=generator) + 0.5 for _ in range(2))
    return query.to(dtype), (4 * key).to(dtype)


def rope(x: torch.Tensor, rotary_dim: int, angle: torch.Tensor) -> torch.Tensor:
    """Split-form RoPE of rows [T, D] by angles [T, rotary_dim / 2]."""
    half = rotary_dim // 2
    a, b, rest = x[:, :half], x[:, half:rotary_dim], x[:, rotary_dim:]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], 1)


@given(
    st.integers(0, 2**16),
    st.sampled_from(DTYPES),
    st.sampled_from((DIM, DIM // 2)),
    st.lists(st.integers(-4, 4), min_size=DIM, max_size=DIM),
)
def test_scores_stay_bit_by_bit(
    seed: int, dtype: torch.dtype, rotary_dim: int, exponents: list[int]
) -> None:
    query_norm, key_norm = norms(seed, dtype)
    query_norm = query_norm * torch.tensor(exponents).exp2().to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    # nothing is so small that fp16 would store it with fewer bits
    signs = 1 - 2 * torch.randint(2, (2, 5, DIM), generator=generator)
    rows = (signs * (0.5 + torch.rand(2, 5, DIM, generator=generator))).to(dtype)
    quarter = torch.randint(4, (5, rotary_dim // 2), generator=generator)
    within = 0.05 + 0.9 * torch.rand(5, rotary_dim // 2, generator=generator)
    angle = (quarter + within) * torch.pi / 2

    def products() -> torch.Tensor:
        query, key = (
            rope(x * norm, rotary_dim, angle)
            for x, norm in zip(rows, (query_norm, key_norm), strict=True)
        )
        return query.double() * key.double()

    before = products()
    assert balance_(query_norm, key_norm, rotary_dim) is not None
    assert torch.equal(products(), before)


@given(st.integers(0, 2**16), st.lists(st.integers(-4, 4), min_size=8, max_size=8))
def test_the_balanced_model_does_not_depend_on_the_scale(seed: int, exponents: list[int]) -> None:
    plain, stressed = norms(seed, torch.float32), norms(seed, torch.float32)
    factors = torch.tensor(exponents * 2).exp2()
    stressed[0].div_(factors)
    stressed[1].mul_(factors)
    assert balance_(*plain, DIM) is not None
    assert balance_(*stressed, DIM) is not None
    assert all(map(torch.equal, plain, stressed))


def test_queries_and_keys_get_the_same_size() -> None:
    query, key = torch.full((DIM,), 0.5), torch.full((DIM,), 8.0)
    key[3], key[3 + DIM // 2] = 128.0, 128.0
    assert balance_(query, key, DIM) is not None
    assert torch.equal(query, key)
    assert key[3] == 8.0


def test_a_pair_has_one_factor() -> None:
    query, key = torch.ones(DIM), torch.ones(DIM)
    key[2] = 64.0
    factors = balancing_factors(query, key, DIM)
    assert factors[2] == factors[2 + DIM // 2] > 1
    assert balancing_factors(query, key, 4)[10] == 1
    assert (factors == 1).sum() == DIM - 2


def test_zeros_are_left_alone() -> None:
    query, key = torch.ones(DIM), torch.ones(DIM)
    key[0], key[8], query[1], query[9] = 0.0, 0.0, 0.0, 0.0
    assert torch.equal(balancing_factors(query, key, DIM), torch.ones(DIM))


def test_weights_that_would_lose_bits_stay() -> None:
    key = torch.full((DIM,), 2.0**-24, dtype=torch.float16)
    query = torch.full((DIM,), (1 + 2**-10) * 2.0**-14, dtype=torch.float16)
    before = query.clone(), key.clone()
    assert balance_(query, key, DIM) is None
    assert torch.equal(query, before[0])
    assert torch.equal(key, before[1])

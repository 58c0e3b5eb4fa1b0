"""The plugin in the real engine: vLLM's scheduler, block pool, prefix cache and preemption.

The strongest oracle is the debug preset. It takes every path of a quantised preset but stores rows
unquantised, so whatever the scheduler does, its tokens must be those of the stock cache.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.engine

DEBUG = "kvarn_debug32_g128"
NEAR_TIE = 0.02  # nat


def random_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 512, (count,), generator=generator).tolist()


def requests() -> list[list[int]]:
    """Prompts at page edges, and prompts that share prefixes ending inside and at tiles."""
    edges = [random_tokens(n, n) for n in (1, 127, 128, 129, 255, 256, 257)]
    common = random_tokens(640, 7)
    shared = [common[:640], common[:640], common[:500] + random_tokens(40, 8), common[:385]]
    return edges + shared


def assert_same(answers: dict[int, list[Any]], expected: dict[int, list[Any]], near_tie=0.0):
    """Equal tokens; a difference is accepted only where the two candidates nearly tie."""
    assert answers.keys() == expected.keys()
    for number, samples in expected.items():
        for answer, wanted in zip(answers[number], samples, strict=True):
            assert len(answer.tokens) == len(wanted.tokens)
            for step, (got, want) in enumerate(zip(answer.tokens, wanted.tokens, strict=True)):
                if got != want:
                    gap = abs(answer.best[step] - wanted.best[step])
                    assert gap <= near_tie, f"request {number}, token {step}: {got} != {want}"
                    break


@pytest.fixture(scope="module")
def stock(start) -> dict[int, list[Any]]:
    """Answers of the stock cache to `requests`, given twice."""
    with start("auto") as engine:
        return engine.generate(requests() * 2)


VARIANTS = {
    "one-chunk": {},
    "chunks-of-64": {"max_num_batched_tokens": 64},
    "chunks-of-200-sealed": {
        "max_num_batched_tokens": 200,
        "additional_config": {"kvarn": {"prefill": "sealed"}},
    },
    "sealed": {"additional_config": {"kvarn": {"prefill": "sealed"}}},
    "no-prefix-cache": {"enable_prefix_caching": False, "max_num_batched_tokens": 300},
    "few-pages": {"num_gpu_blocks_override": 40, "max_num_batched_tokens": 200},
    "few-pages-no-prefix-cache": {
        "num_gpu_blocks_override": 34,
        "enable_prefix_caching": False,
    },
    "one-maximal-request": {"num_gpu_blocks_override": 19, "max_num_batched_tokens": 200},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_debug_preset_equals_stock(start, stock, options: dict[str, Any]) -> None:
    with start(DEBUG, **options) as engine:
        assert_same(engine.generate(requests() * 2), stock)

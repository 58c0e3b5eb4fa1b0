from __future__ import annotations

import pytest

from kvarn_eval.capacity import GIB, Pool
from kvarn_eval.server import parse_metrics

INFO = (
    'vllm:cache_config_info{block_size="128",cache_dtype="%s",kv_cache_memory_bytes="%s",'
    'num_cpu_blocks="None",num_gpu_blocks="%d"} 1.0'
)


def pool(cache_dtype: str, pages: int, cache_bytes: object = GIB) -> Pool:
    return Pool.from_metrics(parse_metrics(INFO % (cache_dtype, cache_bytes, pages)))


def test_the_pool_is_what_the_server_reports() -> None:
    found = pool("auto", 1365, GIB // 2)
    assert found == Pool(1365, 128, GIB // 2, "auto")
    assert found.tokens == 174_720
    assert found.tokens_per_gib == 2 * 174_720


@pytest.mark.parametrize(
    ("cache_dtype", "tokens", "held"),
    [
        ("auto", 1, 1),
        ("auto", 128, 1),
        ("auto", 129, 2),
        ("kvarn_k4v2_g128", 1, 11),
        ("kvarn_k4v2_g128", 128, 11),
        ("kvarn_k4v2_g128", 129, 12),
        ("kvarn_k4v2_g128", 16_000, 11 + 124),
        ("kvarn_k4v4_g128", 1, 9),
    ],
)
def test_pages_held_by_a_request(cache_dtype: str, tokens: int, held: int) -> None:
    assert pool(cache_dtype, 1 + 7 * held).requests(tokens, 128) == 7
    assert pool(cache_dtype, 7 * held).requests(tokens, 128) == 6  # one page is the null block


def test_a_server_that_was_not_told_a_size_has_tokens_but_no_density() -> None:
    found = pool("auto", 10, "None")
    assert found.tokens == 1280
    with pytest.raises(ValueError, match="--kv-cache-memory-bytes"):
        _ = found.tokens_per_gib


def test_a_server_that_does_not_report_its_cache_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no metric vllm:cache_config_info"):
        Pool.from_metrics([])

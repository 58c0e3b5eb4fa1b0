from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvarn_core import PRESETS
from kvarn_vllm.cache_spec import KVarNFullAttentionSpec, record_layout

SPEC = KVarNFullAttentionSpec.for_layer("kvarn_k4v2_g128", 128, num_kv_heads=8, head_dim=128)


def test_a_page_is_a_record_per_head() -> None:
    assert SPEC.page_size_bytes == 8 * 13_824
    assert SPEC.layout is record_layout("kvarn_k4v2_g128", 128)
    stock = FullAttentionSpec(block_size=128, num_kv_heads=8, head_size=128, dtype=SPEC.dtype)
    assert 2 * stock.page_size_bytes > 4.7 * SPEC.page_size_bytes, "against 16-bit keys and values"


@pytest.mark.parametrize(("length", "pages"), [(1, 12), (128, 12), (129, 13), (1024, 19)])
def test_a_maximal_request_and_the_null_page_fit(length: int, pages: int) -> None:
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=length))
    assert SPEC.max_memory_usage_bytes(config) == pages * SPEC.page_size_bytes


def test_specs_are_values() -> None:
    again = KVarNFullAttentionSpec.for_layer("kvarn_k4v2_g128", 128, num_kv_heads=8, head_dim=128)
    assert pickle.loads(pickle.dumps(SPEC)) == SPEC == again  # noqa: S301
    assert hash(SPEC) == hash(again)


def test_equal_layers_merge_and_others_do_not() -> None:
    assert KVarNFullAttentionSpec.merge([SPEC, SPEC]) == SPEC
    for preset, heads, dim in (("kvarn_k4v4_g128", 8, 128), ("kvarn_k4v2_g128", 4, 128)):
        other = KVarNFullAttentionSpec.for_layer(preset, 128, heads, dim)
        with pytest.raises(AssertionError, match="same heads and the same preset"):
            KVarNFullAttentionSpec.merge([SPEC, other])


@pytest.mark.parametrize("preset", PRESETS)
def test_block_size_is_the_group(preset: str) -> None:
    group = PRESETS[preset].group
    KVarNFullAttentionSpec.for_layer(preset, group, 1, 64)
    with pytest.raises(AssertionError):
        KVarNFullAttentionSpec.for_layer(preset, 192 - group, 1, 64)

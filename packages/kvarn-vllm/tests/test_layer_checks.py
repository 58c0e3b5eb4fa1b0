from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    UniformTypeKVCacheSpecs,
)

from kvarn_vllm.cache_spec import KVarNFullAttentionSpec
from kvarn_vllm.layer_checks import (
    check_head_size,
    check_layer,
    check_plans,
    check_selection,
)

LAYERS = {
    "alibi": ({"alibi_slopes": [0.5]}, "ALiBi"),
    "sliding-window": ({"sliding_window": 64}, "a sliding window"),
    "soft-cap": ({"logits_soft_cap": 50.0}, "soft capping of logits"),
    "shared-cache": ({"shares_cache": True}, "the cache of another layer"),
    "sinks": ({"extra": {"sinks": torch.zeros(2)}}, "the argument sinks"),
}


@pytest.mark.parametrize(("arguments", "what"), LAYERS.values(), ids=LAYERS)
def test_refused_layers(arguments: dict[str, Any], what: str) -> None:
    check_layer(logits_soft_cap=0.0, extra={"sinks": None})
    with pytest.raises(NotImplementedError) as caught:
        check_layer(**arguments)
    assert str(caught.value) == (
        f"KVarN: this model's attention needs {what}, which kvarn does not implement. "
        "Use another --kv-cache-dtype."
    )


SELECTIONS = {
    "use_mla": "a compressed latent (MLA)",
    "use_sparse": "sparse attention",
    "has_sink": "attention sinks",
    "use_mm_prefix": "bidirectional attention to images",
    "use_non_causal": "non-causal attention",
    "use_per_head_quant_scales": "scales per head from the checkpoint",
}


@pytest.mark.parametrize("field", SELECTIONS)
def test_refused_selections(field: str) -> None:
    wanted = dict.fromkeys(SELECTIONS, False)
    check_selection(SimpleNamespace(head_size=128, **wanted))
    with pytest.raises(NotImplementedError) as caught:
        check_selection(SimpleNamespace(head_size=128, **{**wanted, field: True}))
    assert str(caught.value) == (
        f"KVarN: this model's attention needs {SELECTIONS[field]}, which kvarn does not "
        "implement. Use another --kv-cache-dtype."
    )


def test_two_head_sizes_in_one_model_are_refused() -> None:
    check_head_size(256, expected=256)
    with pytest.raises(NotImplementedError) as caught:
        check_head_size(64, expected=128)
    assert str(caught.value) == (
        "KVarN: layers with head sizes 128 and 64 in one model are not supported. "
        "Use another --kv-cache-dtype."
    )


def test_a_plan_of_vllms_own_is_found_wherever_it_is() -> None:
    """A layer that brings its own backend passes no other check."""
    ours = KVarNFullAttentionSpec.for_layer("kvarn_k4v2_g128", 128, 2, 128)
    own = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=128, dtype=torch.uint8)

    def plan(*specs: Any) -> KVCacheConfig:
        groups = [KVCacheGroupSpec(["layer"], spec) for spec in specs]
        return KVCacheConfig(num_blocks=1, kv_cache_tensors=[], kv_cache_groups=groups)

    def together(**specs: Any) -> Any:
        return UniformTypeKVCacheSpecs(block_size=128, kv_cache_specs=specs)

    check_plans([plan(ours), plan(together(a=ours, b=ours)), plan()])
    for found in (plan(ours, own), plan(together(a=ours, b=own))):
        with pytest.raises(NotImplementedError, match="plans a FullAttentionSpec of its own"):
            check_plans([plan(ours), found])

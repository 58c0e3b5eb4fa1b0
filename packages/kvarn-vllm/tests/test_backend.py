from __future__ import annotations

import pytest
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from kvarn_core import PRESETS
from kvarn_vllm.backend import KVarNBackend, KVarNBackendG64, backend_path
from kvarn_vllm.impl import KVarNImpl
from kvarn_vllm.metadata import KVarNMetadataBuilder


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_has_a_backend_of_its_group(preset: str) -> None:
    backend = resolve_obj_by_qualname(backend_path(preset))
    group = PRESETS[preset].group
    assert backend is {128: KVarNBackend, 64: KVarNBackendG64}[group]
    assert backend.get_supported_kernel_block_sizes() == [group]
    assert backend.supports_kv_cache_dtype(preset)
    assert not backend.supports_kv_cache_dtype(preset.replace(f"g{group}", f"g{192 - group}"))
    assert not backend.supports_kv_cache_dtype("auto")


def test_the_name_is_the_slot_that_vllm_keeps_for_plugins() -> None:
    assert AttentionBackendEnum[KVarNBackend.get_name()] is AttentionBackendEnum.CUSTOM
    assert AttentionBackendEnum[KVarNBackendG64.get_name()] is AttentionBackendEnum.CUSTOM


def test_cache_shape_has_pages_first() -> None:
    shape = KVarNBackend.get_kv_cache_shape(7, 128, 2, 128, "kvarn_k4v2_g128")
    assert shape == (7, 2, 13_824)
    assert KVarNBackend.get_kv_cache_block_dim(128, 2, 128, "kvarn_k4v2_g128") == 0
    with pytest.raises(AssertionError):
        KVarNBackend.get_kv_cache_shape(7, 64, 2, 128, "kvarn_k4v2_g128")


def test_capabilities() -> None:
    assert KVarNBackend.get_supported_head_sizes() == [64, 128, 256]
    assert not KVarNBackend.supports_head_size(96)
    assert KVarNBackend.get_impl_cls() is KVarNImpl
    assert KVarNBackend.get_builder_cls() is KVarNMetadataBuilder
    assert not KVarNBackend.supports_sink()
    assert not KVarNBackend.is_mla()
    assert KVarNBackend.forward_includes_kv_cache_update

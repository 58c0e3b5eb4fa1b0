"""The attention backend as vLLM sees it: what is supported, and the shape of the cache."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend

from kvarn_core.layout import HEAD_DIMS
from kvarn_core.spec import DEBUG_PRESETS, PRESETS, Preset
from kvarn_vllm.cache_spec import record_layout
from kvarn_vllm.impl import KVarNImpl
from kvarn_vllm.metadata import KVarNMetadataBuilder


class KVarNBackend(AttentionBackend):  # type: ignore[misc]
    """Full attention over pages of records; tiles of 128 tokens."""

    group: ClassVar[int] = 128
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]

    @staticmethod
    def get_name() -> str:
        """Name of the slot that vLLM keeps for plugins."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[KVarNImpl]:
        """Class of one layer's attention."""
        return KVarNImpl

    @staticmethod
    def get_builder_cls() -> type[KVarNMetadataBuilder]:
        """Class that translates a step."""
        return KVarNMetadataBuilder

    @classmethod
    def get_supported_kernel_block_sizes(cls) -> list[int]:
        """Page sizes in tokens: the group, nothing else."""
        return [cls.group]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Head dimensions: powers of two, for the rotation."""
        return list(HEAD_DIMS)

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        """Whether this is the name of a preset with this class's group."""
        presets = {**PRESETS, **DEBUG_PRESETS}
        return kv_cache_dtype in presets and presets[kv_cache_dtype].group == cls.group

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """Shape of one layer's cache, uint8: [pages, KV heads, record bytes]."""
        layout = record_layout(cache_dtype_str, head_size)
        assert block_size == layout.group
        return (num_blocks, num_kv_heads, layout.record_bytes)


class KVarNBackendG64(KVarNBackend):
    """The same with tiles of 64 tokens. vLLM asks the class, not the layer, for page sizes."""

    group: ClassVar[int] = 64


def backend_path(kv_cache_dtype: str) -> str:
    """Dotted path of the backend class of a preset, as vLLM's selector wants it."""
    classes: dict[int, Any] = {cls.group: cls for cls in (KVarNBackend, KVarNBackendG64)}
    cls = classes[Preset.from_name(kv_cache_dtype).group]
    return f"{cls.__module__}.{cls.__qualname__}"

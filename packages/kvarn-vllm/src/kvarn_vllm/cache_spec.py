"""What one attention layer keeps, in the words of vLLM's memory planner.

A page (vLLM: block) holds one record per KV head. The planner also has to know the header that
every request carries, or a request could stop for ever in a pool that is one page too small.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvarn_core import Preset, RecordLayout
from kvarn_vllm.config import is_kvarn


@cache
def record_layout(preset: str, head_dim: int) -> RecordLayout:
    """Layout of a preset given by name; one instance per combination.

    Raises
    ------
    ValueError
        If there is no such preset or the head dimension is not supported.
    """
    return RecordLayout(Preset.from_name(preset), head_dim)


def table_columns() -> int:
    """Columns of a page table under the configuration being built; 0 if it is not ours."""
    config = get_current_vllm_config_or_none()
    if config is None or not is_kvarn(config.cache_config.cache_dtype):
        return 0
    model, scheduler = config.model_config, config.scheduler_config
    layout = record_layout(config.cache_config.cache_dtype, model.get_head_size())
    # the second runner warms up with batches over all requests, whatever a request may hold: equal
    # shares, and the last request has what is left
    requests = min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens)
    share = scheduler.max_num_batched_tokens // requests + requests - 1
    return layout.columns(max(model.max_model_len, share))


@dataclass(frozen=True, kw_only=True)
class KVarNFullAttentionSpec(FullAttentionSpec):  # type: ignore[misc]
    """Cache of a full-attention layer whose pages hold records.

    Parameters
    ----------
    preset : str
        Cache dtype, for example ``kvarn_k4v2_g128``. The other fields are vLLM's;
        `block_size` is the group of the preset.
    """

    preset: str

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.block_size == self.layout.group

    @classmethod
    def for_layer(
        cls, preset: str, block_size: int, num_kv_heads: int, head_dim: int
    ) -> KVarNFullAttentionSpec:
        """Spec of a layer with `num_kv_heads` heads on this rank."""
        return cls(
            block_size=block_size,
            num_kv_heads=num_kv_heads,
            head_size=head_dim,
            head_size_v=head_dim,
            dtype=torch.uint8,
            preset=preset,
        )

    @property
    def layout(self) -> RecordLayout:
        """Byte layout and header geometry."""
        return record_layout(self.preset, self.head_size)

    @property
    def real_page_size_bytes(self) -> int:
        """Bytes of one page of this layer: a record per KV head."""
        heads: int = self.num_kv_heads
        return heads * self.layout.record_bytes

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes that one request of maximal length needs, so that it can always finish.

        One column of its table, the hit count, is not a page; the pool's null page takes its
        place in the sum.
        """
        columns = self.layout.columns(vllm_config.model_config.max_model_len)
        return int(columns * self.page_size_bytes)

    @classmethod
    def merge(cls, specs: list[KVarNFullAttentionSpec]) -> KVarNFullAttentionSpec:
        """One spec for a group of layers; vLLM expects an AssertionError if they differ."""
        assert all(spec == specs[0] for spec in specs[1:]), (
            "Layers of one kvarn cache group must have the same heads and the same preset."
        )
        return specs[0]

"""vLLM's words for a step, translated into ours.

vLLM orders the requests of a step so that those with one new token come first. The page table it
passes is used as it is; slot mappings have no meaning here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.attention.backend import AttentionMetadata, AttentionMetadataBuilder
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class KVarNMetadata(AttentionMetadata):  # type: ignore[misc]
    """One step, the same for all layers.

    Parameters
    ----------
    page_table : Tensor [B, columns], int32
        Header and record pages per request.
    seq_lens : Tensor [B], int32
        Tokens per request after this step, new ones included.
    cu_seqlens_q : Tensor [B + 1], int32
        Prefix sum of new tokens.
    num_tokens : int
        New tokens of the step; tensors of the model may be longer.
    num_decodes : int
        Requests, all at the front, with one new token.
    """

    page_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    num_tokens: int
    num_decodes: int

    def rows(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Page table, lengths and prefix sum of requests `start` to `stop`."""
        return (
            self.page_table[start:stop],
            self.seq_lens[start:stop],
            self.cu_seqlens_q[start : stop + 1],
        )


class KVarNMetadataBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Builds `KVarNMetadata` once per step."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        self.columns = kv_cache_spec.layout.columns(vllm_config.model_config.max_model_len)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> KVarNMetadata:
        """Translate one step; see the base class for the arguments."""
        step = common_attn_metadata
        assert step.block_table_tensor.shape[1] >= self.columns, "The page table is too narrow."
        num_decodes, _, _, _ = split_decodes_and_prefills(step, decode_threshold=1)
        return KVarNMetadata(
            page_table=step.block_table_tensor,
            seq_lens=step.seq_lens,
            cu_seqlens_q=step.query_start_loc,
            num_tokens=step.num_actual_tokens,
            num_decodes=num_decodes,
        )

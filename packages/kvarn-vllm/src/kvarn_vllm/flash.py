"""FlashAttention as vLLM ships it, and the merging of attention over disjoint keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states


@dataclass(frozen=True)
class FlashAttention:
    """Attention over packed sequences of any lengths.

    Parameters
    ----------
    scale : float
        Factor on scores before the softmax.
    version : int
        FlashAttention 2, 3 or 4.
    """

    scale: float
    version: int

    @classmethod
    def for_gpu(cls, scale: float, head_dim: int) -> FlashAttention:
        """The version that vLLM prefers on this GPU.

        Raises
        ------
        RuntimeError
            If this build of vLLM has none for it.
        """
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        version = get_flash_attn_version(head_size=head_dim)
        if version is None:
            raise RuntimeError(
                "KVarN: this vLLM has no FlashAttention for this GPU, which prefill needs. "
                "Install the CUDA wheel of vLLM, or ask for engine reference."
            )
        return cls(scale, version)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_query_len: int,
        max_key_len: int,
        *,
        causal: bool,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Attend each sequence's queries to its keys.

        Parameters
        ----------
        query : Tensor [T, Hq, D], fp16 or bf16
        key, value : Tensor [N, Hkv, D], dtype of `query`
        cu_seqlens_q, cu_seqlens_k : Tensor [B + 1], int32
            Where sequences begin. A sequence may have no keys.
        max_query_len, max_key_len : int
            Longest sequences, or more.
        causal : bool
            Whether the last query sees all keys, the one before it one less, and so on.
        out : Tensor [T, Hq, D], dtype of `query`
            Written in place.

        Returns
        -------
        Tensor [Hq, T], fp32
            Natural log of the sum of exponentials; infinite where there are no keys, plus or minus
            by version.
        """
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        lse: torch.Tensor
        _, lse = flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_query_len,
            max_seqlen_k=max_key_len,
            softmax_scale=self.scale,
            causal=causal,
            out=out,
            return_softmax_lse=True,
            fa_version=self.version,
        )
        return lse

    def merge(
        self, out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
    ) -> torch.Tensor:
        """Add attention over further keys to `out`.

        Parameters
        ----------
        out, other : Tensor [T, Hq, D]
            Attention over two disjoint sets of keys. `out` is overwritten by attention over both.
        lse, other_lse : Tensor [Hq, T], fp32, contiguous
            Their log-sum-exps; an infinite one says that there were no keys.

        Returns
        -------
        Tensor [Hq, T], fp32
            Log-sum-exp over both.
        """
        merged: torch.Tensor = torch.empty_like(lse)
        merge_attn_states(out, other, other_lse, out, lse, merged)
        return merged

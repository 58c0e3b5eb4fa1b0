"""Scratch memory of attention, reserved once, before vLLM measures what is left for the cache.

Most bytes come from vLLM's workspace manager, so all layers share them and a captured graph finds
them where it left them. Their sizes follow from the configuration alone. What is traded away: a
context longer than `CONTEXT_TOKENS` is read in several passes. The scratch of the decode op is a
tensor of its own, a few MiB for all layers of a kind: it begins as zeros, and whatever else is
written to it would break its counters.

Rotated queries are not kept here. They are as large as the step, and live while the much larger
tensors of the layer's MLP do not, so the allocator finds room for them that is counted anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.worker.workspace import current_workspace_manager

from kvarn_core.ops.decode import workspace_bytes

if TYPE_CHECKING:
    from kvarn_core import RecordLayout

CONTEXT_TOKENS = 16_384  # 64 MiB for 8 KV heads of 128


@dataclass(frozen=True)
class Workspace:
    """Scratch tensors of one kind of layer. Each call reuses the same bytes.

    Parameters
    ----------
    layout : RecordLayout
        Byte layout of the preset.
    num_q_heads, num_kv_heads : int
        Heads of the layer on this rank.
    max_requests : int
        Requests of the largest step.
    engine : str
        Engine of `kvarn_core`; each has its own use for the scratch of decode.
    """

    layout: RecordLayout
    num_q_heads: int
    num_kv_heads: int
    max_requests: int
    engine: str

    def reserve(self, query: torch.Tensor) -> None:
        """Take the largest of everything, so that nothing grows later.

        Then take and release what prefill needs for `query`, the queries of a profile run, so that
        it is part of the peak that vLLM measures.
        """
        self.decode(self.max_requests)
        self.context(CONTEXT_TOKENS, query.dtype)
        rotated, output = torch.empty_like(query), torch.empty_like(query)
        del rotated, output

    def decode(self, requests: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scratch of the decode op (uint8) and its log-sum-exps [requests, Hq], fp32."""
        (lse,) = _take(((requests, self.num_q_heads), torch.float32))
        return _decode_scratch(self, lse.device), lse

    def context(self, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [tokens, Hkv, D] of older tokens."""
        rows = ((tokens, self.num_kv_heads, self.layout.head_dim), dtype)
        key, value = _take(rows, rows)
        return key, value


@cache
def _decode_scratch(workspace: Workspace, device: torch.device) -> torch.Tensor:
    """Scratch of the decode op, shared by the layers that `workspace` describes."""
    nbytes = workspace_bytes(
        workspace.max_requests, workspace.num_q_heads, workspace.num_kv_heads, workspace.layout
    )
    return torch.zeros(nbytes, dtype=torch.uint8, device=device)


def _take(*shapes: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
    tensors: list[Any] = current_workspace_manager().get_simultaneous(*shapes)
    return tensors

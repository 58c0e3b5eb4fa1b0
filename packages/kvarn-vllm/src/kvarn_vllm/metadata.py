"""vLLM's words for a step, translated into ours.

vLLM orders the requests of a step so that those with one new token come first. The page table it
passes is used as it is; slot mappings have no meaning here. A pure decode step takes vLLM's own
persistent tensors and nothing else, so a CUDA graph may hold it. A step with prefills runs outside
graphs; what its attention needs to know is laid out here, once for all layers, from lengths that
vLLM has on the host, and sent to the device in one copy that nobody waits for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from kvarn_vllm.config import Options
from kvarn_vllm.engine import model_layout, serves_batches
from kvarn_vllm.passes import plan, prefix_sum
from kvarn_vllm.workspace import CONTEXT_TOKENS

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from kvarn_vllm.batched import Launches

    Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # page table, lengths, prefix sum


@dataclass(frozen=True)
class ContextPass:
    """Context tokens that the prefill rows of a step read together.

    Parameters
    ----------
    rows, tokens : slice
        Rows that read, among the prefill rows, and their new tokens, among those of prefill rows.
    starts, context_lens, positions : Tensor [n], int32
        Per row: first token to read, how many, and the position whose view of the cache counts.
    cu_seqlens_q, cu_seqlens_k : Tensor [n + 1], int32
        Prefix sums of new tokens and of tokens to read.
    max_query_len, max_context_len, num_context_tokens : int
        Largest entries of the prefix sums' steps, and the tokens to read in all.
    """

    rows: slice
    tokens: slice
    starts: torch.Tensor
    context_lens: torch.Tensor
    positions: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_query_len: int
    max_context_len: int
    num_context_tokens: int


@dataclass(frozen=True)
class Prefill:
    """The prefill rows of a step.

    Parameters
    ----------
    first_token : int
        Where their new tokens begin.
    cu_seqlens : Tensor [n + 1], int32
        Prefix sum of their new tokens, from 0.
    max_query_len : int
        New tokens of the longest.
    passes : tuple of ContextPass
        How their context is read; empty if no row has any.
    """

    first_token: int
    cu_seqlens: torch.Tensor
    max_query_len: int
    passes: tuple[ContextPass, ...]


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
    max_query_len : int
        New tokens of the longest row.
    prefill : Prefill, optional
        The other requests, where a step is served as a whole; None if there are none.
    launches : dict
        What `batched` prepares for the layers of a kind, at the first of them.
    """

    page_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    num_tokens: int
    num_decodes: int
    max_query_len: int
    prefill: Prefill | None = None
    launches: dict[Hashable, Launches] = field(default_factory=dict, repr=False, compare=False)

    @property
    def everything(self) -> Rows:
        """All requests."""
        return self.rows(0, len(self.seq_lens))

    @property
    def decodes(self) -> Rows:
        """The requests with one new token."""
        return self.rows(0, self.num_decodes)

    @property
    def prefills(self) -> Rows:
        """The others."""
        return self.rows(self.num_decodes, len(self.seq_lens))

    def rows(self, start: int, stop: int) -> Rows:
        """Page table, lengths and prefix sum of requests `start` to `stop`."""
        return (
            self.page_table[start:stop],
            self.seq_lens[start:stop],
            self.cu_seqlens_q[start : stop + 1],
        )


class KVarNMetadataBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Builds `KVarNMetadata` once per step. Keeps nothing between steps."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        self.layout = kv_cache_spec.layout
        self.columns = self.layout.columns(vllm_config.model_config.max_model_len)
        options = Options.from_config(vllm_config.additional_config)
        self.serves_batches = serves_batches(options, self.layout)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Graphs hold steps of decode rows, unless rows are served one by one."""
        options = Options.from_config(vllm_config.additional_config)
        if serves_batches(options, model_layout(vllm_config)):
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> KVarNMetadata:
        """Translate one step; see the base class for the arguments."""
        step = common_attn_metadata
        assert step.block_table_tensor.shape[1] >= self.columns, "The page table is too narrow."
        num_decodes, num_prefills, _, _ = split_decodes_and_prefills(step, decode_threshold=1)
        whole = num_prefills > 0 and self.serves_batches
        return KVarNMetadata(
            page_table=step.block_table_tensor,
            seq_lens=step.seq_lens,
            cu_seqlens_q=step.query_start_loc,
            num_tokens=step.num_actual_tokens,
            num_decodes=num_decodes,
            max_query_len=step.max_query_len,
            prefill=self._prefill(step, num_decodes) if whole else None,
        )

    def _prefill(self, step: Any, num_decodes: int) -> Prefill:
        # vLLM promises an upper bound, exact for prefill rows.
        starts = step.query_start_loc_cpu[num_decodes : step.num_reqs + 1].tolist()
        lengths = step.seq_lens_cpu_upper_bound[num_decodes : step.num_reqs].tolist()
        new = [stop - start for start, stop in pairwise(starts)]
        contexts = [length - count for length, count in zip(lengths, new, strict=True)]
        return lay_out(starts[0], new, contexts, self.layout.group, self.device)


def lay_out(
    first_token: int,
    new: Sequence[int],
    contexts: Sequence[int],
    group: int,
    device: torch.device,
    width: int = CONTEXT_TOKENS,
) -> Prefill:
    """Lay out prefill rows for attention.

    Parameters
    ----------
    first_token : int
        New tokens of the step before these rows.
    new, contexts : sequence of int
        New and older tokens of each row.
    group : int
        Tokens per tile.
    device : torch.device
        Where the tensors go, in one copy.
    width : int
        Context tokens per pass.
    """
    cu_seqlens = prefix_sum(new)
    passes = plan(contexts, width, group)
    columns = [cu_seqlens]
    for one in passes:
        columns += [
            list(one.starts),
            list(one.counts),
            list(contexts[one.rows]),
            prefix_sum(new[one.rows]),
            prefix_sum(one.counts),
        ]
    sent = iter(_send(columns, device))
    return Prefill(
        first_token=first_token,
        cu_seqlens=next(sent),
        max_query_len=max(new),
        passes=tuple(
            ContextPass(
                rows=one.rows,
                tokens=slice(cu_seqlens[one.rows.start], cu_seqlens[one.rows.stop]),
                starts=next(sent),
                context_lens=next(sent),
                positions=next(sent),
                cu_seqlens_q=next(sent),
                cu_seqlens_k=next(sent),
                max_query_len=max(new[one.rows]),
                max_context_len=max(one.counts),
                num_context_tokens=sum(one.counts),
            )
            for one in passes
        ),
    )


def _send(columns: list[list[int]], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Copy lists of integers to the device together, without waiting; int32."""
    values = [value for column in columns for value in column]
    pinned = device.type == "cuda"  # the allocator of pinned memory waits before it reuses a block
    host = torch.tensor(values, dtype=torch.int32, pin_memory=pinned)
    there = host.to(device, non_blocking=True)
    return torch.split(there, [len(column) for column in columns])

"""Attention of all prefill rows of a step at once.

New tokens see each other unquantised and older ones as a decode step would. The two parts are
separate calls of FlashAttention, merged by their log-sum-exps: a causal one over the raw keys and
values of the step, and, a pass at a time, one over context that was gathered into the workspace.
Context is stored rotated; instead of rotating it back, the queries are rotated and so is the
output, which costs as little as the new tokens are few.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvarn_core.ops.gather import gather, rotate_rows

if TYPE_CHECKING:
    from kvarn_core import RecordLayout
    from kvarn_vllm.flash import FlashAttention
    from kvarn_vllm.metadata import ContextPass, Prefill
    from kvarn_vllm.workspace import Workspace


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    step: Prefill,
    output: torch.Tensor,
    *,
    layout: RecordLayout,
    attention: FlashAttention,
    workspace: Workspace,
    engine: str,
) -> None:
    """Attend the new tokens of prefill rows to each other and to their context.

    Parameters
    ----------
    query : Tensor [T, Hq, D], fp16 or bf16
        New tokens of the prefill rows, after RoPE.
    key, value : Tensor [T, Hkv, D], dtype of `query`
        Their keys and values.
    cache : Tensor [P, Hkv, layout.record_bytes], uint8
        Read only. Records and sink rows of this step are in it, ring rows are not.
    page_table : Tensor [B, columns], int32
        Pages of the prefill rows.
    step : Prefill
        Lengths of the rows, and how their context is read.
    output : Tensor [T, Hq, D], dtype of `query`
        Written in place.
    layout : RecordLayout
        Byte layout of the preset.
    attention : FlashAttention
        Attends and merges.
    workspace : Workspace
        Scratch memory.
    engine : str
        Engine of `kvarn_core`.

    Notes
    -----
    Not capturable: launch sizes depend on the step. Nothing is read back to the host.
    """
    lse = attention.attend(
        query, key, value,
        step.cu_seqlens, step.cu_seqlens, step.max_query_len, step.max_query_len,
        causal=True, out=output,
    )  # fmt: skip
    for part in step.passes:
        old_key, old_value = workspace.context(part.num_context_tokens, query.dtype)
        _gather(cache, page_table, part, old_key, old_value, layout=layout, engine=engine)
        rotated = rotate_rows(query[part.tokens], engine=engine)
        old = torch.empty_like(rotated)
        old_lse = attention.attend(
            rotated, old_key, old_value,
            part.cu_seqlens_q, part.cu_seqlens_k, part.max_query_len, part.max_context_len,
            causal=False, out=old,
        )  # fmt: skip
        rotate_rows(old, out=old, engine=engine)
        known = lse[:, part.tokens].contiguous()
        merged = attention.merge(output[part.tokens], known, old, old_lse)
        if part is not step.passes[-1]:  # nobody asks for the sums of all keys
            lse[:, part.tokens] = merged


def _gather(
    cache: torch.Tensor,
    page_table: torch.Tensor,
    part: ContextPass,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    layout: RecordLayout,
    engine: str,
) -> None:
    """Read the context tokens of a pass, rotated, into `key` and `value`."""
    gather(
        cache, page_table[part.rows], part.context_lens, part.positions,
        layout=layout, dtype=key.dtype, starts=part.starts, cu_seqlens_k=part.cu_seqlens_k,
        max_context_len=part.max_context_len, out=(key, value), engine=engine,
    )  # fmt: skip

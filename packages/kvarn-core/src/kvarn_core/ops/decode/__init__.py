"""Attention of new queries over the compressed cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvarn_core.ops.decode import reference

if TYPE_CHECKING:
    import torch

    from kvarn_core.layout import RecordLayout


def decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    layout: RecordLayout,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend one query per request to everything the request has in the cache.

    Parameters
    ----------
    query : Tensor [B, Hq, D], fp16, bf16 or fp32
        Query of the newest token after RoPE, unrotated. Hq is a multiple of Hkv; query head i
        reads KV head ``i // (Hq / Hkv)``.
    cache : Tensor [P, Hkv, layout.record_bytes], uint8
        Pages, the newest token's row included. Read only.
    page_table : Tensor [B, max_pages], int32
        Header and record pages per request.
    seq_lens : Tensor [B], int32
        Tokens in the cache, the newest included. 0 marks a padded row.
    layout : RecordLayout
        Byte layout of the preset.
    sm_scale : float
        Factor on scores before the softmax.

    Returns
    -------
    out : Tensor [B, Hq, D], dtype of `query`
        Attention output, rotated back. Zero on padded rows.
    lse : Tensor [B, Hq], fp32
        Natural log of the sum of exponentials. Minus infinity on padded rows.

    Raises
    ------
    ValueError
        If a shape disagrees with `layout` or with `cache`.

    References
    ----------
    docs/explanation/algorithm.md, docs/explanation/paging.md.
    """
    if query.shape[2] != layout.head_dim or query.shape[1] % cache.shape[1]:
        raise ValueError(
            f"query has shape {tuple(query.shape)}. Pass [B, Hq, {layout.head_dim}] with Hq a "
            f"multiple of the {cache.shape[1]} KV heads."
        )
    return reference.decode(query, cache, page_table, seq_lens, layout, sm_scale)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention over contiguous keys in plain torch; the newest query sees all of them.

    Parameters
    ----------
    query : Tensor [Q, Hq, D], fp32
        Queries of the last Q positions.
    key, value : Tensor [N, Hkv, D], fp32
        All positions, N >= Q, in the same basis as `query`.
    sm_scale : float
        Factor on scores before the softmax.

    Returns
    -------
    out : Tensor [Q, Hq, D], fp32
        Attention output.
    lse : Tensor [Q, Hq], fp32
        Natural log of the sum of exponentials.
    """
    return reference.attend(query, key, value, sm_scale)

"""The definition of attention over the cache, in plain torch and fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvarn_core.ops.gather import gather
from kvarn_core.rotation import cast, rotate

if TYPE_CHECKING:
    from kvarn_core.layout import RecordLayout


def decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    layout: RecordLayout,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kvarn_core.ops.decode.decode`."""
    out = torch.zeros_like(query)
    lse = torch.full(query.shape[:2], float("-inf"), device=query.device)
    rotated = rotate(query)
    for row, length in enumerate(seq_lens.tolist()):
        if not length:
            continue
        one = slice(row, row + 1)
        key, value, _ = gather(
            cache,
            page_table[one],
            seq_lens[one],
            seq_lens[one] - 1,
            layout=layout,
            engine="reference",
        )
        rows, lse[one] = attend(rotated[one], key, value, sm_scale)
        out[one] = cast(rotate(rows), query.dtype)
    return out, lse


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kvarn_core.ops.decode.attend`."""
    queries, q_heads, dim = query.shape
    length, kv_heads, _ = key.shape
    ratio = q_heads // kv_heads
    # the query heads of a KV head are rows of one matrix: [Hkv, Q * ratio, D]
    q = query.view(queries, kv_heads, ratio, dim).transpose(0, 1).flatten(1, 2)
    scores = q @ key.permute(1, 2, 0) * sm_scale  # [Hkv, Q * ratio, N]
    if queries > 1:
        position = torch.arange(length, device=key.device)
        hidden = position > position[length - queries :].repeat_interleave(ratio)[:, None]
        scores = scores.masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ value.transpose(0, 1)
    by_query = (kv_heads, queries, ratio, dim)
    return (
        out.view(by_query).transpose(0, 1).reshape(queries, q_heads, dim),
        lse.view(by_query[:3]).transpose(0, 1).reshape(queries, q_heads),
    )

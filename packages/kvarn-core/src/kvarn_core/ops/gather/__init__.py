"""Pages to contiguous keys and values, as one query position sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvarn_core.ops.gather import reference

if TYPE_CHECKING:
    from kvarn_core.layout import RecordLayout


def gather(
    cache: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    positions: torch.Tensor,
    *,
    layout: RecordLayout,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read the first tokens of each request the way a query at a given position sees them.

    A query at position p reads the sink rows (tokens < S0, if the request has a sink page and any
    tile is packed), records of the other tokens of tiles below ``layout.packed_tiles(p, hits)``,
    and exact rows after them.

    Parameters
    ----------
    cache : Tensor [P, Hkv, layout.record_bytes], uint8
        Pages. Read only.
    page_table : Tensor [B, max_pages], int32
        Header and record pages per request.
    context_lens : Tensor [B], int32
        Tokens to read of each request; at most p + 1 of them exist in the cache.
    positions : Tensor [B], int32
        Query position p of each request; decides what is packed and what is exact.
    layout : RecordLayout
        Byte layout of the preset.
    dtype : torch.dtype
        Result dtype; arithmetic is fp32.

    Returns
    -------
    key, value : Tensor [sum(context_lens), Hkv, D], `dtype`
        Rotated rows, request after request.
    cu_seqlens_k : Tensor [B + 1], int32
        Prefix sum of `context_lens`.

    References
    ----------
    docs/explanation/paging.md.
    """
    cu_seqlens_k = torch.zeros(len(context_lens) + 1, dtype=torch.int32, device=cache.device)
    cu_seqlens_k[1:] = context_lens.cumsum(0)
    starts = cu_seqlens_k.tolist()
    shape = (starts[-1], cache.shape[1], layout.head_dim)
    key, value = (torch.empty(shape, dtype=dtype, device=cache.device) for _ in range(2))
    for row, position in enumerate(positions.tolist()):
        rows = slice(starts[row], starts[row + 1])
        if rows.start < rows.stop:
            reference.gather_request(
                cache, page_table[row], position, layout, key[rows], value[rows]
            )
    return key, value, cu_seqlens_k

"""Pages to contiguous keys and values, as one query position sees them; rotation of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvarn_core.checks import check_cache, check_dense, check_requests
from kvarn_core.dispatch import check_devices, select
from kvarn_core.layout import HEAD_DIMS
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
    starts: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_context_len: int | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    engine: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read a run of tokens of each request the way a query at a given position sees them.

    A query at position p reads the sink rows (tokens < S0, if the request has a sink page and any
    tile is packed), records of the other tokens of tiles below ``layout.packed_tiles(p, hits)``,
    and exact rows after them.

    Parameters
    ----------
    cache : Tensor [P, Hkv, layout.record_bytes], uint8
        Pages; a page may be followed by a gap. Read only.
    page_table : Tensor [B, max_pages], int32
        Header and record pages per request.
    context_lens : Tensor [B], int32
        Tokens to read of each request; 0 marks a padded row.
    positions : Tensor [B], int32
        Query position p of each request; decides what is packed and what is exact.
    layout : RecordLayout
        Byte layout of the preset.
    dtype : torch.dtype
        Result dtype, unless `out` is given; arithmetic is fp32, fp16 saturates.
    starts : Tensor [B], int32, optional
        First token to read of each request, 0 by default. ``starts + context_lens <= p + 1``.
    cu_seqlens_k : Tensor [B + 1], int32, optional
        Prefix sum of `context_lens`, computed if absent.
    max_context_len : int, optional
        At least the largest of `context_lens`, in tokens.
    out : (Tensor, Tensor), [N, Hkv, D], optional
        Contiguous, fp16, bf16 or fp32, N at least ``sum(context_lens)``. Later rows stay as they
        are.
    engine : str, optional
        Forces an engine, see `kvarn_core.dispatch`.

    Returns
    -------
    key, value : Tensor [sum(context_lens), Hkv, D], `dtype`
        Rotated rows, request after request; `out` itself if it was given.
    cu_seqlens_k : Tensor [B + 1], int32
        Prefix sum of `context_lens`.

    Raises
    ------
    ValueError
        If a shape, dtype or stride disagrees with `layout`; the message names the argument.

    Notes
    -----
    With `cu_seqlens_k`, `max_context_len` and `out` given, the Triton engine neither allocates nor
    waits for the device. All engines give the same bits.

    References
    ----------
    docs/explanation/paging.md.
    """
    _check_cache(cache, layout)
    lists = {"positions": positions, "starts": starts, "cu_seqlens_k": cu_seqlens_k}
    check_requests(len(context_lens), layout, page_table, context_lens=context_lens, **lists)
    if cu_seqlens_k is None:
        cu_seqlens_k = torch.zeros(len(context_lens) + 1, dtype=torch.int32, device=cache.device)
        torch.cumsum(context_lens, 0, dtype=torch.int32, out=cu_seqlens_k[1:])
    if out is None:
        shape = (int(cu_seqlens_k[-1]), cache.shape[1], layout.head_dim)
        key, value = (torch.empty(shape, dtype=dtype, device=cache.device) for _ in range(2))
    else:
        key, value = out
        _check_out(key, value, cache, layout)
    if select(cache.device, layout, engine) == "triton":
        from kvarn_core.ops.gather import triton

        check_devices(
            cache.device, page_table=page_table, context_lens=context_lens, key=key, value=value,
            **lists,
        )  # fmt: skip
        check_dense(page_table, context_lens=context_lens, **lists)
        if max_context_len is None:
            max_context_len = int(context_lens.max()) if len(context_lens) else 0
        triton.gather(
            cache, page_table, starts, context_lens, positions, cu_seqlens_k, max_context_len,
            layout, key, value,
        )  # fmt: skip
    else:
        reference.gather(
            cache, page_table, starts, context_lens, positions, cu_seqlens_k, layout, key, value
        )
    return key, value, cu_seqlens_k


def rotate_rows(
    x: torch.Tensor, *, out: torch.Tensor | None = None, engine: str | None = None
) -> torch.Tensor:
    """Multiply rows by the normalised Hadamard matrix, into the basis of the cache or out of it.

    Parameters
    ----------
    x : Tensor [T, H, D], fp16, bf16 or fp32
        D is 64, 128 or 256. Rows may have any strides that are multiples of 16 bytes.
    out : Tensor [T, H, D], dtype of `x`, optional
        Written and returned; may be `x` itself.
    engine : str, optional
        Forces an engine, see `kvarn_core.dispatch`.

    Returns
    -------
    Tensor [T, H, D], dtype of `x`
        Computed in fp32; fp16 saturates. All engines give the same bits.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.dim() != 3 or x.shape[2] not in HEAD_DIMS:
        raise ValueError(f"x has shape {tuple(x.shape)}. Pass [T, H, D] with D in {HEAD_DIMS}.")
    if out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(
            f"out has dtype {out.dtype} and shape {tuple(out.shape)}. "
            f"Pass those of x: {x.dtype} {tuple(x.shape)}."
        )
    for name, rows in (("x", x), ("out", out)):
        apart = [rows.stride(i) * rows.element_size() for i in range(2) if rows.shape[i] > 1]
        if rows.stride(2) != 1 or any(nbytes % 16 for nbytes in apart):
            raise ValueError(
                f"{name} has strides {rows.stride()}. Pass rows that are contiguous and a multiple "
                "of 16 bytes apart."
            )
    if select(x.device, None, engine) == "triton":
        from kvarn_core.ops.gather import triton

        check_devices(x.device, out=out)
        triton.rotate_rows(x, out)
    else:
        reference.rotate_rows(x, out)
    return out


def _check_cache(cache: torch.Tensor, layout: RecordLayout) -> None:
    check_cache(cache, layout)
    page_stride, head_stride, byte_stride = cache.stride()
    together = head_stride == layout.record_bytes or cache.shape[1] == 1
    if byte_stride != 1 or not together or page_stride % 16:
        raise ValueError(
            f"cache has strides {cache.stride()}. Pass records that follow one another and pages "
            "that are a multiple of 16 bytes apart."
        )


def _check_out(
    key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, layout: RecordLayout
) -> None:
    width = (cache.shape[1], layout.head_dim)
    if key.shape != value.shape or key.dtype != value.dtype or key.shape[1:] != width:
        raise ValueError(
            f"out has shapes {tuple(key.shape)} and {tuple(value.shape)}. "
            f"Pass two tensors [N, {width[0]}, {width[1]}] of one dtype."
        )
    if not (key.is_contiguous() and value.is_contiguous()):
        raise ValueError("out is not contiguous. Pass two contiguous tensors.")

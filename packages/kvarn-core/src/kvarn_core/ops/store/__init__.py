"""New keys and values into the cache: exact rows now, records when a tile is due.

A step calls `write_sink` for prefill rows and `seal` for all rows, then reads (attention). It
calls `append` for decode rows before it reads and for prefill rows after it, because prefill still
reads the old ring.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from kvarn_core.checks import check_cache, check_dense, check_requests
from kvarn_core.dispatch import check_devices, select
from kvarn_core.ops.store import reference
from kvarn_core.spec import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    import torch

    from kvarn_core.layout import RecordLayout

    Options = dict[str, Any]
    Write = Callable[..., None]  # key, value, cache, layer=0

KERNELS = ("triton", "cuda")
OPS = ("write_sink", "seal", "append")


def write_sink(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    layout: RecordLayout,
    max_query_len: int | None = None,
    engine: str | None = None,
) -> None:
    """Write the new rows among a request's first tokens to its sink page.

    Parameters
    ----------
    key, value, cache, page_table, seq_lens, cu_seqlens_q, layout, max_query_len, engine
        As in `seal`. Only sink pages are written; a request whose sink is the null page has none.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit; the message names the argument.
    """
    inputs = key, value, cache, page_table, seq_lens, cu_seqlens_q
    options: Options = {"layout": layout, "max_query_len": max_query_len, "engine": engine}
    prepare("write_sink", *inputs, **options)(key, value, cache)


def seal(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    layout: RecordLayout,
    recipe: Recipe = Recipe.KVARN,
    layer: int = 0,
    max_query_len: int | None = None,
    engine: str | None = None,
) -> None:
    """Write every record that is due in this step.

    A tile t not taken from the prefix cache is due when position ``(t + 1) * G + f`` is among the
    new tokens; the phase f spreads the work over requests, layers and heads (`seal_phase`). Its
    rows come from the ring (older tokens) and from `key` and `value` (new ones).

    Parameters
    ----------
    key, value : Tensor [T, Hkv, D], fp16, bf16 or fp32
        New rows after RoPE, unrotated. Read only.
    cache : Tensor [P, Hkv, layout.record_bytes], uint8
        Pages. Record pages of the given requests are written in place.
    page_table : Tensor [B, max_pages], int32
        Header and record pages per request. Columns past the last used one are not read.
    seq_lens : Tensor [B], int32
        Tokens of each request after this step, new ones included. A row with fewer than its new
        tokens stores nothing; 0 marks a padded row.
    cu_seqlens_q : Tensor [B + 1], int32
        Where each request's new tokens begin in `key` and `value`.
    layout : RecordLayout
        Byte layout of the preset.
    recipe : Recipe
        How records are filled.
    layer : int
        Index of the attention layer; enters the phase only.
    max_query_len : int, optional
        At least the largest number of new tokens of a request; sizes the launch of a kernel.
        Computed on the host if not given.
    engine : str, optional
        ``reference``, ``triton`` or ``cuda``; chosen by `kvarn_core.dispatch` if not given.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit; the message names the argument.

    Notes
    -----
    Idempotent: the ring rows survive until after the deadline. The bytes of a record depend on
    its own tile only, in whatever pieces the tile arrived.

    References
    ----------
    docs/explanation/paging.md.
    """
    inputs = key, value, cache, page_table, seq_lens, cu_seqlens_q
    options: Options = {"layout": layout, "max_query_len": max_query_len, "engine": engine}
    prepare("seal", *inputs, **options, recipe=recipe)(key, value, cache, layer)


def append(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    layout: RecordLayout,
    max_query_len: int | None = None,
    engine: str | None = None,
) -> None:
    """Write the last 2 G new rows of each request to its ring, and to its sink those that belong.

    Rows of a request with one new token may be appended before or after `seal`: the row that is
    overwritten belongs to a tile that was due at least one step before. With more new tokens call
    `write_sink` and `seal` first: older rows of the ring are still needed to seal, and sink rows
    may lie before the last 2 G new ones.

    Parameters
    ----------
    key, value, cache, page_table, seq_lens, cu_seqlens_q, layout, max_query_len, engine
        As in `seal`. Only ring and sink pages are written.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit; the message names the argument.
    """
    inputs = key, value, cache, page_table, seq_lens, cu_seqlens_q
    options: Options = {"layout": layout, "max_query_len": max_query_len, "engine": engine}
    prepare("append", *inputs, **options)(key, value, cache)


def prepare(
    op: str,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    layout: RecordLayout,
    recipe: Recipe = Recipe.KVARN,
    max_query_len: int | None = None,
    engine: str | None = None,
) -> Write:
    """Make all checks and choices of an op once, for every layer of a step.

    Parameters
    ----------
    op : str
        A member of `OPS`.
    key, value, cache : Tensor
        Of any of the layers.
    page_table, seq_lens, cu_seqlens_q, layout, recipe, max_query_len, engine
        As in `seal`.

    Returns
    -------
    callable
        ``run(key, value, cache, layer=0)`` does the op. Its tensors have shapes, strides and dtypes
        of those given here, which is not checked again.

    Raises
    ------
    ValueError
        If there is no such op, and as the op itself.
    """
    if op not in OPS:
        raise ValueError(f"There is no op {op!r}. Choose one of {', '.join(OPS)}.")
    requests = page_table, seq_lens, cu_seqlens_q
    _check(key, value, cache, *requests, layout)
    chosen = select(cache.device, layout, engine, kernels=KERNELS)
    if chosen == "reference":
        return partial(_reference, op, requests, layout, recipe)
    most = _check_for_kernels(key, value, cache, *requests, max_query_len)
    if chosen == "triton" and not cache.is_contiguous():
        raise ValueError(f"cache has strides {cache.stride()}. Pass pages that follow one another.")
    kernels = import_module(f"{__name__}.{chosen}")  # whose packages are needed from here on
    run: Write = kernels.prepare(
        op, key, value, cache, *requests, layout=layout, recipe=recipe, max_query_len=most
    )
    return run


def _reference(
    op: str,
    requests: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    layout: RecordLayout,
    recipe: Recipe,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    layer: int = 0,
) -> None:
    inputs = key, value, cache, *requests
    if op == "seal":
        reference.seal(*inputs, layout=layout, recipe=recipe, layer=layer)
    else:
        getattr(reference, op)(*inputs, layout=layout)


def _check(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    layout: RecordLayout,
) -> None:
    check_cache(cache, layout)
    heads = cache.shape[1]
    for name, rows in (("key", key), ("value", value)):
        if rows.shape[1:] != (heads, layout.head_dim):
            raise ValueError(
                f"{name} has shape {tuple(rows.shape)}. Pass [T, {heads}, {layout.head_dim}]."
            )
    if len(key) != len(value):
        raise ValueError(f"key has {len(key)} rows and value {len(value)}. Pass equally many.")
    lists = {"seq_lens": seq_lens, "cu_seqlens_q": cu_seqlens_q}
    check_requests(len(seq_lens), layout, page_table, **lists)


def _check_for_kernels(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_query_len: int | None,
) -> int:
    """Check what kernels rely on; return `max_query_len`, computed if not given."""
    lists = {"seq_lens": seq_lens, "cu_seqlens_q": cu_seqlens_q}
    check_devices(cache.device, key=key, value=value, page_table=page_table, **lists)
    check_dense(page_table, **lists)
    if cache.data_ptr() % 16:
        raise ValueError(f"cache begins at {cache.data_ptr():#x}. Align it to 16 bytes.")
    if cache.stride()[1:] != (cache.shape[2], 1) or cache.stride(0) % 16:
        raise ValueError(
            f"cache has strides {cache.stride()}. Pass contiguous pages at multiples of 16 bytes."
        )
    for name, rows in (("key", key), ("value", value)):
        if rows.stride()[1:] != (rows.shape[2], 1) or (len(rows) > 1 and rows.stride(0) % 8):
            raise ValueError(
                f"{name} has strides {rows.stride()}. "
                "Pass contiguous heads and a row stride that is a multiple of 8 elements."
            )
    if max_query_len is not None or len(seq_lens) == 0:
        return max_query_len or 0
    return int(cu_seqlens_q.diff().max())

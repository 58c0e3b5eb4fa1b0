"""New keys and values into the cache: exact rows now, records when a tile is due.

A step calls `write_sink` for prefill rows and `seal` for all rows, then reads (attention). It
calls `append` for decode rows before it reads and for prefill rows after it, because prefill still
reads the old ring.
"""

from __future__ import annotations

from functools import cache as memoize
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING

from kvarn_core.dispatch import select
from kvarn_core.ops.store import reference
from kvarn_core.spec import Recipe

if TYPE_CHECKING:
    from types import ModuleType

    import torch

    from kvarn_core.layout import RecordLayout

KERNELS = ("triton", "cuda")


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
        If a shape disagrees with `layout`; the message names the argument.
    """
    inputs = key, value, cache, page_table, seq_lens, cu_seqlens_q
    chosen = select(cache.device, layout, engine, kernels=KERNELS)
    _check(key, value, cache, page_table, layout, chosen)
    if chosen == "reference":
        reference.write_sink(*inputs, layout=layout)
        return
    most = _longest(seq_lens, cu_seqlens_q) if max_query_len is None else max_query_len
    _kernels(chosen).write_sink(*inputs, layout=layout, max_query_len=most)


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
        Tokens of each request after this step, new ones included. 0 marks a padded row.
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
        If a shape disagrees with `layout`; the message names the argument.

    Notes
    -----
    Idempotent: the ring rows survive until after the deadline. The bytes of a record depend on
    its own tile only, in whatever pieces the tile arrived.

    References
    ----------
    docs/explanation/paging.md.
    """
    inputs = key, value, cache, page_table, seq_lens, cu_seqlens_q
    chosen = select(cache.device, layout, engine, kernels=KERNELS)
    _check(key, value, cache, page_table, layout, chosen)
    if chosen == "reference":
        reference.seal(*inputs, layout=layout, recipe=recipe, layer=layer)
        return
    most = _longest(seq_lens, cu_seqlens_q) if max_query_len is None else max_query_len
    _kernels(chosen).seal(*inputs, layout=layout, recipe=recipe, layer=layer, max_query_len=most)


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
        If a shape disagrees with `layout`; the message names the argument.
    """
    inputs = key, value, cache, page_table, seq_lens, cu_seqlens_q
    chosen = select(cache.device, layout, engine, kernels=KERNELS)
    _check(key, value, cache, page_table, layout, chosen)
    if chosen == "reference":
        reference.append(*inputs, layout=layout)
        return
    most = _longest(seq_lens, cu_seqlens_q) if max_query_len is None else max_query_len
    _kernels(chosen).append(*inputs, layout=layout, max_query_len=most)


@memoize
def _kernels(engine: str) -> ModuleType:
    """Module of an engine with kernels, whose packages are needed by this call only."""
    return import_module(f"{__name__}.{engine}")


def _longest(seq_lens: torch.Tensor, cu_seqlens_q: torch.Tensor) -> int:
    """The largest number of new tokens of a request, read back from the device."""
    return int(cu_seqlens_q.diff().max()) if len(seq_lens) else 0


def _check(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    layout: RecordLayout,
    engine: str,
) -> None:
    """Refuse shapes that disagree, and strides that kernels do not expect."""
    shapes = key.shape, value.shape, cache.shape, page_table.shape
    strides = key.stride(), value.stride(), cache.stride()
    _check_places(shapes, None if engine == "reference" else strides, layout)


@lru_cache
def _check_places(
    shapes: tuple[torch.Size, ...],
    strides: tuple[tuple[int, ...], ...] | None,
    layout: RecordLayout,
) -> None:
    """Check shapes, and strides if given; remembered, because all layers of a step ask the same."""
    key, value, cache, page_table = shapes
    if len(cache) != 3 or cache[2] != layout.record_bytes:
        raise ValueError(
            f"cache has shape {tuple(cache)}. "
            f"Pass uint8 [P, Hkv, {layout.record_bytes}] for {layout.preset.name}."
        )
    for name, rows in (("key", key), ("value", value)):
        if rows[1:] != (cache[1], layout.head_dim):
            raise ValueError(
                f"{name} has shape {tuple(rows)}. Pass [T, {cache[1]}, {layout.head_dim}]."
            )
    if page_table[1] < layout.header_columns:
        raise ValueError(
            f"page_table has {page_table[1]} columns. "
            f"{layout.preset.name} needs {layout.header_columns} for the header alone."
        )
    if strides is None:
        return
    *strides_of_rows, pages = strides
    if pages[1:] != (cache[2], 1) or pages[0] % 16:
        raise ValueError(
            f"cache has strides {pages}. Pass contiguous pages at multiples of 16 bytes."
        )
    for name, rows, steps in zip(("key", "value"), (key, value), strides_of_rows, strict=True):
        if steps[1:] != (rows[2], 1) or (rows[0] > 1 and steps[0] % 8):
            raise ValueError(
                f"{name} has strides {steps}. "
                "Pass contiguous heads and a row stride that is a multiple of 8 elements."
            )

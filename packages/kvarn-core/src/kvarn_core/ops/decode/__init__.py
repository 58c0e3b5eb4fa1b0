"""Attention of new queries over the compressed cache."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

import torch

from kvarn_core import dispatch
from kvarn_core.checks import check_cache, check_dense, check_requests
from kvarn_core.ops.decode import reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvarn_core.layout import RecordLayout

    Decode = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]  # query, cache, out

KERNELS = ("triton", "cuda")


def decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    layout: RecordLayout,
    sm_scale: float,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    engine: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend one query per request to everything the request has in the cache.

    Parameters
    ----------
    query : Tensor [B, Hq, D], fp16, bf16 or fp32
        Query of the newest token after RoPE, unrotated; any stride between requests. Hq is a
        multiple of Hkv; query head i reads KV head ``i // (Hq / Hkv)``. The cuda engine wants dense
        heads, an address and a stride that are multiples of 16 bytes, and the same of `out`.
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
    out : Tensor [B, Hq, D], dtype of `query`, optional
        Receives the output; any stride between requests.
    lse : Tensor [B, Hq], fp32, optional
        Receives the log-sum-exp.
    workspace : Tensor [n], uint8, optional
        Scratch memory of a kernel, n >= `workspace_bytes`, 16-byte aligned. Zero before its first
        use, used for nothing else and by one engine, one layout, one number of query and of KV
        heads, and one call at a time: the cuda engine keeps counters in it, which every call leaves
        at zero.
    engine : str, optional
        Forces an engine; see `kvarn_core.dispatch`.

    Returns
    -------
    out : Tensor [B, Hq, D], dtype of `query`
        Attention output, rotated back. Zero on padded rows.
    lse : Tensor [B, Hq], fp32
        Natural log of the sum of exponentials. Minus infinity on padded rows.

    Raises
    ------
    ValueError
        If a shape or dtype disagrees with `layout` or with `cache`, `workspace` does not fit, or a
        kernel could not read or write a tensor where it lies. The message names the argument.

    Notes
    -----
    With `out`, `lse` and `workspace` given, the kernels allocate nothing, read nothing back to the
    host and can be captured in a CUDA graph; the cuda engine after a call with each number of
    requests in `warm_up_batches`. Results depend on the batch in the last bits, because it decides
    how a request is split.

    References
    ----------
    docs/explanation/algorithm.md, docs/explanation/paging.md.
    """
    out = torch.empty_like(query) if out is None else out
    lse = query.new_empty(query.shape[:2], dtype=torch.float32) if lse is None else lse
    run = prepare(
        query, cache, page_table, seq_lens, layout=layout, sm_scale=sm_scale, out=out, lse=lse,
        workspace=workspace, engine=engine,
    )  # fmt: skip
    run(query, cache, out)
    return out, lse


def prepare(
    query: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    layout: RecordLayout,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    workspace: torch.Tensor | None = None,
    engine: str | None = None,
) -> Decode:
    """Make all checks and choices of `decode` once, for every layer of a step.

    Parameters
    ----------
    query, cache, out : Tensor
        Of any of the layers.
    page_table, seq_lens, layout, sm_scale, lse, workspace, engine
        As in `decode`.

    Returns
    -------
    callable
        ``run(query, cache, out)`` fills `out`, and `lse`. Its tensors have shapes, strides and
        dtypes of those given here, which is not checked again.

    Raises
    ------
    ValueError
        As `decode`.
    """
    _check(query, cache, page_table, seq_lens, layout, out, lse)
    chosen = dispatch.select(cache.device, layout, engine, kernels=KERNELS)
    if chosen == "reference":
        requests = page_table[: len(query)], seq_lens[: len(query)]
        return partial(_reference, *requests, layout, sm_scale, lse)
    _check_for_kernels(query, cache, page_table, seq_lens, out, lse, workspace)
    if workspace is not None:
        needed = workspace_bytes(len(query), query.shape[1], cache.shape[1], layout)
        if workspace.dtype != torch.uint8 or workspace.numel() < needed:
            raise ValueError(
                f"workspace has dtype {workspace.dtype} and {workspace.numel()} elements. "
                f"Pass uint8 and {needed} or more."
            )
    kernels = import_module(f"{__name__}.{chosen}")  # whose packages are needed from here on
    run: Decode = kernels.prepare(
        query, cache, page_table, seq_lens, layout, sm_scale, out, lse, workspace
    )
    return run


def _check(
    query: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    layout: RecordLayout,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    check_cache(cache, layout)
    fits = query.dim() == 3 and query.shape[2] == layout.head_dim
    if not fits or query.shape[1] % cache.shape[1]:
        raise ValueError(
            f"query has shape {tuple(query.shape)}. Pass [B, Hq, {layout.head_dim}] with Hq a "
            f"multiple of the {cache.shape[1]} KV heads."
        )
    check_requests(len(query), layout, page_table, seq_lens=seq_lens)
    for name, result, shape, dtype in (
        ("out", out, query.shape, query.dtype),
        ("lse", lse, query.shape[:2], torch.float32),
    ):
        if result.shape != shape or result.dtype != dtype:
            raise ValueError(
                f"{name} has dtype {result.dtype} and shape {tuple(result.shape)}. "
                f"Pass {dtype} {tuple(shape)}."
            )


def _check_for_kernels(
    query: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    workspace: torch.Tensor | None,
) -> None:
    """Check the devices and strides that kernels rely on."""
    dispatch.check_devices(
        cache.device, query=query, page_table=page_table, seq_lens=seq_lens, out=out, lse=lse,
        workspace=workspace,
    )  # fmt: skip
    check_dense(page_table, seq_lens=seq_lens, lse=lse, workspace=workspace)
    for name, tensor, wanted in (
        ("cache", cache, "pages that follow one another"),
        ("query", query[:1], "dense heads"),
        ("out", out[:1], "dense heads"),
    ):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}. Pass {wanted}.")


def _reference(
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    layout: RecordLayout,
    sm_scale: float,
    lse: torch.Tensor,
    query: torch.Tensor,
    cache: torch.Tensor,
    out: torch.Tensor,
) -> None:
    result = reference.decode(query, cache, page_table, seq_lens, layout, sm_scale)
    for given, found in zip((out, lse), result, strict=True):
        given.copy_(found)


def workspace_bytes(batch: int, num_q_heads: int, num_kv_heads: int, layout: RecordLayout) -> int:
    """Return the bytes of scratch memory that suffice for every batch of up to `batch` requests.

    They suffice for every engine that has kernels for the current GPU.

    Parameters
    ----------
    batch : int
        Largest number of requests in one call.
    num_q_heads, num_kv_heads : int
        Heads of the query and of the cache.
    layout : RecordLayout
        Byte layout of the preset.
    """
    from kvarn_core.ops.decode import cuda

    nbytes = 0
    if dispatch.triton_installed():
        from kvarn_core.ops.decode import triton

        nbytes = triton.workspace_bytes(batch, num_q_heads, num_kv_heads, layout)
    if cuda.has_kernels(layout):
        device = torch.device("cuda", torch.cuda.current_device())
        sizes = (batch, num_q_heads, num_kv_heads, layout)
        nbytes = max(nbytes, cuda.workspace_bytes(*sizes, device))
    return nbytes


def warm_up_batches(
    batch: int,
    num_q_heads: int,
    num_kv_heads: int,
    layout: RecordLayout,
    device: torch.device,
    engine: str | None = None,
) -> list[int]:
    """Return numbers of requests which together make `decode` compile all that it ever will.

    Parameters
    ----------
    batch : int
        Largest number of requests in one call.
    num_q_heads, num_kv_heads : int
        Heads of the query and of the cache.
    layout : RecordLayout
        Byte layout of the preset.
    device : torch.device
        Where the cache lies.
    engine : str, optional
        As for `decode`.
    """
    if dispatch.select(device, layout, engine, kernels=KERNELS) != "cuda":
        return [1]
    from kvarn_core.ops.decode import cuda

    return cuda.warm_up_batches(batch, num_q_heads, num_kv_heads, layout, device)


def codes_in_cuda() -> str:
    """Say how the cuda engine makes codes on the current GPU, after a test of its tensor cores.

    Returns
    -------
    str
        ``"subnormal halves"``, or ``"halves with an exponent"`` where tensor cores lose subnormals.

    Raises
    ------
    RuntimeError
        If the test cannot be compiled or run.

    References
    ----------
    docs/explanation/kernels.md, section "Decode on CUDA".
    """
    from kvarn_core.ops.decode import cuda

    device = torch.device("cuda", torch.cuda.current_device())
    exact = cuda.subnormals_are_exact(device)
    return "subnormal halves" if exact else "halves with an exponent"


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

"""Attention of new queries over the compressed cache."""

from __future__ import annotations

from functools import cache as memoize
from importlib import import_module
from typing import TYPE_CHECKING

import torch

from kvarn_core import dispatch
from kvarn_core.ops.decode import reference

if TYPE_CHECKING:
    from types import ModuleType

    from kvarn_core.layout import RecordLayout

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
        use, used for nothing else and by one engine, one layout and one call at a time: the cuda
        engine keeps counters in it, which every call leaves at zero.
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
        If a shape disagrees with `layout` or with `cache`, `workspace` is too small, or rows of
        `query` or `out` lie where the cuda engine cannot read or write them.

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
    if query.shape[2] != layout.head_dim or query.shape[1] % cache.shape[1]:
        raise ValueError(
            f"query has shape {tuple(query.shape)}. Pass [B, Hq, {layout.head_dim}] with Hq a "
            f"multiple of the {cache.shape[1]} KV heads."
        )
    chosen = dispatch.select(cache.device, layout, engine, kernels=KERNELS)
    if chosen == "reference":
        result = reference.decode(query, cache, page_table, seq_lens, layout, sm_scale)
        given = (out, lse)
        return tuple(r if g is None else g.copy_(r) for r, g in zip(result, given, strict=True))  # type: ignore[return-value]
    kernels = _kernels(chosen)
    if workspace is not None:
        sizes = query.shape[0], query.shape[1], cache.shape[1], layout
        needed = kernels.workspace_bytes(*sizes, cache.device)
        if workspace.numel() < needed:
            raise ValueError(f"workspace has {workspace.numel()} bytes. Pass {needed} or more.")
    out = torch.empty_like(query) if out is None else out
    lse = query.new_empty(query.shape[:2], dtype=torch.float32) if lse is None else lse
    arguments = (query, cache, page_table, seq_lens, layout, sm_scale, out, lse, workspace)
    kernels.decode(*arguments)
    return out, lse


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
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    engines = ["triton"]
    if _kernels("cuda").has_kernels(layout):
        engines.append("cuda")
    sizes = batch, num_q_heads, num_kv_heads, layout, device
    nbytes: int = max(_kernels(engine).workspace_bytes(*sizes) for engine in engines)
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
    sizes = batch, num_q_heads, num_kv_heads, layout, device
    batches: list[int] = _kernels("cuda").warm_up_batches(*sizes)
    return batches


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
    device = torch.device("cuda", torch.cuda.current_device())
    exact = _kernels("cuda").subnormals_are_exact(device)
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


@memoize
def _kernels(engine: str) -> ModuleType:
    """Module of an engine with kernels, whose packages are needed by this call only."""
    return import_module(f"{__name__}.{engine}")

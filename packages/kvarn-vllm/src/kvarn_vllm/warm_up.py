"""Every kernel runs once before vLLM measures memory and captures graphs.

A kernel that is first needed while serving would be compiled there, for seconds, and its module
would take memory that nobody counted. The calls below are those of `batched` and `prefill` in
their variants, on padded rows, which every op skips.
"""

from __future__ import annotations

from functools import cache as memoize
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from kvarn_core.ops.decode import decode, warm_up_batches
from kvarn_core.ops.gather import gather, rotate_rows
from kvarn_core.ops.store import append, seal, write_sink
from kvarn_vllm.streams import beside

if TYPE_CHECKING:
    from kvarn_vllm.batched import Batched


@memoize
def warm_up(path: Batched, dtype: torch.dtype, device: torch.device) -> None:
    """Run every op of a step once; repeated calls for the same kind of layer do nothing.

    Parameters
    ----------
    path : Batched
        How the layer is served.
    dtype : torch.dtype
        Dtype of the model.
    device : torch.device
        Where it runs.
    """
    layout, workspace = path.layout, path.workspace
    kv_heads, dim = workspace.num_kv_heads, layout.head_dim
    query = torch.zeros(1, workspace.num_q_heads, dim, dtype=dtype, device=device)
    key = torch.zeros(1, kv_heads, dim, dtype=dtype, device=device)
    cache = torch.zeros(1, kv_heads, layout.record_bytes, dtype=torch.uint8, device=device)
    table = torch.zeros(1, layout.columns(1), dtype=torch.int32, device=device)
    nothing = torch.zeros(1, dtype=torch.int32, device=device)
    bounds = torch.zeros(2, dtype=torch.int32, device=device)

    for new in (1, 2 * layout.group):  # decode rows, prefill rows
        common: dict[str, Any] = {"layout": layout, "max_query_len": new, "engine": path.engine}
        rows = (key, key, cache, table, nothing, bounds)
        write_sink(*rows, **common)
        with beside(partial(seal, *rows, recipe=path.recipe, **common), device):
            append(*rows, **common)
    heads = workspace.num_q_heads, kv_heads
    for requests in warm_up_batches(workspace.max_requests, *heads, layout, device, path.engine):
        scratch, lse = workspace.decode(requests)
        queries = query.new_zeros(requests, *query.shape[1:])
        decode(
            queries, cache, table.expand(requests, -1), nothing.expand(requests).contiguous(),
            layout=layout, sm_scale=path.scale, out=torch.empty_like(queries), lse=lse,
            workspace=scratch, engine=path.engine,
        )  # fmt: skip

    old_key, old_value = workspace.context(1, dtype)
    gather(
        cache, table, nothing, nothing, layout=layout, dtype=dtype, starts=nothing,
        cu_seqlens_k=bounds, max_context_len=1, out=(old_key, old_value), engine=path.engine,
    )  # fmt: skip
    rotated = rotate_rows(query, engine=path.engine)
    out = torch.empty_like(rotated)
    one = torch.tensor([0, 1], dtype=torch.int32, device=device)
    for causal in (True, False):
        lse = path.attention.attend(rotated, key, key, one, one, 1, 1, causal=causal, out=out)
    path.attention.merge(out, lse, rotated, lse)

"""The ops of kvarn_core as a server calls them: everything given that keeps them off the host."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from cases import Case, Job

from kvarn_core.ops.decode import decode, workspace_bytes
from kvarn_core.ops.gather import gather, rotate_rows
from kvarn_core.ops.store import append, seal
from kvarn_core.testing.timing import distinct_sets
from kvarn_core.testing.workload import decode_bytes, random_cache, record_tables, tiles_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvarn_core import RecordLayout

MAX_ERROR = 4e-3  # of decode, relative to the fp32 reference on the same records


@dataclass(frozen=True)
class Sets:
    """Memory sets of one batch: a cache and one page table per set, none sharing a page."""

    cache: torch.Tensor
    tables: torch.Tensor
    seq_lens: torch.Tensor

    @classmethod
    def make(
        cls,
        layout: RecordLayout,
        seq_lens: Sequence[int],
        num_kv_heads: int,
        *,
        sets: int,
        device: torch.device,
    ) -> Sets:
        """Random caches on `device`."""
        tables, pages = record_tables(layout, seq_lens, sets=sets)
        return cls(
            random_cache(layout, tables, pages, num_kv_heads, device=device),
            tables.to(device),
            torch.tensor(seq_lens, dtype=torch.int32, device=device),
        )


def prepare_decode(case: Case, query: torch.Tensor, l2_bytes: int, engine: str) -> Job:
    """Calls of `decode`.

    Parameters
    ----------
    case : Case
        Shape and lengths.
    query : Tensor [B, Hq, D]
        Queries; their device is where everything happens.
    l2_bytes : int
        Size of the L2 cache.
    engine : str
        Engine of `kvarn_core.dispatch`.

    Returns
    -------
    Job
    """
    nbytes = decode_bytes(case.layout, case.seq_lens, case.num_q_heads, case.num_kv_heads)
    memory = Sets.make(
        case.layout,
        case.seq_lens,
        case.num_kv_heads,
        sets=distinct_sets(nbytes, l2_bytes),
        device=query.device,
    )
    size = workspace_bytes(case.batch, case.num_q_heads, case.num_kv_heads, case.layout)
    shared = {
        "layout": case.layout,
        "sm_scale": case.head_dim**-0.5,
        "out": torch.empty_like(query),
        "lse": torch.empty(query.shape[:2], device=query.device),
        "workspace": torch.zeros(size, dtype=torch.uint8, device=query.device),
        "engine": engine,
    }
    calls = [
        partial(decode, query, memory.cache, table, memory.seq_lens, **shared)
        for table in memory.tables
    ]
    return Job.over(calls, nbytes)


def prepare_store(
    case: Case, new_tokens: int, device: torch.device, l2_bytes: int, engine: str
) -> dict[str, Job]:
    """Calls of `append` and `seal` when each request of `case` gets `new_tokens` more tokens.

    Bytes of `seal` are those of the tiles that become complete: rows read, records written. There
    are at most 20 memory sets: a single step moves too little to empty the L2 cache.
    """
    layout, heads = case.layout, case.num_kv_heads
    row = heads * layout.row_bytes
    tokens = case.batch * new_tokens
    tiles = sum(tiles_in(n - new_tokens, n, layout.group) for n in case.seq_lens)
    stored = sum(min(new_tokens, layout.ring_rows) for _ in case.seq_lens)
    sets = distinct_sets(max(stored, 1) * row, l2_bytes)
    memory = Sets.make(layout, case.seq_lens, heads, sets=min(sets, 20), device=device)
    width = case.num_q_heads + 2 * heads  # rows are slices of a fused projection
    fused = torch.randn(tokens, width, layout.head_dim, device=device, dtype=torch.float16)
    key = fused[:, case.num_q_heads : case.num_q_heads + heads]
    value = fused[:, case.num_q_heads + heads :]
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * new_tokens
    shared = {"layout": layout, "max_query_len": new_tokens, "engine": engine}

    def over(op, nbytes: int, **more: object) -> Job:  # type: ignore[no-untyped-def]
        where = [(memory.cache, table, memory.seq_lens, starts) for table in memory.tables]
        return Job.over(
            [partial(op, key, value, *place, **shared, **more) for place in where], nbytes
        )

    return {
        "append": over(append, 2 * stored * row),
        "seal": over(seal, tiles * (layout.group * row + heads * layout.record_bytes)),
    }


def prepare_gather(case: Case, device: torch.device, l2_bytes: int, engine: str) -> Job:
    """Calls of `gather` for the whole context of each request, into a reserved workspace."""
    tokens, heads = sum(case.seq_lens), case.num_kv_heads
    shape = (tokens, heads, case.head_dim)
    key, value = (torch.empty(shape, dtype=torch.float16, device=device) for _ in range(2))
    nbytes = decode_bytes(case.layout, case.seq_lens, 0, heads) + 4 * tokens * heads * case.head_dim
    memory = Sets.make(
        case.layout, case.seq_lens, heads, sets=distinct_sets(nbytes, l2_bytes), device=device
    )
    starts = torch.zeros(case.batch + 1, dtype=torch.int32, device=device)
    starts[1:] = memory.seq_lens.cumsum(0)
    positions = memory.seq_lens - 1
    calls = [
        partial(
            gather,
            memory.cache,
            table,
            memory.seq_lens,
            positions,
            layout=case.layout,
            dtype=torch.float16,
            starts=torch.zeros_like(memory.seq_lens),
            cu_seqlens_k=starts,
            max_context_len=max(case.seq_lens),
            out=(key, value),
            engine=engine,
        )
        for table in memory.tables
    ]
    return Job.over(calls, nbytes)


def prepare_rotate(case: Case, tokens: int, device: torch.device, engine: str) -> Job:
    """Calls of `rotate_rows` on the queries of `tokens` tokens."""
    shape = (2, tokens, case.num_q_heads, case.head_dim)
    rows = torch.randn(shape, device=device, dtype=torch.float16)
    out = torch.empty_like(rows)
    calls = [partial(rotate_rows, rows[i], out=out[i], engine=engine) for i in range(2)]
    return Job.over(calls, 4 * rows[0].numel())


def check_decode(case: Case, query: torch.Tensor, engine: str) -> float:
    """Error of `decode` against the reference on one random cache, relative L2.

    Raises
    ------
    RuntimeError
        If the error exceeds `MAX_ERROR`: the time of a wrong result is of no interest.
    """
    memory = Sets.make(case.layout, case.seq_lens, case.num_kv_heads, sets=1, device=query.device)
    where = (query, memory.cache, memory.tables[0], memory.seq_lens)
    tested, expected = (
        decode(*where, layout=case.layout, sm_scale=case.head_dim**-0.5, engine=name)[0].float()
        for name in (engine, "reference")
    )
    error = float((tested - expected).norm() / expected.norm())
    if not error <= MAX_ERROR:
        raise RuntimeError(
            f"decode with engine {engine} is wrong: error {error:.2e}, allowed {MAX_ERROR}. "
            "Run the kernel tests before the benchmark."
        )
    return error

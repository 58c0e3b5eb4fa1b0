"""Inputs of benchmarks: lengths, permuted page tables, random caches, and the bytes a call reads.

The time of a kernel does not depend on what the codes say, so records are random bytes with scale
vectors of ordinary size. Everything is seeded.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from kvarn_core.layout import HIT_COLUMN, SINK_COLUMN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvarn_core.layout import RecordLayout

SCALES = (0.01, 0.05)  # range of random scale vectors


def lengths(
    batch: int, context: int, *, group: int = 128, mixed: bool = False, seed: int = 0
) -> list[int]:
    """Context lengths of a batch.

    Parameters
    ----------
    batch : int
        Requests.
    context : int
        Longest length, tokens.
    group : int
        Lengths lie anywhere in the last tile: ``context - group + 1 .. context``.
    mixed : bool
        Spread lengths over ``context / 10 .. context`` instead, uniformly in the logarithm.
    seed : int
        Of the random lengths.

    Returns
    -------
    list of int
    """
    draw = random.Random(seed)  # noqa: S311 - a workload, not a secret
    if mixed:
        return [round(context * 10 ** -draw.random()) for _ in range(batch)]
    # one of each stretch of the tile, so that small batches are typical too
    return [context - int(group * (i + draw.random()) / batch) for i in range(batch)]


def exact_rows(layout: RecordLayout, num_tokens: int) -> int:
    """Exact rows that a decode query reads of a request without prefix hits, sink included."""
    tiles = layout.packed_tiles(num_tokens - 1)
    sink = min(layout.sink_rows, num_tokens) if tiles else 0
    return int(num_tokens - tiles * layout.group + sink)


def decode_bytes(
    layout: RecordLayout, seq_lens: Sequence[int], num_q_heads: int, num_kv_heads: int
) -> int:
    """Bytes one decode step of one layer must move: records, exact rows, fp16 query and output.

    Partial results of split contexts are not counted: they differ between engines.
    """
    cache = sum(
        layout.packed_tiles(n - 1) * layout.record_bytes + exact_rows(layout, n) * layout.row_bytes
        for n in seq_lens
    )
    return int(num_kv_heads * cache + 4 * len(seq_lens) * num_q_heads * layout.head_dim)


def dense_decode_bytes(
    token_bytes: int, seq_lens: Sequence[int], num_q_heads: int, head_dim: int
) -> int:
    """The same for a cache of `token_bytes` bytes per token, all KV heads together."""
    return sum(seq_lens) * token_bytes + 4 * len(seq_lens) * num_q_heads * head_dim


def page_tables(
    columns: Sequence[int], *, sets: int = 1, seed: int = 0
) -> tuple[torch.Tensor, int]:
    """Random page tables that share no page.

    Parameters
    ----------
    columns : sequence of int
        Pages of each request.
    sets : int
        Independent tables for the same requests.
    seed : int
        Of the permutation.

    Returns
    -------
    tables : Tensor [sets, B, max(columns)], int32, CPU
        Pages 1, 2, ... in random order; 0 behind the last page of a request.
    pages : int
        Pages of a cache for all sets, the unused page 0 included.
    """
    used = sets * sum(columns)
    order = torch.randperm(used, generator=torch.Generator().manual_seed(seed)).int() + 1
    tables = torch.zeros(sets, len(columns), max(columns), dtype=torch.int32)
    tables[torch.arange(max(columns)) < torch.tensor([columns] * sets)[..., None]] = order
    return tables, used + 1


def record_tables(
    layout: RecordLayout, seq_lens: Sequence[int], *, sets: int = 1, seed: int = 0
) -> tuple[torch.Tensor, int]:
    """Page tables [sets, B, columns] of requests without prefix hits, and the pages they need."""
    tables, pages = page_tables([layout.columns(n) for n in seq_lens], sets=sets, seed=seed)
    tables[..., HIT_COLUMN] = 0
    return tables, pages


def random_cache(
    layout: RecordLayout,
    tables: torch.Tensor,
    pages: int,
    num_kv_heads: int,
    *,
    device: torch.device,
    seed: int = 0,
) -> torch.Tensor:
    """A cache of random records, with random exact rows on the sink and ring pages of `tables`.

    Parameters
    ----------
    layout : RecordLayout
        Byte layout of the preset.
    tables : Tensor [sets, B, columns], int32
        Page tables, of `record_tables`.
    pages, num_kv_heads : int
        Size of the cache.
    device : torch.device
        Where the cache is made.
    seed : int
        Of the bytes.

    Returns
    -------
    Tensor [pages, num_kv_heads, layout.record_bytes], uint8
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape = (pages, num_kv_heads, layout.record_bytes)
    cache = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
    for name, field in layout.fields.items():
        if not name.endswith("codes"):
            vector = cache[..., field.offset : field.end].view(torch.float16)
            vector.uniform_(*SCALES, generator=generator)
    exact = tables[..., SINK_COLUMN : layout.header_columns].flatten().to(device).long()
    exact_shape = (len(exact), num_kv_heads, layout.record_bytes // 2)
    rows = torch.randn(exact_shape, dtype=torch.float16, device=device, generator=generator)
    cache[exact] = rows.view(torch.uint8)
    return cache


def fill_value_scales(
    cache: torch.Tensor, records: torch.Tensor, layout: RecordLayout, scale: float
) -> None:
    """Give every row of V on some record pages this scale.

    Parameters
    ----------
    cache : Tensor [P, Hkv, layout.record_bytes], uint8
        Written in place.
    records : Tensor, integers
        The pages.
    layout : RecordLayout
        Byte layout of the preset.
    scale : float
        At most 65504.
    """
    field = layout.fields["v_scale"]
    row = torch.full((field.nbytes // 2,), scale, dtype=torch.float16, device=cache.device)
    pages = records.flatten().long().to(cache.device)
    cache[pages, :, field.offset : field.end] = row.view(torch.uint8)


def tiles_in(first: int, last: int, group: int) -> int:
    """Tiles that become complete with the tokens ``first .. last - 1``."""
    return last // group - first // group

"""Every kernel once at small sizes, for compute-sanitizer: ``nox -s sanitize``.

Lengths end inside and at the edges of tiles, pages are permuted, one request has prefix hits and no
sink. Results are compared elsewhere; here only memory accesses count.
"""

from __future__ import annotations

import os

import torch

from kvarn_core import nvrtc
from kvarn_core.layout import HIT_COLUMN, SINK_COLUMN, RecordLayout
from kvarn_core.ops.decode import decode
from kvarn_core.ops.gather import gather, rotate_rows
from kvarn_core.ops.quantize import quantize
from kvarn_core.ops.store import append, seal, write_sink
from kvarn_core.rotation import exact_rows
from kvarn_core.spec import PRESETS
from kvarn_core.testing.workload import random_cache, record_tables

SHAPES = [  # preset, head dimension, KV heads, query heads per KV head
    ("kvarn_k4v2_g128", 128, 2, 8),
    ("kvarn_k2v2_g64", 64, 1, 1),
    ("kvarn_k4v4_g64", 256, 2, 4),
]
LENGTHS = [1, 127, 128, 129, 257, 511]
NEW = [1, 127, 64, 129, 130, 2]  # new tokens of each request in a step with prefills
COPIES = [1, 15, 30]  # of all requests in a decode step: one CTA for each processor, two, three
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


def engines() -> list[str]:
    """Those with kernels for this GPU; what the machine lacks for them fails when they run."""
    hopper = DEVICE.type == "cuda" and torch.cuda.get_device_capability() == nvrtc.CAPABILITY
    return ["triton", "cuda"] if hopper else ["triton"]


def run(layout: RecordLayout, heads: int, ratio: int, engine: str) -> None:
    """Store, decode and gather one batch."""
    tables, pages = record_tables(layout, LENGTHS)
    tables[0, 4, HIT_COLUMN], tables[0, 5, SINK_COLUMN] = 1, 0
    cache = random_cache(layout, tables, pages, heads, device=DEVICE)
    table = tables[0].to(DEVICE)
    lens = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
    for news in (NEW, [1] * len(LENGTHS)):
        starts = torch.tensor([0, *news], device=DEVICE).cumsum(0).int()
        shape = (sum(news), heads, layout.head_dim)
        key, value = torch.randn(2, *shape, dtype=torch.float16, device=DEVICE).unbind(0)
        where = (key, value, cache, table, lens, starts)
        write_sink(*where, layout=layout, engine=engine, max_query_len=max(news))
        seal(*where, layout=layout, engine=engine, layer=1, max_query_len=max(news))
        append(*where, layout=layout, engine=engine, max_query_len=max(news))
    for copies in COPIES:
        shape = (copies * len(LENGTHS), heads * ratio, layout.head_dim)
        query = torch.randn(shape, dtype=torch.float16, device=DEVICE)
        where = query, cache, table.repeat(copies, 1), lens.repeat(copies)
        decode(*where, layout=layout, sm_scale=0.1, engine=engine)
    gather(cache, table, lens, lens - 1, layout=layout, engine=engine)
    rotate_rows(query, engine=engine)
    tiles = torch.randn(2, 3, layout.group, layout.head_dim, device=DEVICE)
    quantize(*(exact_rows(tile, layout) for tile in tiles), layout, engine=engine)


def main() -> None:
    """All shapes."""
    for engine in engines():
        for preset, dim, heads, ratio in SHAPES:
            run(RecordLayout(PRESETS[preset], dim), heads, ratio, engine)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            print(engine, preset, dim, flush=True)


if __name__ == "__main__":
    main()

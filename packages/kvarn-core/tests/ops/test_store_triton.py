"""Triton stores the same bytes every time; what they are is in test_store_kernels.py."""

from __future__ import annotations

import pytest
import torch
from store_steps import FILL, new_rows

from kvarn_core.layout import RecordLayout
from kvarn_core.ops.store import append, seal, write_sink
from kvarn_core.spec import PRESETS
from kvarn_core.testing.paging import allocate


@pytest.mark.gpu
def test_a_thousand_runs_give_one_result() -> None:
    layout = RecordLayout(PRESETS["kvarn_k4v2_g128"], 128)
    total, device = 700, torch.device("cuda")
    rows = [new_rows(layout, total, seed=i, heads=8) for i in range(4)]
    paging = allocate(layout, [total] * 4, num_kv_heads=8, seed=11, fill=FILL)
    key, value = (torch.cat(part).to(device) for part in zip(*rows, strict=True))
    empty, table = paging.cache.to(device), paging.page_table.to(device)
    lens = torch.full((4,), total, dtype=torch.int32, device=device)
    starts = torch.arange(5, dtype=torch.int32, device=device) * total
    first = None
    for _ in range(1000):
        cache = empty.clone()
        for write in (write_sink, seal, append):
            write(key, value, cache, table, lens, starts, layout=layout, max_query_len=total,
                  engine="triton")  # fmt: skip
        first = cache if first is None else first
        assert torch.equal(cache, first)

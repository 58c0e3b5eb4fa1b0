"""Storing in CUDA C++: what it refuses, and on a GPU graphs, streams and repetition.

That it stores what the reference stores is in test_store_kernels.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from store_steps import FILL, assert_a_thousand_runs_agree, assert_same_cache, new_rows, store

from kvarn_core import nvrtc
from kvarn_core.layout import HEAD_DIMS, RecordLayout
from kvarn_core.ops.store import append, cuda, seal, write_sink
from kvarn_core.spec import PRESETS, Recipe
from kvarn_core.testing.paging import Paging, allocate

MAIN = RecordLayout(PRESETS["kvarn_k4v2_g128"], 128)
SMALL = RecordLayout(PRESETS["kvarn_k4v2_g64"], 64)


@pytest.fixture
def hopper() -> torch.device:
    if torch.cuda.get_device_capability() != nvrtc.CAPABILITY:
        pytest.skip("needs a GPU of compute capability 9.0")
    return torch.device("cuda", 0)


def _on_gpu(paging: Paging, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return paging.cache.to(device), paging.page_table.to(device)


@pytest.mark.parametrize("op", [append, write_sink, seal])
def test_what_kernels_cannot_read_is_refused(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvarn_core.dispatch._cuda_obstacle", lambda device: None)
    paging = allocate(SMALL, [100])
    flat = torch.zeros(10 * 2 * 64 + 1, dtype=torch.float16)
    rows, shifted = (flat[i : i + 10 * 2 * 64].view(10, 2, 64) for i in (0, 1))
    where = [torch.tensor(x, dtype=torch.int32) for x in ([10], [0, 10])]
    options: dict[str, Any] = {"layout": SMALL, "engine": "cuda", "max_query_len": 10}
    with pytest.raises(ValueError, match=r"^value begins at 0x\w+\. Align it to 16 bytes\.$"):
        op(rows, shifted, paging.cache, paging.page_table, *where, **options)
    for key, value in ((rows, rows.float()), (rows.double(), rows.double())):
        with pytest.raises(
            ValueError, match=r"^key and value have dtypes .* in bf16 or in fp32\.$"
        ):
            op(key, value, paging.cache, paging.page_table, *where, **options)


@pytest.mark.gpu
def test_one_graph_stores_every_position(hopper: torch.device) -> None:
    """A captured decode step, replayed over 2 G + 5 positions, leaves what the reference does."""
    begin, end, heads = 300, 300 + 2 * MAIN.group + 5, 8
    behind = (0, 40, 128)  # requests in three phases
    rows = [new_rows(MAIN, end, seed=i, heads=heads) for i in range(3)]
    paging = allocate(MAIN, [end] * 3, num_kv_heads=heads, seed=12, fill=FILL)
    first = [begin - n for n in behind]
    store(paging, rows, first, first, "reference", hopper)
    cache, table = _on_gpu(paging, hopper)
    key, value = (torch.zeros(3, heads, 128, dtype=torch.float32, device=hopper) for _ in range(2))
    lens, starts = torch.zeros(3).int().to(hopper), torch.arange(4).int().to(hopper)
    options: dict[str, Any] = {"layout": MAIN, "max_query_len": 1, "engine": "cuda"}

    def step() -> None:
        append(key, value, cache, table, lens, starts, **options)
        seal(key, value, cache, table, lens, starts, **options, layer=3)

    step()  # nothing to store: compiles and loads
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for n in range(begin + 1, end + 1):
        lengths = [n - b for b in behind]
        for i, length in enumerate(lengths):
            key[i], value[i] = (x[length - 1].to(hopper) for x in rows[i])
        lens.copy_(torch.tensor(lengths))
        graph.replay()
        store(paging, rows, lengths, [1] * 3, "reference", hopper, layer=3)
    assert_same_cache(cache.cpu(), paging, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_thousand_runs_give_one_result(preset: str, dim: int, hopper: torch.device) -> None:
    assert_a_thousand_runs_agree(RecordLayout(PRESETS[preset], dim), "cuda", hopper)


@pytest.mark.gpu
def test_a_step_may_seal_beside_its_append(hopper: torch.device) -> None:
    """Sealing on a second stream while rows are appended gives the bytes of one stream."""
    batch, length, heads = 64, 5 * MAIN.group, 8
    rows = [new_rows(MAIN, length, seed=0, heads=heads)] * batch
    paging = allocate(MAIN, [length] * batch, num_kv_heads=heads, seed=13, fill=FILL)
    cache, table = _on_gpu(paging, hopper)
    key, value = (
        torch.cat([x[: length - 1] for x in kv]).to(hopper) for kv in zip(*rows, strict=True)
    )
    before = length - 1
    lens = torch.full((batch,), before, dtype=torch.int32, device=hopper)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=hopper) * before
    for write in (write_sink, seal, append):
        write(key, value, cache, table, lens, starts, layout=MAIN, max_query_len=before,
              engine="cuda")  # fmt: skip
    key, value = (torch.cat([x[before:] for x in kv]).to(hopper) for kv in zip(*rows, strict=True))
    where = (table, lens + 1, torch.arange(batch + 1, dtype=torch.int32, device=hopper))
    options: dict[str, Any] = {"layout": MAIN, "max_query_len": 1, "engine": "cuda"}
    want = cache.clone()
    append(key, value, want, *where, **options)
    appended = want.clone()
    seal(key, value, want, *where, **options)
    assert not torch.equal(want, appended), "nothing is due"
    side = torch.cuda.Stream()
    for _ in range(200):
        got = cache.clone()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            seal(key, value, got, *where, **options)
        append(key, value, got, *where, **options)
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(got, want)


def test_every_form_has_a_name_of_its_own() -> None:
    names = [variant.name for variant in cuda.variants()]
    assert len(names) == len(set(names)) == 18 * 3 * (1 + len((Recipe.KVARN, Recipe.PAPER)))

"""Triton decode against the reference, interpreted or on a GPU."""

from __future__ import annotations

import pytest
import torch

from kvarn_core.layout import HIT_COLUMN, SINK_COLUMN, RecordLayout
from kvarn_core.ops.decode import decode, prepare, workspace_bytes
from kvarn_core.spec import PRESETS
from kvarn_core.testing.compare import assert_close, assert_same_bits
from kvarn_core.testing.inputs import draw
from kvarn_core.testing.paging import POISONS, Paging, allocate, store_sequence
from kvarn_core.testing.plugin import poison
from kvarn_core.testing.workload import lengths, random_cache, record_tables

pytestmark = pytest.mark.kernel

SMALL = RecordLayout(PRESETS["kvarn_k4v2_g64"], 64)
ROUNDING = 4e-3  # fp16 queries, folded scales and probabilities; 4-bit codes lose 20 times as much

# preset, head_dim, KV heads, query heads per KV head, tokens of each request
CASES = [
    ("kvarn_k4v2_g64", 64, 2, 1, (1, 0, 63, 64)),
    ("kvarn_k4v2_g64", 64, 1, 8, (65, 127, 128, 129)),
    ("kvarn_k4v2_g64", 128, 1, 5, (191, 192, 193)),
    ("kvarn_k4v2_g64", 64, 1, 16, (260, 321)),
    ("kvarn_k4v2_g128", 128, 1, 4, (1, 128, 257, 400)),
    ("kvarn_k4v4_g128", 128, 1, 7, (385,)),
    ("kvarn_k2v2_g128", 128, 1, 8, (385,)),
    ("kvarn_k4v2_g128", 256, 1, 4, (385,)),
    ("kvarn_k4v4_g128", 256, 1, 8, (385,)),
    ("kvarn_k2v2_g128", 256, 1, 8, (385,)),
    ("kvarn_k4v2_g128", 64, 1, 8, (385,)),
    ("kvarn_k4v4_g64", 64, 1, 8, (193,)),
    ("kvarn_k2v2_g64", 64, 1, 8, (193,)),
    ("kvarn_k2v2_g64", 256, 1, 8, (193,)),
]
each_case = pytest.mark.parametrize(
    ("name", "dim", "heads", "ratio", "tokens"),
    [pytest.param(*c, id=f"{c[0][6:]}-d{c[1]}-kv{c[2]}-gqa{c[3]}-len{c[4][-1]}") for c in CASES],
)


def _stored(layout: RecordLayout, tokens: tuple[int, ...], heads: int, **options: object) -> Paging:
    paging = allocate(layout, [max(n, 1) for n in tokens], num_kv_heads=heads, **options)  # type: ignore[arg-type]
    for i, n in enumerate(tokens):
        shape = (n, heads, layout.head_dim)
        if n:
            key, value = draw("gaussian", shape, seed=i), draw("gaussian", shape, seed=i + 50)
            store_sequence(paging, i, key, value, [n])
    return paging


def _query(paging: Paging, ratio: int, dtype: torch.dtype) -> torch.Tensor:
    batch, heads = len(paging.capacities), paging.cache.shape[1]
    return draw("gaussian", (batch, heads * ratio, paging.layout.head_dim), seed=9).to(dtype)


def _both(
    paging: Paging, query: torch.Tensor, tokens: tuple[int, ...], device: torch.device
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    lens = torch.tensor(tokens, dtype=torch.int32)
    where = [x.to(device) for x in (query, paging.cache, paging.page_table, lens)]
    options = {"layout": paging.layout, "sm_scale": paging.layout.head_dim**-0.5}
    want = decode(*where, **options, engine="reference")
    got = decode(*where, **options, engine="triton")
    return got, want


@each_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_triton_agrees_with_the_reference(
    name: str,
    dim: int,
    heads: int,
    ratio: int,
    tokens: tuple[int, ...],
    dtype: torch.dtype,
    kernel_device: torch.device,
) -> None:
    if dtype == torch.bfloat16 and dim == 256:
        pytest.skip("head_dim 256 is covered in fp16")
    paging = _stored(RecordLayout(PRESETS[name], dim), tokens, heads)
    (out, lse), (want, want_lse) = _both(
        paging, _query(paging, ratio, dtype), tokens, kernel_device
    )
    unit = 2.0**-8 if dtype == torch.bfloat16 else 0.0  # the interpreter truncates to bf16
    assert_close(out, want, tolerance=ROUNDING + unit)
    assert_close(lse, want_lse, tolerance=ROUNDING)


def test_a_query_that_is_no_number_gets_none(kernel_device: torch.device) -> None:
    tokens = (200, 40)
    paging = _stored(SMALL, tokens, 1)
    query = _query(paging, 4, torch.float16)
    query[0, 1, 5] = torch.nan
    for out, _ in _both(paging, query, tokens, kernel_device):
        lost = out.isnan().any(2)
        assert lost[0].tolist() == [False, True, False, False]
        assert not lost[1].any()


def test_hits_and_a_missing_sink(kernel_device: torch.device) -> None:
    tokens = (300, 230, 200)
    paging = allocate(SMALL, tokens, hits=[0, 3, 0], donors=[0, 0, 0])
    paging.page_table[2, SINK_COLUMN] = 0
    for i, first in ((0, 0), (1, 3 * SMALL.group), (2, 0)):
        rows = (tokens[i] - first, 2, SMALL.head_dim)
        key, value = draw("gaussian", rows, seed=i), draw("gaussian", rows, seed=i + 50)
        store_sequence(paging, i, key, value, [rows[0]], start=first)
    assert paging.page_table[1, HIT_COLUMN] == 3
    (out, lse), (want, want_lse) = _both(
        paging, _query(paging, 2, torch.float16), tokens, kernel_device
    )
    assert_close(out, want, tolerance=ROUNDING)
    assert_close(lse, want_lse, tolerance=ROUNDING)


def test_a_hit_count_beyond_the_request_is_not_followed(kernel_device: torch.device) -> None:
    """Its records would lie outside the page table."""
    tokens = (1, 40)
    paging = _stored(SMALL, tokens, 1)
    query = _query(paging, 8, torch.float16)
    (want, _), _ = _both(paging, query, tokens, kernel_device)
    paging.page_table[:, HIT_COLUMN] = 1000
    (got, _), _ = _both(paging, query, tokens, kernel_device)
    assert_same_bits(got, want)


def test_bytes_that_are_not_written_change_no_bit(kernel_device: torch.device) -> None:
    tokens = (150, 64, 1)
    results = []
    for fill in POISONS:
        paging = _stored(SMALL, tokens, 1, fill=fill)
        paging.poison_unused(fill)
        got, _ = _both(paging, _query(paging, 4, torch.float16), tokens, kernel_device)
        results.append(got)
    for out, lse in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(lse, results[0][1])


def test_given_buffers_are_used_and_strides_respected(kernel_device: torch.device) -> None:
    tokens = (150, 0, 70)
    paging = _stored(SMALL, tokens, 2)
    fused = _query(paging, 5, torch.float16).to(kernel_device)  # a slice of a fused projection
    query, out = fused[:, :4], torch.full_like(fused, float("nan"))
    assert not query.is_contiguous()
    lens = torch.tensor(tokens, dtype=torch.int32, device=kernel_device)
    cache, table = paging.cache.to(kernel_device), paging.page_table.to(kernel_device)
    workspace = torch.full(
        (workspace_bytes(3, 4, 2, SMALL),), 255, dtype=torch.uint8, device=kernel_device
    )
    lse = torch.empty(3, 4, device=kernel_device)
    options = {"layout": SMALL, "sm_scale": 0.125}
    got = decode(
        query, cache, table, lens, **options,
        out=out[:, :4], lse=lse, workspace=workspace, engine="triton",
    )  # fmt: skip
    want = decode(query.contiguous(), cache, table, lens, **options, engine="reference")
    assert got[0].data_ptr() == out.data_ptr()
    assert got[1].data_ptr() == lse.data_ptr()
    assert_close(got[0], want[0], tolerance=ROUNDING)
    assert_close(lse, want[1], tolerance=ROUNDING)
    assert out[:, 4:].isnan().all()


def test_what_one_layer_prepared_serves_another(kernel_device: torch.device) -> None:
    tokens = (150, 0, 70)
    layers = [_stored(SMALL, tokens, heads=2, seed=3), _stored(SMALL, tokens, heads=2, seed=3)]
    layers[1].cache = layers[1].cache.roll(1, dims=1)  # heads change places
    query = _query(layers[0], 2, torch.float16)
    lens = torch.tensor(tokens, dtype=torch.int32, device=kernel_device)
    table, lse = layers[0].page_table.to(kernel_device), torch.empty(3, 4, device=kernel_device)
    options = {"layout": SMALL, "sm_scale": 0.125, "engine": "triton"}
    run = None
    for paging, scale in zip(layers, (1, 2), strict=True):
        tensors = (query * scale).to(kernel_device), paging.cache.to(kernel_device)
        out = torch.full_like(tensors[0], float("nan"))
        run = run or prepare(*tensors, table, lens, **options, out=out, lse=lse)
        run(*tensors, out)
        want, want_lse = decode(*tensors, table, lens, **options)
        assert_same_bits(out, want)
        assert_same_bits(lse, want_lse)


@pytest.mark.parametrize("name", ["cache", "page_table", "seq_lens", "query", "lse"])
def test_tensors_that_lie_otherwise_than_kernels_read_are_refused(
    name: str, kernel_device: torch.device
) -> None:
    paging = _stored(SMALL, (5, 9), 2)
    given = {
        "query": _query(paging, 2, torch.float16).to(kernel_device),
        "cache": paging.cache.to(kernel_device),
        "page_table": paging.page_table.to(kernel_device),
        "seq_lens": torch.tensor([5, 9], dtype=torch.int32, device=kernel_device),
    }
    given["lse"] = torch.zeros(given["query"].shape[:2], device=kernel_device)
    apart = given[name].new_zeros(*given[name].shape, 2)
    given[name] = apart[..., 0].copy_(given[name])
    with pytest.raises(ValueError, match=f"^{name} has strides .* Pass "):
        decode(**given, layout=SMALL, sm_scale=1.0, engine="triton")


def test_tensors_of_another_device_are_refused(kernel_device: torch.device) -> None:
    paging = _stored(SMALL, (5,), 1)
    query = _query(paging, 1, torch.float16).to(kernel_device)
    lens = torch.tensor([5], dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=r"^seq_lens is on meta\. Pass it on "):
        decode(
            query, paging.cache.to(kernel_device), paging.page_table.to(kernel_device), lens,
            layout=SMALL, sm_scale=1.0, engine="triton",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("workspace", "message"),
    [
        (torch.empty(16, dtype=torch.uint8), "and 16 elements. Pass uint8 and .* or more"),
        (torch.empty(1 << 20), "^workspace has dtype torch.float32"),
        (torch.empty(1 << 21, dtype=torch.uint8)[::2], "^workspace has strides"),
    ],
)
def test_a_workspace_that_does_not_fit_is_refused(
    workspace: torch.Tensor, message: str, kernel_device: torch.device
) -> None:
    paging = _stored(SMALL, (5,), 1)
    query = _query(paging, 1, torch.float16).to(kernel_device)
    lens = torch.tensor([5], dtype=torch.int32, device=kernel_device)
    with pytest.raises(ValueError, match=message):
        decode(
            query, paging.cache.to(kernel_device), paging.page_table.to(kernel_device), lens,
            layout=SMALL, sm_scale=1.0, engine="triton", workspace=workspace.to(kernel_device),
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "context"), [(1, 16000), (32, 3000)])
def test_a_thousand_replays_of_a_graph_have_the_bits_of_eager_mode(
    batch: int, context: int
) -> None:
    layout, device = RecordLayout(PRESETS["kvarn_k4v2_g128"], 128), torch.device("cuda")
    seq_lens = lengths(batch, context)
    tables, pages = record_tables(layout, seq_lens)
    cache = random_cache(layout, tables, pages, 8, device=device)
    query = torch.randn(batch, 64, 128, dtype=torch.float16, device=device)
    where = (query, cache, tables[0].to(device), torch.tensor(seq_lens).int().to(device))
    scratch = torch.empty(workspace_bytes(batch, 64, 8, layout), dtype=torch.uint8, device=device)
    options = {"layout": layout, "sm_scale": 0.1, "workspace": scratch, "engine": "triton"}
    want, want_lse = (x.clone() for x in decode(*where, **options))
    out, lse = torch.empty_like(want), torch.empty_like(want_lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(*where, **options, out=out, lse=lse)
    for _ in range(1000):
        poison(out)
        poison(scratch)
        graph.replay()
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)

"""Decode in CUDA C++ on a GPU of compute capability 9.0: numbers, bits, graphs."""

from __future__ import annotations

import pytest
import torch

from kvarn_core import nvrtc
from kvarn_core.layout import RecordLayout
from kvarn_core.ops.decode import cuda, decode, workspace_bytes
from kvarn_core.spec import PRESETS
from kvarn_core.testing.compare import assert_close, assert_same_bits
from kvarn_core.testing.inputs import draw
from kvarn_core.testing.paging import POISONS, Paging, allocate, store_sequence
from kvarn_core.testing.plugin import poison
from kvarn_core.testing.workload import lengths, random_cache, record_tables

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != nvrtc.CAPABILITY,
        reason="needs a GPU of compute capability 9.0",
    ),
]

MAIN = RecordLayout(PRESETS["kvarn_k4v2_g128"], 128)
ROUNDING = 4e-3

# preset, head_dim, KV heads, query heads per KV head, tokens of each request
CASES = [
    (name, dim, 2, ratio, (0, 1, group - 1, group, group + 1, 2 * group, 2 * group + 1, 1000))
    for name, group in (
        ("kvarn_k4v2_g128", 128), ("kvarn_k4v4_g128", 128), ("kvarn_k2v2_g128", 128),
        ("kvarn_k4v2_g64", 64), ("kvarn_k4v4_g64", 64), ("kvarn_k2v2_g64", 64),
    )
    for dim, ratio in ((64, 8), (128, 5), (256, 4))
] + [
    ("kvarn_k4v2_g128", 128, 8, 1, (3000, 27, 28)),
    ("kvarn_k4v2_g128", 128, 1, 16, (3000, 384)),
    ("kvarn_k4v2_g128", 128, 1, 7, (257,)),
]  # fmt: skip
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


def _run(
    paging: Paging, ratio: int, tokens: tuple[int, ...], dtype: torch.dtype, engine: str
) -> tuple[torch.Tensor, torch.Tensor]:
    heads, dim = paging.cache.shape[1], paging.layout.head_dim
    query = draw("gaussian", (len(tokens), heads * ratio, dim), seed=9).to(dtype)
    lens = torch.tensor(tokens, dtype=torch.int32)
    where = [x.cuda() for x in (query, paging.cache, paging.page_table, lens)]
    return decode(*where, layout=paging.layout, sm_scale=dim**-0.5, engine=engine)


def test_tensor_cores_keep_subnormals() -> None:
    assert cuda.subnormals_are_exact(torch.device("cuda", 0))


@each_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_it_agrees_with_the_reference_and_with_triton(
    name: str,
    dim: int,
    heads: int,
    ratio: int,
    tokens: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    paging = _stored(RecordLayout(PRESETS[name], dim), tokens, heads)
    unit = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    out, lse = _run(paging, ratio, tokens, dtype, "cuda")
    for engine in ("reference", "triton"):
        want, want_lse = _run(paging, ratio, tokens, dtype, engine)
        assert_close(out, want, tolerance=ROUNDING + unit)
        assert_close(lse, want_lse, tolerance=ROUNDING)


def test_codes_with_an_exponent_give_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = (1000, 300)
    paging = _stored(MAIN, tokens, 2)
    want, _ = _run(paging, 8, tokens, torch.float16, "cuda")
    cuda._kernel.cache_clear()
    monkeypatch.setattr(cuda, "subnormals_are_exact", lambda device: False)
    got, _ = _run(paging, 8, tokens, torch.float16, "cuda")
    cuda._kernel.cache_clear()
    assert_close(got, want, tolerance=1e-3)


def test_bytes_that_are_not_written_change_no_bit() -> None:
    tokens = (700, 129, 64, 1)
    results = []
    for fill in POISONS:
        paging = _stored(MAIN, tokens, 2, fill=fill)
        paging.poison_unused(fill)
        results.append(_run(paging, 4, tokens, torch.float16, "cuda"))
    for out, lse in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(lse, results[0][1])


@pytest.mark.parametrize(("batch", "context"), [(1, 16000), (32, 3000), (3, 130_000)])
def test_a_thousand_replays_of_a_graph_have_the_bits_of_eager_mode(
    batch: int, context: int
) -> None:
    device = torch.device("cuda", 0)
    seq_lens = lengths(batch, context)
    tables, pages = record_tables(MAIN, seq_lens)
    cache = random_cache(MAIN, tables, pages, 8, device=device)
    query = torch.randn(batch, 64, 128, dtype=torch.float16, device=device)
    lens = torch.tensor(seq_lens).int().to(device)
    where = (query, cache, tables[0].to(device), lens)
    nbytes = workspace_bytes(batch, 64, 8, MAIN)
    scratch = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    options = {"layout": MAIN, "sm_scale": 0.1, "workspace": scratch, "engine": "cuda"}
    want, want_lse = (x.clone() for x in decode(*where, **options))
    out, lse = torch.empty_like(want), torch.empty_like(want_lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(*where, **options, out=out, lse=lse)
    for _ in range(1000):
        poison(out)
        graph.replay()
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)


def test_one_workspace_serves_batches_of_any_size() -> None:
    nbytes = workspace_bytes(5, 8, 2, MAIN)
    scratch = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
    tokens = (1500, 0, 300, 64, 2000)
    paging = _stored(MAIN, tokens, 2)
    query = draw("gaussian", (5, 8, 128), seed=9).half().cuda()
    lens = torch.tensor(tokens, dtype=torch.int32).cuda()
    cache, table = paging.cache.cuda(), paging.page_table.cuda()
    options = {"layout": MAIN, "sm_scale": 0.1}
    for size in (5, 1, 3, 2, 5):
        where = (query[:size], cache, table[:size], lens[:size])
        got, _ = decode(*where, **options, workspace=scratch, engine="cuda")
        want, _ = decode(*where, **options, engine="reference")
        assert_close(got, want, tolerance=ROUNDING)

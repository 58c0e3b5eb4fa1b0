"""Decode in CUDA C++ on a GPU of compute capability 9.0: numbers, bits, graphs.

The tests go from small to large. A kernel that does not end, or that breaks the context of the
GPU, ends the session: whatever came after would say nothing.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch

from kvarn_core import nvrtc
from kvarn_core.layout import HIT_COLUMN, SINK_COLUMN, RecordLayout
from kvarn_core.ops.decode import codes_in_cuda, cuda, decode, prepare, workspace_bytes
from kvarn_core.spec import PRESETS
from kvarn_core.testing.compare import assert_same_bits, relative_error
from kvarn_core.testing.inputs import draw
from kvarn_core.testing.paging import POISONS, Paging, allocate, store_sequence
from kvarn_core.testing.plugin import poison
from kvarn_core.testing.workload import fill_value_scales, lengths, random_cache, record_tables

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != nvrtc.CAPABILITY,
        reason="needs a GPU of compute capability 9.0",
    ),
]

MAIN = RecordLayout(PRESETS["kvarn_k4v2_g128"], 128)
ROUNDING = 4e-3
LSE_ROUNDING = 4e-3  # absolute, natural log
LIMIT = 30.0  # seconds that a launch may take
UNITS = {torch.float16: 0.0, torch.bfloat16: 2.0**-8, torch.float32: 0.0}

# preset, head_dim, KV heads, query heads per KV head, tokens of each request
Case = tuple[str, int, int, int, tuple[int, ...]]
LAYOUT_CASES: list[Case] = [
    (name, dim, 2, ratio, (0, 1, group - 1, group, group + 1, 2 * group, 2 * group + 1, 1000))
    for name, group in (
        ("kvarn_k4v2_g128", 128), ("kvarn_k4v4_g128", 128), ("kvarn_k2v2_g128", 128),
        ("kvarn_k4v2_g64", 64), ("kvarn_k4v4_g64", 64), ("kvarn_k2v2_g64", 64),
    )
    for dim, ratio in ((128, 8), (64, 5), (256, 4))
]  # fmt: skip
HEAD_CASES: list[Case] = [
    ("kvarn_k4v2_g128", 128, 8, 1, (3000, 27, 28)),
    ("kvarn_k4v2_g128", 128, 1, 16, (3000, 384)),
    ("kvarn_k4v2_g128", 128, 2, 20, (700,)),
    ("kvarn_k4v4_g64", 64, 2, 12, (3000, 0, 64)),
    ("kvarn_k2v2_g128", 256, 1, 16, (700,)),
    ("kvarn_k4v2_g128", 128, 1, 7, (257,)),
]


def _named(cases: list[Case]) -> pytest.MarkDecorator:
    ids = [f"{c[0][6:]}-d{c[1]}-kv{c[2]}-gqa{c[3]}-len{c[4][-1]}" for c in cases]
    return pytest.mark.parametrize("case", cases, ids=ids)


@pytest.fixture(autouse=True)
def context_survives() -> Iterator[None]:
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"the context of the GPU is lost: {error}", returncode=1)


def _await_gpu() -> None:
    event = torch.cuda.Event()
    event.record()
    deadline = time.monotonic() + LIMIT
    while not event.query():
        if time.monotonic() > deadline:
            pytest.exit(f"a kernel runs for more than {LIMIT} s", returncode=1)


@cache
def _stored(layout: RecordLayout, tokens: tuple[int, ...], heads: int, fill: int = 0xFF) -> Paging:
    paging = allocate(layout, [max(n, 1) for n in tokens], num_kv_heads=heads, fill=fill)
    for i, n in enumerate(tokens):
        shape = (n, heads, layout.head_dim)
        if n:
            key, value = draw("gaussian", shape, seed=i), draw("gaussian", shape, seed=i + 50)
            store_sequence(paging, i, key, value, [n])
    return paging


def _run(
    paging: Paging,
    ratio: int,
    tokens: tuple[int, ...],
    engine: str = "cuda",
    dtype: torch.dtype = torch.float16,
) -> tuple[torch.Tensor, torch.Tensor]:
    heads, dim = paging.cache.shape[1], paging.layout.head_dim
    query = draw("gaussian", (len(tokens), heads * ratio, dim), seed=9).to(dtype)
    lens = torch.tensor(tokens, dtype=torch.int32)
    where = [query, paging.cache, paging.page_table, lens]
    if engine != "reference":  # which reads the records in Triton if it finds a GPU
        where = [x.cuda() for x in where]
    out, lse = decode(*where, layout=paging.layout, sm_scale=dim**-0.5, engine=engine)
    _await_gpu()
    return out.cuda(), lse.cuda()


def _check(
    got: tuple[torch.Tensor, torch.Tensor],
    want: tuple[torch.Tensor, torch.Tensor],
    tokens: tuple[int, ...] | list[int],
    *,
    tolerance: float = ROUNDING,
) -> None:
    """Compare request by request, so that a failure says which lengths and heads are wrong."""
    lines = []
    for i, n in enumerate(tokens):
        out, true = got[0][i].float(), want[0][i].float()
        errors = [relative_error(a, b) for a, b in zip(out, true, strict=True)]
        nans = int(out.isnan().sum())
        lse, true_lse = got[1][i], want[1][i]
        if n:
            distance = float((lse - true_lse).abs().max())
            wrong = not distance <= LSE_ROUNDING or not max(errors) <= tolerance or nans
        else:
            distance = float(lse.isneginf().logical_not().sum())
            wrong = bool(distance or out.any() or nans)
        if wrong:
            lines.append(
                f"request {i}, {n} tokens: {nans} NaN, lse off by {distance:.2e}, error per head "
                + " ".join(f"{e:.1e}" for e in errors[:20])
                + f"\n  got  {out[0, :6].tolist()}\n  want {true[0, :6].tolist()}"
            )
    assert not lines, f"{len(lines)} of {len(tokens)} requests are wrong\n" + "\n".join(lines[:8])


def test_tensor_cores_keep_subnormals() -> None:
    """The first kernel that runs: if this fails, loading or launching is what fails."""
    assert cuda.subnormals_are_exact(torch.device("cuda", 0))
    assert codes_in_cuda() == "subnormal halves"


@pytest.mark.parametrize("length", [1, 16, 17, 128, 256, 257, 385])
def test_one_request_of_one_kv_head(length: int) -> None:
    """1 to 256 tokens are exact rows in growing numbers of pieces; then there are records."""
    tokens = (length,)
    paging = _stored(MAIN, tokens, 1)
    _check(_run(paging, 8, tokens), _run(paging, 8, tokens, "reference"), tokens)


def test_a_padded_row_becomes_zero() -> None:
    paging = _stored(MAIN, (0, 40, 0), 1)
    out, lse = _run(paging, 8, (0, 40, 0))
    assert not out[::2].any()
    assert lse[::2].isneginf().all()


@_named(LAYOUT_CASES + HEAD_CASES)
def test_it_agrees_with_the_reference(case: Case) -> None:
    name, dim, heads, ratio, tokens = case
    paging = _stored(RecordLayout(PRESETS[name], dim), tokens, heads)
    _check(_run(paging, ratio, tokens), _run(paging, ratio, tokens, "reference"), tokens)


@_named([LAYOUT_CASES[0], HEAD_CASES[1]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_other_dtypes_of_the_query(case: Case, dtype: torch.dtype) -> None:
    name, dim, heads, ratio, tokens = case
    paging = _stored(RecordLayout(PRESETS[name], dim), tokens, heads)
    got, want = (_run(paging, ratio, tokens, engine, dtype) for engine in ("cuda", "reference"))
    _check(got, want, tokens, tolerance=ROUNDING + UNITS[dtype])


@pytest.mark.parametrize("dtype", list(UNITS), ids=["fp16", "bf16", "fp32"])
def test_probabilities_times_the_largest_scale_are_finite(dtype: torch.dtype) -> None:
    """A maximum may lag by a factor of 2^8: times a scale of 65504 that is beyond fp16."""
    device, seq_lens = torch.device("cuda", 0), [20_000] * 8
    tables, pages = record_tables(MAIN, seq_lens)
    cache = random_cache(MAIN, tables, pages, 8, device=device)
    fill_value_scales(cache, tables[0, :, MAIN.header_columns :], MAIN, 65504.0)
    query = 20 * draw("gaussian", (len(seq_lens), 64, 128), seed=9).to(device, dtype)
    where = (query, cache, tables[0].to(device), torch.tensor(seq_lens).int().to(device))
    for result in decode(*where, layout=MAIN, sm_scale=128**-0.5, engine="cuda"):
        assert result.isfinite().all()


@_named([LAYOUT_CASES[0], HEAD_CASES[1]])
def test_it_agrees_with_triton(case: Case) -> None:
    name, dim, heads, ratio, tokens = case
    paging = _stored(RecordLayout(PRESETS[name], dim), tokens, heads)
    _check(_run(paging, ratio, tokens), _run(paging, ratio, tokens, "triton"), tokens)


def test_hits_and_a_missing_sink() -> None:
    tokens, group = (500, 460, 400), MAIN.group
    paging = allocate(MAIN, tokens, hits=[0, 3, 0], donors=[0, 0, 0])
    paging.page_table[2, SINK_COLUMN] = 0
    for i, first in ((0, 0), (1, 3 * group), (2, 0)):
        rows = (tokens[i] - first, 2, MAIN.head_dim)
        key, value = draw("gaussian", rows, seed=i), draw("gaussian", rows, seed=i + 50)
        store_sequence(paging, i, key, value, [rows[0]], start=first)
    assert paging.page_table[1, HIT_COLUMN] == 3
    _check(_run(paging, 4, tokens), _run(paging, 4, tokens, "reference"), tokens)


def test_codes_with_an_exponent_give_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = (1000, 300)
    paging = _stored(MAIN, tokens, 2)
    want = _run(paging, 8, tokens)
    cuda._kernel.cache_clear()
    monkeypatch.setattr(cuda, "subnormals_are_exact", lambda device: False)
    got = _run(paging, 8, tokens)
    cuda._kernel.cache_clear()
    _check(got, want, tokens, tolerance=1e-3)


def test_a_thread_without_a_context_can_launch() -> None:
    tokens = (300,)
    paging = _stored(MAIN, tokens, 1)
    want = _run(paging, 8, tokens)
    with ThreadPoolExecutor(1) as other:
        got = other.submit(_run, paging, 8, tokens).result()
    assert_same_bits(got[0], want[0])


def test_bytes_that_are_not_written_change_no_bit() -> None:
    tokens = (700, 129, 64, 1)
    results = []
    for fill in POISONS:
        paging = _stored(MAIN, tokens, 2, fill)
        paging.poison_unused(fill)
        results.append(_run(paging, 4, tokens))
    for out, lse in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(lse, results[0][1])


@pytest.mark.parametrize(
    "seq_lens",
    [
        lengths(48, 5000, mixed=True), [n % 7 * 60 for n in range(300)], [20_000, 1, 0, 129],
        lengths(8, 9000, mixed=True), lengths(8, 9000), [150_000],
    ],
    ids=[
        "48-mixed", "300-short-or-padded", "long-beside-short", "8-mixed", "8-equal",
        "more-parts-than-lanes",
    ],
)  # fmt: skip
def test_many_requests(seq_lens: list[int]) -> None:
    device = torch.device("cuda", 0)
    tables, pages = record_tables(MAIN, [max(n, 1) for n in seq_lens])
    cache = random_cache(MAIN, tables, pages, 2, device=device)
    query = torch.randn(len(seq_lens), 16, 128, dtype=torch.float16, device=device)
    where = (query, cache, tables[0].to(device), torch.tensor(seq_lens).int().to(device))
    options = {"layout": MAIN, "sm_scale": 0.1}
    got = decode(*where, **options, engine="cuda")
    _await_gpu()
    _check(got, decode(*where, **options, engine="reference"), seq_lens)


@pytest.mark.parametrize(("batch", "context"), [(1, 16_000), (32, 3000), (3, 130_000)])
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
    _await_gpu()
    out, lse = torch.empty_like(want), torch.empty_like(want_lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(*where, **options, out=out, lse=lse)
    for _ in range(1000):
        poison(out)
        graph.replay()
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)


def test_what_one_layer_prepared_serves_another() -> None:
    tokens = (1500, 0, 300)
    paging = _stored(MAIN, tokens, 2)
    lens = torch.tensor(tokens, dtype=torch.int32).cuda()
    table, lse = paging.page_table.cuda(), torch.empty(3, 8, device="cuda")
    options = {"layout": MAIN, "sm_scale": 0.1, "engine": "cuda"}
    run = None
    for layer in range(2):
        query = draw("gaussian", (3, 8, 128), seed=layer).half().cuda()
        cache = paging.cache.roll(layer, dims=1).cuda()  # heads change places
        out = torch.full_like(query, float("nan"))
        run = run or prepare(query, cache, table, lens, **options, out=out, lse=lse)
        run(query, cache, out)
        want, want_lse = decode(query, cache, table, lens, **options)
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
        got = decode(*where, **options, workspace=scratch, engine="cuda")
        _check(got, decode(*where, **options, engine="reference"), tokens[:size])

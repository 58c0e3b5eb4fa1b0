"""One attention layer on a GPU, without an engine: kernels, FlashAttention, graphs, streams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from vllm.v1.worker.workspace import init_workspace_manager, reset_workspace_manager

from kvarn_core import Recipe, nvrtc
from kvarn_core.layout import RING_COLUMN, seal_phase
from kvarn_vllm.batched import Batched
from kvarn_vllm.by_request import ByRequest
from kvarn_vllm.cache_spec import record_layout
from kvarn_vllm.flash import FlashAttention
from kvarn_vllm.metadata import KVarNMetadata, lay_out
from kvarn_vllm.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.gpu

Q_HEADS, KV_HEADS, LONGEST, MOST = 8, 2, 1600, 16
LAYER = 5
PREFILL_WIDTH = 512  # several passes


@pytest.fixture(autouse=True)
def workspace() -> Iterator[None]:
    """vLLM's workspace manager, which an engine would have made."""
    init_workspace_manager(torch.device("cuda"))
    yield
    reset_workspace_manager()


def batched(preset: str, head_dim: int, dtype: torch.dtype, engine: str) -> Batched:
    layout, scale = record_layout(preset, head_dim), head_dim**-0.5
    attention = FlashAttention.for_gpu(scale, head_dim)
    scratch = Workspace(layout, Q_HEADS, KV_HEADS, MOST, engine)
    path = Batched(layout, Recipe.KVARN, scale, engine, attention, scratch)
    path.warm_up(torch.empty(2048, Q_HEADS, head_dim, dtype=dtype, device="cuda"))
    return path


class Requests:
    """Caches, tables and random rows of some requests."""

    def __init__(self, path: Batched | ByRequest, count: int, dtype: torch.dtype) -> None:
        self.path, self.count, self.dtype = path, count, dtype
        layout = path.layout
        columns = layout.columns(LONGEST)
        self.generator = torch.Generator("cuda").manual_seed(3)
        pages = torch.randperm(count * columns, generator=self.generator, device="cuda") + 1
        self.table = pages.view(count, columns).int()
        self.table[:, 0] = 0
        shape = (count * columns + 1, KV_HEADS, layout.record_bytes)
        self.cache = torch.full(shape, 0xFF, dtype=torch.uint8, device="cuda")
        self.lengths = [0] * count

    def rows(self, total: int) -> list[torch.Tensor]:
        """Queries, keys and values of new tokens: slices of one tensor."""
        dim = self.path.layout.head_dim
        widths = [heads * dim for heads in (Q_HEADS, KV_HEADS, KV_HEADS)]
        fused = torch.randn(total, sum(widths), generator=self.generator, device="cuda")
        return [part.view(total, -1, dim) for part in fused.to(self.dtype).split(widths, dim=1)]

    def step(self, new: list[int]) -> torch.Tensor:
        """Serve `new` tokens per request, at least one each, those with one first."""
        total, num_decodes = sum(new), sum(count == 1 for count in new)
        contexts = list(self.lengths)
        self.lengths = [old + count for old, count in zip(self.lengths, new, strict=True)]
        group, device = self.path.layout.group, torch.device("cuda")
        prefill = None
        if num_decodes < self.count:
            rows = new[num_decodes:], contexts[num_decodes:]
            prefill = lay_out(num_decodes, *rows, group, device, PREFILL_WIDTH)
        metadata = KVarNMetadata(
            page_table=self.table,
            seq_lens=torch.tensor(self.lengths, dtype=torch.int32, device=device),
            cu_seqlens_q=torch.tensor([0, *new], device=device).cumsum(0).int(),
            num_tokens=total,
            num_decodes=num_decodes,
            max_query_len=max(new),
            prefill=prefill,
        )
        query, key, value = self.rows(total)
        output = torch.full_like(query, float("nan")).contiguous()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if isinstance(self.path, Batched) else "default")
        try:
            self.path.serve(query, key, value, self.cache, metadata, output, layer=LAYER)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return output


STEPS = [
    [1, 1, 90, 300, 500],
    [1, 1, 400, 200, 130],
    [1, 1, 1, 1, 1],
    [1, 1, 1, 700, 2],
    [1, 1, 1, 1, 1],
]
SHAPES = [  # a 2-bit code that rounds the other way weighs more than all other differences
    ("kvarn_k4v2_g128", 128, torch.float16, 1e-2),
    ("kvarn_k4v2_g128", 128, torch.bfloat16, 3e-2),
    ("kvarn_k2v2_g64", 64, torch.float16, 2e-2),
    ("kvarn_k4v4_g128", 256, torch.bfloat16, 3e-2),
]


ENGINES = ["triton"]
if torch.cuda.is_available() and torch.cuda.get_device_capability() == nvrtc.CAPABILITY:
    ENGINES.append("cuda")
each_engine = pytest.mark.parametrize("engine", ENGINES)


@each_engine
@pytest.mark.parametrize(("preset", "head_dim", "dtype", "tolerance"), SHAPES)
def test_steps_equal_the_reference_row_by_row(
    preset: str, head_dim: int, dtype: torch.dtype, tolerance: float, engine: str
) -> None:
    """Nothing waits for the device on the way."""
    path = batched(preset, head_dim, dtype, engine)
    by_row = ByRequest(path.layout, path.recipe, path.scale, "reference", sealed=False)
    whole, reference = (Requests(one, len(STEPS[0]), dtype) for one in (path, by_row))
    for new in STEPS:
        out, expected = whole.step(new).float(), reference.step(new).float()
        assert out.isfinite().all()
        error = (out - expected).norm() / expected.norm()
        assert error < tolerance, (new, float(error))


class Replayed:
    """A decode step over persistent tensors, eager or captured once and replayed."""

    def __init__(self, requests: Requests, rows: int) -> None:
        self.requests, self.rows = requests, rows
        dim = requests.path.layout.head_dim
        self.inputs = requests.rows(rows)
        self.output = torch.empty(rows, Q_HEADS, dim, dtype=requests.dtype, device="cuda")
        self.table = torch.zeros(rows, requests.table.shape[1], dtype=torch.int32, device="cuda")
        self.lens = torch.zeros(rows, dtype=torch.int32, device="cuda")
        self.starts = torch.zeros(rows + 1, dtype=torch.int32, device="cuda")

    def serve(self) -> None:
        step = KVarNMetadata(self.table, self.lens, self.starts, self.rows, self.rows, 1)
        path = self.requests.path
        path.serve(*self.inputs, self.requests.cache, step, self.output, layer=LAYER)

    def capture(self) -> torch.cuda.CUDAGraph:
        self.serve()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.serve()
        return graph

    def load(self, inputs: list[torch.Tensor], lengths: list[int]) -> None:
        """Fill the persistent tensors; rows beyond the requests are padding."""
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine[: len(lengths)] = given
        self.output.fill_(float("nan"))
        self.table[: len(lengths)] = self.requests.table
        self.lens[: len(lengths)] = torch.tensor(lengths, device="cuda")
        self.starts.copy_(torch.arange(self.rows + 1, device="cuda").clamp(max=len(lengths)))


@each_engine
def test_a_replayed_step_equals_an_eager_one_bit_for_bit(engine: str) -> None:
    """Over two tile borders, with padded rows; neither allocates anything."""
    path = batched("kvarn_k4v2_g128", 128, torch.float16, engine)
    eager, replayed = (Requests(path, 5, torch.float16) for _ in range(2))
    steps = [Replayed(requests, 8) for requests in (eager, replayed)]
    graph = steps[1].capture()
    replayed.cache.fill_(0xFF)
    for requests in (eager, replayed):
        requests.step([200, 300, 380, 500, 511])
    lengths = [200, 300, 380, 500, 511]
    for _ in range(300):
        lengths = [length + 1 for length in lengths]
        inputs = eager.rows(5)
        for step in steps:
            step.load(inputs, lengths)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        steps[0].serve()
        graph.replay()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        assert torch.equal(steps[0].output, steps[1].output)
        assert steps[0].output[:5].isfinite().all()
        assert not steps[0].output[5:].any(), "padded rows are zero"
    pages = eager.table[:, 1:].flatten().long()
    assert torch.equal(eager.cache[pages], replayed.cache[pages])


@each_engine
def test_a_thousand_repeats_give_one_result(engine: str) -> None:
    """Of a step in which every request seals a half of a record while others are read."""
    path = batched("kvarn_k4v2_g128", 128, torch.float16, engine)
    requests = Requests(path, 4, torch.float16)
    tile, group = 4, path.layout.group
    lengths = [  # the step writes the position at which the keys of the first head are sealed
        (tile + 1) * group + seal_phase(page, LAYER, 0, is_value=False, group=group)
        for page in requests.table[:, RING_COLUMN].tolist()
    ]
    requests.step(lengths)
    step = Replayed(requests, 4)
    step.load(requests.rows(4), [length + 1 for length in lengths])
    sealed = requests.table[:, path.layout.header_columns + tile].long()
    before = requests.cache[sealed]
    step.serve()
    first: Any = step.output.clone(), requests.cache.clone()
    assert (first[1][sealed] != before).flatten(1).any(1).all(), "every request seals"
    graph = step.capture()
    for _ in range(1000):
        step.output.fill_(float("nan"))
        graph.replay()
        assert torch.equal(step.output, first[0])
    assert torch.equal(requests.cache, first[1])

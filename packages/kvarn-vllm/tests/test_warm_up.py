"""What is launched while serving was launched while warming up, down to Triton's cache keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvarn_core import Recipe
from kvarn_vllm import workspace
from kvarn_vllm.batched import Batched
from kvarn_vllm.cache_spec import record_layout
from kvarn_vllm.metadata import KVarNMetadata, lay_out
from kvarn_vllm.workspace import Workspace

Q_HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
CPU = torch.device("cpu")


@pytest.fixture
def launches(monkeypatch: Any) -> set[str]:
    """Keys of the kernels that would be compiled for an H100; nothing runs."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    if triton.knobs.runtime.interpret:
        pytest.skip("needs compiled kernels, and TRITON_INTERPRET=1 interprets them")
    import kvarn_core.ops.decode.triton
    import kvarn_core.ops.gather.triton
    import kvarn_core.ops.store.triton  # noqa: F401

    monkeypatch.setenv("TRITON_INTERPRET", "1")  # from now on a CPU tensor is no obstacle
    backend = make_backend(GPUTarget("cuda", 90, 32))
    keys: set[str] = set()

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, rest = binder(*args, **options)
        keys.add(f"{kernel.fn.__name__} {specialization} {rest}")

    monkeypatch.setattr(JITFunction, "run", run)
    return keys


class NoAttention:
    """FlashAttention is compiled ahead; here it only has to return."""

    def attend(self, query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return torch.zeros(query.shape[1], len(query))

    def merge(self, out: torch.Tensor, lse: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return lse


def serve(path: Batched, new: list[int], contexts: list[int], columns: int, layer: int) -> None:
    """One step with decode rows first; tensors are slices of larger ones, as vLLM passes them."""
    layout, total, rows = path.layout, sum(new), len(new)
    fused = torch.zeros(total, (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=torch.float16)
    query, key, value = (
        part.view(total, -1, HEAD_DIM)
        for part in fused.split([h * HEAD_DIM for h in (Q_HEADS, KV_HEADS, KV_HEADS)], dim=1)
    )
    lengths = [count + context for count, context in zip(new, contexts, strict=True)]
    prefills = [row for row in range(rows) if new[row] > 1]
    num_decodes = prefills[0] if prefills else rows
    tables = (new[num_decodes:], contexts[num_decodes:], layout.group, CPU, 256)
    step = KVarNMetadata(
        page_table=torch.zeros(rows + 3, columns, dtype=torch.int32)[3:],
        seq_lens=torch.tensor([0, *lengths], dtype=torch.int32)[1:],
        cu_seqlens_q=torch.tensor([0, 0, *new], dtype=torch.int32).cumsum(0).int()[1:],
        num_tokens=total,
        num_decodes=num_decodes,
        max_query_len=max(new),
        prefill=lay_out(num_decodes, *tables) if prefills else None,
    )
    cache = torch.zeros(3, KV_HEADS, layout.record_bytes, dtype=torch.uint8)
    path.serve(query, key, value, cache, step, torch.zeros_like(query), layer=layer)


STEPS = [
    ([1], [0]),
    ([1] * 6, [500] * 6),
    ([1] * 16, list(range(400, 416))),
    ([1] * 17, [999] * 17),
    ([16], [0]),
    ([300, 2, 1], [0, 0, 0]),
    ([1, 5, 64, 65], [700, 1, 64, 513]),
    ([1, 1, 1, 16, 128, 257], [1, 16, 128, 1024, 0, 16]),
]


@pytest.fixture
def in_cuda(launches: set[str], monkeypatch: Any) -> set[str]:
    """Forms of kernels in CUDA C++ that would be compiled, in a set of their own; nothing runs."""
    from kvarn_core.ops.decode import cuda as decode
    from kvarn_core.ops.store import cuda as store

    monkeypatch.setattr("kvarn_core.dispatch._cuda_obstacle", lambda device: None)
    monkeypatch.setattr(decode, "_processors", lambda device: 8)  # so that few requests are many
    monkeypatch.setattr(
        workspace, "workspace_bytes",
        lambda *sizes: decode.workspace_bytes(*sizes, torch.device("cpu")),
    )  # fmt: skip
    forms: set[str] = set()

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def launch(self, grid: tuple[int, int, int], *values: float) -> None:
            assert min(grid) > 0, f"{self.name} is launched with {grid}"
            forms.add(self.name)

    for module, kernel, variant in (
        (decode, "_kernel", decode.variant),
        (store, "_rows_kernel", store.rows_variant),
        (store, "_seal_kernel", store.seal_variant),
    ):
        monkeypatch.setattr(
            module, kernel, lambda *shape, variant=variant: Kernel(variant(*shape[:-1]).name)
        )
    return forms


@pytest.mark.parametrize("preset", ["kvarn_k4v2_g128", "kvarn_k2v2_g64"])
def test_serving_launches_nothing_new(preset: str, launches: set[str], monkeypatch: Any) -> None:
    warm = warm_and_serve(preset, "triton", launches, monkeypatch)
    assert len(warm) >= 8, "the kernels of every op, in their forms"


@pytest.mark.parametrize("preset", ["kvarn_k4v2_g128", "kvarn_k2v2_g64"])
def test_serving_in_cuda_compiles_nothing_new(
    preset: str, in_cuda: set[str], monkeypatch: Any
) -> None:
    warm = warm_and_serve(preset, "cuda", in_cuda, monkeypatch)
    assert {name.split("-")[0] for name in warm} == {"rows", "seal", "decode"}
    assert sum(name.startswith("decode") for name in warm) == 3, "three sizes of CTAs"


def warm_and_serve(preset: str, engine: str, launches: set[str], monkeypatch: Any) -> set[str]:
    """Launches of the warm-up; those of serving must be among them."""

    def take(*shapes: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
        return [torch.zeros(shape, dtype=dtype) for shape, dtype in shapes]

    monkeypatch.setattr(workspace, "_take", take)
    monkeypatch.setattr(workspace, "CONTEXT_TOKENS", 256)
    layout = record_layout(preset, HEAD_DIM)
    scratch = Workspace(layout, Q_HEADS, KV_HEADS, max_requests=32, engine=engine)
    path = Batched(layout, Recipe.KVARN, 0.125, engine, NoAttention(), scratch)
    path.warm_up(torch.empty(7, Q_HEADS, HEAD_DIM, dtype=torch.float16))
    warm = set(launches)
    for layer, columns in ((0, 19), (1, 32), (63, 17)):
        for new, contexts in STEPS:
            serve(path, new, contexts, columns, layer)
    assert launches == warm, launches - warm
    return warm

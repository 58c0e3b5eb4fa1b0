from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backends import fa_utils

from kvarn_core.ops import store
from kvarn_vllm import by_request, flash, workspace
from kvarn_vllm import warm_up as warm_up_module
from kvarn_vllm.batched import Batched
from kvarn_vllm.cache_spec import record_layout
from kvarn_vllm.impl import KVarNImpl, layer_index
from kvarn_vllm.metadata import KVarNMetadata, lay_out
from kvarn_vllm.workspace import Workspace

Q_HEADS, KV_HEADS, HEAD_DIM, LONGEST = 4, 2, 64, 700
LAYER = SimpleNamespace(layer_name="model.layers.1.self_attn.attn")


def make(preset: str, prefill: str = "chunk", **arguments: Any) -> KVarNImpl:
    options = {"kvarn": {"prefill": prefill}}
    with set_current_vllm_config(VllmConfig(additional_config=options)):
        return KVarNImpl(
            Q_HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, kv_cache_dtype=preset, **arguments
        )


class TorchAttention:
    """Stands in for FlashAttention, in fp32; `empty` is its log-sum-exp where there are no keys."""

    def __init__(self, empty: float = float("-inf")) -> None:
        self.empty = empty
        self.calls = 0

    def attend(self, query, key, value, cu_q, cu_k, max_q, max_k, *, causal, out):  # type: ignore[no-untyped-def]
        self.calls += 1
        assert max_q >= cu_q.diff().max()
        assert max_k >= cu_k.diff().max()
        assert len(query) == len(out) == cu_q[-1]
        assert len(key) == len(value) == cu_k[-1]
        lse = torch.full((query.shape[1], len(query)), self.empty)
        out.zero_()
        for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
            if q0 < q1 and k0 < k1:
                part = query[q0:q1], key[k0:k1], value[k0:k1]
                out[q0:q1], lse[:, q0:q1] = attention(*part, causal=causal)
        return lse

    def merge(self, out, lse, other, other_lse):  # type: ignore[no-untyped-def]
        assert lse.is_contiguous()
        assert other_lse.is_contiguous()
        parts = torch.stack([lse, torch.where(other_lse.isinf(), float("-inf"), other_lse)])
        weights = parts.softmax(0).transpose(1, 2)[..., None]
        out.copy_(weights[0] * out + weights[1] * other)
        return parts.logsumexp(0)


def batched(preset: str, engine: str = "reference", width: int = 128, **kwargs: Any) -> KVarNImpl:
    """Attention of a layer as on a GPU, with FlashAttention in plain torch."""
    served = make(preset)
    served.path = Batched(
        served.layout,
        served.path.recipe,
        served.scale,
        engine,
        TorchAttention(**kwargs),
        Workspace(served.layout, Q_HEADS, KV_HEADS, max_requests=8, engine="triton"),
    )
    served.width = width
    return served


@pytest.fixture
def scratch(monkeypatch: Any) -> list[int]:
    """Scratch memory full of NaN in place of vLLM's workspace; the bytes of each request for it."""
    taken = []

    def take(*shapes: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
        taken.append(sum(tensor.nbytes for tensor in tensors))
        return [tensor.view(torch.uint8).fill_(0xFF).view(tensor.dtype) for tensor in tensors]

    monkeypatch.setattr(workspace, "_take", take)
    return taken


class Sequences:
    """Random q, k, v of some requests, served step by step through `KVarNImpl.forward`."""

    def __init__(self, attention: KVarNImpl, lengths: list[int], seed: int = 5) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(heads: int) -> list[torch.Tensor]:
            return [torch.randn(n, heads, HEAD_DIM, generator=generator) for n in lengths]

        self.attention, self.lengths = attention, lengths
        self.q, self.k, self.v = draw(Q_HEADS), draw(KV_HEADS), draw(KV_HEADS)
        self.done = [0] * len(lengths)
        layout = record_layout(attention.kv_cache_dtype, HEAD_DIM)
        columns = layout.columns(LONGEST)
        pages = torch.randperm(len(lengths) * columns, generator=generator) + 1
        self.table = pages.view(len(lengths), columns).int()
        self.table[:, 0] = 0
        shape = (len(pages) + 1, KV_HEADS, layout.record_bytes)
        self.cache = torch.full(shape, 0xFF, dtype=torch.uint8)
        self.out = [torch.full_like(q, float("nan")) for q in self.q]

    def prefill(self, num_decodes: int, parts: list[slice]) -> Any:
        """Tables of the prefill rows, where a step is served whole."""
        if not parts or not isinstance(self.attention.path, Batched):
            return None
        new = [part.stop - part.start for part in parts]
        contexts = [part.start for part in parts]
        group, width = self.attention.layout.group, self.attention.width
        return lay_out(num_decodes, new, contexts, group, torch.device("cpu"), width)

    def step(self, chunks: list[int]) -> None:
        """Serve `chunks` new tokens per request; rows with one token go first."""
        order = sorted(range(len(chunks)), key=lambda i: chunks[i] != 1)
        order = [i for i in order if chunks[i]]
        parts = [slice(self.done[i], self.done[i] + chunks[i]) for i in order]
        q, k, v = (
            torch.cat([rows[i][part] for i, part in zip(order, parts, strict=True)])
            for rows in (self.q, self.k, self.v)
        )
        starts = torch.tensor([0, *(chunks[i] for i in order)]).cumsum(0).int()
        num_decodes = sum(chunks[i] == 1 for i in order)
        metadata = KVarNMetadata(
            page_table=self.table[order],
            seq_lens=torch.tensor([part.stop for part in parts], dtype=torch.int32),
            cu_seqlens_q=starts,
            num_tokens=len(q),
            num_decodes=num_decodes,
            max_query_len=max(chunks),
            prefill=self.prefill(num_decodes, parts[num_decodes:]),
        )
        padded = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 3), value=9.0) for x in (q, k, v)]
        output = torch.full_like(padded[0], -7.0)
        returned = self.attention.forward(LAYER, *padded, self.cache, metadata, output)
        assert returned is output
        assert (output[len(q) :] == -7.0).all(), "rows beyond the step are not ours"
        for i, part, rows in zip(order, parts, output[: len(q)].split(starts.diff().tolist()),
                                 strict=True):  # fmt: skip
            self.out[i][part] = rows
            self.done[i] = part.stop


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [Q, Hq, D] and log-sum-exp [Hq, Q], fp32; the last query sees all keys."""
    k, v = (x.float().repeat_interleave(Q_HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * HEAD_DIM**-0.5
    if causal:
        hidden = torch.ones(len(q), len(k)).triu(1 + len(k) - len(q)).bool()
        scores.masked_fill_(hidden, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attention(q, k, v, causal=True)[0]


STEPS = [
    [300, 1, 130, 0],  # a one-token prompt counts as a decode
    [1, 257, 127, 90],
    [1, 1, 1, 500],
    [200, 1, 1, 1],
    [1, 100, 1, 1],
]


@pytest.mark.parametrize("prefill", ["chunk", "sealed"])
@pytest.mark.parametrize("preset", ["kvarn_debug32_g64", "kvarn_debug32_g128"])
def test_mixed_batches_equal_dense_attention(preset: str, prefill: str) -> None:
    lengths = [sum(chunks) for chunks in zip(*STEPS, strict=True)]
    served = Sequences(make(preset, prefill), lengths)
    for chunks in STEPS:
        served.step(chunks)
    for i, out in enumerate(served.out):
        torch.testing.assert_close(out, dense(served.q[i], served.k[i], served.v[i]),
                                   atol=2e-5, rtol=0)  # fmt: skip


def test_sealed_prefill_does_not_depend_on_chunks() -> None:
    results = []
    for steps in ([[600]], [[1]] + [[90]] * 6 + [[59]], [[257], [300], [1], [42]]):
        served = Sequences(make("kvarn_k4v2_g64", "sealed"), [600])
        for chunks in steps:
            served.step(chunks)
        results.append(served)
    first = results[0]
    header = first.attention.layout.header_columns
    records = first.table[0, header : header + 7].long()
    for other in results[1:]:
        assert torch.equal(other.cache[records], first.cache[records])
        torch.testing.assert_close(other.out[0], first.out[0], atol=1e-5, rtol=0)
    exact = dense(first.q[0], first.k[0], first.v[0])
    assert (first.out[0] - exact).abs().max() > 1e-2, "nothing was quantised"


def test_a_chunk_sees_its_own_tokens_raw() -> None:
    served = Sequences(make("kvarn_k4v2_g64"), [600])
    served.step([600])
    exact = dense(served.q[0], served.k[0], served.v[0])
    torch.testing.assert_close(served.out[0], exact, atol=2e-5, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -65504.0, 1e30])
def test_a_bad_neighbour_changes_no_bit(bad: float) -> None:
    outputs = []
    for value in (1.0, bad):
        served = Sequences(make("kvarn_k4v2_g64"), [300, 300])
        for rows in (served.k, served.v):
            rows[1][70:140] = value
        for chunks in ([200, 250], [99, 49], [1, 1]):
            served.step(chunks)
        outputs.append(served.out[0])
    assert torch.equal(*outputs)


def test_blocks_of_queries_agree(monkeypatch: Any) -> None:
    outputs = []
    for block in (4096, 33):
        monkeypatch.setattr(by_request, "QUERY_BLOCK", block)
        served = Sequences(make("kvarn_k4v2_g64"), [400])
        for chunks in ([250], [150]):
            served.step(chunks)
        outputs.append(served.out[0])
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    served = Sequences(make("kvarn_debug32_g64"), [200])
    served.q, served.k, served.v, served.out = (
        [x.to(dtype) for x in rows] for rows in (served.q, served.k, served.v, served.out)
    )
    for chunks in ([150], [49], [1]):
        served.step(chunks)
    exact = dense(*(rows[0].float() for rows in (served.q, served.k, served.v)))
    assert served.out[0].dtype == dtype
    rounding = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(served.out[0], exact.to(dtype), atol=1e-5, rtol=rounding)


INFINITY = float("inf")
WHOLE = {  # preset, tokens per pass, log-sum-exp of FlashAttention 2 and 3 where there are no keys
    "one-tile-per-pass": ("kvarn_k4v2_g64", 64, INFINITY),
    "several-passes": ("kvarn_k2v2_g64", 192, -INFINITY),
    "one-pass": ("kvarn_k4v4_g64", 1 << 14, INFINITY),
    "unquantised": ("kvarn_debug32_g64", 192, -INFINITY),
}


@pytest.mark.parametrize(("preset", "width", "empty"), WHOLE.values(), ids=WHOLE)
def test_a_step_served_whole_equals_one_served_row_by_row(
    preset: str, width: int, empty: float, scratch: list[int]
) -> None:
    """Rows with and without context in one pass, rows cut into several, decode rows beside them."""
    lengths = [sum(chunks) for chunks in zip(*STEPS, strict=True)]
    whole, by_row = (
        Sequences(attention, lengths)
        for attention in (batched(preset, width=width, empty=empty), make(preset))
    )
    for chunks in STEPS:
        whole.step(chunks)
        by_row.step(chunks)
    assert torch.equal(whole.cache, by_row.cache)
    for one, other in zip(whole.out, by_row.out, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


def test_one_call_of_attention_for_all_rows_and_one_per_pass(scratch: list[int]) -> None:
    served = Sequences(batched("kvarn_k4v2_g64", width=256), [700] * 3)
    attention = served.attention.path.attention
    calls = []
    for chunks in ([200, 200, 2], [300, 100, 1], [1, 1, 1]):
        served.step(chunks)
        calls.append(attention.calls)
    assert calls == [1, 4, 4], "first chunks; two contexts of 200 in two passes; decodes"


def test_layers_of_a_step_share_what_the_first_of_their_kind_prepared(
    scratch: list[int], monkeypatch: Any
) -> None:
    prepared: list[str] = []
    whole = store.prepare

    def prepare(op: str, *tensors: Any, **options: Any) -> Any:
        prepared.append(op)
        return whole(op, *tensors, **options)

    monkeypatch.setattr(store, "prepare", prepare)
    served = Sequences(batched("kvarn_k4v2_g64"), [200, 200])
    forward = served.attention.forward

    def layers(layer: Any, query: Any, key: Any, value: Any, *rest: Any) -> Any:
        """Four layers that all write the same, two of them from rows of a wider tensor."""
        wide = [torch.cat((rows, rows), dim=1)[:, : rows.shape[1]] for rows in (key, value)]
        for rows in ((key, value), (key, value), wide):
            forward(layer, query, *rows, *rest)
        return forward(layer, query, *wide, *rest)

    monkeypatch.setattr(served.attention, "forward", layers)
    for chunks, ops in (
        ([100, 60], ["append", "append", "seal", "write_sink"]),
        ([1, 40], ["append", "append", "seal", "write_sink"]),
        ([1, 1], ["append", "seal"]),
    ):
        served.step(chunks)
        assert sorted(prepared) == sorted(2 * ops)
        prepared.clear()


def test_nothing_that_is_read_was_left_unwritten(scratch: list[int]) -> None:
    served = Sequences(batched("kvarn_k4v2_g64"), [400, 400])
    for chunks in ([150, 60], [100, 1], [150, 200]):
        served.step(chunks)
        assert all(out[:done].isfinite().all() for out, done in zip(served.out, served.done,
                                                                    strict=True))  # fmt: skip


@pytest.mark.kernel
def test_kernels_serve_a_mixed_batch_like_the_reference(
    scratch: list[int], monkeypatch: Any
) -> None:
    steps = [[150, 1, 70], [1, 66, 70], [1, 1, 1], [40, 1, 1]]
    lengths = [sum(chunks) for chunks in zip(*steps, strict=True)]
    kernels, reference = (
        Sequences(batched("kvarn_k4v2_g64", engine), lengths) for engine in ("triton", "reference")
    )
    for served in (kernels, reference):
        served.q, served.k, served.v, served.out = (
            [x.half() for x in rows] for rows in (served.q, served.k, served.v, served.out)
        )
        for chunks in steps:
            served.step(chunks)
    for one, other in zip(kernels.out, reference.out, strict=True):
        torch.testing.assert_close(one, other, atol=4e-3, rtol=0)


def test_warm_up_writes_zeros() -> None:
    attention = make("kvarn_k4v2_g128")
    q, kv = torch.ones(5, Q_HEADS, HEAD_DIM), torch.ones(5, KV_HEADS, HEAD_DIM)
    output = torch.full_like(q, 3.0)
    assert attention.forward(LAYER, q, kv, kv, torch.tensor([]), None, output) is output
    assert not output.any()


def test_warm_up_reserves_the_largest_step_and_runs_every_op_once(
    scratch: list[int], monkeypatch: Any
) -> None:
    ran: list[str] = []

    def watched(name: str, op: Any) -> Any:
        return lambda *args, **options: ran.append(name) or op(*args, **options)

    for name in ("write_sink", "seal", "append", "decode", "gather", "rotate_rows"):
        op = getattr(warm_up_module, name)
        monkeypatch.setattr(warm_up_module, name, watched(name, op))
    monkeypatch.setattr(workspace, "CONTEXT_TOKENS", 256)
    attention = batched("kvarn_k4v2_g64")
    q, kv = torch.ones(5, Q_HEADS, HEAD_DIM), torch.ones(5, KV_HEADS, HEAD_DIM)
    for _ in range(2):  # vLLM comes by several times
        attention.forward(LAYER, q, kv, kv, torch.tensor([]), None, torch.empty_like(q))
    stores = ["write_sink", "seal", "append"]
    assert ran == [*stores, *stores, "decode", "gather", "rotate_rows"]
    assert attention.path.attention.calls == 2

    reserved, before = max(scratch), len(scratch)
    served = Sequences(attention, [700] * 4)
    for chunks in ([255] * 4, [256] * 4, [1] * 4, [1, 1, 180, 180]):
        served.step(chunks)
    assert scratch[before:]
    assert max(scratch[before:]) <= reserved


def test_a_vllm_without_flash_attention_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **kwargs: None)
    with pytest.raises(RuntimeError, match=r"^KVarN: this vLLM has no FlashAttention for this GPU"):
        flash.FlashAttention.for_gpu(1.0, 128)


def test_merging_is_that_of_vllm(monkeypatch: Any) -> None:
    """Which arguments are the context's is the one thing the stand-in cannot check."""
    seen = []
    monkeypatch.setattr(flash, "merge_attn_states", lambda *tensors: seen.append(tensors))
    out, other = torch.zeros(3, 2, 4), torch.ones(3, 2, 4)
    lse, other_lse = torch.zeros(2, 3), torch.ones(2, 3)
    merged = flash.FlashAttention(1.0, 3).merge(out, lse, other, other_lse)
    [(to, prefix, prefix_lse, suffix, suffix_lse, merged_lse)] = seen
    assert to is suffix is out
    assert prefix is other
    assert prefix_lse is other_lse
    assert suffix_lse is lse
    assert merged_lse is merged
    assert merged is not lse


def test_unsupported_layers_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="needs ALiBi"):
        make("kvarn_k4v2_g128", alibi_slopes=[0.5] * Q_HEADS)
    with pytest.raises(NotImplementedError, match="needs the cache of another layer"):
        make("kvarn_k4v2_g128", kv_sharing_target_layer_name="model.layers.0.self_attn.attn")
    with pytest.raises(NotImplementedError, match="needs the argument sinks"):
        make("kvarn_k4v2_g128", sinks=torch.zeros(Q_HEADS))


def test_layer_index() -> None:
    assert layer_index("model.layers.17.self_attn.attn") == 17
    assert layer_index("attn") == 0

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config

from kvarn_vllm import impl as module
from kvarn_vllm.cache_spec import record_layout
from kvarn_vllm.impl import KVarNImpl, layer_index
from kvarn_vllm.metadata import KVarNMetadata

Q_HEADS, KV_HEADS, HEAD_DIM, LONGEST = 4, 2, 64, 700
LAYER = SimpleNamespace(layer_name="model.layers.1.self_attn.attn")


def make(preset: str, prefill: str = "chunk", **arguments: Any) -> KVarNImpl:
    options = {"kvarn": {"prefill": prefill}}
    with set_current_vllm_config(VllmConfig(additional_config=options)):
        return KVarNImpl(
            Q_HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, kv_cache_dtype=preset, **arguments
        )


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
        metadata = KVarNMetadata(
            page_table=self.table[order],
            seq_lens=torch.tensor([part.stop for part in parts], dtype=torch.int32),
            cu_seqlens_q=starts,
            num_tokens=len(q),
            num_decodes=sum(chunks[i] == 1 for i in order),
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


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (x.repeat_interleave(Q_HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * HEAD_DIM**-0.5
    scores.masked_fill_(torch.ones(len(q), len(k)).triu(1).bool(), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


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
        monkeypatch.setattr(module, "QUERY_BLOCK", block)
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


def test_warm_up_writes_zeros() -> None:
    attention = make("kvarn_k4v2_g128")
    q, kv = torch.ones(5, Q_HEADS, HEAD_DIM), torch.ones(5, KV_HEADS, HEAD_DIM)
    output = torch.full_like(q, 3.0)
    assert attention.forward(LAYER, q, kv, kv, torch.tensor([]), None, output) is output
    assert not output.any()


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

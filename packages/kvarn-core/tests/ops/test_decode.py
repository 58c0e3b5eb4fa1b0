from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn_core.layout import HIT_COLUMN, SINK_COLUMN, RecordLayout
from kvarn_core.ops.decode import attend, decode, workspace_bytes
from kvarn_core.rotation import hadamard_matrix
from kvarn_core.spec import DEBUG_PRESETS, PRESETS, Preset
from kvarn_core.testing import naive
from kvarn_core.testing.compare import assert_as_good_as, assert_close, assert_same_bits
from kvarn_core.testing.inputs import draw
from kvarn_core.testing.paging import POISONS, Paging, allocate, lengths, store_sequence

SMALL = RecordLayout(PRESETS["kvarn_k4v2_g64"], 64)
EDGES = (1, 127, 128, 129, 255, 256, 257, 384, 700)

# preset, head_dim, KV heads, query heads per KV head, tokens
CASES = [
    *(("kvarn_k4v2_g128", 128, 2, 4, tokens) for tokens in EDGES),
    ("kvarn_k4v2_g128", 64, 1, 8, 300),
    ("kvarn_k4v2_g128", 256, 2, 1, 300),
    ("kvarn_k4v4_g128", 128, 2, 8, 515),
    ("kvarn_k4v4_g128", 256, 1, 4, 385),
    ("kvarn_k2v2_g128", 128, 2, 1, 515),
    ("kvarn_k2v2_g128", 64, 4, 2, 257),
    ("kvarn_k4v2_g64", 128, 1, 4, 193),
    ("kvarn_k4v4_g64", 64, 3, 1, 129),
    ("kvarn_k2v2_g64", 256, 1, 8, 200),
]
each_case = pytest.mark.parametrize(
    ("name", "dim", "heads", "ratio", "tokens"),
    [pytest.param(*c, id=f"{c[0][6:]}-d{c[1]}-kv{c[2]}-gqa{c[3]}-len{c[4]}") for c in CASES],
)


def _stored(
    layout: RecordLayout, tokens: list[int], *, heads: int = 2, seed: int = 0, fill: int = 0xFF
) -> Paging:
    paging = allocate(layout, tokens, num_kv_heads=heads, seed=seed, fill=fill)
    for i, n in enumerate(tokens):
        shape = (n, heads, layout.head_dim)
        key, value = draw("gaussian", shape, seed=i), draw("gaussian", shape, seed=i + 50)
        if n:
            store_sequence(paging, i, key, value, [n])
    return paging


def _decode(
    paging: Paging, query: torch.Tensor, tokens: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    return decode(
        query, paging.cache, paging.page_table, torch.tensor(tokens, dtype=torch.int32),
        layout=paging.layout, sm_scale=paging.layout.head_dim**-0.5,
    )  # fmt: skip


def _softmax_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One query [Hq, D] over [N, Hkv, D] in fp64, head by head."""
    ratio = query.shape[0] // key.shape[1]
    out, lse = torch.zeros_like(query), torch.zeros(query.shape[0], dtype=torch.float64)
    for head in range(query.shape[0]):
        scores = key[:, head // ratio] @ query[head] * query.shape[1] ** -0.5
        lse[head] = scores.exp().sum().log()
        out[head] = scores.softmax(0) @ value[:, head // ratio]
    return out, lse


def _oracle(
    paging: Paging, query: torch.Tensor, request: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention over what the naive decoder reads, turned back by the matrix."""
    layout = paging.layout
    rows = naive.view(
        paging.cache.numpy(), paging.page_table[request].numpy(), tokens, tokens - 1,
        group=layout.group, dim=layout.head_dim, key_bits=layout.preset.key_bits,
        value_bits=layout.preset.value_bits,
    )  # fmt: skip
    matrix = hadamard_matrix(layout.head_dim)
    key, value = (torch.from_numpy(x).double() @ matrix for x in rows)
    return _softmax_attention(query.double(), key, value)


@each_case
def test_decode_is_exact_attention_on_the_stored_content(
    name: str, dim: int, heads: int, ratio: int, tokens: int
) -> None:
    paging = _stored(RecordLayout(Preset.from_name(name), dim), [tokens], heads=heads)
    query = 2 * draw("gaussian", (1, heads * ratio, dim), seed=99)
    out, lse = _decode(paging, query, [tokens])
    want, want_lse = _oracle(paging, query[0], 0, tokens)
    assert_close(out[0], want.float(), tolerance=5e-6)
    assert_close(lse[0], want_lse.float(), tolerance=5e-6)


@pytest.mark.parametrize("change", ["null-sink", "hits"])
def test_decode_without_a_sink_and_after_a_prefix_hit(change: str) -> None:
    paging, tokens = _stored(SMALL, [300]), 300
    if change == "hits":  # tile 2 would be exact at 200 tokens, but it came from the prefix cache
        paging.page_table[0, HIT_COLUMN], tokens = 3, 200
    paging.page_table[0, SINK_COLUMN] = 0
    query = draw("gaussian", (1, 4, 64), seed=5)
    out, lse = _decode(paging, query, [tokens])
    want, want_lse = _oracle(paging, query[0], 0, tokens)
    assert_close(out[0], want.float(), tolerance=5e-6)
    assert_close(lse[0], want_lse.float(), tolerance=5e-6)


@pytest.mark.parametrize("name", list(DEBUG_PRESETS))
@pytest.mark.parametrize("tokens", [1, 129, 450])
def test_the_debug_preset_is_exact_attention(name: str, tokens: int) -> None:
    paging = _stored(RecordLayout(DEBUG_PRESETS[name], 64), [tokens])
    query = draw("gaussian", (1, 6, 64), seed=6)
    key, value = (draw("gaussian", (tokens, 2, 64), seed=seed).double() for seed in (0, 50))
    want, want_lse = _softmax_attention(query[0].double(), key, value)
    out, lse = _decode(paging, query, [tokens])
    assert_close(out[0], want.float(), tolerance=2e-6)
    assert_close(lse[0], want_lse.float(), tolerance=2e-6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_row_does_not_depend_on_the_batch_nor_on_foreign_bytes(data: st.DataObject) -> None:
    tokens = data.draw(st.lists(lengths(64, 300), min_size=2, max_size=4))
    seed = data.draw(st.integers(0, 99))
    poison = data.draw(st.sampled_from(POISONS))
    paging = _stored(SMALL, tokens, seed=seed, fill=poison)
    query = draw("gaussian", (len(tokens), 4, 64), seed=7)
    together = _decode(paging, query, tokens)
    clean = _stored(SMALL, tokens, seed=seed, fill=0)
    clean.poison_unused(0x3C)
    for i, n in enumerate(tokens):
        alone = decode(
            query[i : i + 1], clean.cache, clean.page_table[i : i + 1],
            torch.tensor([n], dtype=torch.int32), layout=SMALL, sm_scale=64**-0.5,
        )  # fmt: skip
        for got, want in zip(together, alone, strict=True):
            assert_same_bits(got[i : i + 1], want)


def test_a_padded_row_gives_zero_and_minus_infinity() -> None:
    paging = _stored(SMALL, [70, 70])
    query = draw("gaussian", (2, 4, 64), seed=8)
    want = _decode(paging, query, [70, 70])
    paging.page_table[0] = 10**6
    out, lse = _decode(paging, query, [0, 70])
    assert not out[0].any()
    assert torch.isneginf(lse[0]).all()
    assert_same_bits(out[1], want[0][1])
    assert_same_bits(lse[1], want[1][1])


def test_a_strided_query_gives_the_same_bits() -> None:
    paging = _stored(SMALL, [200, 65])
    wide = draw("gaussian", (4, 2, 3 * 64), seed=9)
    query = wide.transpose(0, 1)[:, :, 64:128]
    assert not query.is_contiguous()
    strided = _decode(paging, query, [200, 65])
    for got, want in zip(strided, _decode(paging, query.contiguous(), [200, 65]), strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_queries_lose_no_more_than_torch(dtype: torch.dtype) -> None:
    paging = _stored(SMALL, [300])
    query = draw("gaussian", (1, 4, 64), seed=10, dtype=dtype)
    out, lse = _decode(paging, query, [300])
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    want, _ = _oracle(paging, query[0].float(), 0, 300)
    assert_as_good_as(out[0].double(), want, want.to(dtype).double(), factor=1.01)


def test_attend_is_causal_and_ends_at_the_newest_key() -> None:
    key, value = draw("gaussian", (37, 2, 64), seed=11), draw("gaussian", (37, 2, 64), seed=12)
    query = draw("gaussian", (9, 6, 64), seed=13)
    out, lse = attend(query, key, value, sm_scale=64**-0.5)
    for i in range(9):
        visible = 37 - 9 + i + 1
        want, want_lse = _softmax_attention(
            query[i].double(), key[:visible].double(), value[:visible].double()
        )
        assert_close(out[i], want.float(), tolerance=2e-6)
        assert_close(lse[i], want_lse.float(), tolerance=2e-6)


def test_large_scores_do_not_overflow() -> None:
    paging = _stored(SMALL, [300])
    out, lse = _decode(paging, 1e4 * draw("gaussian", (1, 4, 64), seed=14), [300])
    assert out.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("cache", torch.zeros(9, 2, RecordLayout(PRESETS["kvarn_k2v2_g64"], 64).record_bytes)),
        ("page_table", torch.zeros(1, 30, dtype=torch.int64)),
        ("page_table", torch.zeros(1, 3, dtype=torch.int32)),
        ("page_table", torch.zeros(0, 30, dtype=torch.int32)),
        ("seq_lens", torch.tensor([10])),
        ("out", torch.zeros(1, 4, 64, dtype=torch.float16)),
        ("lse", torch.zeros(1, 3)),
    ],
)
def test_arguments_that_do_not_fit_are_named(name: str, wrong: torch.Tensor) -> None:
    paging = _stored(SMALL, [10])
    tokens, query = torch.tensor([10], dtype=torch.int32), torch.zeros(1, 4, 64)
    places = {"cache": paging.cache, "page_table": paging.page_table, "seq_lens": tokens}
    results = {"out": torch.zeros(1, 4, 64), "lse": torch.zeros(1, 4)}
    given = {**places, **results, name: wrong.byte() if name == "cache" else wrong}
    with pytest.raises(ValueError, match=rf"^{name} has .* (Pass|needs) "):
        decode(query, layout=SMALL, sm_scale=1.0, **given)


@pytest.mark.parametrize("shape", [(1, 3, 64), (4, 64), (1, 4, 32)])
def test_a_wrong_query_is_named(shape: tuple[int, ...]) -> None:
    paging = _stored(SMALL, [10])
    message = r"^query has shape \(.*\)\. Pass \[B, Hq, 64\] with Hq a multiple of the 2 KV"
    with pytest.raises(ValueError, match=message):
        _decode(paging, torch.zeros(shape), [10])


def test_longer_lists_of_requests_are_cut() -> None:
    paging = _stored(SMALL, [100, 50])
    query = torch.randn(1, 4, 64)
    want = _decode(paging, query, [100])
    for table in (paging.page_table, paging.page_table[:1]):
        got = decode(
            query, paging.cache, table, torch.tensor([100, 50], dtype=torch.int32),
            layout=SMALL, sm_scale=0.125, engine="reference",
        )  # fmt: skip
        for one, other in zip(got, want, strict=True):
            assert_same_bits(one, other)


def test_without_triton_there_is_nothing_to_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvarn_core.dispatch.triton_installed", lambda: False)
    monkeypatch.setitem(sys.modules, "kvarn_core.ops.decode.triton", None)
    assert workspace_bytes(4, 32, 8, SMALL) == 0

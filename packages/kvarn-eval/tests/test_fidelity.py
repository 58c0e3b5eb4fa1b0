from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from kvarn_core import PRESETS, RecordLayout
from kvarn_core.ops.decode import decode
from kvarn_core.ops.store import append, seal, write_sink
from kvarn_eval.baselines import METHODS, Method
from kvarn_eval.fidelity import (
    ARMS,
    DEFAULT_PRESET,
    CachePolicy,
    Distance,
    PolicyCache,
    Text,
    as_served,
    compare,
    load_model,
    make_texts,
    program_texts,
    pseudo_decode,
    texts_sha256,
    weights_sha256,
)
from kvarn_eval.small_model import SMALL_MODEL
from kvarn_eval.small_model.tasks import FAMILIES

if TYPE_CHECKING:
    from pathlib import Path

    from kvarn_eval.small_model.model import SmallModel

G = DEFAULT_PRESET.group


def rows(length: int, heads: int, dim: int = 64) -> torch.Tensor:
    return torch.randn(heads, length, dim, generator=torch.Generator().manual_seed(length + heads))


@pytest.mark.parametrize("profile", ["moderate", "large"])
def test_keys_as_served_do_not_depend_on_the_size_of_norms(profile: str) -> None:
    plain, stressed = (
        as_served(load_model(SMALL_MODEL, x), ARMS["kvarn"]).state_dict()
        for x in ("plain", profile)
    )
    norms = [name for name in plain if "q_norm" in name or "k_norm" in name]
    assert len(norms) == 12
    assert all(torch.equal(plain[name], stressed[name]) for name in norms)
    model = load_model(SMALL_MODEL, profile)
    assert as_served(model, ARMS["paper"]) is model


@pytest.mark.parametrize(
    ("window", "sink"), [(1, 27), (0, 128), (0, 0), (1, 0), (2, 300)], ids=lambda x: str(x)
)
def test_each_query_sees_what_its_position_would_find(
    window: int, sink: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shifted = Method(lambda x, _: x, lambda k, v, _: (k + 1, v - 1))
    monkeypatch.setitem(METHODS, "shifted", shifted)
    length = 3 * G + 40
    q, k, v = rows(length, 4), rows(length, 2), rows(length, 3)[:2]
    out = PolicyCache(CachePolicy("shifted", window, sink), DEFAULT_PRESET)(0, q, k, v, 0.1)
    for position in (0, 1, G - 1, G, 2 * G - 1, 2 * G, 3 * G, length - 1):
        border = max(position // G - window, 0) * G
        packed = (torch.arange(position + 1) >= sink) & (torch.arange(position + 1) < border)
        offset = packed.float()[None, :, None]
        key, value = k[:, : position + 1] + offset, v[:, : position + 1] - offset
        for head in range(4):
            weight = (0.1 * key[head // 2] @ q[head, position]).softmax(0)
            expected = weight @ value[head // 2]
            assert torch.allclose(out[head, position], expected, atol=1e-5)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 256, 257, 400, 700])
def test_pseudo_decode_equals_the_decode_operation(length: int) -> None:
    preset = PRESETS["kvarn_k4v2_g64"]
    layout = RecordLayout(preset, 64)
    heads, scale = 2, 0.2
    q, k, v = rows(length, 4), rows(length, heads), rows(length, 3)[:heads]
    tokens = [x.transpose(0, 1).contiguous() for x in (k, v)]
    columns = layout.columns(length)
    cache = torch.zeros(columns + 1, heads, layout.record_bytes, dtype=torch.uint8)
    table = torch.arange(columns, dtype=torch.int32)[None]
    seq_lens, cu = torch.tensor([length]), torch.tensor([0, length])
    write_sink(*tokens, cache, table, seq_lens.int(), cu.int(), layout=layout)
    seal(*tokens, cache, table, seq_lens.int(), cu.int(), layout=layout)
    append(*tokens, cache, table, seq_lens.int(), cu.int(), layout=layout)
    expected, _ = decode(
        q[:, -1][None], cache, table, seq_lens.int(), layout=layout, sm_scale=scale
    )
    out = PolicyCache(CachePolicy("kvarn"), preset)(0, q, k, v, scale)
    assert torch.allclose(out[:, -1], expected[0], atol=1e-5)


def test_an_arm_that_packs_nothing_is_the_reference(tiny_model: SmallModel) -> None:
    model, text = tiny_model, make_texts(1, 700)[0]
    reference = pseudo_decode(model, text.ids, ARMS["fp16"], DEFAULT_PRESET)
    assert torch.allclose(reference.exp().sum(-1), torch.ones(1, dtype=torch.float64))
    rotated = pseudo_decode(model, text.ids, ARMS["rotated fp16"], DEFAULT_PRESET)
    distance = compare(reference, rotated, text)
    assert distance.kld.max() < 1e-4
    kvarn = pseudo_decode(model, text.ids, ARMS["kvarn"], DEFAULT_PRESET)
    assert torch.equal(rotated[: 2 * G], kvarn[: 2 * G])
    assert compare(reference, kvarn, text).kld[2 * G :].mean() > 100 * distance.kld.mean()


def test_divergence_against_a_hand_calculation() -> None:
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.3, 0.7]], dtype=torch.float64).log()
    q = torch.tensor([[0.25, 0.75], [0.4, 0.6], [0.3, 0.7]], dtype=torch.float64).log()
    distance = compare(p, q, Text("recall", (0, 1, 0), prompt=2))
    first = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    second = 0.9 * math.log(0.9 / 0.4) + 0.1 * math.log(0.1 / 0.6)
    assert distance.kld == pytest.approx([first, second])
    assert distance.top1.tolist() == [0.0, 0.0]
    assert distance.dlogp == pytest.approx([math.log(1.5), math.log(0.9 / 0.4)])
    assert distance.answer(distance.kld, 0) == pytest.approx([second])


def test_answers_begin_with_their_first_prediction() -> None:
    values = np.arange(10.0)
    distance = Distance(values, values, values, answer_from=4)
    assert distance.answer(values, 0)[0] == 4
    assert distance.answer(values, 7)[0] == 7


def test_texts_are_deterministic_and_of_the_length_asked_for() -> None:
    texts = make_texts(4, 1024)
    assert make_texts(4, 1024) == texts
    assert len({text.ids for text in texts}) == 4
    assert {text.source for text in texts} == set(FAMILIES)
    assert all(1000 <= len(text.ids) <= 1024 for text in texts)
    assert texts_sha256(texts) != texts_sha256(make_texts(4, 1025))
    assert texts_sha256(texts) == texts_sha256(make_texts(4, 1024))


def test_program_texts_have_no_answer() -> None:
    texts = program_texts(2, 600)
    assert [len(text.ids) for text in texts] == [600, 600]
    logits = torch.zeros(600, 200, dtype=torch.float64).log_softmax(-1)
    distance = compare(logits, logits, texts[0])
    assert len(distance.kld) == 599
    assert len(distance.answer(distance.kld, 256)) == 0


def test_the_weights_are_identified_by_their_hash(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    assert weights_sha256(tmp_path).startswith("ba7816bf")

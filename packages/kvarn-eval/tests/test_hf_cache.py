"""The transformers cache holds and shows what the served cache does."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from kvarn_core import PRESETS, Recipe, RecordLayout
from kvarn_eval.fidelity import ARMS, PolicyCache, make_texts
from kvarn_eval.hf_cache import KVarNCache
from kvarn_eval.small_model.model import SmallModel, causal_attention
from kvarn_eval.small_model.tasks import grade, make_item
from kvarn_eval.small_model.tokenizer import decode, encode

ROOT = Path(__file__).parents[3]
SMALL = ROOT / "packages" / "kvarn-eval" / "models" / "small"
G128 = PRESETS["kvarn_k4v2_g128"]
GUIDE = ROOT / "docs" / "how-to" / "quantise-a-hugging-face-cache.md"


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(SMALL, dtype=torch.float32).eval()


@torch.inference_mode()
def logits(model: Any, ids: torch.Tensor, cache: Any, pieces: list[int]) -> torch.Tensor:
    """Logits [B, T, V] of ids [B, T], fed in pieces of these lengths."""
    found = [model(piece, past_key_values=cache).logits for piece in ids.split(pieces, 1)]
    return torch.cat(found, 1)


def text(length: int, batch: int = 1) -> torch.Tensor:
    """Problems with answers, cut to `length` tokens."""
    return torch.tensor([item.ids[:length] for item in make_texts(batch, max(length, 360) + 40)])


def attend(cache: KVarNCache, rows: list[torch.Tensor], pieces: list[int]) -> torch.Tensor:
    """Attention [Hq, T, D] of queries over keys and values [H, T, D] fed to a layer in pieces."""
    parts = zip(*(x.split(pieces, 1) for x in rows), strict=True)
    found = []
    for query, key, value in parts:
        seen_key, seen_value = cache.update(key[None], value[None], 0)
        found.append(causal_attention(query, seen_key[0], seen_value[0], 0.1))
    return torch.cat(found, 1)


@pytest.mark.parametrize("preset", ["kvarn_k4v2_g128", "kvarn_k2v2_g64"])
def test_every_query_sees_what_the_served_cache_shows(preset: str, model: Any) -> None:
    group, generator = PRESETS[preset].group, torch.Generator().manual_seed(0)
    rows = [torch.randn(heads, 600, 128, generator=generator) for heads in (8, 2, 2)]
    wanted = PolicyCache(ARMS["kvarn"], PRESETS[preset])(0, *rows, 0.1)
    tiles = [group] * (600 // group) + [600 % group]
    assert torch.equal(attend(KVarNCache(model.config, preset), rows, tiles), wanted)
    tokens = attend(KVarNCache(model.config, preset), rows, [1] * 600)
    assert (tokens - wanted).abs().max() < 1e-5  # sums of another order
    late = attend(KVarNCache(model.config, preset), rows, [600])
    assert (late - wanted).abs().max() > 1e-2  # one piece reads no record


def test_a_model_reads_its_cache_through_it(model: Any) -> None:
    """Bits differ between two models, so codes flip: distances are compared, not logits."""
    ids = text(600)
    found = logits(model, ids, KVarNCache(model.config), [128] * 4 + [88])[0]
    small = SmallModel.load(SMALL)
    with torch.inference_mode():
        exact, wanted = small(ids[0]), small(ids[0], PolicyCache(ARMS["kvarn"], G128))

    def distance(p: torch.Tensor, q: torch.Tensor) -> float:
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    assert distance(wanted, found) < 0.1 * distance(exact, wanted)


def test_the_debug_preset_is_an_exact_cache(model: Any) -> None:
    ids = text(300)
    pieces = [150, 10, *[1] * 140]
    found = logits(model, ids, KVarNCache(model.config, "kvarn_debug32_g64"), pieces)
    assert (found - logits(model, ids, DynamicCache(), pieces)).abs().max() < 1e-3


def test_the_recipe_reaches_the_records(model: Any) -> None:
    ids = text(300)
    by_recipe = [
        logits(model, ids, KVarNCache(model.config, "kvarn_k4v2_g64", recipe), [64] * 4 + [44])
        for recipe in (Recipe.KVARN, Recipe.PAPER)
    ]
    assert not torch.equal(*by_recipe)


@pytest.mark.parametrize("length", [1, 64, 127, 128, 129, 192, 256, 300])
def test_it_holds_records_and_exact_rows_and_nothing_else(length: int, model: Any) -> None:
    cache = KVarNCache(model.config, "kvarn_k4v2_g64")
    logits(model, text(length), cache, [length])
    layout = RecordLayout(PRESETS["kvarn_k4v2_g64"], 128)
    tiles = layout.packed_tiles(length)
    exact = length - tiles * 64 + (layout.sink_rows if tiles else 0)
    heads = model.config.num_key_value_heads * model.config.num_hidden_layers
    assert cache.nbytes == heads * (tiles * layout.record_bytes + exact * layout.row_bytes)
    assert cache.get_seq_length() == length


def test_rows_of_a_batch_can_be_reordered_repeated_and_chosen(model: Any) -> None:
    ids = text(200, batch=2)
    apart = [logits(model, row[None], KVarNCache(model.config, "kvarn_k4v2_g64"), [199, 1])[0, -1]
             for row in ids]  # fmt: skip

    def after(change: Any, order: list[int]) -> torch.Tensor:
        cache = KVarNCache(model.config, "kvarn_k4v2_g64")
        logits(model, ids[:, :199], cache, [199])
        for layer in cache.layers:
            change(layer)
        return logits(model, ids[order, 199:], cache, [1])[:, -1]

    swapped = after(lambda layer: layer.reorder_cache(torch.tensor([1, 0])), [1, 0])
    assert (swapped - torch.stack(apart[::-1])).abs().max() < 1e-3
    doubled = after(lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1])
    assert (doubled[::2] - torch.stack(apart)).abs().max() < 1e-3
    chosen = after(lambda layer: layer.batch_select_indices(torch.tensor([1])), [1])
    assert (chosen[0] - apart[1]).abs().max() < 1e-3


def test_a_reset_cache_is_a_new_one(model: Any) -> None:
    ids, cache = text(200), KVarNCache(model.config, "kvarn_k4v2_g64")
    first = logits(model, ids, cache, [64, 64, 64, 8])
    for layer in cache.layers:
        layer.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(first, logits(model, ids, cache, [64, 64, 64, 8]))


def test_generation_solves_a_problem_out_of_records(model: Any) -> None:
    item = make_item("recall", 7, prompt_tokens=700, questions=4, rewrites=0.5)
    cache = KVarNCache(model.config)
    prompt = torch.tensor([encode(item.prompt)])
    options = {"max_new_tokens": item.answer_tokens, "prefill_chunk_size": 128}
    answer = model.generate(prompt, past_key_values=cache, do_sample=False, **options)
    assert cache.layers[0].records.shape[2] >= 4
    assert grade(item, decode(answer[0, prompt.shape[1] :].tolist()))


@pytest.mark.gpu
def test_a_gpu_sees_what_a_cpu_sees(model: Any) -> None:
    ids, pieces = text(700), [128] * 5 + [60]
    on_cpu = logits(model, ids, KVarNCache(model.config), pieces)
    copy = AutoModelForCausalLM.from_pretrained(SMALL, dtype=torch.float32).eval().cuda()
    cache = KVarNCache(copy.config)
    on_gpu = logits(copy, ids.cuda(), cache, pieces).cpu()
    assert cache.layers[0].records.is_cuda
    same = on_gpu.argmax(-1) == on_cpu.argmax(-1)
    assert same.float().mean() > 0.99
    assert (on_gpu.softmax(-1) - on_cpu.softmax(-1)).abs().mean() < 1e-4


def settings(**fields: Any) -> Any:
    base = {"num_hidden_layers": 1, "hidden_size": 512, "num_attention_heads": 4, "head_dim": None}
    config = SimpleNamespace(**{**base, **fields})
    config.get_text_config = lambda decoder: config
    return config


def test_what_is_unsupported_is_refused(model: Any) -> None:
    with pytest.raises(NotImplementedError, match="Layers of type sliding_attention"):
        KVarNCache(settings(layer_types=["full_attention", "sliding_attention"]))
    with pytest.raises(NotImplementedError, match="Layers of type sliding_window"):
        KVarNCache(settings(sliding_window=4096))  # without types of layers
    with pytest.raises(ValueError, match="head_dim 96 is not supported"):
        KVarNCache(settings(head_dim=96))
    with pytest.raises(ValueError, match="not a KVarN preset"):
        KVarNCache(settings(), "kvarn_k3v3_g128")
    assert KVarNCache(settings()).layers[0].layout.head_dim == 128
    cache = KVarNCache(model.config)
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        cache.layers[0].crop(-1)
    with pytest.raises(ValueError, match="Rows have 64 channels"):
        cache.update(torch.zeros(1, 2, 3, 64), torch.zeros(1, 2, 3, 64), 0)


def test_the_guide_runs(capsys: pytest.CaptureFixture[str]) -> None:
    tensor, cache, norms = re.findall(
        r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.S
    )
    exec(tensor, {})  # noqa: S102 - the page is ours
    assert "4.74 times smaller than fp16" in capsys.readouterr().out
    prompt = make_item("recall", 7, prompt_tokens=300, questions=4, rewrites=0.5).prompt
    for shown, meant in (
        ('"Qwen/Qwen3-8B"', repr(str(SMALL))),
        ('"Explain variance normalisation."', repr(prompt)),
        ("max_new_tokens=512", "max_new_tokens=40"),
    ):
        assert cache.count(shown) == 1
        cache = cache.replace(shown, meant)
    assert len(cache.splitlines()) <= 10
    names: dict[str, Any] = {}
    exec(cache, names)  # noqa: S102
    assert re.search(r"3\d\d tokens in 1\.\d MiB", capsys.readouterr().out)
    names["model"].float()  # fp16 would lose bits of numbers below 6e-5
    before = names["model"](names["inputs"]["input_ids"]).logits
    exec(norms, names)  # noqa: S102
    assert torch.equal(names["model"](names["inputs"]["input_ids"]).logits, before)

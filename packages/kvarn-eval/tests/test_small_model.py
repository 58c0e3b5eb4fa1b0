"""The small model: program text, tokenizer, forward pass, and the committed weights."""

from __future__ import annotations

import copy
import dataclasses
import json
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvarn_eval.preflight import Missing
from kvarn_eval.small_model import corpus, tokenizer
from kvarn_eval.small_model.evaluate import exact_match
from kvarn_eval.small_model.headroom import LIMIT, largest_activation, with_headroom
from kvarn_eval.small_model.model import GrowingCache, ModelConfig, SmallModel, generate
from kvarn_eval.small_model.tasks import FAMILIES, grade, make_item, trained

ODDITIES = "[1][65]<recall>é? if x[64] <= <module> and s == '\\\\n':\n\tpass"
PUBLISHED = Path(__file__).parents[1] / "models" / "small"
TINY = ModelConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)


def some_ids(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, len(tokenizer.TOKENS), (count,), generator=generator)


@pytest.fixture(scope="module")
def tiny() -> SmallModel:
    """Random weights, large enough that attention is not uniform."""
    torch.manual_seed(0)
    model = SmallModel(TINY).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.15) if weight.ndim == 2 else weight.uniform_(0.5, 2)
    return model


# --- headroom in fp16


def test_headroom_changes_activations_and_not_the_function(tiny: SmallModel) -> None:
    with torch.no_grad():  # a last layer that writes a hundred thousand
        tiny = copy.deepcopy(tiny)
        tiny.model.layers[-1].mlp.up_proj.weight *= 10_000
    scaled, ids = with_headroom(tiny), some_ids(60)
    want = tiny(ids)
    torch.testing.assert_close(scaled(ids), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert largest_activation(tiny, ids) > 65_504
    assert not tiny.half()(ids).isfinite().all()
    assert largest_activation(scaled, ids) < 65_504
    assert scaled.half()(ids).isfinite().all()


@pytest.mark.parametrize("family", trained(PUBLISHED))
def test_the_published_model_has_headroom(family: str) -> None:
    """Prompts as well, where no token can be guessed and nothing was learnt."""
    items = [make_item(family, seed) for seed in range(3)]
    model = SmallModel.load(PUBLISHED)
    rows = [torch.tensor(tokenizer.encode(item.prompt + item.answer)) for item in items]
    assert max(largest_activation(model, row) for row in rows) < LIMIT


# --- program text


def test_no_training_text_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standard, torch_root = tmp_path / "stdlib", tmp_path / "torch"
    modules = [f"module{n}" for n in range(60)]
    for folder in (standard / "test", standard / "site-packages", torch_root):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(f"# {folder.name}\n")
    for name in modules:
        (standard / f"{name}.py").write_text(f"{name}\n" * 100)
    (standard / "accents.py").write_text("é\n" * 100, encoding="utf-8")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(standard))
    spec = SimpleNamespace(origin=str(torch_root / "__init__.py"))
    monkeypatch.setattr(corpus, "find_spec", lambda name: spec)
    training = tokenizer.decode(corpus.training_ids().tolist())
    held_out = corpus.held_out_texts(4, 300)
    assert [len(ids) for ids in held_out.values()] == [300] * 4
    for name in modules:
        assert (f"{name}\n" in training) is not corpus.is_held_out(name)
        assert corpus.is_held_out(name) or f"{name}.py" not in held_out
    assert "# torch\n" in training
    assert "# test\n" not in training
    assert "# site-packages\n" not in training
    assert "\n\n" not in training  # nothing of what cannot be expressed
    with pytest.raises(ValueError, match=r"held-out modules of Python have 5000 tokens\. Ask for"):
        corpus.held_out_texts(1, 5000)


def test_missing_sources_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(Missing, match="The sources of Python or torch are missing"):
        corpus.training_ids()


def test_this_python_has_program_text_to_read() -> None:
    texts = corpus.held_out_texts(12, 4096)
    assert {len(ids) for ids in texts.values()} == {4096}
    assert len({name.split("/")[0].removesuffix(".py") for name in texts}) == 12
    assert any("def " in tokenizer.decode(ids) for ids in texts.values())
    assert list(corpus.held_out_texts(2, 4096)) == list(texts)[:2]


# --- tokenizer


def test_text_and_ids_determine_each_other() -> None:
    assert tokenizer.encode("a[1]é") == [tokenizer.IDS["a"], tokenizer.IDS["[1]"], tokenizer.UNK]
    program = "".join(map(chr, range(32, 127))) + "\t\nx[10] = y[65] + [0]<module><recall>"
    assert tokenizer.decode(tokenizer.encode(program)) == program


def test_later_keywords_moved_no_token() -> None:
    assert tokenizer.TOKENS[74] == "[1]"
    assert tokenizer.TOKENS[165] == "~"
    assert len(tokenizer.TOKENS) <= ModelConfig().vocab_size


def test_the_written_tokenizer_agrees(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    tokenizer.save_tokenizer(tmp_path, max_length=8192)
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert written.get_vocab() == tokenizer.IDS
    for text in (*(make_item(name, 0).prompt for name in FAMILIES), ODDITIES):
        ids = tokenizer.encode(text)
        assert written.encode(text).ids == ids
        assert written.decode(ids) == tokenizer.decode(ids)


# --- forward pass


def test_transformers_computes_the_same_logits(tiny: SmallModel, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tiny.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = SmallModel.load(tmp_path)
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    ids = some_ids(300)
    with torch.inference_mode():
        expected, logits = theirs(ids[None]).logits[0], ours(ids)
    assert logits.abs().max() > 1
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path)
    item = make_item("arith", 0)
    assert reader(item.prompt)["input_ids"] == tokenizer.encode(item.prompt)
    assert reader.decode(tokenizer.encode(item.prompt)) == item.prompt


def test_a_growing_cache_changes_nothing(tiny: SmallModel) -> None:
    ids = some_ids(90)
    cache = GrowingCache()
    with torch.inference_mode():
        blocks = [
            tiny(ids[s:e], cache, start=s) for s, e in ((0, 40), (40, 80), (80, 81), (81, 90))
        ]
        torch.testing.assert_close(torch.cat(blocks), tiny(ids), rtol=0, atol=2e-5)


def test_a_batch_is_its_rows(tiny: SmallModel) -> None:
    ids = torch.stack((some_ids(60, 1), some_ids(60, 2)))
    with torch.inference_mode():
        torch.testing.assert_close(
            tiny(ids), torch.stack([tiny(r) for r in ids]), rtol=0, atol=2e-5
        )


def test_the_hook_sees_and_replaces_what_each_layer_reads(tiny: SmallModel) -> None:
    seen = []

    def hook(
        layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        seen.append((layer, tuple(q.shape), tuple(k.shape), tuple(v.shape), scale))
        return torch.zeros_like(q)

    ids = some_ids(20)
    with torch.inference_mode():
        replaced, plain = tiny(ids, hook), tiny(ids)
    assert seen == [(i, (4, 20, 32), (2, 20, 32), (2, 20, 32), 32**-0.5) for i in range(2)]
    assert (replaced - plain).abs().max() > 0.1


def test_generation_continues_greedily(tiny: SmallModel) -> None:
    prompt = torch.stack((some_ids(30, 1), some_ids(30, 2)))
    ids = prompt
    with torch.inference_mode():
        for _ in range(6):
            ids = torch.cat((ids, tiny(ids)[:, -1:].argmax(-1)), 1)
    new = generate(tiny, prompt, 6)
    assert torch.equal(new, ids[:, 30 : 30 + new.shape[1]])


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="Use a multiple of the KV heads and an even head_dim"):
        dataclasses.replace(TINY, num_attention_heads=3)
    with pytest.raises(ValueError, match=f"Use at least {len(tokenizer.TOKENS)}"):
        dataclasses.replace(TINY, vocab_size=100)


def test_another_architecture_is_refused(tiny: SmallModel, tmp_path: Path) -> None:
    tiny.save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "architectures": ["LlamaForCausalLM"]})
    )
    with pytest.raises(ValueError, match="is not a Qwen3ForCausalLM with tied embeddings"):
        SmallModel.load(tmp_path)


# --- the committed model


@pytest.fixture(scope="module")
def published() -> SmallModel:
    return SmallModel.load(PUBLISHED)


def test_the_published_model_keeps_its_promises(published: SmallModel) -> None:
    assert published.config == with_headroom(SmallModel(ModelConfig())).config
    assert 5e6 <= sum(p.numel() for p in published.parameters()) <= 15e6
    assert published.config.vocab_size <= 512
    weights = PUBLISHED / "model.safetensors"
    assert weights.stat().st_size <= 30e6
    assert not {p.suffix for p in PUBLISHED.iterdir()} - {".json", ".safetensors", ".md"}
    log = json.loads((PUBLISHED / "training.json").read_text(encoding="utf-8"))
    assert log["steps"] == log["planned_steps"]
    assert log["seconds"] <= 12 * 60
    for family in trained(PUBLISHED):
        cells = [r for r in log["accuracy"] if r["family"] == family and r["rewrites"] <= 0.5]
        assert sum(r["right"] for r in cells) >= 0.95 * sum(r["items"] for r in cells)
        assert sum(r["items"] for r in cells) >= 512


@pytest.mark.parametrize("family", trained(PUBLISHED))
def test_the_published_model_answers_held_out_items(published: SmallModel, family: str) -> None:
    items = [make_item(family, seed, prompt_tokens=600, questions=6) for seed in (70_000, 70_001)]
    assert exact_match(published, items) == [True, True]
    with torch.inference_mode():
        new = generate(published, torch.tensor([tokenizer.encode(items[0].prompt)]), 200)
    assert new[0, -1] == tokenizer.EOS
    assert grade(items[0], tokenizer.decode(new[0].tolist()))


def test_a_blurred_cache_makes_the_published_model_wrong(published: SmallModel) -> None:
    class Blurred(GrowingCache):
        def __call__(
            self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
        ) -> torch.Tensor:
            return super().__call__(layer, q, k.sign() * k.abs().mean(-1, keepdim=True), v, scale)

    items = [make_item("recall", seed, prompt_tokens=600, questions=6) for seed in (70_000, 70_001)]
    assert exact_match(published, items, Blurred()) == [False, False]


def test_items_of_different_lengths_are_not_one_batch(tiny: SmallModel) -> None:
    items = [make_item("recall", 0, prompt_tokens=n) for n in (600, 700)]
    with pytest.raises(ValueError, match="Evaluate one at a time"):
        exact_match(tiny, items)

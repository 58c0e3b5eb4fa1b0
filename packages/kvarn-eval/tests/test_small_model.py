"""The small model: items, tokenizer, forward pass, training, stress, and the committed weights."""

from __future__ import annotations

import dataclasses
import json
import re
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvarn_eval.small_model import corpus, tokenizer
from kvarn_eval.small_model.evaluate import exact_match
from kvarn_eval.small_model.model import GrowingCache, ModelConfig, SmallModel, generate
from kvarn_eval.small_model.muon import Muon, orthogonalise
from kvarn_eval.small_model.tasks import (
    FAMILIES,
    PROMPT_WEIGHT,
    Family,
    Item,
    grade,
    held_out,
    make_item,
    training_batch,
)
from kvarn_eval.small_model.train import Phase, Plan, batch, train

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
TEXT = np.array(tokenizer.encode("for i in range(10):\n    print(i)\n" * 40), dtype=np.uint8)


def solve(item: Item) -> str:
    """The answer, worked out from the prompt as text."""
    table_text, questions = re.sub("<[a-z]+>", "", item.prompt).split("?")
    table = {row[:2]: row[3:] for row in table_text.split(";") if row}
    lines = []
    if item.family == "recall":
        for label, name in re.findall(r"(\[\d+\])(..)", questions):
            value = table[name]
            hop = f":{table[value[1:]]}" if value.startswith("@") else ""
            lines.append(f"{label}{name}:{value}{hop};")
        return "".join(lines)
    results: dict[str, str] = {}
    for label, left, sign, right in re.findall(r"(\[\d+\])(\[\d+\]|..)([+-])(..);", questions):
        a, b = results.get(left) or table[left], table[right]
        x, y = int(a[::-1]), int(b[::-1])
        results[label] = f"{(x + y if sign == '+' else x - y) % 1000:03d}"[::-1]
        lines.append(f"{label}{left}:{a}{sign}{right}:{b}={label}:{results[label]};")
    return "".join(lines)


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


# --- items


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rewrites", [0.0, 0.5, 0.9])
def test_an_independent_solver_finds_every_answer(family: Family, rewrites: float) -> None:
    items = held_out(family, 20, min_tokens=300, max_tokens=2000, questions=9, rewrites=rewrites)
    assert [solve(item) for item in items] == [item.answer for item in items]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_item_and_others_differ(family: Family) -> None:
    prompts = [make_item(family, seed).prompt for seed in (5, 5, 6)]
    assert prompts[0] == prompts[1] != prompts[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_tables_are_odd_and_training_tables_even(family: Family) -> None:
    def rows(prompt: str) -> int:
        return prompt.split("?")[0].count(";")

    assert all(rows(i.prompt) % 2 == 1 for i in held_out(family, 9, min_tokens=400, max_tokens=900))
    for step in range(5):
        ids, _, _ = training_batch(np.random.default_rng(step), 4, 512)
        assert all(rows(tokenizer.decode(row)) % 2 == 0 for row in ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_items_have_the_length_they_state_and_names_are_near_duplicates(family: Family) -> None:
    for item in held_out(family, 5, min_tokens=1024, max_tokens=7000, rewrites=0.25):
        assert len(tokenizer.encode(item.prompt)) == item.prompt_tokens
        assert len(tokenizer.encode(item.answer)) + 1 == item.answer_tokens
        names = set(re.findall(r"[>;](\w\w):", item.prompt))
        firsts = [sum(other[0] == name[0] for other in names) for name in names]
        assert np.mean(firsts) > 5
    assert 1024 - 13 <= make_item(family, 0, prompt_tokens=1024).prompt_tokens <= 1024


def test_a_grade_asks_for_the_whole_answer() -> None:
    item = make_item("recall", 1)
    assert grade(item, item.answer + "\n")
    assert not grade(item, item.answer[:-1])
    assert not grade(item, item.answer + item.answer[:5])
    digit = next(i for i, c in enumerate(item.answer) if c.isdigit() and item.answer[i - 1] == ":")
    other = str((int(item.answer[digit]) + 1) % 10)
    assert not grade(item, item.answer[:digit] + other + item.answer[digit + 1 :])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"questions": 65}, "65 questions cannot be labelled. Choose 1 to 64."),
        ({"prompt_tokens": 100}, "gives recall a table of 7 rows. Choose prompt_tokens for 16"),
        ({"prompt_tokens": 30_000, "rewrites": 0.0}, "to 2704 rows of 7 tokens."),
    ],
)
def test_impossible_items_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_item("recall", 0, **settings)  # type: ignore[arg-type]


def test_training_asks_for_answers_and_lightly_for_prompts() -> None:
    ids, targets, weights = training_batch(np.random.default_rng(0), 8, 1024)
    assert np.array_equal(ids[:, 1:], targets[:, :-1])
    for row, target, weight in zip(ids, targets, weights, strict=True):
        where = np.flatnonzero(weight == 1)
        assert (np.diff(where) == 1).all()
        assert (weight[: where[0]] == np.float32(PROMPT_WEIGHT)).all()
        assert (weight[where[-1] + 1 :] == 0).all()
        prompt = tokenizer.decode(row[: where[0] + 1])
        assert prompt.endswith("=")
        assert target[where[-1]] == tokenizer.EOS
        answer = tokenizer.decode(target[where[:-1]])
        family: Family = "recall" if "<recall>" in prompt else "arith"
        assert solve(Item(family, 0, prompt, answer, 0, 0)) == answer


def test_a_batch_is_two_thirds_tasks_and_one_third_text() -> None:
    text = (np.arange(2000) % 100).astype(np.uint8)
    ids, targets, weights = batch(np.random.default_rng(0), text, 12, 512)
    assert ids.shape == targets.shape == weights.shape == (12, 512)
    names = {tokenizer.IDS["<recall>"], tokenizer.IDS["<arith>"]}
    assert set(ids[:8, 0].tolist()) == names
    assert ((ids[8:, 1:] - ids[8:, :-1]) % 100 == 1).all()
    assert ((targets[8:] - ids[8:]) % 100 == 1).all()
    assert np.unique(weights[8:]).tolist() == [np.float32(corpus.WEIGHT)]


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
    with pytest.raises(RuntimeError, match="The sources of Python or torch are missing"):
        corpus.training_ids()


def test_this_python_has_program_text_to_read() -> None:
    texts = corpus.held_out_texts(12, 4096)
    assert {len(ids) for ids in texts.values()} == {4096}
    assert len({name.split("/")[0].removesuffix(".py") for name in texts}) == 12
    assert any("def " in tokenizer.decode(ids) for ids in texts.values())
    assert list(corpus.held_out_texts(2, 4096)) == list(texts)[:2]


# --- tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_text_and_ids_determine_each_other(family: Family) -> None:
    item = make_item(family, 3)
    assert tokenizer.decode(tokenizer.encode(item.prompt)) == item.prompt
    assert tokenizer.encode("a[1]é") == [tokenizer.IDS["a"], tokenizer.IDS["[1]"], tokenizer.UNK]
    program = "".join(map(chr, range(32, 127))) + "\t\nx[10] = y[65] + [0]<module><recall>"
    assert tokenizer.decode(tokenizer.encode(program)) == program


def test_the_written_tokenizer_agrees(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    tokenizer.save_tokenizer(tmp_path, max_length=8192)
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert written.get_vocab() == tokenizer.IDS
    for text in (make_item("recall", 0).prompt, make_item("arith", 0).answer, ODDITIES):
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


# --- training


def test_a_short_run_learns_and_repeats(tmp_path: Path) -> None:
    plan = Plan(
        phases=(Phase(12, (256,), (1.0,)),),
        batch_tokens=6 * 256,
        warmup=2,
        log_every=4,
        compile=False,
        test_items=2,
        test_lengths=(400,),
        test_rewrites=(0.5,),
        test_texts=1,
        test_text_tokens=300,
    )
    runs = [
        train(tmp_path / name, seed=1, minutes=5, plan=plan, config=TINY, device="cpu", text=TEXT)
        for name in "ab"
    ]
    losses = [[point["loss"] for point in run["curve"]] for run in runs]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] - 0.3
    assert runs[0]["curve"][-1]["text_loss"] < runs[0]["curve"][0]["text_loss"] - 0.3
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == second
    log = json.loads((tmp_path / "a" / "training.json").read_text())
    assert log["steps"] == 12
    assert log["tokens"] == 12 * 6 * 256
    assert len(log["held_out_text"]["files"]) == 1
    assert 1 < log["held_out_text"]["loss"] < 6
    assert {row["family"] for row in log["accuracy"]} == set(FAMILIES)


def test_a_run_out_of_time_ends_early_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = Plan(
        phases=(Phase(4, (256,), (1.0,)),),
        batch_tokens=6 * 256,
        log_every=2,
        compile=False,
        test_items=1,
        test_lengths=(400,),
        test_rewrites=(0.5,),
        test_texts=1,
        test_text_tokens=300,
    )
    log = train(tmp_path, minutes=0.0, plan=plan, config=TINY, device="cpu", text=TEXT)
    assert (log["steps"], log["planned_steps"], len(log["curve"])) == (2, 4, 1)
    assert "Ended at step 2 of 4 by the time limit." in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is present")
def test_training_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Training needs a CUDA GPU"):
        train(tmp_path)


def test_muon_agrees_with_torch() -> None:
    torch.manual_seed(0)
    start = [torch.randn(shape) * 0.02 for shape in ((64, 32), (32, 64), (32, 32), (64, 32))]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    optimizers = (
        Muon(ours, lr=1e-2, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert (a - before).abs().max() > 1e-2
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 24, 64)).float())
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_muon_refuses_vectors() -> None:
    with pytest.raises(ValueError, match="Give it matrices only"):
        Muon([torch.zeros(3, requires_grad=True)], lr=1e-2)


# --- the committed model


@pytest.fixture(scope="module")
def published() -> SmallModel:
    return SmallModel.load(PUBLISHED)


def test_the_published_model_keeps_its_promises(published: SmallModel) -> None:
    assert published.config == ModelConfig()
    assert 5e6 <= sum(p.numel() for p in published.parameters()) <= 15e6
    assert published.config.vocab_size <= 512
    weights = PUBLISHED / "model.safetensors"
    assert weights.stat().st_size <= 30e6
    assert not {p.suffix for p in PUBLISHED.iterdir()} - {".json", ".safetensors", ".md"}
    log = json.loads((PUBLISHED / "training.json").read_text(encoding="utf-8"))
    assert log["steps"] >= 0.95 * Plan().steps
    assert log["seconds"] <= 12 * 60
    for family in FAMILIES:
        cells = [row for row in log["accuracy"] if row["family"] == family]
        assert sum(r["right"] for r in cells) >= 0.95 * sum(r["items"] for r in cells)
        assert sum(r["items"] for r in cells) >= 512


@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_model_answers_held_out_items(published: SmallModel, family: Family) -> None:
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

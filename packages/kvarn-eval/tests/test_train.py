"""Training in small, on the CPU: a run learns, repeats, stops, and goes on as if it had not."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from kvarn_eval.cli import app
from kvarn_eval.preflight import Missing
from kvarn_eval.small_model import checkpoint, corpus, noise, tokenizer
from kvarn_eval.small_model import train as training
from kvarn_eval.small_model.examine import Examination, examine
from kvarn_eval.small_model.model import ModelConfig, SmallModel, causal_attention
from kvarn_eval.small_model.tasks import FAMILIES
from kvarn_eval.small_model.train import Phase, Plan, batch, train

if TYPE_CHECKING:
    from pathlib import Path

TINY = ModelConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)
TEXT = np.array(tokenizer.encode("for i in range(10):\n    print(i)\n" * 40), dtype=np.uint8)
PLAN = Plan(
    phases=(Phase(6, (256,), (1.0,)), Phase(6, (256, 384), (0.5, 0.5))),
    batch_tokens=12 * 384,
    warmup=2,
    log_every=4,
    compile=False,
)
EXAMINATION = Examination(items=2, lengths=(700,), rewrites=(0.5,), texts=1, text_tokens=300)


def run(out: Path, **options: Any) -> dict[str, Any]:
    settings = {"seed": 1, "minutes": 5.0, "plan": PLAN, "config": TINY, "text": TEXT}
    return train(out, device="cpu", **{**settings, **options})


def test_a_batch_is_two_thirds_tasks_and_one_third_text() -> None:
    text = (np.arange(2000) % 100).astype(np.uint8)
    ids, targets, weights = batch(np.random.default_rng(0), text, 12, 512)
    assert ids.shape == targets.shape == weights.shape == (12, 512)
    assert [tokenizer.TOKENS[i] for i in ids[:8, 0]] == 2 * [f"<{name}>" for name in FAMILIES]
    assert ((ids[8:, 1:] - ids[8:, :-1]) % 100 == 1).all()
    assert ((targets[8:] - ids[8:]) % 100 == 1).all()
    assert np.unique(weights[8:]).tolist() == [np.float32(corpus.WEIGHT)]


def test_a_short_run_learns_and_repeats(tmp_path: Path) -> None:
    runs = [run(tmp_path / name, examination=EXAMINATION) for name in "ab"]
    losses = [[point["loss"] for point in log["curve"]] for log in runs]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] - 0.3
    assert runs[0]["curve"][-1]["text_loss"] < runs[0]["curve"][0]["text_loss"] - 0.3
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == second
    log = json.loads((tmp_path / "a" / "training.json").read_text())
    assert log["steps"] == 12
    assert log["families"] == list(FAMILIES)
    assert log["tokens"] == runs[0]["curve"][-1]["tokens"]
    assert len(log["held_out_text"]["files"]) == 1
    assert 1 < log["held_out_text"]["loss"] < 6
    assert [row["family"] for row in log["accuracy"]] == list(FAMILIES)
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert all(f"- `{name}`: " in card for name in FAMILIES)
    assert "| family | rewrites | 700 |" in card
    assert "| graph | 0.50 | 0/2 |" in card


def stopped(
    out: Path, monkeypatch: pytest.MonkeyPatch, after: int, **options: Any
) -> dict[str, Any]:
    """A run whose clock jumps past the limit after some of its steps."""
    step = training._Run.take

    def take(self: Any, data: Any) -> None:
        step(self, data)
        if self.steps == after:
            monkeypatch.setattr(training.time, "monotonic", lambda: 1e9)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "take", take)
        patch.setattr(training.time, "monotonic", training.time.monotonic)
        return run(out, **options)


@pytest.mark.parametrize("after", [1, 5, 8])
def test_a_run_that_goes_on_equals_one_that_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, after: int
) -> None:
    whole = run(tmp_path / "whole")
    log = stopped(tmp_path / "half", monkeypatch, after)
    monkeypatch.undo()
    assert (log["steps"], log["planned_steps"]) == (after, 12)
    assert f"Ended at step {after} of 12 by the time limit." in caplog.text
    assert not (tmp_path / "half" / "model.safetensors").exists()
    rest = run(tmp_path / "half", resume=tmp_path / "half")
    assert not list((tmp_path / "half").glob("checkpoint*"))

    def curve(log: dict[str, Any]) -> list[dict[str, float]]:
        return [{k: v for k, v in point.items() if k != "seconds"} for point in log["curve"]]

    assert curve(rest) == curve(whole)
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "half")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tmp_path, monkeypatch, 1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"is of a run with another seed\. Repeat the options"):
        run(tmp_path, resume=tmp_path, seed=2)
    with pytest.raises(ValueError, match="another plan"):
        run(tmp_path, resume=tmp_path, plan=dataclasses.replace(PLAN, key_noise=0.1))
    with pytest.raises(ValueError, match="another text_sha256"):
        run(tmp_path, resume=tmp_path, text=TEXT[1:])
    with pytest.raises(ValueError, match=r"has no checkpoint\.json"):
        run(tmp_path, resume=tmp_path / "nowhere")


def test_a_checkpoint_travels_in_small_files(tmp_path: Path) -> None:
    model = SmallModel(ModelConfig())
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(model.parameters())]
    for p in model.parameters():
        optimizers[0].state[p] = {"step": torch.tensor(1.0), "momentum": torch.ones_like(p)}
    checkpoint.save(tmp_path, model, optimizers, {})
    sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert max(sizes) <= 15 << 20
    assert sum(sizes) <= 60 << 20
    kept = [name for file in tmp_path.glob("*.safetensors") for name in load_file(file)]
    assert len(kept) == len(set(kept)) == 2 * len(list(model.parameters()))


def test_the_plan_of_the_published_model_reads_whole_batches() -> None:
    plan = Plan()
    assert plan.steps == 8000
    for phase in plan.phases:
        assert sum(phase.weights) == pytest.approx(1)
        assert all(plan.batch_tokens % (12 * length) == 0 for length in phase.lengths)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is present")
def test_training_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Missing, match="Training needs a CUDA GPU"):
        train(tmp_path)
    SmallModel(TINY).save(tmp_path)
    with pytest.raises(ValueError, match=r"has no training\.json"):
        examine(tmp_path, device="cpu")
    (tmp_path / "training.json").write_text('{"families": ["recall"]}')
    with pytest.raises(ValueError, match=r"is of an earlier version\. Train the model again"):
        examine(tmp_path, device="cpu")
    for command, option in (("train", "--out"), ("examine", "--model")):
        assert CliRunner().invoke(app, [command, option, str(tmp_path)]).exit_code == 2


def test_a_run_cut_short_exits_with_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def unfinished(out: Path, **options: Any) -> dict[str, Any]:
        seen.update(options)
        return {"steps": 5, "planned_steps": 8}

    monkeypatch.setattr(training, "train", unfinished)
    arguments = ["train", "--out", str(tmp_path), "--minutes", "8", "--no-examine"]
    result = CliRunner().invoke(app, [*arguments, "--value-noise", "0"])
    assert result.exit_code == 3
    assert "5 of 8 steps are made. Go on with --resume" in result.stderr
    assert seen["minutes"] == 8
    assert seen["examination"] is None
    assert seen["plan"] == dataclasses.replace(Plan(), value_noise=0.0)


# --- noise


def test_noise_is_relative_to_each_row() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 50, 64) * torch.logspace(-2, 2, 50)[:, None]
    error = noise.disturbed(x, torch.tensor([0.0, 0.3])) - x
    assert (error[0] == 0).all()
    relative = error[1].square().mean(-1).sqrt() / x[1].square().mean(-1).sqrt()
    assert relative.mean() == pytest.approx(0.3, abs=0.01)


def test_half_of_the_rows_have_noise() -> None:
    level = noise.levels(np.random.default_rng(0), 4000)
    assert 0.45 < (level > 0).mean() < 0.55
    assert level.max() <= 1
    assert level[level > 0].mean() == pytest.approx(0.5, abs=0.03)


def test_the_hook_disturbs_keys_and_values_apart() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 9, 32), torch.randn(1, 2, 9, 32), torch.randn(1, 2, 9, 32)
    exact = causal_attention(q, k, v, 0.2)
    first = []
    for key, value in ((0.0, 0.0), (0.3, 0.0), (0.0, 0.3)):
        hook = noise.Noise(key, value)
        hook.set(torch.ones(1))
        out = hook(0, q, k, v, 0.2)
        first.append((out - exact)[:, :, 0].abs().max().item())
        assert torch.equal(out, exact) == (key == value == 0)
    assert first[0] == first[1] == 0  # the first query has one key to choose from
    assert first[2] > 0.01


@torch._dynamo.config.patch(disable=False)
def test_layers_are_compiled_once_for_every_length_and_not_for_every_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # left behind by tests of engines
    torch.manual_seed(0)
    model, graphs = SmallModel(dataclasses.replace(TINY, num_hidden_layers=5)), []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for layer in model.model.layers:
        assert isinstance(layer, nn.Module)
        layer.compile(dynamic=False, backend=count)
    hook = noise.Noise(0.3, 0.3)
    for _ in range(3):
        for rows, length in ((2, 16), (4, 8), (1, 32)):
            hook.set(torch.rand(rows))
            model(torch.ones(rows, length, dtype=torch.long), hook)
    torch._dynamo.reset()
    assert len(graphs) == 3

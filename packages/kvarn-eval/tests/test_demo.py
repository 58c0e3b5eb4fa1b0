from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvarn_eval.demo import Settings, run_demo
from kvarn_eval.schema import Run, Verdict
from kvarn_eval.small_model.tasks import FAMILIES

if TYPE_CHECKING:
    from kvarn_eval.small_model.model import SmallModel

FAKE = (sys.executable, str(Path(__file__).with_name("fake_server.py")))


def demonstrate(weights: SmallModel, folder: Path, behaviour: str) -> tuple[Run, list[str]]:
    """The whole demonstration against the stand-in server."""
    model = folder / "model"
    weights.save(model)
    table = folder / "answers.json"
    command = (*FAKE, "--answers", str(table), "--behaviour", behaviour)
    settings = Settings(
        model=model, items=3, min_tokens=300, max_tokens=400, questions=4, texts=2,
        text_tokens=700, command=command,
    )  # fmt: skip
    known = {item.prompt: item.answer for item in settings.problems()}
    table.write_text(json.dumps(known), encoding="utf-8")
    steps: list[str] = []
    run = run_demo(settings, folder, lambda what, done, total: steps.append(what))
    return run, steps


def test_a_faithful_cache_passes(tmp_path: Path, tiny_model: SmallModel) -> None:
    run, steps = demonstrate(tiny_model, tmp_path, "healthy")
    assert run.verdict is Verdict.PASS, [gate for gate in run.gates if gate.required]
    assert run.value("kvarn", "accuracy") == 1.0
    assert run.value("kvarn", "pool_tokens") / run.value("fp16", "pool_tokens") == pytest.approx(
        6472 / 1365
    )
    assert run.value("kvarn", "kld_mean") == 0.0
    assert any(step.startswith("kvarn: solving") for step in steps)
    lines = (tmp_path / "answers-kvarn.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line)["right"] for line in lines)
    assert (tmp_path / "server-kvarn.log").exists()


def test_a_damaged_cache_fails(tmp_path: Path, tiny_model: SmallModel) -> None:
    run, _ = demonstrate(tiny_model, tmp_path, "damaged")
    verdicts = {gate.name: gate.verdict for gate in run.gates}
    assert run.verdict is Verdict.FAIL
    assert verdicts["accuracy_loss"] is Verdict.FAIL
    assert verdicts["kld"] is Verdict.FAIL
    assert verdicts["capacity"] is Verdict.PASS


def test_both_servers_differ_in_the_cache_only() -> None:
    settings = Settings(model=Path("m"))
    reference, tested = settings.options("auto"), settings.options("kvarn_k4v2_g128")
    assert [(a, b) for a, b in zip(reference, tested, strict=True) if a != b] == [
        ("auto", "kvarn_k4v2_g128")
    ]
    assert tested[tested.index("--long-prefill-token-threshold") + 1] == "128"


def test_most_generated_tokens_read_records() -> None:
    settings = Settings(model=Path("m"))
    assert all(item.prompt_tokens > settings.first_packed for item in settings.problems())
    assert len({item.family for item in settings.problems()}) == len(FAMILIES)

"""The gates are green on the product and red on every injected fault."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from kvarn_core.ops.quantize import dequantize
from kvarn_eval import baselines, fidelity_gates
from kvarn_eval.fidelity import ARMS, Distance, make_texts, measure_arms
from kvarn_eval.fidelity_gates import (
    Settings,
    early_gate,
    gates,
    quantises_gate,
    ratio_gate,
    regression_gates,
    run_fidelity,
)
from kvarn_eval.schema import Run, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvarn_core import RecordLayout
    from kvarn_eval.small_model.model import SmallModel

SETTINGS = Settings(sequences=4, problems=0, length=700, profiles=("plain",))
NAMES = ("fp16", "rotated fp16", "kvarn", "paper", "paper as served")


@pytest.fixture(scope="module")
def distances(tiny_model: SmallModel) -> dict[str, list[Distance]]:
    texts = make_texts(SETTINGS.sequences, SETTINGS.length)
    return measure_arms(tiny_model, texts, {name: ARMS[name] for name in NAMES})


@pytest.fixture(scope="module")
def clean(tiny_model: SmallModel, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_on(tiny_model, tmp_path_factory.mktemp("clean"))


def run_on(
    model: SmallModel, folder: Path, baseline: Run | None = None, settings: Settings = SETTINGS
) -> Run:
    """A whole run with the three arms that the gates need."""
    model.save(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity_gates, "ARMS", {name: ARMS[name] for name in NAMES})
        return run_fidelity(folder, settings, lambda what, done, steps: None, baseline)


def field(records: torch.Tensor, layout: RecordLayout, name: str) -> torch.Tensor:
    place = layout.fields[name]
    return records[:, place.offset : place.end]


def drop(name: str) -> Callable[[torch.Tensor, RecordLayout], None]:
    return lambda records, layout: field(records, layout, name).zero_()


def neighbour(name: str) -> Callable[[torch.Tensor, RecordLayout], None]:
    def fault(records: torch.Tensor, layout: RecordLayout) -> None:
        part = field(records, layout, name)
        part.copy_(part.roll(2, 1))  # two bytes: one row further

    return fault


def lose_bit(name: str, mask: int) -> Callable[[torch.Tensor, RecordLayout], None]:
    return lambda records, layout: field(records, layout, name).bitwise_and_(mask)


FAULTS = {
    "k_zero ignored": drop("k_zero"),
    "v_zero ignored": drop("v_zero"),
    "a bit of K codes dropped": lose_bit("k_codes", 0xEE),
    "a bit of V codes dropped": lose_bit("v_codes", 0xAA),
    "token scale of the neighbour row": neighbour("k_token_scale"),
    "V scale of the neighbour row": neighbour("v_scale"),
    "channel scale of the neighbour": neighbour("v_channel_scale"),
}


def test_the_product_passes(clean: Run) -> None:
    by_name = {gate.name: gate for gate in clean.gates}
    assert by_name["plain.over_paper"].verdict is Verdict.PASS
    assert by_name["plain.early"].verdict is Verdict.PASS
    assert [gate.verdict for gate in regression_gates(clean, clean)] == [Verdict.PASS]


def test_problems_are_reported_and_program_text_decides(
    tiny_model: SmallModel, tmp_path: Path
) -> None:
    settings = Settings(sequences=2, problems=2, length=600, profiles=("plain",))
    run = run_on(tiny_model, tmp_path, settings=settings)
    required = {gate.name: gate.required for gate in run.gates}
    assert required == {
        "plain.over_served": True,
        "plain.over_paper": True,
        "plain.early": True,
        "plain.quantises": True,
        "plain-problems.over_served": False,
        "plain-problems.over_paper": False,
        "plain-problems.early": True,
        "plain-problems.quantises": True,
    }
    names = {measurement.name for measurement in run.measurements}
    assert "plain-problems.answer_kld" in names
    assert "plain.answer_kld" not in names
    assert run.value("kvarn", "plain.kld_mean") != run.value("kvarn", "plain-problems.kld_mean")


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_records_turns_the_regression_gate_red(
    name: str, clean: Run, tiny_model: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(
        records: torch.Tensor, layout: RecordLayout, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        damaged = records.clone()
        FAULTS[name](damaged, layout)
        return dequantize(damaged, layout, dtype)

    monkeypatch.setattr(baselines, "dequantize", faulty)
    run = run_on(tiny_model, tmp_path, clean)
    gate = next(gate for gate in run.gates if gate.name == "plain.regression")
    assert gate.verdict is Verdict.FAIL, gate.reason
    assert run.verdict is Verdict.FAIL


def test_a_lost_window_turns_the_self_check_red(distances: dict[str, list[Distance]]) -> None:
    first = SETTINGS.first_packed
    assert early_gate("plain", distances, first).verdict is Verdict.PASS
    early_reader = [
        Distance(d.kld + 1e-2, d.top1, d.dlogp, d.answer_from) for d in distances["kvarn"]
    ]
    broken = {**distances, "kvarn": early_reader}
    assert early_gate("plain", broken, first).verdict is Verdict.FAIL


def test_an_arm_that_never_quantises_is_noticed(distances: dict[str, list[Distance]]) -> None:
    first = SETTINGS.first_packed
    assert quantises_gate("plain", distances, first).verdict is Verdict.PASS
    exact = {**distances, "kvarn": distances["rotated fp16"]}
    assert quantises_gate("plain", exact, first).verdict is Verdict.FAIL


def test_a_worse_encoder_than_the_published_one_is_red(
    distances: dict[str, list[Distance]],
) -> None:
    swapped = {**distances, "kvarn": distances["paper"], "paper": distances["kvarn"]}
    verdicts = {gate.name: gate.verdict for gate in gates({"plain": swapped}, SETTINGS)}
    assert verdicts["plain.over_paper"] is Verdict.FAIL
    assert verdicts["plain.over_served"] is Verdict.FAIL


def test_few_and_scattered_texts_decide_nothing(distances: dict[str, list[Distance]]) -> None:
    factors = (0.1, 2.5, 0.1, 0.1)
    scattered = [
        Distance(d.kld * f, d.top1, d.dlogp, d.answer_from)
        for d, f in zip(distances["paper"], factors, strict=True)
    ]
    gate = ratio_gate("g", ("kvarn", scattered), ("paper", distances["paper"]), 1.0, "plain", 256)
    assert gate.value < 1.0
    assert gate.verdict is Verdict.INCONCLUSIVE


def test_a_baseline_from_other_texts_is_refused(clean: Run) -> None:
    other = clean.model_copy(update={"suite_sha256": "1" * 64})
    with pytest.raises(ValueError, match="other texts, weights or arms"):
        regression_gates(clean, other)

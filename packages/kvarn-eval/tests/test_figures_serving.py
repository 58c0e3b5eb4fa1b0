"""Quality against speed, and time per token over context: what is shown, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvarn_eval.cli import app
from kvarn_eval.figures import draw
from kvarn_eval.figures_serving import check_one_machine, points
from kvarn_eval.schema import Arm, Model, Run, Unit, describe_run, measure

sys.path.insert(0, str(Path(__file__).parent))
from injected import OURS

ARMS = {
    "fp16": Arm(),
    "fp8": Arm(kv_cache_dtype="fp8"),
    "turboquant": Arm(kv_cache_dtype="turboquant_4bit_nc"),
    "kvarn": Arm(kv_cache_dtype=OURS),
}
RIGHT = {"fp16": 0.98, "fp8": 0.98, "turboquant": 0.91, "kvarn": 0.975}
SPEED = {"fp16": 1000.0, "fp8": 1700.0, "turboquant": 800.0, "kvarn": 3600.0}
TOKENS = {"fp16": 100_000, "fp8": 200_000, "turboquant": 380_000, "kvarn": 470_000}


def make(measurements: list[Any], **changes: Any) -> Run:
    model = Model(name="folder/small", weights_sha256=None, dtype="float16")
    arms = {m.arm for m in measurements}
    fields = {
        "seconds": 1.0,
        "arms": {name: arm for name, arm in ARMS.items() if name in arms},
        "measurements": measurements,
        "gates": [],
    }
    return Run.model_validate({**describe_run("suite", "0" * 64, model), **fields, **changes})


def quality(*arms: str) -> list[Any]:
    return [
        measure("plain.accuracy", arm, Unit.SHARE, RIGHT[arm], better="higher",
                interval=(RIGHT[arm] - 0.02, min(RIGHT[arm] + 0.02, 1.0)))
        for arm in arms
    ]  # fmt: skip


def speed(*arms: str) -> list[Any]:
    return [
        m
        for arm in arms
        for m in (
            measure("decode_equal", arm, Unit.TOKENS_PER_SECOND, 1.0, better="higher"),
            measure("decode_capacity", arm, Unit.TOKENS_PER_SECOND, SPEED[arm], better="higher"),
            measure("pool_tokens", arm, Unit.TOKENS, TOKENS[arm], better="higher"),
        )
    ]


def test_every_arm_is_a_point_over_the_reference() -> None:
    name, of, found = points([make(quality(*ARMS) + speed(*ARMS))])
    assert (name, of) == ("plain.accuracy", "decode_capacity")
    shown = {point.arm: (point.speed, point.quality.median, point.size) for point in found}
    assert shown == {
        "fp16": (1.0, 0.98, 1.0),
        "fp8": (1.7, 0.98, 2.0),
        "turboquant": (0.8, 0.91, 3.8),
        "kvarn": (3.6, 0.975, 4.7),
    }


def test_the_figure_names_arms_and_what_is_missing(tmp_path: Path) -> None:
    [file] = draw(make(quality("fp16", "kvarn") + speed(*ARMS)), tmp_path)
    text = file.read_text(encoding="utf-8")
    assert file.name == "pareto.svg"
    assert "not in both: fp8, turboquant" in text
    assert "4.70x tokens" in text
    before = file.read_bytes()
    draw(make(quality("fp16", "kvarn") + speed(*ARMS)), tmp_path)
    assert file.read_bytes() == before
    draw(make(quality("fp16", "fp8", "kvarn") + speed(*ARMS)), tmp_path)
    assert file.read_bytes() != before


@pytest.mark.parametrize(
    "measurements",
    [speed(*ARMS), quality(*ARMS), quality("fp8", "kvarn") + speed("fp8", "kvarn"),
     quality("fp16") + speed(*ARMS)],
    ids=["no quality", "no speed", "no reference", "one arm"],
)  # fmt: skip
def test_without_two_arms_and_the_reference_there_is_no_figure(
    measurements: list[Any], tmp_path: Path
) -> None:
    assert draw(make(measurements), tmp_path) == []


def other_gpu(run: Run) -> Run:
    gpu = {"name": "NVIDIA H200", "memory_mib": 1, "driver": "1"}
    environment = {**run.environment.model_dump(), "gpus": [gpu]}
    return Run.model_validate({**run.model_dump(), "environment": environment})


def other_weights(run: Run, sha: str) -> Run:
    model = {**run.model.model_dump(), "weights_sha256": sha}
    return Run.model_validate({**run.model_dump(), "model": model})


def test_two_runs_complete_each_other_on_one_machine_only() -> None:
    one, two = make(quality("fp16", "kvarn")), make(speed(*ARMS))
    assert {point.arm for point in points([one, two])[2]} == {"fp16", "kvarn"}
    check_one_machine([one, two])
    check_one_machine([other_weights(one, "a"), two])
    with pytest.raises(ValueError, match="other machines or models"):
        check_one_machine([one, other_gpu(two)])
    with pytest.raises(ValueError, match="other machines or models"):
        check_one_machine([other_weights(one, "a"), other_weights(two, "b")])


def test_quality_may_be_that_of_another_model(tmp_path: Path) -> None:
    small = other_gpu(other_weights(make(quality("fp16", "turboquant", "kvarn")), "a"))
    large = make(speed(*ARMS))
    _, _, found = points([large], small)
    assert {p.arm: (p.speed, p.quality.median) for p in found} == {
        "fp16": (1.0, 0.98),
        "turboquant": (0.8, 0.91),
        "kvarn": (3.6, 0.975),
    }
    for name, run in (("small", small), ("large", large)):
        run.save(tmp_path / f"{name}.json")
    command = ["report", str(tmp_path / "large.json"), "--answers", str(tmp_path / "small.json")]
    assert CliRunner().invoke(app, command).exit_code == 3  # no gates
    text = (tmp_path / "pareto.svg").read_text(encoding="utf-8")
    assert "of small, %" in text
    assert "not in both: fp8" in text


def test_arms_of_another_model_are_found_by_their_cache() -> None:
    small = make(quality("fp16", "turboquant", "kvarn"))

    def renamed(**names: str) -> Run:
        """Arms and measurements of `small` under other names, the cache of the last twice."""
        arms = {names.get(old, old): arm for old, arm in small.arms.items()}
        arms["paper"] = ARMS["kvarn"]
        measured = [
            m.model_copy(update={"arm": names.get(m.arm, m.arm)}) for m in small.measurements
        ]
        return small.model_copy(update={"arms": arms, "measurements": measured})

    large = make(speed(*ARMS))
    found = {p.arm: p.quality.median for p in points([large], renamed(turboquant="4bit_nc"))[2]}
    assert found == {"fp16": 0.98, "turboquant": 0.91, "kvarn": 0.975}
    shown = {p.arm for p in points([large], renamed(kvarn="k4v2"))[2]}
    assert shown == {"fp16", "turboquant"}, "two arms have this cache, neither is known to be it"


def test_the_profile_may_be_chosen() -> None:
    outliers = [measure("large.accuracy", arm, Unit.SHARE, 0.5) for arm in ("fp16", "kvarn")]
    run = make(quality("fp16", "kvarn") + outliers + speed(*ARMS))
    for profile, right in ((None, 0.975), ("plain", 0.975), ("large", 0.5)):
        name, _, found = points([run], profile=profile)
        assert name == f"{profile or 'plain'}.accuracy"
        assert found[-1].quality.median == right
    with pytest.raises(ValueError, match="No accuracy on profile tiny"):
        points([run], profile="tiny")


def test_the_report_takes_a_second_result(tmp_path: Path) -> None:
    files = {"one": make(quality("fp16", "kvarn")), "two": make(speed(*ARMS))}
    files["three"] = other_gpu(files["two"])
    for name, run in files.items():
        run.save(tmp_path / f"{name}.json")
    paths = {name: str(tmp_path / f"{name}.json") for name in files}
    result = CliRunner().invoke(app, ["report", paths["one"], "--with", paths["two"]])
    assert result.exit_code == 3  # no gates
    assert (tmp_path / "pareto.svg").exists()
    assert "](pareto.svg)" in (tmp_path / "report.md").read_text(encoding="utf-8")
    result = CliRunner().invoke(app, ["report", paths["one"], "--with", paths["three"]])
    assert result.exit_code == 2


def slope(arm: str, rise: float, *, fitted: bool) -> list[Any]:
    """Times of 20 ms and `rise` us per 1,000 tokens."""
    found = [
        measure(f"decode_slope.isl-{n}.itl_p50", arm, Unit.SECONDS, 0.02 + rise * n / 1e9)
        for n in (1000, 4000, 16_000, 64_000)
    ]
    if fitted:
        found += [
            measure("decode_slope.base", arm, Unit.SECONDS, 0.02),
            measure("decode_slope.per_1k_tokens", arm, Unit.MICROSECONDS, rise),
        ]
    return found


def test_time_per_token_is_drawn_over_the_context(tmp_path: Path) -> None:
    run = make(slope("fp16", 90, fitted=True) + slope("kvarn", 25, fitted=True))
    [file] = draw(run, tmp_path)
    assert file.name == "itl_context.svg"
    text = file.read_text(encoding="utf-8")
    assert "median time per token (ms)" in text
    bare = make(slope("fp16", 90, fitted=False) + slope("kvarn", 25, fitted=False))
    draw(bare, tmp_path)
    assert file.read_text(encoding="utf-8") != text  # without the fitted lines


def test_one_length_is_no_curve(tmp_path: Path) -> None:
    assert draw(make(slope("fp16", 90, fitted=False)[:1]), tmp_path) == []

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvarn_eval.schema import Run, Verdict
from kvarn_eval.throughput_gates import LONG, gates, limits_of, measurements

RESULTS = Path(__file__).parents[1] / "results"
DECODE = {
    "requests": 16,
    "peak": 16,
    "preemptions": 0,
    "hit_share": 0.99,
    "tokens": 2 * LONG,  # generated ones, which make no request long
    "seconds": 2.0,
    "rates": [49.0, 50.0, 51.0],
    "step_seconds": [0.02, 0.021],
}


def figures(factor: float = 1.0, speed: float = 1.0, tokens: int = LONG) -> dict[str, Any]:
    """Figures of an arm whose capacity and speed are multiples of the reference."""
    decode = {**DECODE, "rates": [rate * speed for rate in DECODE["rates"]]}
    return {
        "startup_seconds": 70.0,
        "pages": int(1000 * factor),
        "page_size": 16,
        "requests_that_fit": int(100 * factor),
        "tokens_per_request": tokens + 256,
        "reported_tokens": int(15_000 * factor),
        "prefill_tokens": 1000,
        "prefill_seconds": 0.5 / speed,
        "plan": {"requests": 16, "prompt_tokens": tokens},
        "equal": decode,
        "capacity": {**decode, "prompt_tokens": tokens},
    }


def judge(tested: dict[str, Any], reference: dict[str, Any], *, speed: bool = True, **asked: Any):
    found = [*measurements("kvarn", tested), *measurements("fp16", reference)]
    return {gate.name: gate for gate in gates({m.key: m for m in found}, speed=speed, **asked)}


def test_measurements_of_an_arm() -> None:
    found = {m.name: m for m in measurements("fp16", figures())}
    assert found["pool_tokens"].median == 16_000
    assert found["prefill"].median == 2000
    assert found["decode_equal"].median == 50
    assert found["decode_equal"].context["requests"] == 16
    assert found["decode_capacity"].context["prompt_tokens"] == LONG
    assert found["decode_equal.step_p99"].median == 0.021


def test_a_run_without_capacity_has_no_such_measurement() -> None:
    short = {k: v for k, v in figures().items() if k != "capacity"}
    assert "decode_capacity" not in {m.name for m in measurements("fp16", short)}
    assert "decode_capacity" not in judge(short, short, capacity=False)
    assert judge(short, figures())["decode_capacity"].reason == (
        "not measured: kvarn:decode_capacity"
    )


@pytest.mark.parametrize(
    ("tested", "reference", "verdict"),
    [
        (False, False, Verdict.FAIL),
        (True, True, Verdict.FAIL),
        (None, None, Verdict.FAIL),
        (False, True, Verdict.INCONCLUSIVE),
        (True, False, Verdict.INCONCLUSIVE),
    ],
)
def test_starts_are_compared_if_both_arms_compiled_or_neither(
    tested: bool | None, reference: bool | None, verdict: Verdict
) -> None:
    slow = {**figures(4.7, 2.1), "startup_seconds": 200.0, "compiled_before": tested}
    gate = judge(slow, {**figures(), "compiled_before": reference})["startup_seconds"]
    assert gate.verdict is verdict


@pytest.mark.parametrize("tokens", [LONG, 600])
def test_what_was_asked_for_and_is_missing_is_never_a_pass(tokens: int) -> None:
    found = [*measurements("kvarn", figures(4.7, 2.1, tokens)),
             *measurements("fp16", figures(tokens=tokens))]  # fmt: skip
    kept = {m.key: m for m in found if m.name in ("pool_tokens", "requests_that_fit")}
    judged = {gate.name: gate for gate in gates(kept, speed=True)}
    decided = {name for name, gate in judged.items() if gate.verdict is Verdict.PASS}
    assert decided == {"pool_tokens", "requests_that_fit"}
    undecided = {name for name, gate in judged.items() if gate.verdict is Verdict.INCONCLUSIVE}
    assert undecided == {
        "reported_tokens", "prefill", "decode_equal", "decode_capacity", "startup_seconds",
        "steady_steps",
    }  # fmt: skip
    assert all(judged[name].required for name in undecided)
    assert judged["prefill"].reason == "not measured: kvarn:prefill, fp16:prefill"


@pytest.mark.parametrize("name", ["aligned-h200", "qwen3-32b-h200", "qwen3-32b-h200-cuda"])
def test_nothing_is_missing_in_the_results_that_are_kept(name: str) -> None:
    run = Run.load(RESULTS / f"throughput-{name}" / "result.json")
    judged = gates(
        {m.key: m for m in run.measurements},
        speed=True,
        arms=tuple(run.arms),
        capacity="--capacity-tokens" not in run.command,
    )
    assert {gate.name for gate in run.gates} <= {gate.name for gate in judged}
    assert Verdict.INCONCLUSIVE not in {gate.verdict for gate in judged}


@pytest.mark.parametrize(
    ("factor", "speed", "red"),
    [
        (4.7, 2.1, set()),
        (4.5, 2.1, {"pool_tokens"}),
        (4.1, 2.1, {"pool_tokens", "reported_tokens", "requests_that_fit"}),
        (4.7, 1.5, {"decode_capacity"}),
        (4.7, 0.9, {"prefill", "decode_equal", "decode_capacity"}),
    ],
    ids=["good", "smaller-pool", "larger-header", "slower-at-capacity", "slower"],
)
def test_each_shortfall_turns_its_gate_red(factor: float, speed: float, red: set[str]) -> None:
    found = judge(figures(factor, speed), figures())
    assert {name for name, gate in found.items() if gate.verdict is Verdict.FAIL} == red
    assert all(gate.required for gate in found.values())


def test_nothing_is_many_times_zero() -> None:
    nothing = {**figures(), "requests_that_fit": 0}
    gate = judge(figures(), nothing)["requests_that_fit"]
    assert gate.verdict is Verdict.INCONCLUSIVE
    assert gate.reason.endswith("; fp16 has none")


def test_a_slow_start_is_a_difference_in_seconds() -> None:
    slow = {**figures(4.7, 2.1), "startup_seconds": 131.0}
    gate = judge(slow, figures())["startup_seconds"]
    assert (gate.value, gate.verdict) == (61.0, Verdict.FAIL)


def test_steps_in_which_tiles_complete_must_not_take_longer() -> None:
    slow = figures(4.7, 2.1)
    slow["equal"] = {**slow["equal"], "step_seconds": [0.02, 0.0225]}
    assert judge(slow, figures())["steady_steps"].verdict is Verdict.FAIL
    slow["equal"] = {**slow["equal"], "step_seconds": [0.02, 0.0215]}
    assert judge(slow, figures())["steady_steps"].verdict is Verdict.PASS


def test_without_a_gpu_only_capacity_is_required() -> None:
    found = judge(figures(4.7, 0.1), figures(), speed=False)
    required = {name for name, gate in found.items() if gate.required}
    assert required == {"pool_tokens", "reported_tokens", "requests_that_fit"}


def test_short_prompts_decide_only_whether_steps_are_alike() -> None:
    found = judge(figures(1.5, tokens=600), figures(tokens=600))
    assert {name for name, gate in found.items() if gate.required} == {"steady_steps"}
    assert found["pool_tokens"].verdict is Verdict.FAIL


@pytest.mark.parametrize(
    ("gpus", "verdict"),
    [
        (["NVIDIA H200"], Verdict.FAIL),
        (["NVIDIA H100 80GB HBM3"] * 2, Verdict.FAIL),
        (["NVIDIA A100-SXM4-80GB"], Verdict.PASS),
        ([], Verdict.PASS),
    ],
)
def test_hopper_must_reach_what_its_kernels_reach(gpus: list[str], verdict: Verdict) -> None:
    tested = figures(4.7, 1.2)
    found = [*measurements("kvarn", tested), *measurements("fp16", figures())]
    judged = gates({m.key: m for m in found}, speed=True, limits=limits_of(gpus))
    assert next(gate for gate in judged if gate.name == "decode_equal").verdict is verdict


def burst(text: str, seconds: float) -> dict[str, Any]:
    return {
        "burst": text,
        "requests": 64,
        "peak": 64,
        "preemptions": 0,
        "hit_share": 0.0,
        "tokens": 1000,
        "seconds": seconds,
        "first_token_seconds": [seconds / 4, seconds / 2],
    }


def test_a_burst_that_was_measured_twice_has_two_samples() -> None:
    bursts = [burst("2x512+128", 4.0), burst("2x512+128", 5.0), burst("1x8+8", 1.0)]
    found = {m.name: m for m in measurements("fp16", {**figures(), "bursts": bursts})}
    assert found["burst_2x512+128.output_throughput"].samples == [250, 200]
    assert found["burst_2x512+128.ttft_p50"].samples == [1.0, 1.25]
    assert found["burst_2x512+128.ttft_p99"].samples == [2.0, 2.5]
    assert found["burst_1x8+8.output_throughput"].samples == [1000]


@pytest.mark.parametrize(
    ("text", "faster", "verdict"),
    [
        ("64x16000+2048", 2.1, Verdict.PASS),
        ("64x16000+2048", 1.9, Verdict.FAIL),
        ("64x16000+256", 1.0, Verdict.PASS),  # most of the work is prefill
        ("1x512+128", 0.99, Verdict.PASS),
        ("1x512+128", 0.97, Verdict.FAIL),
    ],
)
def test_bursts_have_the_limit_of_their_shape(text: str, faster: float, verdict: Verdict) -> None:
    tested = {**figures(4.7, 2.1), "bursts": [burst(text, 10.0 / faster)]}
    reference = {**figures(), "bursts": [burst(text, 10.0)]}
    gate = judge(tested, reference)[f"burst_{text}"]
    assert gate.verdict is verdict
    assert gate.required


def test_a_gpu_that_slowed_down_decides_nothing_about_speed() -> None:
    tested = {**figures(4.7, 2.1), "slowdown_us": 1200}
    found = judge(tested, {**figures(), "slowdown_us": 0})
    assert found["decode_equal"].verdict is Verdict.INCONCLUSIVE
    assert "while kvarn ran" in found["decode_equal"].reason
    assert found["pool_tokens"].verdict is Verdict.PASS
    steady = judge({**tested, "slowdown_us": 0}, {**figures(), "slowdown_us": 0})
    assert steady["decode_equal"].verdict is Verdict.PASS

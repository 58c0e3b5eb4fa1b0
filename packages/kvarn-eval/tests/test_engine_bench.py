from __future__ import annotations

import sys
import types
from itertools import pairwise
from typing import Any

import pytest

from kvarn_eval import engine_bench
from kvarn_eval.engine_bench import Driver, Plan, burst_shape
from kvarn_eval.engine_steps import Burst, Decode, Trace, quantiles

PLAN = Plan(
    engine={"max_num_batched_tokens": 64, "max_num_seqs": 8},
    flash_attn_version=None,
    prompt_tokens=20,
    requests=2,
    output_tokens=4,
    capacity_tokens=0,
    decode_seconds=60.0,
)


def test_prompts_are_random_fixed_and_share_no_prefix() -> None:
    prompts = PLAN.prompts(5, 1000)
    assert [len(prompt) for prompt in prompts] == [20] * 5
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 5
    assert prompts[:3] == PLAN.prompts(3, 1000)
    assert all(0 <= token < 1000 for prompt in prompts for token in prompt)
    others = PLAN.prompts(5, 1000, 30, "burst-0-")
    assert [len(prompt) for prompt in others] == [30] * 5
    assert not {tuple(prompt[:4]) for prompt in prompts} & {tuple(p[:4]) for p in others}


def trace(*steps: tuple[float, int, int, int]) -> Trace:
    """A trace from (time, tokens, started, ended) after each step."""
    return Trace(*(list(column) for column in zip(*steps, strict=True)))


def test_only_the_stretch_in_which_all_generate_counts() -> None:
    # the second request starts at 2 s, the first ends at 5 s
    seen = trace(
        (1, 1, 1, 0), (2, 3, 2, 0), (3, 5, 2, 0), (4, 7, 2, 0), (5, 9, 2, 1), (9, 10, 2, 2)
    )
    assert seen.window(2) == (1, 3)
    result = Decode.of(seen, 2, preemptions=0, hit_share=1.0)
    assert (result.tokens, result.seconds, result.peak) == (4, 2, 2)
    assert result.rates == [2.0, 2.0]
    assert result.step_seconds == [1, 1]


@pytest.mark.parametrize(
    "seen",
    [
        trace((1, 1, 1, 0), (2, 2, 1, 1), (3, 3, 2, 1)),
        trace((1, 1, 1, 0), (2, 2, 1, 0)),
        trace((1, 2, 2, 0), (2, 4, 2, 2)),
    ],
    ids=["one-after-the-other", "second-never-starts", "one-step-only"],
)
def test_requests_that_never_generate_together_are_no_measurement(seen: Trace) -> None:
    with pytest.raises(RuntimeError, match="never generated all at once"):
        Decode.of(seen, 2, preemptions=3, hit_share=0.0)


def test_rates_of_parts_follow_the_speed() -> None:
    times = [0.0]
    for step in range(40):
        times.append(times[-1] + (0.1 if step < 20 else 0.2))
    seen = trace(*((t, 2 * i, 2, 0) for i, t in enumerate(times)))
    assert Decode.of(seen, 2, 0, 1.0).rates == pytest.approx([20, 20, 10, 10])


def test_it_is_known_which_steps_were_slowest() -> None:
    times = [0.0, 1.0, 2.0, 5.0, 6.0, 8.0, 9.0, 10.0]
    seen = trace(*((t, 2 * i, 2, 0) for i, t in enumerate(times)))
    slowest = Decode.of(seen, 2, 0, 1.0).slowest
    assert len(slowest) == 5
    assert slowest[:2] == [(2, 3.0), (4, 2.0)]


def test_quantiles() -> None:
    assert quantiles(range(1, 101)) == [50.5, 100]
    assert quantiles([3.0]) == [3.0, 3.0]


class Fake:
    """An engine that prefills one request per step and decodes the others."""

    def __init__(self) -> None:
        self.waiting: list[tuple[str, int]] = []
        self.running: dict[str, int] = {}
        self.hits = 0

    def get_metrics(self) -> list[Any]:
        return [types.SimpleNamespace(name="vllm:prefix_cache_hits", value=self.hits)]

    def add_request(self, name: str, prompt: dict[str, list[int]], parameters: Any) -> None:
        self.hits += len(prompt["prompt_token_ids"])
        self.waiting.append((name, parameters.max_tokens))

    def abort_request(self, names: list[str]) -> None:
        self.waiting.clear()
        self.running.clear()

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> list[Any]:
        if self.waiting:
            name, left = self.waiting.pop(0)
            self.running[name] = left
        outputs = []
        for name in list(self.running):
            self.running[name] -= 1
            done = not self.running[name]
            if done:
                del self.running[name]
            answer = [types.SimpleNamespace(token_ids=[7])]
            outputs.append(types.SimpleNamespace(request_id=name, outputs=answer, finished=done))
        return outputs


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A driver of the fake engine, with as much of vLLM as it asks for."""
    kind = types.SimpleNamespace(DELTA=1)
    parameters = types.SimpleNamespace(RequestOutputKind=kind)
    vllm = types.SimpleNamespace(SamplingParams=types.SimpleNamespace, sampling_params=parameters)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", parameters)
    clock = iter(range(10**6))
    monkeypatch.setattr(engine_bench.time, "monotonic", lambda: float(next(clock)))
    return Driver(Fake())


def test_a_run_counts_every_token(driver: Driver) -> None:
    seen = driver.run([[1], [2], [3]], 10)
    assert seen.tokens[-1] == 30
    assert seen.ended[-1] == 3
    assert seen.window(3) == (2, 8)
    assert all(a <= b for a, b in pairwise(seen.tokens))


def test_a_window_ends_with_its_tokens_or_its_time(driver: Driver) -> None:
    by_tokens = driver.run([[1], [2]], 100, window_tokens=5)
    assert by_tokens.tokens[-1] == 1 + 2 + 2 * 5
    by_time = driver.run([[1], [2]], 100, seconds=7)
    assert by_time.times[-1] - by_time.times[1] == 7
    assert not driver.engine.has_unfinished_requests()


def test_decode_reports_hits_of_its_own_requests_only(driver: Driver) -> None:
    driver.engine.hits = 50
    result = driver.decode([[1, 2], [3, 4]], 10)
    assert result.hit_share == 4  # the fake reports no queries
    assert (result.requests, result.peak, result.preemptions) == (2, 2, 0)


def test_a_burst_counts_all_tokens_and_all_the_time(driver: Driver) -> None:
    result = driver.burst([[1], [2], [3]], 10)
    assert (result.requests, result.peak, result.preemptions) == (3, 3, 0)
    assert result.tokens == 30
    # one clock tick per step; the last request starts in step 3 and needs 10 steps
    assert result.seconds == 12
    assert result.first_token_seconds == [2, 3]


def test_first_tokens_of_one_step_are_counted_each() -> None:
    seen = trace((11, 2, 2, 0), (12, 5, 3, 0), (15, 8, 3, 3))
    result = Burst.of(seen, 10.0, preemptions=1, hit_share=0.0)
    assert (result.requests, result.peak, result.tokens, result.seconds) == (3, 3, 8, 5)
    assert result.first_token_seconds == [1, 2]


def test_a_burst_is_written_as_requests_prompt_and_answer() -> None:
    assert burst_shape("64x16000+2048") == (64, 16_000, 2048)


@pytest.mark.parametrize("text", ["64x16000", "0x16000+2048", "64x16000+2048 ", "-1x4+4", ""])
def test_another_burst_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no burst"):
        burst_shape(text)

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from kvarn_eval.prompts import PromptSource
from kvarn_eval.scenarios import loads, measurements
from kvarn_eval.small_model import SMALL_MODEL
from kvarn_eval.suite import Scenario, load_suite

if TYPE_CHECKING:
    from pathlib import Path

    from kvarn_eval.bench_serve import Load

REHEARSAL = {scenario.name: scenario for scenario in load_suite("rehearsal").scenarios}


def made(scenario: Scenario, folder: Path, fitting: int = 3) -> list[Load]:
    return list(loads(scenario, PromptSource(SMALL_MODEL), folder, fitting))


def sent(load: Load) -> list[dict[str, Any]]:
    return [json.loads(line) for line in load.prompts.read_text(encoding="utf-8").splitlines()]


def test_every_kind_says_what_it_sends(tmp_path: Path) -> None:
    names = {name: [load.name for load in made(s, tmp_path)] for name, s in REHEARSAL.items()}
    assert names["burst-16k"] == ["burst-16k.osl-4", "burst-16k.osl-8"]
    assert names["decode-slope"] == ["decode-slope.isl-128", "decode-slope.isl-512"]
    assert names["chat"] == ["chat.rate-8", "chat.rate-inf"]
    assert names["primed-full"] == ["primed-full"]


def test_no_two_loads_share_a_prompt(tmp_path: Path) -> None:
    prompts = [
        line["prompt"][:64]
        for scenario in REHEARSAL.values()
        for load in made(scenario, tmp_path)
        for line in sent(load)
    ]
    assert len(prompts) == len(set(prompts))


def test_primed_sends_as_many_as_fit(tmp_path: Path) -> None:
    (load,) = made(REHEARSAL["primed-equal"], tmp_path, fitting=7)
    assert load.requests == len(sent(load)) == 7


def test_one_request_at_a_time_for_the_slope(tmp_path: Path) -> None:
    assert {load.concurrency for load in made(REHEARSAL["decode-slope"], tmp_path)} == {1}


def test_one_in_four_of_mixed_is_long(tmp_path: Path) -> None:
    (load,) = made(REHEARSAL["mixed"], tmp_path)
    assert [line["output_tokens"] for line in sent(load)] == [12, 12, 12, 2]
    assert [len(line["prompt"]) for line in sent(load)] == [64, 64, 64, 512]


def loaded(name: str, kind: str, length: int, step: float) -> dict[str, Any]:
    latency = {"p50": step, "p90": step, "p99": 2 * step}
    return {
        "name": name, "scenario": name.partition(".")[0], "kind": kind, "requests": 1,
        "prompt_tokens": length, "output_tokens": 0, "output_throughput": 5.0, "decode": 0.0,
        "ttft": latency, "tpot": latency, "itl": latency, "e2el": latency, "preemptions": 0,
        "hit_share": 0.0, "peak_requests": 1, "peak_cache_use": 0.1, "rate": None,
        "lowest_clock_mhz": None, "raw": f"{name}.json",
    }  # fmt: skip


def test_the_slope_is_time_per_token_of_context() -> None:
    points = [loaded(f"s.isl-{n}", "slope", n, 0.01 + 2e-6 * n) for n in (1000, 2000, 4000)]
    found = {m.name: m for m in measurements("fp16", points)}
    assert found["s.base"].median == pytest.approx(0.01)
    assert found["s.per_1k_tokens"].median == pytest.approx(2000)  # microseconds
    assert found["s.isl-1000.itl_p99_over_p50"].median == pytest.approx(2)
    assert "s.isl-1000.decode" not in found  # there was no time when all generated

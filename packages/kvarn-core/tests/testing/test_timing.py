from __future__ import annotations

import itertools

import pytest
import torch

from kvarn_core.testing.timing import (
    MIN_CALLS,
    calls_per_graph,
    compare_calls,
    distinct_sets,
    host_microseconds,
    in_turns,
)

MIB = 1 << 20


@pytest.mark.parametrize(
    ("nbytes", "sets"),
    [(1 * MIB, 200), (7 * MIB, 29), (100 * MIB, 2), (4000 * MIB, 2)],
    ids=["1-MiB", "7-MiB", "two-are-enough", "one-would-be-enough"],
)
def test_all_sets_together_exceed_the_l2_cache_four_times(nbytes: int, sets: int) -> None:
    assert distinct_sets(nbytes, 50 * MIB) == sets
    assert sets * nbytes >= 4 * 50 * MIB


@pytest.mark.parametrize("sets", [1, 2, 3, 7, 19, 20, 21, 200])
def test_a_graph_has_enough_calls_and_uses_each_set_equally_often(sets: int) -> None:
    calls = calls_per_graph(sets)
    assert calls >= MIN_CALLS
    assert calls % sets == 0


def test_candidates_take_turns_and_short_ones_are_repeated() -> None:
    log: list[tuple[str, int]] = []

    def measure(name: str, duration: float) -> float:
        def sample(replays: int) -> float:
            log.append((name, replays))
            return duration

        return sample

    samples = in_turns({"short": measure("short", 0.5), "long": measure("long", 9.0)}, rounds=2)
    assert samples == {"short": [0.5, 0.5], "long": [9.0, 9.0]}
    warm_up, round_ = [("short", 1), ("long", 1)], [("short", 8), ("long", 1)]
    assert log == warm_up + 2 * round_


def test_the_host_is_timed_per_call_and_without_the_first_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    costs = itertools.chain([9.0] * 3, itertools.repeat(4e-6))

    def call() -> None:
        clock[0] += next(costs)

    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert host_microseconds([call] * 3) == pytest.approx(4)


@pytest.mark.gpu
def test_twice_the_bytes_take_twice_the_time() -> None:
    source = torch.empty(2, 512 * MIB, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    half = [lambda: target[0].copy_(source[0])] * 4
    full = [lambda: target.copy_(source)] * 4
    times = compare_calls({"half": half, "full": full}, rounds=9)
    ratio = min(times["full"]) / min(times["half"])  # other tests may run on the same GPU
    assert 1.8 < ratio < 2.2

"""Throughput scenarios: which loads each is made of, and what is read from them.

All arms get the same prompts in the same order. Prompts are distinct from load to load, so nothing
is found in the prefix cache unless a scenario is about that; `primed` and `aligned` send theirs
twice, first for one token, and then measure decoding with hardly any prefill.
"""

from __future__ import annotations

import json
import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from kvarn_core.testing.throttle import slowdown_us, slowed
from kvarn_eval.bench_serve import Load, run_load
from kvarn_eval.prompts import write_requests
from kvarn_eval.schema import Measurement, Unit, measure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvarn_eval.bench_serve import LoadGenerator
    from kvarn_eval.prompts import PromptSource
    from kvarn_eval.schema import Scalar
    from kvarn_eval.server import Server
    from kvarn_eval.suite import Scenario

    Request = tuple[str, int]  # prompt, answer length in tokens

PRIMING = 8  # requests at once while prompts are put into the cache
_LONG_EVERY = 4  # of the requests of `mixed`, one in so many is long
_WARM_SEED = 1


def loads(scenario: Scenario, source: PromptSource, folder: Path, fitting: int) -> Iterator[Load]:
    """The loads of a scenario; their prompts are written to `folder`.

    Parameters
    ----------
    scenario : Scenario
        What to send.
    source : PromptSource
        Draws the prompts.
    folder : Path
        Existing folder; files of the same name are replaced.
    fitting : int
        Requests of `primed`, as many as its `fill` says.

    Yields
    ------
    Load
    """

    def load(part: str, requests: list[Request], **how: Any) -> Load:
        name = f"{scenario.name}.{part}" if part else scenario.name
        file = folder / f"{name}.jsonl"
        write_requests(file, requests)
        return Load(name, file, len(requests), **how)

    def draw(count: int, length: int, answer: int, part: str) -> list[Request]:
        seed = zlib.crc32(f"{scenario.name}.{part}".encode())
        return [(prompt, answer) for prompt in source.draw(count, length, seed)]

    lengths, answers = scenario.prompt_tokens, scenario.output_tokens
    if scenario.kind == "burst":
        for answer in answers:
            part = f"osl-{answer}"
            yield load(part, draw(scenario.requests, lengths[0], answer, part))
    elif scenario.kind == "slope":
        for length in lengths:
            part = f"isl-{length}"
            requests = draw(scenario.requests, length, answers[0], part)
            yield load(part, requests, concurrency=1)
    elif scenario.kind == "rates":
        for rate in scenario.rates:
            part = f"rate-{rate:g}"
            requests = draw(scenario.requests, lengths[0], answers[0], part)
            yield load(part, requests, rate=rate)
    elif scenario.kind == "mixed":
        short = draw(scenario.requests, lengths[0], answers[0], "short")
        long = draw(scenario.requests, lengths[1], answers[1], "long")
        both = zip(short, long, strict=True)
        requests = [pair[i % _LONG_EVERY == _LONG_EVERY - 1] for i, pair in enumerate(both)]
        yield load("", requests, rate=scenario.rates[0])
    else:
        count = fitting if scenario.kind == "primed" else scenario.requests
        yield load("", draw(count, lengths[0], answers[0], ""))


def run_scenario(
    scenario: Scenario,
    server: Server,
    source: PromptSource,
    tokenizer: str,
    out: Path,
    fitting: int,
    progress: Callable[[str], None],
    generator: LoadGenerator,
) -> list[dict[str, Any]]:
    """Send all loads of a scenario to a running server.

    Parameters
    ----------
    scenario : Scenario
        What to send.
    server : Server
        Ready to answer.
    source : PromptSource
        Draws the prompts.
    tokenizer : str
        Folder of the tokenizer.
    out : Path
        Existing folder for prompts, logs and the child's results.
    fitting : int
        As in `loads`.
    progress : callable
        Receives the name of each load.
    generator : LoadGenerator
        Sends the loads.

    Returns
    -------
    list of dict
        As from `bench_serve.Loaded.to_json`, with ``kind`` and ``min_hit_share`` of the scenario,
        and ``slowdown_us`` of `kvarn_core.testing.throttle`.
    """
    found = []
    for load in loads(scenario, source, out, fitting):
        progress(load.name)
        first = load.prompts.read_text(encoding="utf-8").splitlines()
        if scenario.cached:
            send(server, [_prompt(line) for line in first], 1)
        else:
            send(server, source.draw(2, scenario.prompt_tokens[0], _WARM_SEED), 4)
        before = slowdown_us()
        loaded = run_load(server, load, tokenizer, out, generator)
        found.append(
            {
                **loaded.to_json(),
                "scenario": scenario.name,
                "kind": scenario.kind,
                "slowdown_us": slowed(before),
                "min_hit_share": scenario.min_hit_share if scenario.cached else None,
            }
        )
    return found


def _prompt(line: str) -> str:
    prompt: str = json.loads(line)["prompt"]
    return prompt


def send(server: Server, prompts: list[str], tokens: int) -> None:
    """Let the server answer prompts with `tokens` tokens each; nothing is measured."""

    def ask(prompt: str) -> None:
        body = {"model": server.model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        server.post("/v1/completions", {**body, "temperature": 0})

    with ThreadPoolExecutor(PRIMING) as pool:
        list(pool.map(ask, prompts))


def measurements(arm: str, found: list[dict[str, Any]], raw: str = "") -> list[Measurement]:
    """Measurements of the loads of one arm.

    Parameters
    ----------
    arm : str
        Configuration.
    found : list of dict
        As from `run_scenario`, all scenarios.
    raw : str
        Folder of the raw files, relative to the result, with a trailing slash.
    """
    result = []
    for loaded in found:
        context: dict[str, Scalar] = {
            key: loaded[key]
            for key in (
                "requests", "prompt_tokens", "output_tokens", "rate", "peak_requests",
                "peak_cache_use", "preemptions", "hit_share", "lowest_clock_mhz",
            )
        }  # fmt: skip
        result += list(_of_load(arm, loaded, context, raw + loaded["raw"]))
    slopes: dict[str, list[dict[str, Any]]] = {}
    for loaded in found:
        if loaded["kind"] == "slope":
            slopes.setdefault(loaded["scenario"], []).append(loaded)
    for name, points in slopes.items():
        result += _slope(arm, name, points)
    return result


def _of_load(
    arm: str, loaded: dict[str, Any], context: dict[str, Scalar], raw: str
) -> Iterator[Measurement]:
    name = loaded["name"]
    for quantity in ("output_throughput", "decode"):
        if loaded[quantity]:
            yield measure(
                f"{name}.{quantity}",
                arm,
                Unit.TOKENS_PER_SECOND,
                loaded[quantity],
                better="higher",
                context=context,
                raw=raw,
            )
    for metric in ("ttft", "tpot", "itl", "e2el"):
        for point, value in loaded[metric].items():
            yield measure(
                f"{name}.{metric}_{point}", arm, Unit.SECONDS, value, better="lower", raw=raw
            )
    steady = loaded["itl"]["p99"] / max(loaded["itl"]["p50"], 1e-9)
    yield measure(f"{name}.itl_p99_over_p50", arm, Unit.RATIO, steady, better="lower")
    yield measure(f"{name}.preemptions", arm, Unit.COUNT, loaded["preemptions"], better="lower")
    yield measure(f"{name}.hit_share", arm, Unit.SHARE, loaded["hit_share"])
    yield measure(f"{name}.peak_requests", arm, Unit.REQUESTS, loaded["peak_requests"])


def _slope(arm: str, name: str, points: list[dict[str, Any]]) -> Iterator[Measurement]:
    """Median time per token as a line over the length of the context."""
    if len(points) < 2:
        return
    lengths = [point["prompt_tokens"] + point["output_tokens"] / 2 for point in points]
    rise, base = np.polyfit(lengths, [point["itl"]["p50"] for point in points], 1)
    context: dict[str, Scalar] = {"points": len(points), "longest": math.ceil(max(lengths))}
    yield measure(f"{name}.base", arm, Unit.SECONDS, float(base), better="lower", context=context)
    yield measure(
        f"{name}.per_1k_tokens",
        arm,
        Unit.MICROSECONDS,
        1e9 * float(rise),
        better="lower",
        context=context,
    )

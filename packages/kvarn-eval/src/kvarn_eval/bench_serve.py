"""Loads on a running server, by ``vllm bench serve`` in a child process that sends them all.

The child's JSON stays as it is, beside the result. From it come tokens per second and latencies;
from the server's own counters, read before and after, prefix hits and preemptions; from a watch on
its gauges, how full the cache was, how many requests ran at once and how low the clocks went.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvarn_eval.schema import find_gpus
from kvarn_eval.server import OFFLINE, child, tail, total

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvarn_eval.server import Server

BENCH = (sys.executable, "-m", "kvarn_eval.bench_child")
COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "hits": "vllm:prefix_cache_hits_total",
    "asked": "vllm:prefix_cache_queries_total",
}
GAUGES = {"running": "vllm:num_requests_running", "cache_use": "vllm:kv_cache_usage_perc"}
PERCENTILES = (50, 90, 99)
_POLL_SECONDS = 0.1  # between looks whether a load is over
_IDLE_SECONDS = 0.25  # between looks at a server that has nothing to do yet
_BUSY_SECONDS = 3.0  # a server that answers a look delays a step: of fewer than one in a hundred


@dataclass(frozen=True)
class Load:
    """What is sent.

    Parameters
    ----------
    name : str
        Name of the measurement and of its files.
    prompts : Path
        As written by `prompts.write_requests`; sent in this order.
    requests : int
        How many of them.
    rate : float
        Requests per second, Poisson; infinite: all at once.
    concurrency : int, optional
        Most requests in flight.
    seed : int
        Of the arrival times.
    """

    name: str
    prompts: Path
    requests: int
    rate: float = math.inf
    concurrency: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Loaded:
    """What one load showed; seconds, tokens per second, shares between 0 and 1.

    `decode` counts tokens only while all requests were generating; 0 if there was no such time.
    """

    name: str
    requests: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    output_throughput: float
    decode: float
    ttft: dict[str, float]
    tpot: dict[str, float]
    itl: dict[str, float]
    e2el: dict[str, float]
    preemptions: int
    hit_share: float
    peak_requests: int
    peak_cache_use: float
    raw: str
    rate: float | None = None
    lowest_clock_mhz: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Fields as plain data."""
        return asdict(self)


def arguments(server: Server, load: Load, tokenizer: str, raw: Path) -> list[str]:
    """Options of a load."""
    values = {
        "--backend": "openai",
        "--base-url": server.url,
        "--model": server.model,
        "--tokenizer": tokenizer,
        "--dataset-name": "custom",
        "--dataset-path": load.prompts,
        "--custom-output-len": -1,  # as each line says
        "--num-prompts": load.requests,
        "--request-rate": load.rate,
        "--seed": load.seed,
        "--temperature": 0,
        # a warm-up would put its prompt into the prefix cache; `scenarios.run_scenario` warms up
        "--num-warmups": 0,
        "--percentile-metrics": "ttft,tpot,itl,e2el",
        "--metric-percentiles": ",".join(map(str, PERCENTILES)),
        "--result-dir": raw.parent,
        "--result-filename": raw.name,
    }
    flags = ["--skip-chat-template", "--disable-shuffle", "--ignore-eos", "--disable-tqdm"]
    flags += ["--save-result", "--save-detailed"]
    if load.concurrency is not None:
        values["--max-concurrency"] = load.concurrency
    return [*(str(part) for pair in values.items() for part in pair), *flags]


class LoadGenerator:
    """The child process that sends loads, one after the other.

    Parameters
    ----------
    process : subprocess.Popen
        The child, whose standard input is a pipe.
    log : Path
        What it prints before its first load.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log

    def send(self, what: str, options: list[str], log: Path, seconds: float) -> None:
        """Send one load and wait for its end.

        Parameters
        ----------
        what : str
            Its name in messages.
        options : list of str
            As of ``vllm bench serve``.
        log : Path
            File that receives what is printed meanwhile; replaced.
        seconds : float
            Longest wait.

        Raises
        ------
        RuntimeError
            If it fails or takes too long; the message holds the end of the log.
        """
        over = log.with_suffix(".over")
        for earlier in (over, log):
            earlier.unlink(missing_ok=True)
        line = json.dumps({"options": options, "log": str(log), "over": str(over)})
        pipe = self._process.stdin
        assert pipe is not None
        with suppress(BrokenPipeError):  # the child has ended, which is seen below
            pipe.write(line.encode() + b"\n")
        if problem := self._await(over, seconds):
            log = log if log.exists() else self._log
            raise RuntimeError(f"{what} {problem}. Its log, {log}, ends with:\n{tail(log)}")

    def _await(self, over: Path, seconds: float) -> str:
        """What went wrong with a load; nothing, if its file is there and empty."""
        deadline = time.monotonic() + seconds
        while not over.exists():
            if (status := self._process.poll()) is not None:
                return f"ended with status {status}"
            if time.monotonic() > deadline:
                return "took too long"
            time.sleep(_POLL_SECONDS)
        problem = over.read_text(encoding="utf-8")
        over.unlink()
        return problem and f"failed with {problem}"


@contextmanager
def load_generator(log: Path, command: tuple[str, ...] = BENCH) -> Iterator[LoadGenerator]:
    """Start the child process for the length of a ``with`` block.

    Parameters
    ----------
    log : Path
        File for what it prints before its first load; replaced.
    command : tuple of str
        Its program.
    """
    environment = {**os.environ, **OFFLINE}
    with child(command, log, environment, stdin=subprocess.PIPE) as process:
        yield LoadGenerator(process, log)


def run_load(
    server: Server,
    load: Load,
    tokenizer: str,
    out: Path,
    generator: LoadGenerator,
    seconds: float = 3600.0,
) -> Loaded:
    """Send one load and reduce what came back.

    Parameters
    ----------
    server : Server
        Ready to answer.
    load : Load
        What to send.
    tokenizer : str
        Folder of the tokenizer, by which the child counts tokens.
    out : Path
        Existing folder for the child's JSON and log.
    generator : LoadGenerator
        Sends it.
    seconds : float
        A load that takes longer fails.

    Returns
    -------
    Loaded

    Raises
    ------
    RuntimeError
        If the child, a request or the server fails, or an answer has another length than was asked
        for.
    """
    raw, log = out / f"{load.name}.json", out / f"{load.name}.log"
    raw.unlink(missing_ok=True)
    before = _counters(server)
    with _watch(server) as peaks:
        options = arguments(server, load, tokenizer, raw)
        generator.send(f"Load {load.name}", options, log, seconds)
    spent = {name: value - before[name] for name, value in _counters(server).items()}
    return reduce_load(load, json.loads(raw.read_text(encoding="utf-8")), spent, peaks)


def reduce_load(
    load: Load, figures: dict[str, Any], spent: dict[str, float], peaks: dict[str, float]
) -> Loaded:
    """Figures of a load from the child's JSON, the counters it moved and the watched gauges.

    Raises
    ------
    RuntimeError
        If a request failed, or answers are not as long as `load.prompts` says.
    """
    lines = load.prompts.read_text(encoding="utf-8").splitlines()[: load.requests]
    asked = [int(json.loads(line)["output_tokens"]) for line in lines]
    if failed := [error for error in figures["errors"] if error]:
        raise RuntimeError(f"Load {load.name}: {len(failed)} requests failed, first {failed[0]}")
    if figures["output_lens"] != asked:
        raise RuntimeError(
            f"Load {load.name}: answers have {sum(figures['output_lens'])} tokens, not "
            f"{sum(asked)}. Raise --max-model-len."
        )
    return Loaded(
        name=load.name,
        requests=load.requests,
        prompt_tokens=max(figures["input_lens"]),
        output_tokens=max(asked),
        seconds=figures["duration"],
        output_throughput=figures["output_throughput"],
        decode=decode_speed(figures),
        **{
            metric: {f"p{p}": figures[f"p{p}_{metric}_ms"] / 1000 for p in PERCENTILES}
            for metric in ("ttft", "tpot", "itl", "e2el")
        },
        preemptions=int(spent["preemptions"]),
        hit_share=spent["hits"] / max(spent["asked"], 1),
        peak_requests=int(peaks["running"]),
        peak_cache_use=peaks["cache_use"],
        raw=f"{load.name}.json",
        rate=None if math.isinf(load.rate) else load.rate,
        lowest_clock_mhz=int(peaks["clock"]) if "clock" in peaks else None,
    )


def decode_speed(figures: dict[str, Any]) -> float:
    """Tokens per second from the last first token to the first last token; 0 without such a time.

    Parameters
    ----------
    figures : dict
        With ``start_times`` and ``ttfts``, in s, ``itls``, in s per message after the first, and
        ``output_lens``; a busy server puts several tokens into one message.
    """
    arrivals = [
        start + first + np.concatenate([[0.0], np.cumsum(gaps)])
        for start, first, gaps in zip(
            figures["start_times"], figures["ttfts"], figures["itls"], strict=True
        )
    ]
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    if end <= begin:
        return 0.0
    tokens = sum(
        float(((times > begin) & (times <= end)).sum()) * length / len(times)
        for times, length in zip(arrivals, figures["output_lens"], strict=True)
    )
    return float(tokens / (end - begin))


def _counters(server: Server) -> dict[str, float]:
    metrics = server.metrics()
    return {name: total(metrics, metric) for name, metric in COUNTERS.items()}


@contextmanager
def _watch(server: Server) -> Iterator[dict[str, float]]:
    """Largest values of the gauges while the block runs, and the lowest SM clock under load."""
    peaks = dict.fromkeys(GAUGES, 0.0)
    done = threading.Event()

    def look() -> None:
        looks, pause = 0, _IDLE_SECONDS
        while not done.wait(pause):
            try:
                metrics = server.metrics()
            except RuntimeError:
                continue  # a busy server answers the next time; its absence shows in the load
            for name, metric in GAUGES.items():
                peaks[name] = max(peaks[name], total(metrics, metric))
            if not peaks["running"]:
                continue
            looks += 1
            pause = min(float(looks), _BUSY_SECONDS)
            for gpu in find_gpus():
                if gpu.sm_clock_mhz is not None:
                    peaks["clock"] = min(peaks.get("clock", math.inf), gpu.sm_clock_mhz)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()

"""GPU time of a call as a layer of a serving engine sees it: from a graph, on a cold cache.

Many calls, each on memory of its own, are captured in one CUDA graph, and the time of the graph is
divided by their number. So launches cost what they cost in a graph, and whatever a call read has
left the L2 cache before another call reads it again. Candidates take turns, so that a change of
clocks meets all of them.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MIN_CALLS = 20  # per graph
COLD = 4  # times the L2 cache: bytes that all calls of a graph read together
MIN_MILLISECONDS = 4.0  # shorter samples measure the timer


def distinct_sets(bytes_per_call: int, l2_bytes: int) -> int:
    """Memory sets that calls take turns on so that each of them finds a cold L2 cache.

    Parameters
    ----------
    bytes_per_call : int
        Bytes one call reads.
    l2_bytes : int
        Size of the L2 cache.

    Returns
    -------
    int
        At least 2.
    """
    return max(2, math.ceil(COLD * l2_bytes / bytes_per_call))


def calls_per_graph(sets: int) -> int:
    """Calls of one graph: `MIN_CALLS` or more, the same number on each of `sets` memory sets."""
    return sets * math.ceil(MIN_CALLS / sets)


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """Capture calls in one CUDA graph, in order.

    Parameters
    ----------
    calls : sequence of callables without arguments
        The first one also runs before the capture, so that kernels are compiled and loaded.

    Returns
    -------
    CUDAGraph
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def milliseconds(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Mean time of one replay, ms; the host waits for the end."""
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / replays


def in_turns(
    measures: Mapping[str, Callable[[int], float]], *, rounds: int = 5
) -> dict[str, list[float]]:
    """Sample every candidate once per round: A B C, A B C, ...

    Parameters
    ----------
    measures : mapping of str to callable
        Per candidate: takes a number of replays, returns the mean time of one, ms.
    rounds : int
        Samples of each candidate. A round before the first chooses how many replays one sample
        needs, and warms up.

    Returns
    -------
    dict of str to list of float
        Samples, ms per replay.
    """
    replays = {
        name: max(1, math.ceil(MIN_MILLISECONDS / max(measure(1), 1e-3)))
        for name, measure in measures.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            samples[name].append(measure(replays[name]))
    return samples


def compare_calls(
    candidates: Mapping[str, Sequence[Callable[[], object]]], *, rounds: int = 5
) -> dict[str, list[float]]:
    """Time the calls of several candidates against one another.

    Parameters
    ----------
    candidates : mapping of str to sequence of callables
        Calls of one graph, each on memory of its own (`distinct_sets`, `calls_per_graph`).
    rounds : int
        Samples of each candidate.

    Returns
    -------
    dict of str to list of float
        Samples, microseconds per call.
    """
    graphs = {name: capture(calls) for name, calls in candidates.items()}
    measures = {
        name: lambda replays, graph=graph: milliseconds(graph, replays)
        for name, graph in graphs.items()
    }
    samples = in_turns(measures, rounds=rounds)
    return {
        name: [1000 * sample / len(candidates[name]) for sample in samples[name]]
        for name in candidates
    }


def host_microseconds(calls: Sequence[Callable[[], object]], *, rounds: int = 5) -> float:
    """Time that the host needs to launch a call outside of graphs, microseconds.

    Parameters
    ----------
    calls : sequence of callables without arguments
        Launched one after the other; few enough to fit the queue of a stream, which is 1,000 long.
    rounds : int
        Samples, after one that loads what the calls need.

    Returns
    -------
    float
        Median over the samples of the mean over the calls.
    """
    samples = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for call in calls:
            call()
        samples.append(1e6 * (time.perf_counter() - begin) / len(calls))
    torch.cuda.synchronize()
    return sorted(samples[1:])[rounds // 2]

"""What was seen of an engine's steps, and the figures that are made of it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SEGMENTS = 4  # of a decode window; each gives one sample
SLOWEST = 5  # steps of a decode window that are kept


@dataclass
class Trace:
    """Seen after each engine step: time in s, tokens so far, requests started and ended."""

    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    started: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Most requests that generated at the same time."""
        return max(s - e for s, e in zip(self.started, self.ended, strict=True))

    def window(self, requests: int) -> tuple[int, int] | None:
        """First and last step of the stretch in which all requests generate, or None."""
        first = next((i for i, count in enumerate(self.started) if count == requests), None)
        if first is None or self.ended[first]:
            return None
        last = max(i for i, count in enumerate(self.ended) if not count)
        return (first, last) if last > first else None


@dataclass(frozen=True)
class Decode:
    """Decode speed of one batch.

    `rates` are tok/s of consecutive parts of the window, `slowest` (index, seconds) of its slowest
    steps.
    """

    requests: int
    peak: int
    preemptions: int
    hit_share: float
    tokens: int
    seconds: float
    rates: list[float]
    step_seconds: list[float]
    slowest: list[tuple[int, float]]

    @classmethod
    def of(cls, trace: Trace, requests: int, preemptions: int, hit_share: float) -> Decode:
        """Reduce a trace; raises RuntimeError if the requests never all generated at once."""
        window = trace.window(requests)
        if window is None:
            raise RuntimeError(
                f"{requests} requests never generated all at once (at most {trace.peak}, "
                f"{preemptions} preemptions). Ask for more output tokens or fewer requests."
            )
        first, last = window
        times, tokens = trace.times[first : last + 1], trace.tokens[first : last + 1]
        parts = min(SEGMENTS, last - first)
        steps = [b - a for a, b in pairwise(times)]
        cuts = [round(i * (len(times) - 1) / parts) for i in range(parts + 1)]
        return cls(
            requests=requests,
            peak=trace.peak,
            preemptions=preemptions,
            hit_share=hit_share,
            tokens=tokens[-1] - tokens[0],
            seconds=times[-1] - times[0],
            rates=[(tokens[b] - tokens[a]) / (times[b] - times[a]) for a, b in pairwise(cuts)],
            step_seconds=quantiles(steps),
            slowest=sorted(enumerate(steps), key=lambda step: -step[1])[:SLOWEST],
        )


def quantiles(values: Sequence[float]) -> list[float]:
    """The 50 % and 99 % quantiles, nearest rank."""
    ordered = sorted(values)
    return [statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]]


@dataclass(frozen=True)
class Burst:
    """Prompts that came at once, to the last answer; quantiles of the time to first tokens."""

    requests: int
    peak: int
    preemptions: int
    hit_share: float
    tokens: int
    seconds: float
    first_token_seconds: list[float]

    @classmethod
    def of(cls, trace: Trace, began: float, preemptions: int, hit_share: float) -> Burst:
        """Reduce the trace of prompts that were sent at `began`, in s on its clock."""
        first: list[float] = []
        for time, started in zip(trace.times, trace.started, strict=True):
            first += [time - began] * (started - len(first))
        return cls(
            requests=len(first),
            peak=trace.peak,
            preemptions=preemptions,
            hit_share=hit_share,
            tokens=trace.tokens[-1],
            seconds=trace.times[-1] - began,
            first_token_seconds=quantiles(first),
        )

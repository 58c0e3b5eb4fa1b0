"""Decode with tails of several lengths, timed in turns on one Hopper GPU.

    python packages/kvarn-core/benchmarks/tails.py

A tail is the part of the work that CTAs take piece by piece (`TAIL` and `PIECE` in
`kvarn_core/ops/decode/cuda.py`, `tail.cuh`). Times are medians of five on a cold L2 cache.
"""

from __future__ import annotations

import functools
import statistics
import sys

import torch
from cases import Case
from ours import prepare_decode

from kvarn_core import nvrtc
from kvarn_core.ops.decode import cuda
from kvarn_core.testing.timing import capture, in_turns, milliseconds

CASES = (Case(32, 16_384), Case(32, 16_384, mixed=True), Case(32, 4096), Case(12, 16_384))
SETTINGS = ((0, 2), (1, 2), (2, 2), (3, 2), (1, 1), (2, 1), (3, 1))  # TAIL, PIECE


def main() -> int:
    """Print a line per case and setting; returns the exit status."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != nvrtc.CAPABILITY:
        print("tails needs a GPU of compute capability 9.0.", file=sys.stderr)
        return 2
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    for case in CASES:
        shape = (case.batch, case.num_q_heads, case.head_dim)
        query = torch.randn(shape, dtype=torch.float16, device="cuda")
        jobs, measures = {}, {}
        for setting in SETTINGS:
            cuda.TAIL, cuda.PIECE = setting
            cuda._kernel.cache_clear()  # which does not know of PIECE
            jobs[setting] = prepare_decode(case, query, l2_bytes, "cuda")
            jobs[setting].calls[0]()
            torch.cuda.synchronize()
            measures[setting] = functools.partial(milliseconds, capture(jobs[setting].calls))
        for setting, times in in_turns(measures).items():
            microseconds = 1000 * statistics.median(times) / len(jobs[setting].calls)
            tail, piece = setting
            print(f"{case.name:28} tail {tail}/16, pieces of {piece}: {microseconds:7.1f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())

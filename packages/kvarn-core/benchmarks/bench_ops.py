"""Kernel times of one attention layer, beside those of the caches in stock vLLM.

    python packages/kvarn-core/benchmarks/bench_ops.py --quick --out bench.json

All arms run in this process and take turns; every call finds a cold L2 cache; launches come from
CUDA graphs. Bytes are those that must move (records, exact rows, query, output), and the share of
bandwidth is against a sum that reads 2 GB in the same run. Beside it stands what a launch outside
of graphs takes the host. Before anything is timed, decode is compared with the reference: wrong
results have no speed. Neither has a GPU that slows itself down for heat or power meanwhile; such a
case is timed again.

Exit status: 0 all gates pass, 1 a gate or a case fails, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
from pathlib import Path

import baselines
import ours
import torch
import yardstick
from cases import FLASH8, FLASH16, FULL, QUICK, TURBOQUANT, USUAL, Case, Job
from document import Document

from kvarn_core.dispatch import ENGINES, select
from kvarn_core.testing.throttle import unthrottled
from kvarn_core.testing.timing import compare_calls, host_microseconds

ARMS = {
    "memory": {"method": "sum and copy of 2 GiB"},
    FLASH16: {"method": "FlashAttention 3, fp16, pages of 16"},
    FLASH8: {"kv_cache_dtype": "fp8", "method": "FlashAttention 3, e4m3, pages of 16"},
    TURBOQUANT: {"kv_cache_dtype": TURBOQUANT, "method": "Triton kernel of stock vLLM"},
}
MIN_SPEEDUP = {"decode.b32.n16384": 1.5, "decode.b8.n4096": 1.0}  # over FlashAttention 3, fp16
STORE = Case(32, 16_384)
CHUNK = Case(1, 8192)
CHUNK_TOKENS = 2048
GATHER = Case(1, 16_384)
ROTATED_TOKENS = 8192


class Bench:
    """Times cases one after the other and keeps what was found.

    Parameters
    ----------
    document : Document
        Receives the measurements.
    engine : str
        Engine of our ops.
    rounds : int
        Samples per measurement.
    rivals : bool
        Whether the caches of stock vLLM are timed too.
    """

    def __init__(self, document: Document, engine: str, rounds: int, rivals: bool) -> None:
        self.document = document
        self.engine = engine
        self.rounds = rounds
        self.rivals = rivals
        self.device = torch.device("cuda")
        self.l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self.failed: list[str] = []

    def time(self, name: str, jobs: dict[str, Job], **context: float | str | bool) -> None:
        """Time one job per arm, in turns, and print a line for each."""
        calls = {arm: job.calls for arm, job in jobs.items()}
        times = unthrottled(lambda: compare_calls(calls, rounds=self.rounds))
        read = self.document.median("memory", "read")
        for arm, samples in times.items():
            job = jobs[arm]
            rate = job.nbytes / sorted(samples)[len(samples) // 2] / 1000  # GB/s
            host = host_microseconds(job.calls)
            facts = {**context, "bytes": job.nbytes, "gb_per_s": rate, "host_us": host}
            facts["calls"] = len(job.calls)
            if read:
                facts["share_of_read"] = rate / read
            median = self.document.add(name, arm, "us", samples, facts)
            share = f"{100 * rate / read:5.1f} % of read" if read else ""
            rates = f"{rate:8.0f} GB/s {share}"
            print(f"{name:32} {arm:20} {median:9.1f} us, host {host:5.1f} {rates}", flush=True)

    def memory(self) -> None:
        """The yardstick; comes first."""
        jobs = yardstick.prepare()
        calls = {name: job.calls for name, job in jobs.items()}
        times = unthrottled(lambda: compare_calls(calls, rounds=self.rounds))
        for name, samples in times.items():
            rates = [jobs[name].nbytes / sample / 1000 for sample in samples]
            rate = self.document.add(name, "memory", "GB/s", rates, {"bytes": jobs[name].nbytes})
            print(f"{name:32} {'memory':20} {rate:22.0f} GB/s", flush=True)

    def decode(self, case: Case) -> None:
        """One case, all its arms."""
        width = (case.num_q_heads + 2 * case.num_kv_heads) * case.head_dim
        fused = torch.randn(case.batch, width, device=self.device, dtype=torch.float16)
        query = fused[:, : case.num_q_heads * case.head_dim].view(
            case.batch, case.num_q_heads, case.head_dim
        )
        arm = self.arm(case.preset)
        jobs = {arm: ours.prepare_decode(case, query, self.l2_bytes, self.engine)}
        for kind in case.rivals if self.rivals else ():
            self.document.arms.setdefault(kind, ARMS[kind])
            jobs[kind] = baselines.prepare(kind, case, query, self.l2_bytes)
        self.time(
            case.name,
            jobs,
            batch=case.batch,
            tokens=case.context,
            q_heads=case.num_q_heads,
            kv_heads=case.num_kv_heads,
            head_dim=case.head_dim,
            mixed=case.mixed,
        )

    def other_ops(self) -> None:
        """Store, gather and rotation at the usual shape."""
        arm = self.arm(STORE.preset)
        place = (self.device, self.l2_bytes, self.engine)
        for op, job in ours.prepare_store(STORE, 1, *place).items():
            self.time(f"{op}.step.b{STORE.batch}", {arm: job}, batch=STORE.batch)
        tiles = CHUNK_TOKENS // CHUNK.layout.group * CHUNK.num_kv_heads
        for op, job in ours.prepare_store(CHUNK, CHUNK_TOKENS, *place).items():
            self.time(f"{op}.chunk.t{CHUNK_TOKENS}", {arm: job}, tokens=CHUNK_TOKENS, tiles=tiles)
        job = ours.prepare_gather(GATHER, *place)
        self.time(f"gather.n{GATHER.context}", {arm: job}, tokens=GATHER.context)
        job = ours.prepare_rotate(GATHER, ROTATED_TOKENS, self.device, self.engine)
        self.time(f"rotate.t{ROTATED_TOKENS}", {arm: job}, tokens=ROTATED_TOKENS)

    def arm(self, preset: str) -> str:
        """Name of our arm, described in the document."""
        self.document.arms.setdefault(
            preset, {"kv_cache_dtype": preset, "method": f"kvarn_core, {self.engine}"}
        )
        return preset

    def attempt(self, name: str, step, *arguments: object) -> None:  # type: ignore[no-untyped-def]
        """Run a step; one that fails is printed and counted, and the others still run."""
        try:
            step(*arguments)
        except Exception:
            traceback.print_exc()
            self.failed.append(name)
        gc.collect()
        torch.cuda.empty_cache()


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", action="store_true", help="five decode shapes; about a minute")
    size.add_argument("--full", action="store_true", help="the whole matrix; some minutes")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--engine", choices=ENGINES, help="of our ops; what a model would get")
    parser.add_argument("--rounds", type=int, default=5, help="samples per measurement, at least 3")
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--ours-only", action="store_true", help="time no cache of stock vLLM")
    found = parser.parse_args(line)
    if found.rounds < 3:
        parser.error("--rounds must be at least 3.")
    return found


def main() -> int:
    """Run the benchmark; returns the exit status."""
    options = arguments()
    if not torch.cuda.is_available():
        print("bench_ops needs one CUDA GPU. None is visible.", file=sys.stderr)
        return 2
    cases = [case for case in (QUICK if options.quick else FULL) if options.only in case.name]
    document = Document("bench_ops quick" if options.quick else "bench_ops full")
    document.arms["memory"] = ARMS["memory"]
    engine = options.engine or select(torch.device("cuda"), None, kernels=ENGINES)
    bench = Bench(document, engine, options.rounds, not options.ours_only)
    for preset in dict.fromkeys(case.preset for case in cases):
        small = Case(3, 1000, preset=preset)
        query = torch.randn(3, 64, 128, device="cuda", dtype=torch.float16)
        error = ours.check_decode(small, query, engine)
        print(f"{preset}: decode agrees with the reference, error {error:.1e}", flush=True)
    names = [f"{case.preset} {case.name}" for case in cases]
    bench.attempt("memory", bench.memory)
    for case in cases:
        bench.attempt(case.name, bench.decode, case)
        document.write(options.out, names)
    if not options.only:
        bench.attempt("other ops", bench.other_ops)
    for name, limit in MIN_SPEEDUP.items():
        document.require_speedup(name, USUAL, FLASH16, limit)
    document.write(options.out, names)
    red = [gate["name"] for gate in document.gates if gate["verdict"] == "fail"]
    print(f"Written: {options.out}. Failed cases: {bench.failed or 'none'}; gates: {red or 'pass'}")
    return 1 if red or bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())

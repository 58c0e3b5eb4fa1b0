"""Serve the small model on one or two GPUs with CUDA graphs; `test_parallel.py` judges.

Called with the number of GPUs and the file for the report. Engines that share a GPU start at once
and serve one after the other: two of them at work would wait for each other in every all-reduce.
"""

from __future__ import annotations

import fcntl
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from serve import MODEL, PARALLEL, PRESET, SETTINGS, Engine, ask, items, program_texts, read

LAST = 8  # prompts that the pool still holds


def runner(worker: Any) -> str:
    return type(worker.model_runner).__module__


def serve(engine: Engine, out: Path) -> dict[str, Any]:
    """Everything that is asked of an engine; log-probabilities go to a file beside `out`."""
    report: dict[str, Any] = {"runners": engine.llm.collective_rpc(runner)}
    asked = items(24, 30_000)
    report["cold"] = ask(engine, asked)
    report["preemptions"] = engine.preemptions
    report["again"] = ask(engine, asked[-LAST:])
    engine.kv_cache_manager.reset_prefix_cache()
    # eight rows at a time, so that every batch has the size of a graph
    report["same"] = ask(engine, items(8, 30_200), tokens=130)
    engine.kv_cache_manager.reset_prefix_cache()
    rows = read(engine, program_texts(4, 2048))
    np.savez(out.with_suffix(".npz"), *rows)
    return report


def main() -> None:
    gpus, out = int(sys.argv[1]), Path(sys.argv[2])
    options = {**SETTINGS, **(PARALLEL if gpus > 1 else {})}
    engine = Engine(MODEL, PRESET, dtype="float16", enforce_eager=False, **options)
    with out.with_name("serving.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        began = time.monotonic()
        report = serve(engine, out)
        report["seconds"] = time.monotonic() - began
    out.write_text(json.dumps(report), encoding="utf-8")
    engine.stop()


if __name__ == "__main__":
    main()

"""Serve the small model on one or two GPUs with CUDA graphs; `test_parallel.py` judges.

Called with the number of GPUs and the file for the report.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from serve import MODEL, PARALLEL, PRESET, SETTINGS, Engine, ask, items, program_texts, read

LAST = 8  # prompts that the pool still holds


def runner(worker: Any) -> str:
    return type(worker.model_runner).__module__


def main() -> None:
    gpus, out = int(sys.argv[1]), Path(sys.argv[2])
    options = {**SETTINGS, **(PARALLEL if gpus > 1 else {})}
    engine = Engine(MODEL, PRESET, dtype="float16", enforce_eager=False, **options)
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
    out.write_text(json.dumps(report), encoding="utf-8")
    engine.stop()


if __name__ == "__main__":
    main()

"""`kvarn_eval.engine_bench` with an engine that rests for 10 % of the time of every step."""

from __future__ import annotations

import sys
import time
from typing import Any

from kvarn_eval import engine_bench

REST = 0.1


def slowed(start: Any) -> Any:
    """Start an engine whose steps take longer."""

    def started(plan: engine_bench.Plan) -> Any:
        engine = start(plan)
        step = engine.step

        def slow_step() -> Any:
            began = time.monotonic()
            outputs = step()
            time.sleep(REST * (time.monotonic() - began))
            return outputs

        engine.step = slow_step
        return engine

    return started


if __name__ == "__main__":
    engine_bench.start_engine = slowed(engine_bench.start_engine)
    engine_bench.main(sys.argv[1], sys.argv[2], time.monotonic())

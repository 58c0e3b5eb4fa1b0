"""A thousand requests while the pool is full, on both runners and on one or two GPUs: `soak.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.slow]

REQUESTS = 1000
MIB = 1 << 20
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


def serve(runner: str, gpus: int, out: Path) -> dict[str, Any]:
    environment = {
        **os.environ,
        "VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2")),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(out.with_suffix(".cache")),
    }
    script = str(Path(__file__).with_name("soak.py"))
    command = [sys.executable, script, str(REQUESTS), str(gpus), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    print(runner, gpus, found)
    return found


@pytest.fixture(scope="module")
def one_gpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[dict[str, Any]]]:
    """Both runners at once, on the same GPU."""
    folder = tmp_path_factory.mktemp("soak")
    pool = ThreadPoolExecutor(2)
    return {name: pool.submit(serve, name, 1, folder / f"{name}.json") for name in ("v1", "v2")}


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_a_full_pool_leaks_nothing(one_gpu: dict[str, Any], runner: str) -> None:
    check(one_gpu[runner].result())


@two_gpus
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_a_full_pool_leaks_nothing_on_two_gpus(tmp_path: Path, runner: str) -> None:
    check(serve(runner, 2, tmp_path / "report.json"))


def check(found: dict[str, Any]) -> None:
    """Nothing was lost, mixed up or compiled, and the run was as hard as it was meant to be."""
    assert found["foreign"] == []
    assert found["lost"] <= 0.01 * found["answered"], found
    assert found["wrong"] <= 0.04 * found["answered"], "an exact cache misses about 1 % of these"
    assert found["answered"] + found["aborted"] == REQUESTS
    assert found["free pages lost"] == found["requests left"] == 0
    for allocated, reserved in found["drifts"]:
        assert abs(allocated) <= 16 * MIB
        assert reserved <= 16 * MIB
    assert found["compiled while serving"] == []

    assert found["median usage"] >= 0.85, found
    assert found["preemptions"] >= 50, found
    assert found["aborted"] >= 50, found
    assert found["hits"] >= 0.2 * found["answered"], found

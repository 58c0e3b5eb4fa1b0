"""The small model with tensor parallelism of two on two GPUs, beside one GPU; both model runners.

Ranks add their shares in another order than one GPU does, so that texts agree up to near ties and
distributions up to a small part of what quantisation moves them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]

FIRST_PACKED = 256  # position of the first query that reads a record
WRONG = 1  # of 24 answers; an exact cache gets all of these right
NEAR_TIE = 0.2  # nat
SECONDS = 300  # one engine, and its wait for others
MOVED, APART = 0.25, 0.5  # shares of the distance that quantisation moves a distribution
RUNNERS = {"v1": "vllm.v1.worker.gpu_model_runner", "v2": "vllm.v1.worker.gpu.model_runner"}


def serve(runner: str, gpus: str, folder: Path, name: str) -> tuple[dict[str, Any], list[Any]]:
    """Report and log-probabilities of one engine on the `gpus` named."""
    out = folder / f"{runner}-{name}.json"
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": gpus,
        "VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2")),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # pytest's helpers have asked for GPUs, no fork
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(folder / f"cache-{runner}-{len(gpus)}"),  # a repeat reuses it
        "TORCHINDUCTOR_DETERMINISTIC": "1",  # else a first run and a repeat compile differently
    }
    script = str(Path(__file__).with_name("serve_parallel.py"))
    command = [sys.executable, script, str(len(gpus.split(","))), str(out)]
    began, log = time.monotonic(), out.with_suffix(".log")
    try:
        with log.open("w") as sink:
            subprocess.run(
                command, env=environment, stdout=sink, stderr=sink, timeout=SECONDS, check=True
            )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.fail(f"{error}; its log ends with:\n{log.read_text()[-8000:]}")
    report, rows = json.loads(out.read_text(encoding="utf-8")), np.load(out.with_suffix(".npz"))
    took = time.monotonic() - began
    print(f"{out.stem}: {took:.0f} s, {report['seconds']:.0f} of them serving", flush=True)
    return report, [rows[name] for name in rows.files]


class Served:
    """``<runner>-one``, ``-two`` and ``-repeated``, all served when the first is asked for.

    Engines start at once and share the GPUs. Repeats come last, since they reuse what ``-two``
    compiled. Whoever asks for an engine that failed fails too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engines: dict[str, Future[tuple[dict[str, Any], list[Any]]]] = {}

    def __getitem__(self, name: str) -> tuple[dict[str, Any], list[Any]]:
        if not self.engines:
            for wave in ("one", "two"), ("repeated",):
                with ThreadPoolExecutor(len(wave) * len(RUNNERS)) as pool:
                    for (gpu, runner), which in product(enumerate(RUNNERS), wave):
                        gpus = str(gpu) if which == "one" else "0,1"
                        engine = pool.submit(serve, runner, gpus, self.folder, which)
                        self.engines[f"{runner}-{which}"] = engine
        return self.engines[name].result()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("parallel"))


each = pytest.mark.parametrize("runner", RUNNERS)


@each
def test_answers_are_right_on_two_gpus(served: Served, runner: str) -> None:
    report, _ = served[f"{runner}-two"]
    assert report["runners"] == [RUNNERS[runner]] * 2
    assert report["preemptions"] > 0
    assert report["again"]["hits"] > 0
    for phase in ("cold", "again"):
        assert report[phase]["asked"] - report[phase]["right"] <= WRONG, phase


@each
def test_two_gpus_generate_the_tokens_of_one(served: Served, runner: str) -> None:
    one, two = (served[f"{runner}-{name}"][0]["same"] for name in ("one", "two"))
    for number, (here, there) in enumerate(zip(one["tokens"], two["tokens"], strict=True)):
        for step, (a, b) in enumerate(zip(here, there, strict=True)):
            if a != b:
                gap = abs(one["logprobs"][number][step] - two["logprobs"][number][step])
                assert gap <= NEAR_TIE, f"request {number}, token {step}: {a} != {b}"
                break


@each
def test_two_runs_on_two_gpus_are_equal(served: Served, runner: str) -> None:
    (first, rows), (second, others) = (served[f"{runner}-{name}"] for name in ("two", "repeated"))
    for what in ("tokens", "logprobs"):
        assert first["same"][what] == second["same"][what]
    for here, there in zip(rows, others, strict=True):
        np.testing.assert_array_equal(here, there)


def divergence(reference: np.ndarray, test: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence where records are read, in nats."""
    by_position = (np.exp(reference) * (reference - test)).sum(1)
    return float(by_position[FIRST_PACKED:].mean())


@each
def test_distributions_are_those_of_one_gpu(served: Served, runner: str) -> None:
    from kvarn_eval.fidelity import ARMS, DEFAULT_PRESET, load_model, program_texts, pseudo_decode

    model = load_model(Path(__file__).parents[3] / "kvarn-eval" / "models" / "small", "plain")
    exact = [
        pseudo_decode(model, text.ids, ARMS["fp16"], DEFAULT_PRESET)[:-1].numpy()
        for text in program_texts(4, 2048)
    ]
    one, two = (served[f"{runner}-{name}"][1] for name in ("one", "two"))
    moved = [np.mean(list(map(divergence, exact, rows))) for rows in (one, two)]
    apart = np.mean(list(map(divergence, one, two)))
    print(runner, {"one GPU": moved[0], "two GPUs": moved[1], "apart": apart})
    assert abs(moved[1] - moved[0]) <= MOVED * moved[0], moved
    assert apart <= APART * moved[0], (apart, moved)

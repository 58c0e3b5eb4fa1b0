"""The small model on one GPU: both model runners, with and without CUDA graphs, fp16 and bf16.

Each configuration is served once, by `serve.py`, four at a time; the tests read its report. The
weights know the right answers, so accuracy needs no second server, and a plain torch model with the
same cache policy says how far the distributions may move.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

CONFIGURATIONS = [
    f"{runner}-{mode}-{dtype}-triton"
    for runner in ("v1", "v2")
    for mode in ("eager", "graphs")
    for dtype in ("float16", "bfloat16")
] + [
    f"{runner}-{mode}-{dtype}-cuda"
    for runner, dtype in (("v1", "float16"), ("v2", "bfloat16"))
    for mode in ("eager", "graphs")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
]
AT_ONCE = 4
FIRST_PACKED = 256  # position of the first query that reads a record
WRONG = 1  # of 24 answers; an exact cache gets all of these right
NEAR_TIE = 0.2  # nat; graphs pad batches and compile the model, which rounds differently


def serve(configuration: str, folder: Path) -> dict[str, Any]:
    """Run one configuration in a process of its own; its report."""
    runner, *rest = configuration.split("-")
    out = folder / f"{configuration}.json"
    environment = {
        **os.environ,
        "VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2")),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(folder / f"cache-{configuration}"),  # others compile the same model
    }
    command = [sys.executable, str(Path(__file__).with_name("serve.py")), str(out), *rest]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    log = (done.stdout + done.stderr)[-8000:]
    assert done.returncode == 0, f"{configuration} failed:\n{log}"
    return {**json.loads(out.read_text(encoding="utf-8")), "log": log}


@pytest.fixture(scope="module")
def reports(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Futures of the reports of all configurations that this run selected."""
    folder = tmp_path_factory.mktemp("reports")
    asked: set[str] = set()
    for item in request.session.items:
        if Path(item.path) == Path(__file__):
            asked |= {value for value in item.callspec.params.values() if isinstance(value, str)}
    pool = ThreadPoolExecutor(AT_ONCE)
    asked |= {name.replace("graphs", "eager") for name in asked}
    names = [name for name in CONFIGURATIONS if name in asked]
    return {
        "folder": folder,
        **{name: pool.submit(serve, name, folder) for name in names},
    }


@pytest.fixture
def report(reports: dict[str, Any], configuration: str) -> dict[str, Any]:
    return reports[configuration].result()


each = pytest.mark.parametrize("configuration", CONFIGURATIONS)


@each
def test_the_configuration_is_the_one_asked_for(report: dict[str, Any], configuration: str) -> None:
    runner, mode, _, engine = configuration.split("-")
    module = {"v1": "vllm.v1.worker.gpu_model_runner", "v2": "vllm.v1.worker.gpu.model_runner"}
    assert report["runner"] == module[runner]
    assert report["asynchronous"]
    assert report["engine"] == engine
    assert report["kernels"] > 5, "kernels are loaded before the engine serves"
    assert ("FULL" in report["graphs"]) == (mode == "graphs"), report["graphs"]


@each
def test_answers_are_right(report: dict[str, Any], configuration: str) -> None:
    """Cold with preemptions, in chunks of three sizes, and again out of the prefix cache."""
    phases = {name: found for name, found in report.items() if isinstance(found, dict)}
    phases.pop("steps")
    wrong = {name: found["asked"] - found["right"] for name, found in phases.items()}
    assert max(wrong.values()) <= WRONG, wrong
    assert report["preemptions"] > 0
    assert report["again"]["hits"] >= 8 * 1024


@each
def test_graphs_hold_decode_steps(report: dict[str, Any], configuration: str) -> None:
    """A step that a graph replays never reaches the op."""
    steps = report["steps"]
    assert steps["prefill"] > 0
    assert steps["passes"] > 0, "no chunk had any context"
    if "graphs" in configuration:
        assert steps.get("decode", 0) == 0, steps
    else:
        assert steps["decode"] > 100, steps


@each
def test_nothing_is_compiled_or_allocated_while_serving(
    report: dict[str, Any], configuration: str
) -> None:
    """A wait for the device in the op or the builder would have ended the run with an error."""
    assert report["compiled while serving"] == []
    assert report["loaded while serving"] == 0
    assert report["segments"] == 0


@each
def test_poisoned_pages_change_no_bit(report: dict[str, Any], configuration: str) -> None:
    for what in ("tokens", "logprobs"):
        assert report["poisoned"][what] == report["same"][what]


@pytest.mark.parametrize("graphs", [name for name in CONFIGURATIONS if "graphs" in name])
def test_graphs_generate_the_tokens_of_eager_mode(reports: dict[str, Any], graphs: str) -> None:
    eager = reports[graphs.replace("graphs", "eager")].result()["same"]
    whole = reports[graphs].result()["same"]
    for number, (one, other) in enumerate(zip(eager["tokens"], whole["tokens"], strict=True)):
        for step, (a, b) in enumerate(zip(one, other, strict=True)):
            if a != b:
                gap = abs(eager["logprobs"][number][step] - whole["logprobs"][number][step])
                assert gap <= NEAR_TIE, f"request {number}, token {step}: {a} != {b}"
                break


@pytest.fixture(scope="module")
def oracles() -> list[tuple[np.ndarray, np.ndarray]]:
    """Log-probabilities of each text with an fp16 cache and with kvarn's, in plain torch."""
    from kvarn_eval.fidelity import ARMS, DEFAULT_PRESET, load_model, program_texts, pseudo_decode

    folder = Path(__file__).parents[3] / "kvarn-eval" / "models" / "small"
    model = load_model(folder, "plain")
    return [
        tuple(
            pseudo_decode(model, text.ids, ARMS[arm], DEFAULT_PRESET)[:-1].numpy()
            for arm in ("fp16", "kvarn")
        )
        for text in program_texts(4, 2048)
    ]


def divergence(reference: np.ndarray, test: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence where records are read, in nats."""
    by_position = (np.exp(reference) * (reference - test)).sum(1)
    return float(by_position[FIRST_PACKED:].mean())


@each
def test_predictions_move_as_far_as_the_policy_says(
    reports: dict[str, Any], report: dict[str, Any], oracles: Any, configuration: str
) -> None:
    """Half precision adds noise of its own; half of the policy's distance says it was quantised."""
    rows = np.load(reports["folder"] / f"{configuration}.npz")
    served = [rows[str(number)] for number in range(len(oracles))]
    moved = np.mean(
        [divergence(exact, row) for (exact, _), row in zip(oracles, served, strict=True)]
    )
    policy = np.mean([divergence(exact, kvarn) for exact, kvarn in oracles])
    apart = np.mean(
        [divergence(kvarn, row) for (_, kvarn), row in zip(oracles, served, strict=True)]
    )
    print(configuration, {"moved": moved, "policy": policy, "apart": apart})
    assert 0.5 * policy < moved < 1.5 * policy + 0.001, (moved, policy)
    assert apart < 0.5 * policy + 0.001, (apart, policy)

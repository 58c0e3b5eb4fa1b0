"""The comparison with a stand-in for the engine process."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from kvarn_eval.report import headline, markdown
from kvarn_eval.schema import Run, Verdict
from kvarn_eval.throughput import VARIABLES, Settings, run_throughput
from kvarn_eval.throughput_arm import earlier, measure_arm

if TYPE_CHECKING:
    from pathlib import Path

CHILD = """
import json, sys, pathlib
plan = json.loads(pathlib.Path(sys.argv[1]).read_text())
cache = plan["engine"]["kv_cache_dtype"]
print("GPU KV cache size: 1,000 tokens")
if plan["output_tokens"] > 4:
    print("INFO Directly load the compiled graph(s) for compile range (1, 64) from the cache")
print(f"GPU KV cache size: {5 if cache.startswith('kvarn') else 1},234 tokens")
if cache == "fp8":
    sys.exit("no such kernel")
decode = dict(requests=2, peak=2, preemptions=0, hit_share=1.0, tokens=8, seconds=1.0,
              rates=[8.0], step_seconds=[0.2, 0.3])
found = dict(startup_seconds=1.0, pages=100, page_size=16, requests_that_fit=3,
             tokens_per_request=30, bursts=[])
def keep(**more):
    found.update(more)
    pathlib.Path(sys.argv[2]).write_text(json.dumps(found))
keep()
if cache.startswith("turboquant"):
    sys.exit("out of memory")
keep(prefill_tokens=40, prefill_seconds=2.0, equal=decode)
"""


@pytest.fixture
def command(tmp_path: Path) -> tuple[str, ...]:
    program = tmp_path / "child.py"
    program.write_text(CHILD, encoding="utf-8")
    return (sys.executable, str(program))


def settings(**more: Any) -> Settings:
    given = {"prompt_tokens": 20, "requests": 2, "output_tokens": 10, "capacity_tokens": 0}
    return Settings("model", **{**given, **more})


def quiet(what: str, done: int, steps: int) -> None:
    pass


def test_arms_that_fail_leave_the_others(tmp_path: Path, command: tuple[str, ...]) -> None:
    compared = settings(arms=("fp16", "fp8", "kvarn"))
    run, errors = run_throughput(compared, tmp_path, quiet, command=command)
    assert list(run.arms) == ["fp16", "kvarn"]
    assert run.value("kvarn", "reported_tokens") == 5234
    assert run.value("fp16", "prefill") == 20
    assert [error.splitlines()[-1] for error in errors] == ["no such kernel"]
    assert run.failed == {"fp8": "Arm fp8 ended with status 1."}
    assert Run.load(tmp_path / "result.json") == run
    assert run.verdict is Verdict.INCONCLUSIVE
    assert headline(run) == "Not all of fp8 was measured."


def test_an_arm_that_fails_later_keeps_its_figures(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    compared = settings(arms=("turboquant", "kvarn"))
    run, errors = run_throughput(compared, tmp_path, quiet, command=command)
    assert run.value("turboquant", "pool_tokens") == 1600
    assert "turboquant:prefill" not in {m.key for m in run.measurements}
    assert [error.splitlines()[-1] for error in errors] == ["out of memory"]
    assert "Not all of turboquant was measured. Arm turboquant ended with" in markdown(run, [])
    assert earlier(compared, "kvarn", tmp_path) is not None
    assert earlier(compared, "turboquant", tmp_path) is None, "it is measured again"


@pytest.mark.parametrize(("output_tokens", "compiled"), [(10, True), (4, False)])
def test_it_is_known_whether_an_engine_had_to_compile(
    tmp_path: Path, command: tuple[str, ...], output_tokens: int, compiled: bool
) -> None:
    """The stand-in says that it had not if answers are long."""
    compared = settings(arms=("fp16",), output_tokens=output_tokens)
    run, _ = run_throughput(compared, tmp_path, quiet, command=command)
    start = next(m for m in run.measurements if m.name == "startup")
    assert start.context["compiled_before"] is compiled


def test_nothing_measured_is_an_error(tmp_path: Path, command: tuple[str, ...]) -> None:
    with pytest.raises(RuntimeError, match="Arm fp8 ended with status 1"):
        run_throughput(settings(arms=("fp8",)), tmp_path, quiet, command=command)


def test_an_arm_that_hangs_is_ended(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "import time; time.sleep(60)")
    with pytest.raises(RuntimeError, match="Arm fp16 took too long"):
        measure_arm(settings(arm_seconds=0.5), "fp16", tmp_path, command)


def test_figures_are_reused_only_if_they_fit(tmp_path: Path, command: tuple[str, ...]) -> None:
    run_throughput(settings(arms=("fp16",)), tmp_path, quiet, command=command)
    raw = tmp_path / "arm-fp16.json"
    found = json.loads(raw.read_text(encoding="utf-8"))
    raw.write_text(json.dumps({**found, "pages": 500}), encoding="utf-8")

    both = settings(arms=("fp16", "kvarn"))
    run, _ = run_throughput(both, tmp_path, quiet, reuse=True, command=command)
    assert run.value("fp16", "pool_tokens") == 500 * 16
    run, _ = run_throughput(both, tmp_path, quiet, command=command)
    assert run.value("fp16", "pool_tokens") == 100 * 16

    longer = settings(arms=("fp16",), prompt_tokens=21)
    with pytest.raises(ValueError, match="other settings"):
        run_throughput(longer, tmp_path, quiet, reuse=True, command=command)


@pytest.mark.parametrize(
    ("name", "was", "message"),
    [
        ("GPUs", "NVIDIA H200", "with GPUs NVIDIA H200, not none"),
        ("CPU", "another", "with CPU another, not "),
        ("torch", "1.0", r"with torch 1\.0, not "),
        ("VLLM_KV_CACHE_LAYOUT", "HND", "with VLLM_KV_CACHE_LAYOUT HND, not unset"),
    ],
)
def test_figures_of_other_conditions_are_refused(
    tmp_path: Path, command: tuple[str, ...], name: str, was: str, message: str
) -> None:
    one = settings(arms=("fp16",))
    found = measure_arm(one, "fp16", tmp_path, command)
    assert earlier(one, "fp16", tmp_path) == found
    found["conditions"][name] = was
    raw = tmp_path / "arm-fp16.json"
    raw.write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        earlier(one, "fp16", tmp_path)


def test_figures_of_unknown_conditions_are_refused(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    one = settings(arms=("fp16",))
    found = measure_arm(one, "fp16", tmp_path, command)
    found.pop("conditions")
    (tmp_path / "arm-fp16.json").write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(ValueError, match="does not say with which packages it was made"):
        earlier(one, "fp16", tmp_path)


def test_a_variable_that_is_new_is_another_condition(
    tmp_path: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = settings(arms=("fp16",))
    measure_arm(one, "fp16", tmp_path, command)
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "HND")
    with pytest.raises(ValueError, match="with VLLM_KV_CACHE_LAYOUT unset, not HND"):
        earlier(one, "fp16", tmp_path)


def test_the_commit_of_a_reused_arm_is_named(
    tmp_path: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVARN_COMMIT", "earlier")
    run, _ = run_throughput(settings(arms=("fp16",)), tmp_path, quiet, command=command)
    assert run.commits == {}
    monkeypatch.setenv("KVARN_COMMIT", "later")
    both = settings(arms=("fp16", "kvarn"))
    run, _ = run_throughput(both, tmp_path, quiet, reuse=True, command=command)
    assert run.commits == {"fp16": ["earlier"]}


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"commit": None}, "unknown"), ({"commit": "now-dirty"}, "now-dirty"), ({}, None)],
)
def test_a_reused_arm_of_other_sources_is_not_judged_as_this_commit(
    tmp_path: Path,
    command: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
    named: str | None,
) -> None:
    monkeypatch.setenv("KVARN_COMMIT", "now")
    one = settings(arms=("kvarn",))
    found = measure_arm(one, "kvarn", tmp_path, command)
    (tmp_path / "arm-kvarn.json").write_text(json.dumps({**found, **changed}), encoding="utf-8")
    run, _ = run_throughput(one, tmp_path, quiet, reuse=True, command=command)
    assert run.commits == ({"kvarn": [named]} if named else {})


def test_arms_differ_in_their_cache_only() -> None:
    compared = settings(engine={"max_num_seqs": 8}, turboquant_flash_attention=3)
    plans = {arm: compared.plan(arm) for arm in compared.arms}
    assert {arm: plan.engine.pop("kv_cache_dtype") for arm, plan in plans.items()} == {
        "fp16": "auto",
        "fp8": "fp8",
        "turboquant": "turboquant_4bit_nc",
        "kvarn": "kvarn_k4v2_g128",
    }
    assert plans["fp8"].engine.pop("dtype") == "bfloat16"  # its kernel answers in bf16 only
    plans["fp16"].engine.pop("dtype")
    assert plans["fp8"].engine == plans["fp16"].engine
    assert [plan.flash_attn_version for plan in plans.values()] == [None, None, 3, None]


def test_the_document_names_options_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    arm = settings(turboquant_flash_attention=3).describe("turboquant")
    assert {"flash_attn_version=3", "VLLM_USE_V2_MODEL_RUNNER=1", "dtype=float16"} <= set(
        arm.options
    )


def test_a_result_holds_neither_secrets_nor_folders_of_the_machine(
    tmp_path: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "hush")
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/home/alice/cache")
    compared = Settings("/home/alice/models/X", arms=("fp16",), capacity_tokens=0,
                        engine={"tokenizer": "/home/alice/words"})  # fmt: skip
    run, _ = run_throughput(compared, tmp_path, quiet, command=command)
    assert run.model.name == "X"
    assert {"model=X", "tokenizer=words"} <= set(run.arms["fp16"].options)
    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    assert not [secret for secret in ("alice", "hush", "VLLM_API_KEY") if secret in text]


def test_equal_work_has_one_hash_wherever_the_folders_lie(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    hashes = []
    for folder in ("/home/alice/models/X", "/data/X", "/data/Y"):
        compared = Settings(folder, arms=("fp16",), capacity_tokens=0)
        hashes.append(run_throughput(compared, tmp_path, quiet, command=command)[0].suite_sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_document_says_how_many_ranks_there_were(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    compared = settings(arms=("fp16",), engine={"tensor_parallel_size": 2})
    assert run_throughput(compared, tmp_path, quiet, command=command)[0].model.tensor_parallel == 2


def test_relative_folders_and_variables_of_accepted_results_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in VARIABLES:  # vLLM sets some of them itself
        monkeypatch.delenv(name, raising=False)
    variables = {"VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    folder = "packages/kvarn-eval/configs/qwen3-32b"
    options = Settings(folder, environment=variables).describe("fp16").options
    assert f"model={folder}" in options
    assert options[-2:] == ["VLLM_NO_USAGE_STATS=1", "VLLM_USE_FLASHINFER_SAMPLER=0"]


def test_an_arm_that_is_missing_leaves_the_comparison_undecided(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    bursts = ("1x8+8",)
    both = settings(arms=("fp16", "kvarn"), bursts=bursts)
    run, _ = run_throughput(both, tmp_path, quiet, command=command)
    undecided = {g.name: g.reason for g in run.gates if g.verdict is Verdict.INCONCLUSIVE}
    quantity = "burst_1x8+8.output_throughput"
    assert undecided == {"burst_1x8+8": f"not measured: kvarn:{quantity}, fp16:{quantity}"}
    alone, _ = run_throughput(settings(arms=("fp16",)), tmp_path, quiet, command=command)
    assert alone.gates == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"arms": ("fp16", "int8")}, "Unknown arm int8"),
        ({"capacity_tokens": 21}, "exceeds prompt_tokens"),
        ({"bursts": ("8x16",)}, "8x16 is no burst"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**wrong)

from __future__ import annotations

import dataclasses
import itertools
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from kvarn_core.testing import throttle
from kvarn_eval import scenarios
from kvarn_eval.cli import app
from kvarn_eval.schema import Model, Run, Unit, Verdict, describe_run, measure
from kvarn_eval.small_model import SMALL_MODEL
from kvarn_eval.suite import Limit, load_suite
from kvarn_eval.suite_arm import Setup, observe
from kvarn_eval.suite_kept import earlier
from kvarn_eval.suite_run import assemble, limit_gate, limit_gates, quantises_gates, run_suite

sys.path.insert(0, str(Path(__file__).parent))
from fake_suite import FAKE_BENCH, FAKE_SERVER, quiet, setup

if TYPE_CHECKING:
    from kvarn_eval.schema import Measurement


def test_a_suite_runs_from_end_to_end(tmp_path: Path) -> None:
    run = run_suite(setup(tmp_path), quiet)
    assert run.verdict is Verdict.PASS, run.gates
    assert run == Run.load(tmp_path / "result.json").model_copy(update={"seconds": run.seconds})
    assert run.value("kvarn", "pool_tokens") / run.value("fp16", "pool_tokens") > 4.6
    assert run.value("kvarn", "chat.rate-8.output_throughput") > 0
    raw = next(m.raw for m in run.measurements if m.raw and m.arm == "kvarn")
    assert (tmp_path / raw).exists()


def test_a_result_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(SMALL_MODEL / "tokenizer.json", elsewhere)
    one = dataclasses.replace(setup(tmp_path, parts=("capacity",)), tokenizer=elsewhere)
    run = run_suite(one, quiet)
    assert "elsewhere" in run.arms["kvarn"].options
    assert str(tmp_path) not in run.model_dump_json()


def test_an_interrupted_suite_goes_on_and_is_not_green_before(tmp_path: Path) -> None:
    one = setup(tmp_path)
    found = {("plain", "fp16"): observe(one, "plain", "fp16", SMALL_MODEL, {}, None, quiet)}
    model = Model(name="small", weights_sha256=None, dtype="float16")
    partial = assemble(describe_run("smoke", "0" * 64, model), one, found, [], 1.0)
    assert partial.verdict is Verdict.INCONCLUSIVE
    assert "plain kvarn" in next(g.reason for g in partial.gates if g.name == "complete")
    assert earlier(one, "plain", "fp16") == found["plain", "fp16"]
    assert earlier(one, "plain", "kvarn") is None
    with pytest.raises(ValueError, match="was made with other weights"):
        earlier(setup(tmp_path, weights_sha256="1" * 64), "plain", "fp16")


def test_an_interrupted_arm_goes_on_at_the_next_scenario(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, names = setup(tmp_path), ["chat", "again", "last"]
    chat = one.suite.scenarios[0]
    several = tuple(chat.model_copy(update={"name": name}) for name in names)
    one = dataclasses.replace(one, suite=one.suite.model_copy(update={"scenarios": several}))
    sent: list[str] = []
    whole = scenarios.run_scenario

    def run(scenario: Any, *rest: Any) -> list[dict[str, Any]]:
        sent.append(scenario.name)
        if len(sent) == 2:
            raise RuntimeError("The server died.")
        return whole(scenario, *rest)

    monkeypatch.setattr(scenarios, "run_scenario", run)
    first = (one, "plain", "fp16", SMALL_MODEL, {}, None, quiet)
    with pytest.raises(RuntimeError, match="died"):
        observe(*first)
    found = observe(*first, reuse=True)
    assert sent == [*names[:2], *names[1:]]
    assert list(dict.fromkeys(load["scenario"] for load in found["loads"])) == names
    observe(*first)
    assert sent[4:] == names, "nothing is taken unasked"


def test_a_loss_on_any_profile_fails(tmp_path: Path) -> None:
    def answered(right: int) -> dict[str, Any]:
        scores = {str(item): [float(item < right)] for item in range(50)}
        task = {"task": "recall", "scores": scores, "prompt_tokens": [2000] * 50}
        task |= {"generated": 9.0, "truncated": 0, "raw": ["a"]}
        empty = {"loads": [], "pool": None, "startup_seconds": None, "texts": [], "floor": []}
        return {"tasks": [task], **empty}

    one = setup(tmp_path, parts=("accuracy",))
    profiles = {"profiles": ("plain", "large"), "limits": ()}
    one = dataclasses.replace(one, suite=one.suite.model_copy(update=profiles))
    header = describe_run("smoke", "0" * 64, Model(name="s", weights_sha256=None, dtype="float16"))
    found = {("plain", "fp16"): answered(50), ("plain", "kvarn"): answered(50)}
    found |= {("large", "fp16"): answered(50), ("large", "kvarn"): answered(50)}
    assert assemble(header, one, found, [], 1.0).verdict is Verdict.PASS
    found["large", "kvarn"] = answered(40)
    run = assemble(header, one, found, [], 1.0)
    verdicts = {gate.name: gate.verdict for gate in run.gates}
    assert verdicts["plain.accuracy.kvarn"] is Verdict.PASS
    assert verdicts["large.accuracy.kvarn"] is run.verdict is Verdict.FAIL


def test_arms_side_by_side_observe_the_same(tmp_path: Path) -> None:
    one, both = (tmp_path / name for name in ("one", "both"))
    for folder in (one, both):
        folder.mkdir()
    alone = run_suite(setup(one, parts=("capacity",)), quiet)
    together = run_suite(setup(both, parts=("capacity",), at_once=2), quiet)
    assert together.verdict is alone.verdict is Verdict.PASS
    without_start = [m for m in alone.measurements if m.name != "startup"]
    assert together.measurements == without_start != []
    again = run_suite(setup(both, parts=("capacity",), at_once=2), quiet, reuse=True)
    assert again.measurements == together.measurements


def test_other_profiles_are_asked_for_no_more_than_the_parts(tmp_path: Path) -> None:
    one = setup(tmp_path, parts=("capacity",))
    stressed = one.suite.model_copy(
        update={"profiles": ("plain", "tiny"), "traces": load_suite("rehearsal").traces}
    )
    run = run_suite(dataclasses.replace(one, suite=stressed), quiet)
    assert not (tmp_path / "tiny-kvarn" / "server.log").exists()
    assert not list(tmp_path.glob("*/scoring.log"))
    assert run.verdict is Verdict.PASS
    assert {m.name for m in run.measurements if m.arm == "kvarn"} >= {"pool_tokens", "startup"}


def test_an_arm_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    one = setup(tmp_path, parts=("capacity",))
    fp8 = one.suite.arms["fp16"].model_copy(update={"options": {"behaviour": "crash"}})
    arms = {"fp16": one.suite.arms["fp16"], "fp8": fp8, "kvarn": one.suite.arms["kvarn"]}
    one = dataclasses.replace(one, suite=one.suite.model_copy(update={"arms": arms}))
    with pytest.raises(RuntimeError, match="ended with status 1"):
        run_suite(one, quiet)
    run = Run.load(tmp_path / "result.json")
    assert run.verdict is Verdict.INCONCLUSIVE
    assert {m.arm for m in run.measurements} == {"fp16", "kvarn"}


def test_without_its_reference_an_arm_is_not_started(tmp_path: Path) -> None:
    one = setup(tmp_path, parts=("capacity",))
    broken = one.suite.arms["fp16"].model_copy(update={"options": {"behaviour": "crash"}})
    arms = {**one.suite.arms, "fp16": broken}
    one = dataclasses.replace(one, suite=one.suite.model_copy(update={"arms": arms}))
    with pytest.raises(RuntimeError, match="ended with status 1"):
        run_suite(one, quiet)
    assert not (tmp_path / "plain-kvarn").exists()


def test_a_signal_ends_all_that_runs_side_by_side(tmp_path: Path) -> None:
    program = f"""
import signal
from pathlib import Path
from kvarn_eval.small_model import SMALL_MODEL
from kvarn_eval.suite import load_suite
from kvarn_eval.suite_arm import Setup
from kvarn_eval.suite_run import run_suite
from kvarn_eval.terminal import stop_on_signal
signal.signal(signal.SIGTERM, stop_on_signal)
suite, out = load_suite("smoke"), Path({str(tmp_path)!r})
arms = {{
    name: arm.model_copy(
        update={{"options": {{"behaviour": "hang", "child-pid": str(out / f"{{name}}.pids")}}}}
    )
    for name, arm in suite.arms.items()
}}
suite = suite.model_copy(update={{"arms": arms}})
setup = Setup(
    suite, SMALL_MODEL, SMALL_MODEL, out, ("capacity",), at_once=2, serve={FAKE_SERVER!r}
)
run_suite(setup, lambda what, done, steps: None)
"""
    with subprocess.Popen([sys.executable, "-c", program]) as caller:
        files = [tmp_path / f"{name}.pids" for name in ("fp16", "kvarn")]
        deadline = time.monotonic() + 60
        while not all(file.exists() and file.read_text("utf-8") for file in files):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        caller.send_signal(signal.SIGTERM)
        assert caller.wait(timeout=30) == 128 + signal.SIGTERM
    assert not any(
        Path(f"/proc/{pid}").exists() for file in files for pid in file.read_text("utf-8").split()
    )


def test_a_load_during_which_the_gpu_slowed_down_decides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = itertools.count(0, 2500)
    monkeypatch.setattr(throttle, "slowdown_us", lambda: next(counts))
    monkeypatch.setattr(scenarios, "slowdown_us", throttle.slowdown_us)
    run = run_suite(setup(tmp_path), quiet)
    assert run.verdict is Verdict.INCONCLUSIVE
    gate = next(g for g in run.gates if ".steady." in g.name)
    assert gate.reason == "the GPU slowed down for 0.0025 s"


def test_a_limit_on_a_load_that_was_slowed_down_decides_nothing() -> None:
    limit = Limit(quantity="chat.speed", arm="kvarn", over="fp16", at_least=2.0)
    suite = load_suite("smoke").model_copy(update={"limits": (limit,)})
    measured = [
        measure("chat.speed", arm, Unit.TOKENS_PER_SECOND, x)
        for arm, x in (("kvarn", 1.0), ("fp16", 1.0))
    ]
    for slow, verdict in (
        ((), Verdict.FAIL),
        ({("kvarn", "burst")}, Verdict.FAIL),
        ({("fp16", "chat")}, Verdict.INCONCLUSIVE),
    ):
        assert [g.verdict for g in limit_gates(suite, measured, slow)] == [verdict]


@pytest.mark.parametrize(
    ("divergence", "verdict"),
    [(1e-3, Verdict.PASS), (1.1e-5, Verdict.FAIL), (None, Verdict.INCONCLUSIVE)],
    ids=["records-are-read", "an-exact-cache", "not-measured"],
)
@pytest.mark.parametrize("floor", [1e-5, 0.0])
def test_an_arm_that_never_quantises_fails(
    divergence: float | None, verdict: Verdict, floor: float
) -> None:
    suite = load_suite("smoke")
    measured = [measure("plain.floor.kld_mean", "fp16", Unit.NATS, floor)]
    if divergence is not None:
        divergence = divergence if floor else divergence / 10
        measured.append(measure("plain.traces.kld_mean", "kvarn", Unit.NATS, divergence))
    (rule,) = quantises_gates(suite, measured)
    assert rule.verdict is verdict
    assert rule.required
    assert quantises_gates(suite, []) == []  # texts were not asked for


def value(arm: str, number: float) -> Measurement:
    return measure("speed", arm, Unit.TOKENS_PER_SECOND, number)


@pytest.mark.parametrize(
    ("limit", "numbers", "verdict"),
    [
        ({"over": "fp16", "at_least": 2.0}, (4.1, 2.0), Verdict.PASS),
        ({"over": "fp16", "at_least": 2.0}, (3.9, 2.0), Verdict.FAIL),
        ({"over": "fp16", "at_most": 2.0}, (4.1, 2.0), Verdict.FAIL),
        ({"minus": "fp16", "at_most": -0.2}, (0.7, 1.0), Verdict.PASS),
        ({"minus": "fp16", "at_most": -0.2}, (0.9, 1.0), Verdict.FAIL),
        ({"at_least": 1.0}, (0.9,), Verdict.FAIL),
        ({"over": "fp16", "at_least": 2.0}, (3.0, 0.0), Verdict.INCONCLUSIVE),
    ],
)
def test_limits(limit: dict[str, Any], numbers: tuple[float, ...], verdict: Verdict) -> None:
    rule = Limit(quantity="speed", arm="kvarn", **limit)
    measured = [value(arm, x) for arm, x in zip(("kvarn", "fp16"), numbers, strict=False)]
    assert limit_gate(rule, measured, here=True).verdict is verdict
    assert not limit_gate(rule, measured, here=False).required


@pytest.mark.parametrize("name", ["primed-equal", "aligned"])
def test_a_cached_load_without_hits_is_invalid(name: str, tmp_path: Path) -> None:
    suite = load_suite("smoke")
    scenarios = load_suite("rehearsal").sending([name]).scenarios
    suite = suite.model_copy(update={"scenarios": scenarios})
    one = Setup(
        suite, SMALL_MODEL, SMALL_MODEL, tmp_path, ("capacity", "throughput"),
        serve=FAKE_SERVER, bench=FAKE_BENCH,
    )  # fmt: skip
    run = run_suite(one, quiet)  # the stand-in server reports no hits
    verdicts = {g.name: g.verdict for g in run.gates}
    assert verdicts[f"{name}.valid.kvarn"] is Verdict.FAIL
    assert run.verdict is Verdict.FAIL


def test_texts_are_scored_in_chunks_of_one_tile_of_the_arm(tmp_path: Path) -> None:
    one = dataclasses.replace(setup(tmp_path), suite=load_suite("small-model"))
    for arm, served in one.suite.arms.items():
        chunk = one.scoring_options(arm)["long-prefill-token-threshold"]
        assert chunk == (64 if served.kv_cache_dtype.endswith("_g64") else 128), arm


def test_only_servers_whose_answers_are_read_parse_reasoning(tmp_path: Path) -> None:
    suite = load_suite("qwen3-32b-tp2")
    speed = Setup(suite, SMALL_MODEL, SMALL_MODEL, tmp_path, ("capacity", "throughput"))
    tasks = Setup(suite, SMALL_MODEL, SMALL_MODEL, tmp_path, ("accuracy",))
    assert tasks.options("fp16")["reasoning-parser"] == "qwen3"
    assert "reasoning-parser" not in speed.options("fp16")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("nightly",), 2, "There is no suite nightly"),
        (("qwen3-32b-tp2",), 2, "Name its folder with --model"),
        (("qwen3-32b-tp2", "--model", str(SMALL_MODEL)), 2, "needs 2 NVIDIA GPUs"),
        (("smoke", "--load-format", "dummy"), 2, "Random weights know no answers"),
        (("smoke", "--model", "nowhere"), 2, "nowhere has no config.json"),
        (("smoke", "--arms", "fp16"), 2, "Arm kvarn cannot be left out"),
        (("sensitivity", "--parts", "capacity"), 2, "measures no capacity. Choose of accuracy."),
        (("smoke", "--at-once", "2"), 2, "Drop --at-once, or leave throughput out of --parts"),
    ],
)
def test_what_is_missing_is_one_sentence(
    arguments: tuple[str, ...], status: int, words: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = CliRunner().invoke(app, ["run", *arguments, "--out", str(tmp_path)])
    assert result.exit_code == status, result.output
    assert words in " ".join(result.stderr.split())

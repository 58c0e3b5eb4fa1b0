from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from kvarn_eval import schema
from kvarn_eval.schema import (
    Arm,
    Gate,
    Measurement,
    Model,
    Run,
    Unit,
    Verdict,
    describe_run,
    measure,
)

if TYPE_CHECKING:
    from pathlib import Path


def make_run(**changes: Any) -> Run:
    header = describe_run("demo", "0" * 64, Model(name="m", weights_sha256=None, dtype="float16"))
    gate = Gate(
        name="kld",
        rule="mean KLD <= limit",
        value=0.1,
        limit=0.2,
        verdict=Verdict.PASS,
        reason="small",
        evidence=["a:kld"],
    )
    fields = {
        "seconds": 1.0,
        "arms": {"a": Arm()},
        "measurements": [measure("kld", "a", Unit.NATS, [0.1, 0.1, 0.4])],
        "gates": [gate],
    }
    return Run.model_validate({**header, **fields, **changes})


def test_a_run_survives_a_round_trip(tmp_path: Path) -> None:
    run = make_run()
    run.save(tmp_path / "result.json")
    assert Run.load(tmp_path / "result.json") == run
    assert run.value("a", "kld") == 0.1
    with pytest.raises(KeyError):
        run.value("a", "speed")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("surprise",), 1),
        (("schema_version",), 2),
        (("measurements", 0, "unit"), "parsecs"),
        (("measurements", 0, "samples"), []),
        (("measurements", 0, "median"), 0.4),
        (("measurements", 0, "noise"), 1.0),
        (("measurements", 0, "arm"), "b"),
        (("gates", 0, "verdict"), "maybe"),
        (("gates", 0, "evidence"), ["a:speed"]),
        (("arms", "b"), {}),
    ],
    ids=lambda x: ".".join(map(str, x)) if isinstance(x, tuple) else "",
)
def test_a_damaged_document_is_refused(path: tuple[Any, ...], value: Any, tmp_path: Path) -> None:
    data = json.loads(make_run().model_dump_json())
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    file = tmp_path / "result.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValidationError):
        Run.load(file)


def test_a_removed_measurement_is_an_error_not_a_smaller_table() -> None:
    with pytest.raises(ValidationError, match="missing measurements"):
        make_run(measurements=[measure("speed", "a", Unit.SECONDS, 1.0)])


def test_words_of_a_command_name_no_folder_of_the_machine() -> None:
    words = [
        "/home/a/m",
        "--out=/home/a/o",
        "model=/home/a/m",
        "x.y=z=/home/a",
        "./m",
        "a=b/c",
        "-n",
    ]
    assert schema.portable(words) == ["m", "--out=o", "model=m", "x.y=z=a", "./m", "a=b/c", "-n"]


def test_measuring_twice_is_an_error() -> None:
    twice = [measure("kld", "a", Unit.NATS, x) for x in (0.1, 0.2)]
    with pytest.raises(ValidationError, match="Measured twice"):
        make_run(measurements=twice)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_only_finite_numbers_are_numbers(bad: float) -> None:
    with pytest.raises(ValidationError):
        measure("kld", "a", Unit.NATS, bad)
    with pytest.raises(ValidationError):
        measure("kld", "a", Unit.NATS, 1.0, context={"length": bad})


def test_noise_is_the_scaled_median_absolute_deviation() -> None:
    found: Measurement = measure("t", "a", Unit.SECONDS, [1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.median, found.noise) == (3.0, 1.4826)


@pytest.mark.parametrize(
    ("verdicts", "expected", "status"),
    [
        ([("pass", True)], "pass", 0),
        ([("pass", True), ("fail", False)], "pass", 0),
        ([("pass", True), ("inconclusive", True)], "inconclusive", 3),
        ([("inconclusive", True), ("fail", True)], "fail", 1),
        ([("pass", False)], "inconclusive", 3),
        ([], "inconclusive", 3),
    ],
)
def test_the_worst_required_gate_decides(
    verdicts: list[tuple[str, bool]], expected: str, status: int
) -> None:
    template = make_run().gates[0].model_dump()
    gates = [{**template, "verdict": verdict, "required": need} for verdict, need in verdicts]
    run = make_run(gates=gates)
    assert run.verdict == expected
    assert run.verdict.exit_code == status


@pytest.mark.parametrize(
    ("found", "expected"),
    [("pass", "inconclusive"), ("inconclusive", "inconclusive"), ("fail", "fail")],
)
def test_a_run_of_which_an_arm_failed_does_not_pass(found: str, expected: str) -> None:
    gate = make_run().gates[0].model_copy(update={"verdict": Verdict(found)})
    assert make_run(gates=[gate], failed={"b": "Arm b took too long."}).verdict == expected


def test_gpus_are_described_by_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "NVIDIA H100 80GB HBM3, 81559, 580.95, 700.00, 1980, [N/A]"
    monkeypatch.setattr(schema, "_output", lambda *command: f"{line}\n{line}")
    first, _ = schema.find_gpus()
    assert (first.name, first.memory_mib, first.power_cap_w) == (
        "NVIDIA H100 80GB HBM3",
        81559,
        700,
    )
    assert (first.sm_clock_mhz, first.memory_clock_mhz) == (1980, None)
    monkeypatch.setattr(schema, "_output", lambda *command: None)
    assert schema.find_gpus() == []


def test_a_copy_may_be_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        schema, "_output", lambda *command: "other" if command[0] == "git" else None
    )
    monkeypatch.setenv("KVARN_COMMIT", "abc")
    header = describe_run("demo", "0", Model(name="m", weights_sha256=None, dtype="float16"))
    assert header["git"] == schema.Git(sha="abc", dirty=None)


def test_a_copy_of_the_sources_is_not_of_the_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        who = ("-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false")
        subprocess.run(("git", "-C", str(tmp_path), *who, *words), check=True)

    copy = tmp_path / ".venv" / "schema.py"
    copy.parent.mkdir()
    copy.write_text("old", encoding="utf-8")
    monkeypatch.setattr(schema, "__file__", str(copy))
    monkeypatch.delenv("KVARN_COMMIT", raising=False)
    assert schema.git_state() == schema.Git(sha=None, dirty=None)
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "-m", "another project")
    assert schema.git_state() == schema.Git(sha=None, dirty=None)

    git("add", ".venv/schema.py")
    git("commit", "--quiet", "-m", "its own")
    clean = schema.git_state()
    assert clean.sha is not None
    assert clean.dirty is False
    copy.write_text("new", encoding="utf-8")
    assert schema.git_state() == schema.Git(sha=clean.sha, dirty=True)

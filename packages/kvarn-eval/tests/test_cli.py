from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from kvarn_eval import fidelity_gates, suite_run
from kvarn_eval.cli import app
from kvarn_eval.fidelity import ARMS
from kvarn_eval.schema import Unit, Verdict, measure
from kvarn_eval.small_model import SMALL_MODEL

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvarn_eval.schema import Run
    from kvarn_eval.small_model.model import SmallModel

NAMES = ("fp16", "rotated fp16", "kvarn", "paper", "paper as served")


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "--model", "nowhere"),
        ("fidelity", "--model", "nowhere"),
        ("report", "nowhere.json"),
        ("solve", "riddles"),
        ("fly",),
        ("demo", "--items", "0"),
        ("run", "smoke", "--parts", "bogus"),
        ("run", "smoke", "--parts", "fidelity"),  # which it does not measure
        ("run", "smoke", "--model", "nowhere"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("solve", "recall", "--prompt-tokens", "5"), "A prompt of 5 tokens gives recall a table"),
        (("solve", "recall", "--questions", "100000"), "100000 questions cannot be labelled."),
        (("fidelity", "--device", "foo"), "torch finds no device foo. Use --device cpu, or cuda"),
        (("examine", "--device", "foo"), "torch finds no device foo. Use --device cpu, or cuda"),
        (("throughput", "--model", "m", "--engine-args", "[1]"), "--engine-args [1] is not a JSON"),
        (("throughput", "--model", "m", "--engine-args", "{"), "--engine-args { is not a JSON"),
    ],
)
def test_wrong_values_are_one_sentence(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, error = run(*arguments)
    assert status == 2
    assert error.splitlines()[-1].startswith(words)


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("solve", "recall"), ""),
        (("examine", "--device", "cpu"), ""),
        (("fidelity",), "--out"),
        (("demo",), "--out"),
        (("run", "sensitivity"), "--out"),
    ],
)
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", b"{", "config.json is damaged: it holds no JSON object"),
        ("config.json", b'{"vocab_size": 151936}', "another"),
        ("model.safetensors", b"\x10", "model.safetensors is damaged or incomplete"),
        ("training.json", b"[]", "training.json "),
    ],
)
def test_a_damaged_model_is_one_sentence(
    command: tuple[str, ...], option: str, name: str, content: bytes | None, words: str,
    tmp_path: Path, tiny_model: SmallModel,
) -> None:  # fmt: skip
    model = tmp_path / "model"
    tiny_model.save(model)
    (model / name).unlink(missing_ok=True)
    if content is not None:
        (model / name).write_bytes(content)
    out = [option, str(tmp_path / "out")] if option else []
    status, _, error = run(*command, "--model", str(model), *out)
    assert status == 2
    assert words in error.splitlines()[-1]


def test_a_folder_that_cannot_be_is_one_sentence(
    tmp_path: Path, make_run: Callable[..., Run]
) -> None:
    result, file = tmp_path / "result.json", tmp_path / "file"
    make_run().save(result)
    file.write_text("", encoding="utf-8")
    for command in (
        ("demo",),
        ("fidelity",),
        ("throughput", "--model", "m"),
        ("run", "smoke"),
        ("report", str(result)),
        ("train",),
    ):
        status, _, error = run(*command, "--out", str(file))
        words = f"{file} cannot be a folder (File exists). Name another with --out.\n"
        assert (status, error) == (2, words)


@pytest.mark.parametrize("gpus", [0, 1])
def test_missing_gpus_exit_with_2(
    gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    model = str(SMALL_MODEL)
    status, _, error = run("run", "qwen3-32b-tp2", "--model", model, "--out", str(tmp_path))
    assert status == 2
    assert "needs 2 NVIDIA GPUs" in error


def unmeasurable() -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        measure("kld", "kvarn", Unit.NATS, float("nan"))
    return caught.value


@pytest.mark.parametrize("error", [RuntimeError("The server ended."), unmeasurable()])
def test_a_run_that_fails_reports_what_was_measured(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_run: Callable[..., Run]
) -> None:
    def fail(*_: object, **__: object) -> None:
        make_run(Verdict.INCONCLUSIVE).save(tmp_path / "result.json")
        raise error

    monkeypatch.setattr(suite_run, "run_suite", fail)
    (tmp_path / "report.md").write_text("old", encoding="utf-8")
    status, _, words = run("run", "smoke", "--parts", "capacity", "--out", str(tmp_path))
    assert status == 1
    assert str(error) in words
    assert "# demo: inconclusive" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("command", "function"),
    [
        (("fidelity",), "fidelity_gates.run_fidelity"),
        (("throughput", "--model", "m"), "throughput.run_throughput"),
        (("run", "smoke", "--parts", "capacity"), "suite_run.run_suite"),
    ],
)
def test_numbers_that_are_none_are_not_wrong_usage(
    command: tuple[str, ...], function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise unmeasurable()

    monkeypatch.setattr(f"kvarn_eval.{function}", fail)
    status, _, error = run(*command, "--out", str(tmp_path))
    assert status == 1
    assert "No result can hold what was measured." in error


def test_a_baseline_that_does_not_fit_is_one_sentence(
    tmp_path: Path, make_run: Callable[..., Run]
) -> None:
    (tmp_path / "text.json").write_text("not json", encoding="utf-8")
    make_run().save(tmp_path / "demo.json")
    unreadable = "is not a result of this version. Name the result.json of a run."
    unfitting = (
        "does not hold the fidelity of kvarn on profile plain. Name a result of kvarn-eval "
        "fidelity with the same profiles."
    )
    for name, words in (("", unreadable), ("text.json", unreadable), ("demo.json", unfitting)):
        path = tmp_path / name
        status, _, error = run("fidelity", "--out", str(tmp_path), "--baseline", str(path))
        assert (status, error) == (2, f"{path} {words}\n")


def test_wrong_names_are_refused_with_the_allowed_ones(tmp_path: Path) -> None:
    for command in (("demo",), ("throughput", "--model", "m")):
        status, _, error = run(*command, "--out", str(tmp_path), "--kv-cache-dtype", "kvarn_k3v3")
        assert status == 2
        assert "kvarn_k4v2_g128" in error
    status, _, error = run("fidelity", "--out", str(tmp_path), "--profile", "huge")
    assert status == 2
    assert "plain, large, tiny" in " ".join(error.split())


@pytest.mark.parametrize(
    ("verdict", "status"),
    [(Verdict.PASS, 0), (Verdict.FAIL, 1), (Verdict.INCONCLUSIVE, 3)],
)
def test_report_exits_with_the_verdict(
    verdict: Verdict, status: int, tmp_path: Path, make_run: Callable[..., Run]
) -> None:
    make_run(verdict).save(tmp_path / "result.json")
    assert run("report", str(tmp_path / "result.json"))[0] == status
    assert (tmp_path / "report.md").exists()


def test_a_foreign_document_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"schema_version": 7}', encoding="utf-8")
    assert run("report", str(tmp_path / "result.json"))[0] == 2


def test_a_folder_is_no_result(tmp_path: Path, make_run: Callable[..., Run]) -> None:
    folder, result = str(tmp_path), str(tmp_path / "result.json")
    make_run(Verdict.PASS).save(tmp_path / "result.json")
    for command in (
        ("report", folder),
        ("compare", folder, result),
        ("compare", result, folder),
        ("baseline", folder),
    ):
        status, _, words = run(*command)
        assert status == 2
        assert f"{folder} is n" in words


def test_fidelity_writes_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: SmallModel
) -> None:
    monkeypatch.setattr(fidelity_gates, "ARMS", {name: ARMS[name] for name in NAMES})
    tiny_model.save(tmp_path / "model")
    out = tmp_path / "out"
    size = (
        "--sequences",
        "2",
        "--problems",
        "0",
        "--length",
        "700",
        "--profile",
        "plain",
        "--json",
    )
    status, text, _ = run("fidelity", "--model", str(tmp_path / "model"), "--out", str(out), *size)
    assert status in {0, 1, 3}
    data = json.loads(text)
    assert data == json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert {file.name for file in out.iterdir()} == {
        "result.json", "report.md", "kld_position_plain.svg"
    }  # fmt: skip


def test_the_small_model_is_beside_the_package() -> None:
    assert Path(SMALL_MODEL).parts[-3:] == ("kvarn-eval", "models", "small")


def test_solve_counts_right_answers() -> None:
    options = ("--items", "2", "--prompt-tokens", "400", "--questions", "4", "--rewrites", "0.5")
    status, printed, _ = run("solve", "recall", *options)
    assert (status, printed) == (0, "recall: 2 of 2 right (100.0 %)\n")
    status, printed, _ = run("solve", "recall", "--json", *options)
    assert json.loads(printed) == {"family": "recall", "items": 2, "right": 2}

"""What `--reuse` takes of an earlier run, what it refuses, and what the result says of it."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path

import pytest

from kvarn_eval import schema
from kvarn_eval.schema import Verdict
from kvarn_eval.small_model import SMALL_MODEL
from kvarn_eval.suite import Traces
from kvarn_eval.suite_arm import Setup, observe
from kvarn_eval.suite_kept import earlier
from kvarn_eval.suite_run import run_suite
from kvarn_eval.throughput import VARIABLES

sys.path.insert(0, str(Path(__file__).parent))
from fake_suite import quiet, setup


def scoring(folder: Path) -> Setup:
    """The smoke suite with two texts, which the stand-in server writes anew each time."""
    one = setup(folder, parts=("fidelity",))
    texts = {"traces": Traces(lengths=[300], count=2, prompts=["a"]), "limits": ()}
    return dataclasses.replace(one, suite=one.suite.model_copy(update=texts))


def test_figures_of_another_model_or_other_items_are_not_taken(tmp_path: Path) -> None:
    one = setup(tmp_path)
    observe(one, "plain", "fp16", SMALL_MODEL, {}, None, quiet)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    changes = {"model": {"model": other}, "items": {"items_sha256": {"recall": "1"}}}
    for what, changed in changes.items():
        with pytest.raises(ValueError, match=rf"was made with other {what}.*\. Remove it"):
            earlier(dataclasses.replace(one, **changed), "plain", "fp16")


def test_a_fresh_run_forgets_the_last_one(tmp_path: Path) -> None:
    assert run_suite(setup(tmp_path), quiet).verdict is Verdict.PASS
    broken = setup(tmp_path, serve=(sys.executable, "-c", "raise SystemExit(1)"))
    with pytest.raises(RuntimeError):
        run_suite(broken, quiet)
    assert not (tmp_path / "result.json").exists()
    with pytest.raises(RuntimeError):
        run_suite(broken, quiet, reuse=True)


def test_a_result_says_at_which_commits_its_arms_were_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVARN_COMMIT", "a" * 40)
    assert run_suite(setup(tmp_path), quiet).commits == {}
    (tmp_path / "plain-kvarn" / "arm.json").unlink()
    monkeypatch.setenv("KVARN_COMMIT", "b" * 40)
    assert run_suite(setup(tmp_path), quiet, reuse=True).commits == {
        "fp16": ["a" * 40],
        "kvarn": ["a" * 40, "b" * 40],  # its loads were there already
    }


def test_sources_that_were_changed_are_not_those_of_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"ls-files": "schema.py", "rev-parse": "a" * 40, "status": " M impl.py"}
    monkeypatch.setattr(
        schema, "_output", lambda *words: next((said[x] for x in words if x in said), None)
    )
    one = setup(tmp_path, parts=("capacity",))
    assert run_suite(one, quiet).commits == {}, "the result says so itself"
    said["status"] = ""
    (tmp_path / "plain-fp16" / "arm.json").unlink()
    assert run_suite(one, quiet, reuse=True).commits == {"kvarn": ["a" * 40 + "-dirty"]}


def test_divergence_is_kept_with_the_texts_that_it_was_measured_on(tmp_path: Path) -> None:
    one = scoring(tmp_path)
    run, texts = run_suite(one, quiet), tmp_path / "texts-plain.json"
    assert run.texts == {"plain": hashlib.sha256(texts.read_bytes()).hexdigest()}
    again = run_suite(one, quiet, reuse=True)
    assert (again.texts, again.measurements) == (run.texts, run.measurements)
    (tmp_path / "plain-fp16" / "arm.json").unlink()
    with pytest.raises(
        ValueError, match=r"plain-kvarn/arm.json was made with other texts\. Remove"
    ):
        run_suite(one, quiet, reuse=True)
    (tmp_path / "plain-kvarn" / "arm.json").unlink()
    assert run_suite(one, quiet, reuse=True).texts != run.texts


def test_without_texts_a_result_names_none(tmp_path: Path) -> None:
    assert run_suite(setup(tmp_path, parts=("capacity",)), quiet).texts == {}


def test_variables_of_a_server_are_named_and_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    one = setup(tmp_path, parts=("capacity",))
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")  # every server has it
    before = run_suite(one, quiet).arms["kvarn"].options
    assert not [word for word in before if word.startswith("VLLM")]
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "TRITON_ATTN")
    monkeypatch.setenv("VLLM_API_KEY", "a secret")
    with pytest.raises(ValueError, match="was made with other options"):
        run_suite(one, quiet, reuse=True)
    after = run_suite(one, quiet).arms["kvarn"].options
    assert after == [*before, "VLLM_ATTENTION_BACKEND=TRITON_ATTN"]

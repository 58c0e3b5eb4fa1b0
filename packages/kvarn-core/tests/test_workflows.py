"""The check that workflows and noxfile agree, and what the workflows of this repository promise."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / ".ci" / "workflows.py"
NOXFILE = """
import nox
nox.options.sessions = ["lint", "tests"]
@nox.session
def lint(session): ...
@nox.session(python="3.12")
def tests(session): ...
@nox.session
@nox.parametrize("suite", ["a"])
def gate(session, suite): ...
def helper(): ...
"""
WORKFLOW = """
jobs:
  matrix:
    strategy: {matrix: {session: [lint], include: [{session: tests, python: "3.10"}]}}
    steps: [{run: nox -s "$SESSION"}]
  named:
    steps: [{uses: a/b@c}, {run: 'nox -s "gate(qwen3-32b-tp2)" -- --model "$MODEL"'}]
"""


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("workflows", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sessions_are_read(script: Any) -> None:
    assert script.noxfile_sessions(NOXFILE) == ({"lint", "tests", "gate"}, {"lint", "tests"})
    assert script.named_sessions(yaml.safe_load(WORKFLOW)) == {"lint", "tests", "gate"}


def test_disagreements_are_found(script: Any) -> None:
    named = {"ci.yml": {"lint"}, "gpu.yml": {"bench"}}
    assert script.disagreements(named, {"lint", "tests"}, {"lint", "tests"}) == [
        "gpu.yml runs the session bench, which noxfile.py does not have.",
        "ci.yml does not run the default session tests.",
    ]
    assert script.disagreements({"ci.yml": {"lint"}}, {"lint"}, {"lint"}) == []


def workflow(name: str) -> dict[str, Any]:
    text = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


@pytest.mark.parametrize("name", ["gpu", "gate"])
def test_jobs_require_the_gpus_of_their_runner(name: str) -> None:
    found = workflow(name)
    labels = {job["runs-on"][-1] for job in found["jobs"].values()}
    assert labels == {f"gpu-x{found['env']['KVARN_REQUIRE_GPU']}"}


def test_artifacts_hold_answers_and_logs_but_no_scores() -> None:
    def kept(name: str, job: str) -> set[str]:
        steps = workflow(name)["jobs"][job]["steps"]
        return set(steps[-1]["with"]["path"].split())

    small = {f"small-model-results/{of}" for of in ("*.*", "*/answers.jsonl", "*/*.log")}
    assert kept("gpu", "small-model") == small
    public = {"gate-results/", "!gate-results/**/scores-*.safetensors"}
    assert kept("gate", "qwen3-32b-tp2") == public


def test_each_package_is_published_by_a_job_of_its_own() -> None:
    jobs = workflow("release")["jobs"]
    publishing = {name: job for name, job in jobs.items() if "pypi-publish" in str(job)}
    assert {name: job["needs"] for name, job in publishing.items()} == {
        "publish-core": "attest",
        "publish-vllm": "publish-core",
        "publish-eval": "publish-core",
    }
    for name, job in publishing.items():
        assert (job["environment"], job["permissions"]) == ("pypi", {"id-token": "write"})
        assert str(job).count("pypi-publish@") == 1
        assert f"'kvarn_{name.removeprefix('publish-')}-*'" in str(job)


def test_the_text_of_a_comment_cannot_leave_its_fence(tmp_path: Path) -> None:
    step = workflow("gpu-comment")["jobs"]["comment"]["steps"][-1]
    gh = tmp_path / "gh"
    gh.write_text("#!/bin/sh\necho 7\n", encoding="utf-8")
    gh.chmod(0o755)
    (tmp_path / "comparison").mkdir()
    text = "| a |\n~~~\n```\nwww.evil.example/x @everyone\n~~~~"
    (tmp_path / "comparison" / "comparison.md").write_text(text, encoding="utf-8")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HEAD_SHA": "abc", "RUN_URL": "run"}
    line = ["bash", "-e", "-c", step["run"]]
    subprocess.run(line, cwd=tmp_path, env={**environment, "GH_REPO": "o/r"}, check=True)
    lines = (tmp_path / "comment.md").read_text(encoding="utf-8").splitlines()
    fences = [number for number, line in enumerate(lines) if "~" in line]
    assert fences == [2, len(lines) - 1]
    assert {lines[2], lines[-1]} == {"~~~"}
    assert "www.evil.example/x @everyone" in lines[3:-1]

"""The check that workflows and noxfile agree, on workflows that do not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

SCRIPT = Path(__file__).parents[3] / ".ci" / "workflows.py"
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

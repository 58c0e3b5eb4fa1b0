"""Parts of the noxfile, without nox, which no environment of tests has."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

NOXFILE = Path(__file__).parents[3] / "noxfile.py"


class Session:
    posargs: tuple[str, ...] = ()

    def __init__(self, said: str = "") -> None:
        self.said = said
        self.env: dict[str, str] = {}

    def error(self, words: str) -> None:
        raise ValueError(words)

    def run(self, *_: str, **__: Any) -> str:
        return self.said


@pytest.fixture
def noxfile(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    def decorator(*_: Any) -> Any:
        return lambda function: function

    nox = SimpleNamespace(options=SimpleNamespace(), session=decorator(), parametrize=decorator)
    monkeypatch.setitem(sys.modules, "nox", nox)
    monkeypatch.delenv("KVARN_REQUIRE_GPU", raising=False)
    monkeypatch.delenv("KVARN_COMMIT", raising=False)
    return runpy.run_path(str(NOXFILE))


@pytest.mark.parametrize("name", ["baseline", "report"])
def test_a_session_says_which_argument_it_lacks(name: str, noxfile: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"nox -s {name} -- "):
        noxfile[name](Session())


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("a" * 40 + "\n", "a" * 40),
        ("a" * 40 + "-dirty\n", None),
        ("fatal: not a git repository\n", None),
    ],
)
def test_results_of_wheels_name_the_commit_of_unchanged_sources(
    said: str, named: str | None, noxfile: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(said)
    noxfile["name_commit"](session)
    assert session.env.get("KVARN_COMMIT") == named
    monkeypatch.setenv("KVARN_COMMIT", "given")
    session = Session(said)
    noxfile["name_commit"](session)
    assert "KVARN_COMMIT" not in session.env

"""Sessions of the noxfile that need arguments, without nox, which no environment of tests has."""

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

    def error(self, words: str) -> None:
        raise ValueError(words)


@pytest.mark.parametrize("name", ["baseline", "report"])
def test_a_session_says_which_argument_it_lacks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def decorator(*_: Any) -> Any:
        return lambda function: function

    nox = SimpleNamespace(options=SimpleNamespace(), session=decorator(), parametrize=decorator)
    monkeypatch.setitem(sys.modules, "nox", nox)
    monkeypatch.delenv("KVARN_REQUIRE_GPU", raising=False)
    session = runpy.run_path(str(NOXFILE))[name]
    with pytest.raises(ValueError, match=f"nox -s {name} -- "):
        session(Session())

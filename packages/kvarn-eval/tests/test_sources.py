from __future__ import annotations

import pytest

from kvarn_eval.schema import Git
from kvarn_eval.sources import sources


@pytest.mark.parametrize(
    ("sha", "dirty", "name"),
    [
        ("abc", False, "abc"),
        ("abc", None, "abc"),
        ("abc", True, "abc-dirty"),
        (None, None, "unknown"),
    ],
)
def test_changed_sources_are_not_those_of_their_commit(
    sha: str | None, dirty: bool | None, name: str
) -> None:
    assert sources(Git(sha=sha, dirty=dirty)) == name

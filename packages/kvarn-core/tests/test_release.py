"""The three packages have one version, wherever it is written."""

from __future__ import annotations

import re
from pathlib import Path

import kvarn_core

ROOT = Path(__file__).parents[3]
WRITTEN = {
    "packages/*/pyproject.toml": r'^version = "(.+)"|"kvarn-core==(.+?)"',
    "packages/*/src/*/__init__.py": r'^__version__ = "(.+)"',
    "CITATION.cff": r"^version: (.+)",
    "CHANGELOG.md": r"(?s)\A.*?^## (\S+)",  # the newest entry
}


def test_versions_agree() -> None:
    found = {}
    for pattern, expression in WRITTEN.items():
        for path in sorted(ROOT.glob(pattern)):
            matches = re.findall(expression, path.read_text(), re.MULTILINE)
            found[str(path.relative_to(ROOT))] = {"".join(match) for match in matches}
    assert len(found) == 8
    assert {name: "".join(each) for name, each in found.items()} == dict.fromkeys(
        found, kvarn_core.__version__
    )

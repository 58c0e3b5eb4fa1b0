"""The Python of the quickstart runs, and prints what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

PAGE = Path(__file__).parents[3] / "docs" / "quickstart.md"


def test_the_example_without_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGE.read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 1
    exec(compile(examples[0], str(PAGE), "exec"), {})  # noqa: S102
    printed = capsys.readouterr().out
    assert "13824" in printed
    assert "13,824 bytes per tile" in page
    key_error, value_error = map(float, re.findall(r"tensor\(([\d.]+)\)", printed))
    assert 0 < key_error < 0.02 < value_error < 0.2  # 4 and 2 bits of a variance of 1

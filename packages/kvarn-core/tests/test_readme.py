"""The example in the README prints what the README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_ten_lines_quantise_a_tensor() -> None:
    text = README.read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in example.splitlines() if line]) <= 10
    command = [sys.executable, "-c", example]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    printed = dict(line.split() for line in done.stdout.splitlines())
    said = re.search(r"about ([\d.]+) for K \(4 bits\) and ([\d.]+) for V", text)
    assert said is not None
    for name, value in zip("KV", said.groups(), strict=True):
        assert float(printed[name]) == pytest.approx(float(value), rel=0.05)

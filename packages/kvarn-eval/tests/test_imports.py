"""Import rules of the evaluation: it drives vLLM as a user would."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "kvarn_eval"
SOURCES = sorted(ROOT.rglob("*.py"))
FORBIDDEN = {"vllm", "kvarn_vllm"}
CHILDREN = {"engine_bench.py", "bench_child.py"}  # processes of their own; vLLM inside functions


def imported(source: str) -> set[str]:
    """Top-level names of everything a source imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_neither_vllm_nor_the_plugin(path: Path) -> None:
    forbidden = FORBIDDEN - {"vllm"} if path.name in CHILDREN else FORBIDDEN
    assert not imported(path.read_text(encoding="utf-8")) & forbidden


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_source_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_the_rule_sees_an_import() -> None:
    assert imported("def f():\n    from vllm.config import x\n") & FORBIDDEN


@pytest.mark.parametrize("module", ["pickle", "torch.load", "eval("])
def test_no_source_can_run_code_from_data(module: str) -> None:
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        hits = [line for line in text.splitlines() if module in line and ".eval(" not in line]
        assert not hits, path


def test_command_line_starts_without_vllm() -> None:
    program = (
        "import sys; sys.modules['vllm'] = None; sys.modules['kvarn_vllm'] = None\n"
        "import kvarn_eval.cli, kvarn_eval.throughput, kvarn_eval.engine_bench\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

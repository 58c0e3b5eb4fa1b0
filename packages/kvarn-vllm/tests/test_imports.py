"""Import rules of the plugin, by reading its sources and by importing it without vLLM."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[1] / "src" / "kvarn_vllm").glob("*.py"))
TESTS = Path(__file__).parent
COVERED_ELSEWHERE = {
    "__init__": "test_register",
    "__main__": "test_doctor",
    **dict.fromkeys(("batched", "by_request", "flash", "prefill"), "test_impl"),
}


def vllm_names(tree: ast.Module) -> set[str]:
    """Local names that stand for vLLM modules or things imported from vLLM."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                (alias.asname or alias.name).split(".")[0]
                for alias in node.names
                if alias.name.split(".")[0] == "vllm"
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def root_name(node: ast.expr) -> str | None:
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def trespasses(source: str) -> list[str]:
    """Assignments to vLLM attributes and uses of its underscore names."""
    tree = ast.parse(source)
    ours = vllm_names(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, (ast.Attribute, ast.Subscript)) and root_name(target) in ours:
                    found.append(f"assigns to {ast.unparse(target)}")
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            private = not node.attr.startswith("__")
            if private and root_name(node) in ours:
                found.append(f"uses {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_only_patches_touch_vllm_internals(path: Path) -> None:
    found = trespasses(path.read_text(encoding="utf-8"))
    if path.stem == "patches":
        assert found, "patches.py is where vLLM is changed; this rule no longer sees it"
    else:
        assert not found


def test_the_rule_sees_a_trespass() -> None:
    source = "import vllm.config as c\nc.CacheDType.__args__ += ('x',)\nc.cache._private()\n"
    assert len(trespasses(source)) == 2


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_imports_kvarn_core_through_public_names(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvarn_core"):
            assert "reference" not in node.module.split(".")
            assert not [alias.name for alias in node.names if alias.name.startswith("_")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_source_is_short_and_has_a_test_file(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    name = COVERED_ELSEWHERE.get(path.stem, f"test_{path.stem}")
    assert (TESTS / f"{name}.py").is_file()


def test_imports_and_stands_down_without_vllm() -> None:
    program = (
        "import sys; sys.modules['vllm'] = None\n"
        "import kvarn_vllm; kvarn_vllm.register()\n"
        "from kvarn_vllm import patches, config\n"
        "status = patches.arm()\n"
        "assert not status.armed and status.reason, status\n"
        "print(kvarn_vllm.__version__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()

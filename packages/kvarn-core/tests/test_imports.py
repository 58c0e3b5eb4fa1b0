"""Who may import whom, what an import costs, and that every source file has a test file."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kvarn_core

SOURCE = Path(kvarn_core.__file__).parent
TESTS = Path(__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))
FOREIGN = {"vllm", "transformers", "pydantic", "triton", "kvarn_vllm", "kvarn_eval"}
SHARED_BY_OPS = {
    f"kvarn_core.{name}"
    for name in (
        "checks", "dispatch", "exact", "layout", "layout_header", "nvrtc", "rotation", "spec",
        "variants",
    )
}  # fmt: skip


def _imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, `from a import b` counted as a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, "imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def _ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(SOURCE)) for path in paths]


def test_an_import_loads_nothing_that_torch_does_not() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import kvarn_core, kvarn_core.ops.decode, kvarn_core.ops.gather, kvarn_core.ops.quantize
import kvarn_core.ops.store
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
assert not torch.cuda.is_initialized()
"""
    loaded = set(_run(code).split())
    assert loaded - sys.stdlib_module_names == {"kvarn_core"}
    assert not loaded & FOREIGN


def test_spec_and_layout_need_the_standard_library_only() -> None:
    code = """
import sys
for name in ("torch", "numpy"):
    sys.modules[name] = None
from kvarn_core import PRESETS, RecordLayout
assert RecordLayout(PRESETS["kvarn_k4v2_g128"], 128).record_bytes == 13824
foreign = {name.split(".")[0] for name in sys.modules} - sys.stdlib_module_names
print(*sorted(name for name in foreign if not name.startswith("_")))
"""
    assert set(_run(code).split()) <= {"kvarn_core", "torch", "numpy", "sitecustomize"}


@pytest.mark.parametrize("path", MODULES, ids=_ids(MODULES))
def test_the_library_imports_the_standard_library_and_torch(path: Path) -> None:
    allowed = {"kvarn_core", "torch"} | sys.stdlib_module_names
    if "testing" in path.parts:
        allowed |= {"numpy", "pytest", "hypothesis"}
    if path.stem in {"triton", "butterfly", "variants"}:
        allowed |= {"triton"}  # these alone; they are imported when a kernel is wanted
    if path.stem == "nvrtc":
        allowed |= {"cuda"}  # inside functions
    roots = {name.split(".")[0] for name in _imports(path)}
    assert roots <= allowed
    if "testing" not in path.parts:
        assert not any(name.startswith("kvarn_core.testing") for name in _imports(path))


OPS = [path for path in MODULES if path.parent.parent.name == "ops"]


@pytest.mark.parametrize("path", OPS, ids=_ids(OPS))
def test_ops_meet_only_in_public_functions(path: Path) -> None:
    op = path.parent.name
    for name in _imports(path):
        parts = name.split(".")
        if path.stem in ("triton", "cuda") and (
            parts[:2] == ["kvarn_core", "butterfly"] or parts[3:4] == [path.stem]
        ):
            continue  # a kernel may use the device functions of other kernels
        if parts[:2] == ["kvarn_core", "ops"] and parts[2:3] not in ([], [op]):
            # kvarn_core.ops.other or a public name of it, never a module inside
            inside = SOURCE.joinpath("ops", *parts[2:])
            assert len(parts) <= 4, name
            assert parts[-1][0] != "_", name
            assert not inside.with_suffix(".py").exists(), name
        elif parts[0] == "kvarn_core" and len(parts) > 1 and parts[1] != "ops":
            assert ".".join(parts[:2]) in SHARED_BY_OPS, name


@pytest.mark.parametrize("path", OPS, ids=_ids(OPS))
def test_an_engine_does_not_import_another(path: Path) -> None:
    engines = {"reference", "triton", "cuda"} - {path.stem}
    if path.stem == "__init__":
        engines = set()  # the op itself chooses among its engines
    inside = {
        name.split(".")[3]
        for name in _imports(path)
        if name.startswith(f"kvarn_core.ops.{path.parent.name}.")
    }
    assert not inside & engines


@pytest.mark.parametrize("path", MODULES, ids=_ids(MODULES))
def test_every_source_file_is_short_and_has_a_test_file(path: Path) -> None:
    limit = 600 if path.stem == "triton" else 400
    assert len(path.read_text().splitlines()) <= limit
    if path.stem == "__init__" and path.parent.parent.name != "ops":
        return
    where = path.relative_to(SOURCE)
    if where.parts[0] == "ops":
        engine = f"_{path.stem}" if path.stem in ("triton", "cuda") else ""
        test = TESTS / "ops" / f"test_{where.parts[1]}{engine}.py"
    else:
        test = TESTS / where.parent / f"test_{where.stem}.py"
    assert test.exists(), f"{test.relative_to(TESTS)} is missing"


def test_the_public_names_are_few() -> None:
    assert sorted(kvarn_core.__all__) == ["PRESETS", "Preset", "Recipe", "RecordLayout"]

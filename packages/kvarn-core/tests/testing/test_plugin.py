from __future__ import annotations

import subprocess
import sys
import types
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from pathlib import Path


def test_memory_from_torch_is_poisoned_for_library_code_only() -> None:
    library = types.ModuleType("kvarn_core.imaginary")
    code = "import torch\ndef make(): return torch.empty(4, 3), torch.empty_like(torch.ones(5))"
    exec(code, library.__dict__)  # noqa: S102 - the caller's module name is what is tested
    for tensor in library.make():
        assert tensor.isnan().all()
    assert torch.empty(4, dtype=torch.uint8).fill_(7).tolist() == [7] * 4


def _pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "kvarn_core.testing.plugin", "-q"]
    config = folder / "pytest.ini"
    config.write_text("[pytest]\nmarkers = gpu\n")
    return subprocess.run(
        [*command, "-c", str(config), str(folder), *arguments], capture_output=True, text=True
    )


def _with_gpus(folder: Path, count: int) -> None:
    conftest = f"""
import torch
torch.cuda.device_count = lambda: {count}
torch.cuda.is_available = lambda: {count > 0}
"""
    (folder / "conftest.py").write_text(conftest)


def test_a_required_gpu_makes_an_empty_run_fail(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text("def test_cpu(): pass\n")
    assert _pytest(tmp_path).returncode == 0
    _with_gpus(tmp_path, 1)
    required = _pytest(tmp_path, "--require-gpu")
    assert required.returncode == 1
    assert "--require-gpu: no GPU test ran." in required.stderr


@pytest.mark.parametrize(("found", "option"), [(0, "--require-gpu"), (1, "--require-gpu=2")])
def test_required_gpus_are_counted(found: int, option: str, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text("import pytest\n@pytest.mark.gpu\ndef test(): pass\n")
    _with_gpus(tmp_path, found)
    result = _pytest(tmp_path, option)
    assert result.returncode != 0
    assert f"--require-gpu: torch sees {found} of {found + 1} CUDA GPUs." in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status"), [(("--require-gpu=2", "-n", "1"), 1), (("--require-gpu=1",), 0)]
)
def test_no_test_is_skipped_for_want_of_required_gpus(
    arguments: tuple[str, ...], status: int, tmp_path: Path
) -> None:
    source = """
import pytest
pytestmark = pytest.mark.gpu
def test_one(): pass
@pytest.mark.skipif(True, reason="needs a GPU of compute capability 9.0")
def test_other(): pass
@pytest.mark.skipif(True, reason="needs two CUDA GPUs")
def test_two(): pass
"""
    (tmp_path / "test_some.py").write_text(source)
    _with_gpus(tmp_path, 2)
    result = _pytest(tmp_path, *arguments)
    assert result.returncode == status
    assert ("test_two saw too few GPUs." in result.stderr) == bool(status)


def test_gpu_tests_say_what_is_missing(tmp_path: Path) -> None:
    source = "import pytest\n@pytest.mark.gpu\ndef test_gpu(): pass\n"
    (tmp_path / "test_some.py").write_text(source)
    result = _pytest(tmp_path, "-rs")
    if torch.cuda.is_available():
        assert "1 passed" in result.stdout
    else:
        assert "needs a CUDA GPU; none is visible" in result.stdout

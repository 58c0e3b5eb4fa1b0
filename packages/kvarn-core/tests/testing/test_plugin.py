from __future__ import annotations

import subprocess
import sys
import types
from typing import TYPE_CHECKING

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


def test_a_required_gpu_makes_an_empty_run_fail(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text("def test_cpu(): pass\n")
    assert _pytest(tmp_path).returncode == 0
    required = _pytest(tmp_path, "--require-gpu")
    assert required.returncode == 1
    assert "--require-gpu: no GPU test ran." in required.stderr


def test_gpu_tests_say_what_is_missing(tmp_path: Path) -> None:
    source = "import pytest\n@pytest.mark.gpu\ndef test_gpu(): pass\n"
    (tmp_path / "test_some.py").write_text(source)
    result = _pytest(tmp_path, "-rs")
    if torch.cuda.is_available():
        assert "1 passed" in result.stdout
    else:
        assert "needs a CUDA GPU; none is visible" in result.stdout

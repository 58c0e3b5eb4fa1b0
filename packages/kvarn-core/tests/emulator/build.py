"""Builds the C++ of a kernel for the CPU and launches it there.

The compiler is the one of the package ziglang, which pip installs; a build is kept under the hash
of everything it depends on.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import sys
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from kvarn_core.nvrtc import Packer, Program, Variant, cache_folder

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

HERE = Path(__file__).parent
FLAGS = (
    "-std=c++17", "-O2", "-g0", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing",
    "-fno-sanitize=undefined", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function",
)  # fmt: skip
ENTRY = """
#include "device.cuh"
#include "{source}"
extern "C" int launch(void** arguments, const unsigned* grid, unsigned threads,
                      unsigned shared_bytes, unsigned seed, const emulator::Range* memory,
                      int ranges, char* message, int message_bytes) {{
    return emulator::launch({kernel}, arguments, grid, threads, shared_bytes, seed, memory, ranges,
                            message, message_bytes);
}}
"""


class EmulationError(AssertionError):
    """What the emulator found wrong."""


class EmulatedKernel:
    """Launches like `kvarn_core.nvrtc.Kernel`, on CPU tensors.

    Parameters
    ----------
    variant : Variant
        What to build.
    memory : iterable of Tensor
        What bulk copies may read; more can be added to `memory` later.
    seed : int
        Order of lanes, warps and CTAs.
    """

    def __init__(
        self, variant: Variant, memory: Iterable[torch.Tensor] = (), seed: int = 0
    ) -> None:
        self.variant = variant
        self.memory = list(memory)
        self.seed = seed
        self._library = build(variant.program)
        self._arguments = Packer(variant.arguments)

    def launch(self, grid: tuple[int, int, int], *values: float) -> None:
        self._arguments.pack(*values)
        ranges = (ctypes.c_uint64 * (2 * len(self.memory)))(
            *(x for t in self.memory for x in (t.data_ptr(), t.untyped_storage().nbytes()))
        )
        message = ctypes.create_string_buffer(256)
        failed = self._library.launch(
            ctypes.c_void_p(self._arguments.address), (ctypes.c_uint * 3)(*grid),
            self.variant.threads, self.variant.shared_bytes, self.seed, ranges, len(self.memory),
            message, len(message),
        )  # fmt: skip
        if failed:
            raise EmulationError(f"{self.variant.name}: {message.value.decode()}")


_loaded: dict[str, ctypes.CDLL] = {}


def build(program: Program) -> ctypes.CDLL:
    """Compile a program for the CPU, with `launch` as its entry point, and load it."""
    key = _key(program)
    if key not in _loaded:
        path = cache_folder() / "emulator" / f"{key}.so"
        if not path.exists():
            _compile(program, path)
        _loaded[key] = ctypes.CDLL(str(path))
    return _loaded[key]


def _key(program: Program) -> str:
    digest = hashlib.sha256()
    own = {path.name: path.read_text() for path in (HERE / "machine.hpp", HERE / "device.cuh")}
    texts = {**program.texts(), **{f"emulator/{name}": text for name, text in own.items()}}
    parts = [_compiler_version(), ENTRY, program.kernel, program.source.read_text(), *FLAGS]
    parts += [*program.options(""), *(text for pair in sorted(texts.items()) for text in pair)]
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()


@cache
def _compiler_version() -> str:
    return version("ziglang")


def _compile(program: Program, path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        folder = Path(name)
        for header, text in program.texts().items():
            if not (HERE / header).exists():  # the twins stand in for these
                (folder / header).write_text(text)
        entry = folder / "entry.cpp"
        entry.write_text(ENTRY.format(source=program.source, kernel=program.kernel))
        defines = [f"-D{name}={value}" for name, value in program.defines.items()]
        command = [sys.executable, "-m", "ziglang", "c++", *FLAGS, *defines]
        command += [f"-I{HERE}", f"-I{folder}", str(entry), "-o", str(folder / "library.so")]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise EmulationError(f"{program.source.name} does not compile.\n{result.stderr}")
        (folder / "library.so").replace(path)

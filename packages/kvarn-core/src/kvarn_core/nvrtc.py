"""CUDA C++ from source to launch: compile with NVRTC, keep on disk, load, launch.

Sources travel in the wheel and become one cubin per variant on the machine that runs them. A cubin
is kept on disk under the hash of everything it depends on, and its own hash is checked on reading.
A launch packs its arguments into memory that exists already: it allocates nothing, fits in a CUDA
graph, and runs on torch's current stream in torch's context. `cuda.bindings` is imported when the
first kernel is wanted.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import stat
import struct
import tempfile
import threading
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

logger = logging.getLogger(__name__)

ARCH = "sm_90a"
CAPABILITY = (9, 0)  # sm_90a code runs on exactly this one
OPTIONS = ("--std=c++17",)
SHARED_HEADERS = Path(__file__).parent / "cuda"
DIGEST_BYTES = 32
NOT_KEPT = "%s cannot hold compiled kernels (%s); they are not kept."
MISSING = (
    "The cuda engine cannot run: {} is missing. "
    "Install it with `pip install kvarn-core[cuda]`, or use the triton engine."
)
CODES = {"pointer": "Q", "i32": "i", "u32": "I", "i64": "q", "f32": "f"}


@dataclass(frozen=True)
class Program:
    """One kernel and everything its machine code depends on.

    Parameters
    ----------
    kernel : str
        Name of the ``extern "C"`` kernel.
    source : pathlib.Path
        The .cu file.
    headers : mapping of str to str
        Generated headers, text by name; the files in ``kvarn_core/cuda`` and beside the source
        are always there.
    defines : mapping of str to int
        Preprocessor constants.
    """

    kernel: str
    source: Path
    headers: Mapping[str, str] = field(default_factory=dict, hash=False)
    defines: Mapping[str, int] = field(default_factory=dict, hash=False)

    def texts(self) -> dict[str, str]:
        """Text of every header by name."""
        folders = (SHARED_HEADERS, self.source.parent)
        files = (path for folder in folders for path in sorted(folder.glob("*.cuh")))
        return {**{path.name: path.read_text() for path in files}, **self.headers}

    def options(self, arch: str) -> tuple[str, ...]:
        """Compiler options."""
        defines = (f"-D{name}={value}" for name, value in self.defines.items())
        return (f"--gpu-architecture={arch}", *OPTIONS, *defines)


@dataclass(frozen=True)
class Variant:
    """A program with its launch shape: what is compiled, loaded and listed in the resource table.

    Parameters
    ----------
    name : str
        Unique, readable, for example ``decode-k4v2_g128-d128-fp16``.
    program : Program
        What is compiled.
    arguments : sequence of str
        Kinds of the kernel's parameters, keys of `CODES`, in order.
    threads : int
        Threads per CTA.
    ctas : int
        CTAs that one processor holds at once.
    shared_bytes : int
        Dynamic shared memory per CTA.
    """

    name: str
    program: Program
    arguments: tuple[str, ...]
    threads: int
    ctas: int
    shared_bytes: int = 0

    @property
    def carveout(self) -> int:
        """Share of the on-chip memory that is not cache, percent; -1 leaves it to the driver."""
        return 100 if self.shared_bytes else -1


class Packer:
    """Reusable memory for the arguments of one kernel, in the form that a launch takes.

    Parameters
    ----------
    arguments : sequence of str
        Kinds of the arguments, keys of `CODES`.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        codes = "".join(CODES[kind] for kind in arguments)
        self._struct = struct.Struct(f"@{codes}")
        self._buffer = ctypes.create_string_buffer(self._struct.size)
        base = ctypes.addressof(self._buffer)
        offsets = [
            struct.calcsize("@" + codes[: i + 1]) - struct.calcsize(code)
            for i, code in enumerate(codes)
        ]
        self._pointers = (ctypes.c_void_p * len(codes))(*(base + offset for offset in offsets))
        self.address = ctypes.addressof(self._pointers)

    def pack(self, *values: float) -> None:
        """Write the values to where `address` points."""
        self._struct.pack_into(self._buffer, 0, *values)


class Kernel:
    """A loaded kernel of one device.

    Parameters
    ----------
    variant : Variant
        What was loaded.
    function : int
        Driver handle.
    device : torch.device
        Where it was loaded.
    """

    def __init__(self, variant: Variant, function: int, device: torch.device) -> None:
        from cuda.bindings import driver

        self.variant = variant
        self._function = driver.CUfunction(function)
        self._device = device
        self._launch = driver.cuLaunchKernel
        self._no_context = driver.CUresult.CUDA_ERROR_INVALID_CONTEXT
        self._arguments = Packer(variant.arguments)
        self._lock = threading.Lock()

    def launch(self, grid: tuple[int, int, int], *values: float) -> None:
        """Launch on torch's current stream of the device.

        Parameters
        ----------
        grid : (int, int, int)
            CTAs along x, y, z.
        *values : int or float
            Arguments; pointers as addresses.

        Raises
        ------
        RuntimeError
            If the driver refuses.
        """
        if torch.cuda.current_device() != self._device.index:
            with torch.cuda.device(self._device):
                self.launch(grid, *values)
            return
        # torch's own way to a stream builds an object, which a launch has no time for
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        with self._lock:
            self._arguments.pack(*values)  # the driver copies them before it returns
            error = self._enqueue(grid, stream)
            if error == self._no_context:  # a thread that has not talked to the GPU yet
                torch.cuda.current_stream(self._device).query()
                error = self._enqueue(grid, stream)
        if error:
            raise RuntimeError(f"Launching {self.variant.name} failed: {error!s}.")

    def _enqueue(self, grid: tuple[int, int, int], stream: int) -> Any:
        (error,) = self._launch(
            self._function, *grid, self.variant.threads, 1, 1, self.variant.shared_bytes,
            stream, self._arguments.address, 0,
        )  # fmt: skip
        return error


@cache
def obstacle() -> str | None:
    """Name the package that compiling needs and that is missing, or None."""
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401
    except ImportError:
        return "the package cuda-bindings"
    try:
        _checked(nvrtc.nvrtcVersion())
    except RuntimeError:  # no library to load
        return "the package nvidia-cuda-nvrtc"
    return None


@cache
def driver_obstacle() -> str | None:
    """Say that the driver cannot load what the compiler makes, as a clause, or None.

    Machine code of one CUDA release loads on drivers of its major version and of later ones.
    """
    from cuda.bindings import driver, nvrtc

    knows, makes = _checked(driver.cuDriverGetVersion()) // 1000, nvrtc.nvrtcVersion()[1]
    if knows >= makes:
        return None
    return f"its compiler makes code of CUDA {makes} and the driver knows CUDA {knows}"


@cache
def load(variant: Variant, device: torch.device) -> Kernel:
    """Compile or find a variant and load it on a device.

    Parameters
    ----------
    variant : Variant
        What to load.
    device : torch.device
        A CUDA device with an index.

    Raises
    ------
    RuntimeError
        If a package is missing, the source does not compile, or the driver refuses.
    """
    binary = compile(variant.program)
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.cuda.current_stream(device).synchronize()  # torch's context exists and is current
        module = _checked(driver.cuModuleLoadData(binary))
        function = _checked(driver.cuModuleGetFunction(module, variant.program.kernel.encode()))
        attributes = driver.CUfunction_attribute
        for attribute, value in (
            (attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, variant.shared_bytes),
            (attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, variant.carveout),
        ):
            _checked(driver.cuFuncSetAttribute(function, attribute, value))
    return Kernel(variant, int(function), device)


def compile(program: Program, arch: str = ARCH) -> bytes:
    """Machine code of a program, from the cache on disk or from NVRTC; needs no GPU.

    Parameters
    ----------
    program : Program
        What to compile.
    arch : str
        Architecture as NVRTC names it.

    Raises
    ------
    RuntimeError
        If a package is missing or the source does not compile; the message holds the log.
    """
    if missing := obstacle():
        raise RuntimeError(MISSING.format(missing))
    source, headers, options = program.source.read_text(), program.texts(), program.options(arch)
    key = _key(source, headers, options)
    if (kept := _read(key)) is not None:
        return kept
    binary = _compile(program.source.name, source, headers, options)
    _write(key, binary)
    return binary


def cache_folder() -> Path:
    """Where cubins are kept: ``KVARN_CACHE_DIR``, or ``kvarn`` in the user's cache folder.

    Raises
    ------
    RuntimeError
        If neither a variable nor the system says where the user's folders are.
    """
    if chosen := os.environ.get("KVARN_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvarn"


def _compile(name: str, source: str, headers: Mapping[str, str], options: Sequence[str]) -> bytes:
    from cuda.bindings import nvrtc

    texts = [text.encode() for text in headers.values()]
    names = [name.encode() for name in headers]
    program = _checked(
        nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), len(texts), texts, names)
    )
    encoded = [option.encode() for option in options]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    # filled in place: zeros, because Python shares one object among all equal single bytes
    log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
    _checked(nvrtc.nvrtcGetProgramLog(program, log))
    if status:
        text = log.decode(errors="replace").rstrip("\0\n ")
        raise RuntimeError(f"{name} does not compile ({status!s}).\n{text}")
    binary = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return binary


def _key(source: str, headers: Mapping[str, str], options: Sequence[str]) -> str:
    digest = hashlib.sha256()
    names = (text for pair in sorted(headers.items()) for text in pair)
    for part in (source, *names, *options, _compiler()):
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()


@cache
def _compiler() -> str:
    """Version and size of NVRTC's library: releases with fixes have the version of the first."""
    from cuda.bindings import nvrtc
    from cuda.pathfinder import load_nvidia_dynamic_lib

    library = load_nvidia_dynamic_lib("nvrtc").abs_path
    size = Path(library).stat().st_size if library else 0
    return f"{nvrtc.nvrtcVersion()[1:]} {size}"


def _read(key: str) -> bytes | None:
    """A kept cubin, or None if there is none or it is not what was written."""
    folder = _private_folder()
    if folder is None:
        return None
    try:
        content = (folder / key).read_bytes()
    except OSError:  # most often there is none
        return None
    digest, binary = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(binary).digest() != digest:
        logger.warning("%s is damaged and is written again.", folder / key)
        return None
    return binary


def _write(key: str, binary: bytes) -> None:
    """Keep a cubin: readers see all of it or nothing."""
    folder = _private_folder()
    if folder is None:
        return
    unfinished = None
    try:
        handle, unfinished = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(binary).digest() + binary)
        Path(unfinished).replace(folder / key)
    except OSError as error:
        logger.warning(NOT_KEPT, folder, error)
        if unfinished is not None:
            Path(unfinished).unlink(missing_ok=True)


def _private_folder() -> Path | None:
    """The cache folder if it is ours alone: what lies in it runs on the GPU."""
    folder: Path | str = "The user's cache folder"
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except (OSError, RuntimeError) as error:  # no room, no right, no home
        logger.warning(NOT_KEPT, folder, error)
        return None
    if state.st_uid != os.getuid() or stat.S_IMODE(state.st_mode) & 0o022:
        logger.warning("%s can be written by others; compiled kernels are not kept there.", folder)
        return None
    return folder


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of cuda.bindings returned besides its status; raises on a bad status."""
    status, *values = result
    if status:
        raise RuntimeError(f"The CUDA driver or compiler answered {status!s}.")
    return values[0] if len(values) == 1 else None

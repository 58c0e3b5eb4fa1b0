"""Compiling, keeping and packing, without a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import stat
from typing import TYPE_CHECKING

import pytest
import torch

from kvarn_core import nvrtc
from kvarn_core.nvrtc import DIGEST_BYTES, Kernel, Packer, Program, Variant

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SOURCE = '#include "device.cuh"\nKERNEL void copy(int* p) { p[threadIdx.x] = VALUE; }\n'
compiles = pytest.mark.skipif(nvrtc.obstacle() is not None, reason=f"{nvrtc.obstacle()} is missing")


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.setenv("KVARN_CACHE_DIR", str(tmp_path / "cache"))
    source = tmp_path / "copy.cu"
    source.write_text(SOURCE)
    return Program("copy", source, {}, {"VALUE": 3})


def _kept() -> list[Path]:
    return sorted(nvrtc.cache_folder().iterdir())


@compiles
def test_a_cubin_is_compiled_once_and_kept_privately(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = nvrtc.compile(program)
    assert first[:4] == b"\x7fELF"
    assert b"copy" in first
    assert stat.S_IMODE(nvrtc.cache_folder().stat().st_mode) == 0o700
    assert len(_kept()) == 1
    monkeypatch.setattr(nvrtc, "_compile", None)  # a second compilation would fail
    assert nvrtc.compile(program) == first


@compiles
def test_an_empty_log_leaves_single_bytes_alone(program: Program) -> None:
    nvrtc.compile(program)  # its log is one byte, and Python keeps one object per single byte
    assert [bytes([byte])[0] for byte in range(256)] == list(range(256))


@compiles
def test_everything_that_matters_is_part_of_the_key(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvrtc.compile(program)
    nvrtc.compile(dataclasses.replace(program, defines={"VALUE": 4}))
    nvrtc.compile(dataclasses.replace(program, headers={"unused.cuh": "// other"}))
    nvrtc.compile(program, "sm_100a")
    program.source.write_text(SOURCE + "// other\n")
    nvrtc.compile(program)
    monkeypatch.setattr(nvrtc, "_compiler", lambda: "a release with a fix")
    nvrtc.compile(program)
    assert len(_kept()) == 6


@compiles
@pytest.mark.parametrize(
    ("knows", "said"),
    [
        (12_080, "its compiler makes code of CUDA 13 and the driver knows CUDA 12"),
        (13_000, None),
        (14_000, None),
    ],
)
def test_an_older_driver_is_an_obstacle(
    knows: int, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cuda.bindings import driver

    monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: (0, knows))
    nvrtc.driver_obstacle.cache_clear()
    assert nvrtc.driver_obstacle() == said
    nvrtc.driver_obstacle.cache_clear()


@compiles
def test_without_a_home_nothing_is_kept(
    program: Program, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    caplog.set_level("WARNING", logger=nvrtc.logger.name)
    monkeypatch.delenv("KVARN_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(nvrtc.Path, "home", homeless)
    assert nvrtc.compile(program)[:4] == b"\x7fELF"
    assert "Could not determine home directory" in caplog.text


def test_a_folder_that_takes_no_more_files_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(**where: object) -> None:
        raise OSError(28, "No space left on device")

    caplog.set_level("WARNING", logger=nvrtc.logger.name)
    monkeypatch.setenv("KVARN_CACHE_DIR", str(tmp_path / "kvarn"))
    monkeypatch.setattr(nvrtc.tempfile, "mkstemp", full)
    nvrtc._write("key", b"binary")
    assert "No space left on device" in caplog.text
    assert _kept() == []


@compiles
@pytest.mark.parametrize("place", [0, DIGEST_BYTES + 100])
def test_a_damaged_cubin_is_written_again(
    place: int, program: Program, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", logger=nvrtc.logger.name)  # others may have silenced the root
    first = nvrtc.compile(program)
    (path,) = _kept()
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert nvrtc.compile(program) == first
    assert "is damaged" in caplog.text
    content[place] ^= 1
    assert path.read_bytes() == content


@compiles
def test_a_folder_that_others_can_write_is_not_trusted(
    program: Program, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", logger=nvrtc.logger.name)
    nvrtc.cache_folder().mkdir(mode=0o777)
    nvrtc.cache_folder().chmod(0o777)
    assert nvrtc.compile(program)[:4] == b"\x7fELF"
    assert _kept() == []
    assert "can be written by others" in caplog.text


@compiles
def test_an_error_names_the_file_and_shows_the_log(program: Program) -> None:
    program.source.write_text("KERNEL broken")
    with pytest.raises(RuntimeError, match=r"(?s)^copy\.cu does not compile .*error"):
        nvrtc.compile(program)
    assert not nvrtc.cache_folder().exists() or _kept() == []


def test_a_missing_package_is_named(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "obstacle", lambda: "the package cuda-bindings")
    with pytest.raises(RuntimeError) as error:
        nvrtc.compile(program)
    assert str(error.value) == (
        "The cuda engine cannot run: the package cuda-bindings is missing. "
        "Install it with `pip install kvarn-core[cuda]`, or use the triton engine."
    )


def test_arguments_lie_where_the_pointers_say() -> None:
    packer = Packer(("i32", "pointer", "f32", "i64", "u32"))
    packer.pack(-7, 2**63 + 5, 1.5, -(2**40), 2**32 - 1)
    types = (ctypes.c_int32, ctypes.c_uint64, ctypes.c_float, ctypes.c_int64, ctypes.c_uint32)
    pointers = (ctypes.c_void_p * 5).from_address(packer.address)
    values = [kind.from_address(p).value for kind, p in zip(types, pointers, strict=True)]
    assert values == [-7, 2**63 + 5, 1.5, -(2**40), 2**32 - 1]


def test_variants_are_keys_of_what_is_loaded(program: Program) -> None:
    """`load` keeps one kernel per variant: equal ones must be found, others told apart."""
    one, same = (Variant("copy", program, ("pointer",), 32, 1) for _ in range(2))
    other = dataclasses.replace(program, defines={"VALUE": 4})
    assert {one: 1}[same] == 1
    assert Variant("copy", other, ("pointer",), 32, 1) not in {one: 1}


class Driver:
    """Takes launches in the place of the driver; the first answers are given."""

    def __init__(self, *answers: int) -> None:
        self.answers = list(answers)
        self.launches: list[tuple[object, ...]] = []

    def launch(self, *arguments: object) -> tuple[int]:
        self.launches.append(arguments)
        return (self.answers.pop(0) if self.answers else 0,)


class Stream:
    """A stream of torch."""

    cuda_stream, queries = 77, 0

    def query(self) -> None:
        self.queries += 1


@compiles
def test_a_launch_binds_the_context_of_a_fresh_thread_and_names_what_failed(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cuda.bindings.driver import CUresult

    stream = Stream()
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: stream)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch._C._cuda_getCurrentRawStream", [77].__getitem__)
    variant = Variant("copy", program, ("pointer", "i32"), 64, 1, 512)
    kernel = Kernel(variant, 5, torch.device("cuda", 0))
    driver = Driver(CUresult.CUDA_ERROR_INVALID_CONTEXT)
    monkeypatch.setattr(kernel, "_launch", driver.launch)
    kernel.launch((3, 2, 1), 2**40, -1)
    assert stream.queries == 1
    assert [launch[1:9] for launch in driver.launches] == [(3, 2, 1, 64, 1, 1, 512, 77)] * 2
    driver.answers = [CUresult.CUDA_ERROR_INVALID_VALUE]
    with pytest.raises(RuntimeError, match=r"^Launching copy failed: .*INVALID_VALUE"):
        kernel.launch((1, 1, 1), 0, 0)
    assert stream.queries == 1


@compiles
def test_a_launch_reaches_its_own_device(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    current = [1]

    @contextlib.contextmanager
    def switch(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr("torch.cuda.current_device", lambda: current[0])
    monkeypatch.setattr("torch.cuda.device", switch)
    monkeypatch.setattr("torch._C._cuda_getCurrentRawStream", [77, 99].__getitem__)
    kernel = Kernel(Variant("copy", program, ("pointer", "i32"), 64, 1), 5, torch.device("cuda", 0))
    devices: list[tuple[int, object]] = []

    def launch(*arguments: object) -> tuple[int]:
        devices.append((current[0], arguments[8]))
        return (0,)

    monkeypatch.setattr(kernel, "_launch", launch)
    kernel.launch((1, 1, 1), 0, 0)
    assert devices == [(0, 77)]
    assert current == [1]

"""Kernels as data: every compiled form that can run, and what the compiler makes of it.

Each `ops/*/triton.py` lists its forms in `variants()`. They compile for any GPU architecture on a
machine without one, so registers and spills are known before a kernel ever runs. Triton is imported
by `compile` only.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel.

    Parameters
    ----------
    name : str
        Unique, readable, for example ``gather-k4v2_g128-d128-fp16``.
    kernel : triton.JITFunction
        What is launched.
    signature : mapping of str to str
        Triton type of each runtime parameter, for example ``{"p_cache": "*u8", "stride": "i32"}``.
    constexprs : mapping of str to object
        Value of each compile-time parameter.
    num_warps, num_stages : int
        Launch options.
    maxnreg : int, optional
        Limit of registers per thread, so that more programs are resident.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


@dataclass(frozen=True)
class Resources:
    """What one thread or one program of a compiled kernel occupies.

    Attributes
    ----------
    registers : int
        32-bit registers per thread.
    shared : int
        Bytes of shared memory per program.
    stack_bytes : int
        Bytes of memory per thread; spilled registers live there, so 0 means no spills.
    """

    registers: int
    shared: int
    stack_bytes: int


def compile(variant: Variant, arch: int) -> Resources:
    """Compile for a GPU architecture; no GPU is needed.

    Parameters
    ----------
    variant : Variant
        What to compile. Pointers count as 16-byte aligned unless the kernel names them in
        ``do_not_specialize_on_alignment``, integers as arbitrary: as a launch does.
    arch : int
        Compute capability without the dot: 80, 90, 100.

    Returns
    -------
    Resources
        As the assembler reports them.

    Raises
    ------
    ValueError
        If `variant` does not name exactly the parameters of its kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    parameters = variant.kernel.params
    named = [*variant.signature, *variant.constexprs]
    if sorted(named) != sorted(parameter.name for parameter in parameters):
        raise ValueError(
            f"{variant.name} names the parameters {sorted(named)}. "
            f"Name those of its kernel: {sorted(parameter.name for parameter in parameters)}."
        )
    types = {p.name: variant.signature.get(p.name, "constexpr") for p in parameters}
    aligned = {
        (p.num,): [["tt.divisibility", 16]]
        for p in parameters
        if types[p.name].startswith("*") and not p.do_not_specialize_on_alignment
    }
    source = ASTSource(variant.kernel, types, dict(variant.constexprs), aligned)
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "maxnreg": variant.maxnreg,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    report = _resource_usage(compiled.asm["cubin"])
    return Resources(
        registers=int(report["REG"]),
        shared=compiled.metadata.shared,
        stack_bytes=int(report["STACK"]) + int(report["LOCAL"]),
    )


def _resource_usage(cubin: bytes) -> dict[str, str]:
    """Numbers that the assembler left in a binary with one kernel, by their names."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        result = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    numbers = re.findall(r"(REG|STACK|LOCAL):(\d+)", result.stdout)
    assert len(numbers) == 3, result.stdout
    return dict(numbers)

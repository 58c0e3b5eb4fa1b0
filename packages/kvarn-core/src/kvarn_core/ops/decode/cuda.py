"""Launching decode attention in CUDA C++: one kernel per call, whatever the lengths.

The grid is what the GPU holds at once. Scratch memory is one slot per CTA and end of its share,
then one counter per (request, head block); counters are zero between calls.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvarn_core import nvrtc
from kvarn_core.layout import HEAD_DIMS, RecordLayout
from kvarn_core.layout_header import HEADER_NAME, layout_header
from kvarn_core.ops.decode.shapes import (
    HEADS,
    WIDE_HEADS,
    Shape,
    block_heads,
    head_blocks,
    shape_for,
    shapes,
)
from kvarn_core.spec import PRESETS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvarn_core.ops.decode import Decode

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
LOG2_E = 1.4426950408889634
DTYPES = {torch.float16: ("fp16", 0), torch.bfloat16: ("bf16", 1), torch.float32: ("fp32", 2)}
ARGUMENTS = ("pointer",) * 8 + ("f32",) + ("i32",) * 10 + ("u32",) * 4
LEAST = 4  # units of a share, one for each quarter of a processor: more means fewer partials, later
SLACK = 4  # units of a warp by which shares may grow to give every head block whole CTAs


@dataclass(frozen=True)
class Scratch:
    """Bytes of the workspace: partial results, then counters.

    Parameters
    ----------
    ctas : int
        CTAs of the largest grid.
    heads : int
        Query heads of a head block.
    head_dim : int
        D.
    counters : int
        One per (request, head block).
    """

    ctas: int
    heads: int
    head_dim: int
    counters: int

    @property
    def partial_bytes(self) -> int:
        """Two slots per CTA: outputs, maxima and sums of a head block, fp32."""
        return 2 * self.ctas * self.heads * (self.head_dim + 2) * 4

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.partial_bytes + 4 * self.counters


def prepare(
    query: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    layout: RecordLayout,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    workspace: torch.Tensor | None,
) -> Decode:
    """See `kvarn_core.ops.decode.prepare`."""
    batch, num_q_heads, _ = query.shape
    if not batch:
        return _nothing
    _check_rows("query", query)
    _check_rows("out", out)
    num_kv_heads = cache.shape[1]
    heads, blocks = head_blocks(layout, num_q_heads, num_kv_heads)
    scratch = _scratch(batch, num_q_heads, num_kv_heads, layout, query.device)
    processors = _processors(query.device)
    shape = shape_for(layout, heads, batch * num_kv_heads * blocks, processors)
    ctas = processors * shape.ctas
    memory = workspace
    if memory is None:
        memory = torch.zeros(scratch.nbytes, dtype=torch.uint8, device=query.device)
    if memory.numel() < scratch.nbytes:  # `workspace_bytes` asked another GPU
        raise ValueError(f"workspace has {memory.numel()} bytes. Pass {scratch.nbytes} or more.")
    _check_address("cache", cache)
    _check_address("workspace", memory)
    kernel = _kernel(layout, query.dtype, shape, query.device)
    numbers = (
        sm_scale * LOG2_E, page_table.stride(0), query.stride(0), out.stride(0), batch,
        num_kv_heads, num_q_heads // num_kv_heads, blocks, num_kv_heads * blocks,
        LEAST, SLACK * shape.warps,
        *inverses(ctas, num_kv_heads, blocks),
    )  # fmt: skip

    def run(query: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> None:
        rows, results, pages = query.data_ptr(), out.data_ptr(), cache.data_ptr()
        partials = memory.data_ptr()
        if (rows | results | pages) % 16:
            _check_rows("query", query)
            _check_rows("out", out)
            _check_address("cache", cache)
        kernel.launch(
            (ctas, 1, 1),
            rows, pages, page_table.data_ptr(), seq_lens.data_ptr(),
            results, lse.data_ptr(), partials, partials + scratch.partial_bytes, *numbers,
        )  # fmt: skip

    return run


@cache
def inverses(ctas: int, num_kv_heads: int, blocks: int) -> tuple[int, ...]:
    """What the schedule divides by, as `Inverses` in schedule.cuh wants it."""
    pairs = num_kv_heads * blocks
    return tuple(0xFFFFFFFF // n for n in (ctas, max(1, ctas // pairs), pairs, blocks))


def workspace_bytes(
    batch: int, num_q_heads: int, num_kv_heads: int, layout: RecordLayout, device: torch.device
) -> int:
    """See `kvarn_core.ops.decode.workspace_bytes`."""
    return _scratch(batch, num_q_heads, num_kv_heads, layout, device).nbytes


def warm_up_batches(
    batch: int, num_q_heads: int, num_kv_heads: int, layout: RecordLayout, device: torch.device
) -> list[int]:
    """See `kvarn_core.ops.decode.warm_up_batches`: the smallest batch of every size of CTAs."""
    heads, blocks = head_blocks(layout, num_q_heads, num_kv_heads)
    firsts: dict[Shape, int] = {}
    for requests in range(1, batch + 1):
        total = requests * num_kv_heads * blocks
        firsts.setdefault(shape_for(layout, heads, total, _processors(device)), requests)
    return list(firsts.values())


def has_kernels(layout: RecordLayout) -> bool:
    """Whether the kernel can run on the current GPU, its packages apart."""
    if layout.preset.is_debug or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() == nvrtc.CAPABILITY


def variant(
    layout: RecordLayout, dtype: torch.dtype, shape: Shape, *, magic: bool = False
) -> nvrtc.Variant:
    """The compiled form for a layout and a query dtype.

    Parameters
    ----------
    layout : RecordLayout
        Byte layout of the preset.
    dtype : torch.dtype
        Of query and output: a key of `DTYPES`.
    shape : Shape
        Sizes of CTAs and head blocks.
    magic : bool
        Make codes with an exponent instead of as subnormals.
    """
    shared = shape.shared_bytes(layout)
    name, number = DTYPES[dtype]
    defines = {
        "WARPS": shape.warps, "CTAS": shape.ctas, "HEADS": shape.heads, "QUERY": number,
        "EXPECTED_SHARED_BYTES": shared, **({"KVARN_MAGIC": 1} if magic else {}),
    }  # fmt: skip
    program = nvrtc.Program(
        "decode_kernel", HERE / "decode.cu", {HEADER_NAME: layout_header(layout)}, defines
    )
    words = ["decode", layout.preset.name[6:], f"d{layout.head_dim}", name]
    words += ["wide"] * (shape.heads > HEADS) + [f"{shape.ctas}x{shape.warps}"] + ["magic"] * magic
    return nvrtc.Variant("-".join(words), program, ARGUMENTS, shape.warps * 32, shape.ctas, shared)


def variants() -> Iterator[nvrtc.Variant]:
    """Every compiled form of the kernel; see `kvarn_core.nvrtc`."""
    for preset in PRESETS.values():
        for dim in HEAD_DIMS:
            layout = RecordLayout(preset, dim)
            for heads in sorted({block_heads(layout, ratio) for ratio in (HEADS, WIDE_HEADS)}):
                for shape in shapes(layout, heads):
                    yield variant(layout, torch.float16, shape)
            yield variant(layout, torch.float16, shapes(layout)[-1], magic=True)
    main = RecordLayout(PRESETS["kvarn_k4v2_g128"], 128)
    for dtype in (torch.bfloat16, torch.float32):
        yield variant(main, dtype, shapes(main)[-1])
    wide = shapes(main, WIDE_HEADS)[-1]
    yield variant(main, torch.bfloat16, wide)
    yield variant(main, torch.float16, wide, magic=True)


@cache
def subnormals_are_exact(device: torch.device) -> bool:
    """Multiply every code at every place of a half on the tensor cores of a device and compare.

    Runs once per device and reads the answer back, so not while a graph is captured.

    Notes
    -----
    On failure the kernels make codes with an exponent, which costs instructions; one log line.
    """
    program = nvrtc.Program("self_test", HERE.parent.parent / "cuda" / "self_test.cu")
    kernel = nvrtc.load(nvrtc.Variant("self-test", program, ("pointer",), 32, 1), device)
    wrong = torch.full((1,), -1, dtype=torch.int32, device=device)
    kernel.launch((1, 1, 1), wrong.data_ptr())
    count = int(wrong.item())
    if count:
        logger.warning("Tensor cores of %s: %d wrong subnormal products.", device, count)
    else:
        logger.info("Tensor cores of %s multiply subnormals exactly.", device)
    return count == 0


@cache
def _kernel(
    layout: RecordLayout, dtype: torch.dtype, shape: Shape, device: torch.device
) -> nvrtc.Kernel:
    if dtype not in DTYPES:
        raise ValueError(f"query has dtype {dtype}. Pass fp16, bf16 or fp32.")
    magic = not subnormals_are_exact(device)
    return nvrtc.load(variant(layout, dtype, shape, magic=magic), device)


@cache
def _scratch(
    batch: int, num_q_heads: int, num_kv_heads: int, layout: RecordLayout, device: torch.device
) -> Scratch:
    heads, blocks = head_blocks(layout, num_q_heads, num_kv_heads)
    ctas = _processors(device) * shapes(layout, heads)[-1].ctas
    return Scratch(ctas, heads, layout.head_dim, batch * num_kv_heads * blocks)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _nothing(query: object, cache: object, out: object) -> None:
    """Without requests there is nothing to launch."""


def _check_address(name: str, tensor: torch.Tensor) -> None:
    if tensor.data_ptr() % 16:
        raise ValueError(f"{name} begins at {tensor.data_ptr():#x}. Align it to 16 bytes.")


def _check_rows(name: str, rows: torch.Tensor) -> None:
    """Refuse what the kernel's loads of 16 bytes would misread."""
    dense = rows.stride(2) == 1 and rows.stride(1) == rows.shape[2]
    step = rows.stride(0) * rows.element_size() if len(rows) > 1 else 0
    if not dense or step % 16 or rows.data_ptr() % 16:
        raise ValueError(
            f"{name} has strides {tuple(rows.stride())} at address {rows.data_ptr():#x}. Pass "
            "dense heads, an address and a stride between requests that are multiples of 16 bytes."
        )

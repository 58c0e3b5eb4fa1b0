"""Storing in CUDA C++: exact rows as they come, and whole tiles when they are due.

Two kernels: `write_rows` for the ring and the sink, `seal` with the encoder of `ops.quantize`. What
distinguishes a decode step from a prefill is a run-time argument, so a model needs one form of
each. Grids follow from the batch, the new tokens and the heads; a prefill among many decode rows
does not multiply them.
"""

from __future__ import annotations

from functools import cache as memoize
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvarn_core import nvrtc
from kvarn_core.layout import HEAD_DIMS, RecordLayout
from kvarn_core.layout_header import HEADER_NAME, layout_header
from kvarn_core.ops.quantize import cuda as encoder
from kvarn_core.spec import PRESETS, Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvarn_core.ops.store import Write

HERE = Path(__file__).parent
ROWS_THREADS = 128
DTYPES = {torch.float16: ("fp16", 0), torch.bfloat16: ("bf16", 1), torch.float32: ("fp32", 2)}
PLACES = ("pointer",) * 6 + ("i64",) * 4  # tensors and strides that both kernels take


def prepare(
    op: str,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    layout: RecordLayout,
    recipe: Recipe,
    max_query_len: int,
) -> Write:
    """See `kvarn_core.ops.store.prepare`."""
    _check(key, value)
    _addresses(key, value, cache)
    strides = key.stride(0), value.stride(0), cache.stride(0), page_table.stride(0)
    batch, heads = len(seq_lens), cache.shape[1]
    if batch == 0 or max_query_len == 0:
        return _nothing
    if op == "seal":
        one_new = max_query_len == 1  # the deadline of at most one head in G
        slots = batch if one_new else len(key) // layout.group + batch
        grid = (slots, -(-heads // layout.group) if one_new else heads, 2)
        kernel = _seal_kernel(layout, recipe, key.dtype, cache.device)
    else:
        to_ring = op == "append"
        most = min(max_query_len, layout.ring_rows if to_ring else layout.sink_rows)
        grid = (-(-most * heads * 2 * layout.head_dim // 8 // ROWS_THREADS), batch, 1)
        kernel = _rows_kernel(layout, key.dtype, cache.device)

    def run(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, layer: int = 0) -> None:
        places = (
            *_addresses(key, value, cache),
            page_table.data_ptr(), seq_lens.data_ptr(), cu_seqlens_q.data_ptr(), *strides,
        )  # fmt: skip
        if op == "seal":
            kernel.launch(grid, *places, batch, heads, layer, one_new)
        else:
            kernel.launch(grid, *places, heads, to_ring)

    return run


def rows_variant(layout: RecordLayout, dtype: torch.dtype) -> nvrtc.Variant:
    """The compiled form that writes exact rows, for rows of the model in `dtype`."""
    name, number = DTYPES[dtype]
    headers = {HEADER_NAME: layout_header(layout)}
    constants = {"THREADS": ROWS_THREADS, "INPUT": number}
    program = nvrtc.Program("write_rows", HERE / "rows.cu", headers, constants)
    name = f"rows-{layout.preset.name[6:]}-d{layout.head_dim}-{name}"
    return nvrtc.Variant(name, program, (*PLACES, "i32", "i32"), ROWS_THREADS, 1)


def seal_variant(layout: RecordLayout, recipe: Recipe, dtype: torch.dtype) -> nvrtc.Variant:
    """The compiled form that writes records, for rows of the model in `dtype`."""
    name, number = DTYPES[dtype]
    constants = {**encoder.defines(layout, recipe), "INPUT": number}
    program = nvrtc.Program("seal", HERE / "seal.cu", encoder.headers(layout), constants)
    name = f"seal-{layout.preset.name[6:]}-d{layout.head_dim}-{name}-{recipe.name}"
    threads, ctas = encoder.threads_and_ctas(layout)
    arguments = (*PLACES, "i32", "i32", "i32", "i32")
    return nvrtc.Variant(name, program, arguments, threads, ctas, encoder.shared_bytes(layout))


def variants() -> Iterator[nvrtc.Variant]:
    """Every compiled form of the kernels; see `kvarn_core.nvrtc`."""
    for preset in PRESETS.values():
        for dim in HEAD_DIMS:
            layout = RecordLayout(preset, dim)
            for dtype in DTYPES:
                yield rows_variant(layout, dtype)
                for recipe in (Recipe.KVARN, Recipe.PAPER):
                    yield seal_variant(layout, recipe, dtype)


def _check(key: torch.Tensor, value: torch.Tensor) -> None:
    """Refuse what the kernels would misread."""
    if key.dtype not in DTYPES or value.dtype != key.dtype:
        raise ValueError(
            f"key and value have dtypes {key.dtype} and {value.dtype}. "
            "Pass both in fp16, in bf16 or in fp32."
        )


def _addresses(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor) -> tuple[int, int, int]:
    """Addresses of a layer's tensors, which kernels read 16 bytes at a time."""
    addresses = key.data_ptr(), value.data_ptr(), cache.data_ptr()
    if (addresses[0] | addresses[1] | addresses[2]) % 16:
        named = zip(("key", "value", "cache"), addresses, strict=True)
        name, address = next(found for found in named if found[1] % 16)
        raise ValueError(f"{name} begins at {address:#x}. Align it to 16 bytes.")
    return addresses


def _nothing(key: object, value: object, cache: object, layer: int = 0) -> None:
    """Without requests or new tokens there is nothing to launch."""


@memoize
def _rows_kernel(layout: RecordLayout, dtype: torch.dtype, device: torch.device) -> nvrtc.Kernel:
    return nvrtc.load(rows_variant(layout, dtype), device)


@memoize
def _seal_kernel(
    layout: RecordLayout, recipe: Recipe, dtype: torch.dtype, device: torch.device
) -> nvrtc.Kernel:
    return nvrtc.load(seal_variant(layout, recipe, dtype), device)

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

HERE = Path(__file__).parent
ROWS_THREADS = 128
DTYPES = {torch.float16: ("fp16", 0), torch.bfloat16: ("bf16", 1), torch.float32: ("fp32", 2)}
PLACES = ("pointer",) * 6 + ("i64",) * 4  # tensors and strides that both kernels take


def write_sink(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    layout: RecordLayout,
    max_query_len: int,
) -> None:
    """See `kvarn_core.ops.store.write_sink`."""
    most = min(max_query_len, layout.sink_rows)
    inputs = key, value, cache, page_table, seq_lens, cu_seqlens_q
    _launch_rows(*inputs, layout, most, to_ring=False)


def append(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    layout: RecordLayout,
    max_query_len: int,
) -> None:
    """See `kvarn_core.ops.store.append`."""
    most = min(max_query_len, layout.ring_rows)
    inputs = key, value, cache, page_table, seq_lens, cu_seqlens_q
    _launch_rows(*inputs, layout, most, to_ring=True)


def seal(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    layout: RecordLayout,
    recipe: Recipe,
    layer: int,
    max_query_len: int,
) -> None:
    """See `kvarn_core.ops.store.seal`."""
    batch, heads = seq_lens.shape[0], cache.shape[1]
    if batch == 0 or max_query_len == 0:
        return
    one_new = max_query_len == 1  # the deadline of at most one head in G
    slots = batch if one_new else key.shape[0] // layout.group + batch
    columns = -(-heads // layout.group) if one_new else heads
    places = _places(key, value, cache, page_table, seq_lens, cu_seqlens_q)
    kernel = _seal_kernel(layout, recipe, key.dtype, cache.device)
    kernel.launch((slots, columns, 2), *places, batch, heads, layer, one_new)


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


def _launch_rows(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    layout: RecordLayout,
    most: int,
    *,
    to_ring: bool,
) -> None:
    """Write at most `most` rows per request."""
    batch, heads = seq_lens.shape[0], cache.shape[1]
    if batch == 0 or most == 0:
        return
    ctas = -(-most * heads * 2 * layout.head_dim // 8 // ROWS_THREADS)
    places = _places(key, value, cache, page_table, seq_lens, cu_seqlens_q)
    kernel = _rows_kernel(layout, key.dtype, cache.device)
    kernel.launch((ctas, batch, 1), *places, heads, to_ring)


def _places(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
) -> tuple[int, ...]:
    """Addresses and strides; refuses what the kernels would misread."""
    if key.dtype not in DTYPES or value.dtype != key.dtype:
        raise ValueError(
            f"key and value have dtypes {key.dtype} and {value.dtype}. "
            "Pass both in fp16, in bf16 or in fp32."
        )
    addresses = key.data_ptr(), value.data_ptr(), cache.data_ptr()
    for i, address in enumerate(addresses):
        if address % 16:
            name = ("key", "value", "cache")[i]
            raise ValueError(f"{name} begins at {address:#x}. Align it to 16 bytes.")
    numbers = page_table, seq_lens, cu_seqlens_q
    for i, tensor in enumerate(numbers):
        if tensor.dtype != torch.int32 or tensor.stride(-1) != 1:
            name = ("page_table", "seq_lens", "cu_seqlens_q")[i]
            raise ValueError(
                f"{name} has dtype {tensor.dtype} and strides {tensor.stride()}. "
                "Pass int32, contiguous along the last dimension."
            )
    return (
        *addresses, page_table.data_ptr(), seq_lens.data_ptr(), cu_seqlens_q.data_ptr(),
        key.stride(0), value.stride(0), cache.stride(0), page_table.stride(0),
    )  # fmt: skip


@memoize
def _rows_kernel(layout: RecordLayout, dtype: torch.dtype, device: torch.device) -> nvrtc.Kernel:
    return nvrtc.load(rows_variant(layout, dtype), device)


@memoize
def _seal_kernel(
    layout: RecordLayout, recipe: Recipe, dtype: torch.dtype, device: torch.device
) -> nvrtc.Kernel:
    return nvrtc.load(seal_variant(layout, recipe, dtype), device)

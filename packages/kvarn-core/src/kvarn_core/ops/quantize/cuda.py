"""Tile to record in CUDA C++: one CTA encodes one tile of K or of V.

`defines` and `headers` are what the encoder needs; whoever includes ``encode.cuh`` compiles with
them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvarn_core import nvrtc
from kvarn_core.layout import HEAD_DIMS, RecordLayout
from kvarn_core.layout_header import HEADER_NAME, layout_header
from kvarn_core.spec import PRESETS, Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
LANES = 16  # threads that share the rows of a tile, as in tile.cuh


def encode_key(key: torch.Tensor, layout: RecordLayout, recipe: Recipe) -> torch.Tensor:
    """K tiles [N, G, D] to bytes [N, key_bytes]."""
    return _encode(key, layout, recipe, is_value=False)


def encode_value(value: torch.Tensor, layout: RecordLayout, recipe: Recipe) -> torch.Tensor:
    """V tiles [N, G, D] to bytes [N, record_bytes - key_bytes]."""
    return _encode(value, layout, recipe, is_value=True)


def threads_and_ctas(layout: RecordLayout) -> tuple[int, int]:
    """Threads of a CTA, each with at most 64 elements, and CTAs of a processor."""
    return (512, 1) if layout.head_dim == 256 else (256, 2)


def shared_bytes(layout: RecordLayout) -> int:
    """Shared memory of a CTA: one after the other the tile, sums of columns, the packed half."""
    threads, _ = threads_and_ctas(layout)
    sums = (
        4 * (2 * threads // LANES * (cols + 16) + 2 * LANES * (cols // 16 + 4) + 6 * threads // 32)
        for cols in (layout.group, layout.head_dim)
    )
    halves = layout.key_bytes, layout.record_bytes - layout.key_bytes
    return max(2 * layout.group * layout.head_dim, *sums, *halves)


def headers(layout: RecordLayout) -> dict[str, str]:
    """Text of the encoder's headers by name."""
    own = {path.name: path.read_text() for path in sorted(HERE.glob("*.cuh"))}
    return {HEADER_NAME: layout_header(layout), **own}


def defines(layout: RecordLayout, recipe: Recipe) -> dict[str, int]:
    """Constants of the encoder: launch shape and recipe."""
    threads, ctas = threads_and_ctas(layout)
    return {
        "THREADS": threads, "CTAS": ctas, "SHARED_BYTES": shared_bytes(layout),
        "RELATIVE": int(recipe.relative), "ITERATIONS": recipe.iterations,
        "RANGE_REFITS": recipe.range_refits, "FACTOR_REFITS": recipe.factor_refits,
        "RESTORE_NORM": int(recipe.restore_norm),
    }  # fmt: skip


def variant(layout: RecordLayout, recipe: Recipe) -> nvrtc.Variant:
    """The compiled form for a layout and a recipe."""
    program = nvrtc.Program(
        "quantize", HERE / "quantize.cu", headers(layout), defines(layout, recipe)
    )
    name = f"quantize-{layout.preset.name[6:]}-d{layout.head_dim}-{recipe.name}"
    arguments = ("pointer", "pointer", "i32")
    threads, ctas = threads_and_ctas(layout)
    return nvrtc.Variant(name, program, arguments, threads, ctas, shared_bytes(layout))


def variants() -> Iterator[nvrtc.Variant]:
    """Every compiled form of the kernel; see `kvarn_core.nvrtc`."""
    for preset in PRESETS.values():
        for dim in HEAD_DIMS:
            for recipe in (Recipe.KVARN, Recipe.PAPER):
                yield variant(RecordLayout(preset, dim), recipe)


def _encode(
    tiles: torch.Tensor, layout: RecordLayout, recipe: Recipe, *, is_value: bool
) -> torch.Tensor:
    nbytes = layout.record_bytes - layout.key_bytes if is_value else layout.key_bytes
    parts = torch.empty(len(tiles), nbytes, dtype=torch.uint8, device=tiles.device)
    if len(tiles):
        tiles = tiles.contiguous()
        if tiles.data_ptr() % 16:
            tiles = tiles.clone()
        kernel = _kernel(layout, recipe, tiles.device)
        kernel.launch((len(tiles), 1, 1), tiles.data_ptr(), parts.data_ptr(), is_value)
    return parts


@cache
def _kernel(layout: RecordLayout, recipe: Recipe, device: torch.device) -> nvrtc.Kernel:
    return nvrtc.load(variant(layout, recipe), device)

"""Tile to record and back: the algorithm itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvarn_core.dispatch import select
from kvarn_core.ops.quantize import reference
from kvarn_core.spec import Recipe

if TYPE_CHECKING:
    from kvarn_core.layout import RecordLayout

KERNELS = ("triton", "cuda")


def quantize(
    key: torch.Tensor,
    value: torch.Tensor,
    layout: RecordLayout,
    recipe: Recipe = Recipe.KVARN,
    *,
    engine: str | None = None,
) -> torch.Tensor:
    """Encode complete tiles into records.

    Parameters
    ----------
    key, value : Tensor [N, G, D], fp16 (fp32 for the debug preset)
        Rotated rows as `exact_rows` returns them. Read only.
    layout : RecordLayout
        Byte layout of the preset.
    recipe : Recipe
        How the encoder chooses factors and ranges; readers do not depend on it.
    engine : str, optional
        ``reference``, ``triton`` or ``cuda``; chosen by `kvarn_core.dispatch` if not given. Engines
        agree up to the order of sums: almost all codes are equal, and the factors of their columns.

    Returns
    -------
    Tensor [N, layout.record_bytes], uint8
        One record per tile. A record depends on its own tile only.

    Raises
    ------
    ValueError
        If a shape or dtype disagrees with `layout`.

    References
    ----------
    arXiv 2606.03458; docs/explanation/algorithm.md.
    """
    return torch.cat(
        (
            quantize_key(key, layout, recipe, engine=engine),
            quantize_value(value, layout, recipe, engine=engine),
        ),
        dim=1,
    )


def quantize_key(
    key: torch.Tensor,
    layout: RecordLayout,
    recipe: Recipe = Recipe.KVARN,
    *,
    engine: str | None = None,
) -> torch.Tensor:
    """Encode K tiles [N, G, D] into the K part [N, layout.key_bytes], uint8; see `quantize`."""
    _check_tiles("key", key, layout)
    chosen = select(key.device, layout, engine, kernels=KERNELS)
    if chosen == "reference":
        return reference.encode_key(key, layout, recipe)
    if chosen == "cuda":
        from kvarn_core.ops.quantize import cuda

        return cuda.encode_key(key, layout, recipe)
    from kvarn_core.ops.quantize import triton

    return triton.encode_key(key, layout, recipe)


def quantize_value(
    value: torch.Tensor,
    layout: RecordLayout,
    recipe: Recipe = Recipe.KVARN,
    *,
    engine: str | None = None,
) -> torch.Tensor:
    """Encode V tiles [N, G, D] into the V part of records, uint8; see `quantize`."""
    _check_tiles("value", value, layout)
    chosen = select(value.device, layout, engine, kernels=KERNELS)
    if chosen == "reference":
        return reference.encode_value(value, layout, recipe)
    if chosen == "cuda":
        from kvarn_core.ops.quantize import cuda

        return cuda.encode_value(value, layout, recipe)
    from kvarn_core.ops.quantize import triton

    return triton.encode_value(value, layout, recipe)


def dequantize(
    records: torch.Tensor,
    layout: RecordLayout,
    dtype: torch.dtype = torch.float32,
    *,
    engine: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode records into rotated tiles.

    Parameters
    ----------
    records : Tensor [N, layout.record_bytes], uint8
        As `quantize` wrote them. Read only.
    layout : RecordLayout
        Byte layout of the preset.
    dtype : torch.dtype
        Result dtype. Arithmetic is fp32; fp16 saturates.
    engine : str, optional
        As in `quantize`. There is no kernel for whole tiles alone (`ops.gather` decodes pages):
        every engine runs the reference on the device of `records`, with the same bits.

    Returns
    -------
    key, value : Tensor [N, G, D], `dtype`
        ``(code * scale + zero)`` times the column factor, still rotated.

    Raises
    ------
    ValueError
        If `records` is not uint8 of the layout's width.
    """
    if records.dtype != torch.uint8 or records.shape[1:] != (layout.record_bytes,):
        raise ValueError(
            f"records has dtype {records.dtype} and shape {tuple(records.shape)}. "
            f"Pass uint8 [N, {layout.record_bytes}] for {layout.preset.name}."
        )
    select(records.device, layout, engine)  # an engine that cannot run is refused here too
    return reference.decode(records, layout, dtype)


def _check_tiles(name: str, tiles: torch.Tensor, layout: RecordLayout) -> None:
    dtype = torch.float32 if layout.preset.is_debug else torch.float16
    if tiles.dtype != dtype or tiles.shape[1:] != (layout.group, layout.head_dim):
        raise ValueError(
            f"{name} has dtype {tiles.dtype} and shape {tuple(tiles.shape)}. "
            f"Pass {dtype} [N, {layout.group}, {layout.head_dim}], rotated by exact_rows."
        )

"""Ways to store a KV cache, each as what a reader gets back.

The two KVarN recipes go through real records; the other methods are emulated in torch with the same
bits, so that a comparison shows the method and nothing else. How many rows stay exact is not
decided here (see `fidelity.CachePolicy`). What is traded away: nothing here saves memory.

Sources: KIVI, arXiv 2402.02750 (keys per channel, values per token); KVarN, arXiv 2606.03458.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvarn_core import Preset, Recipe, RecordLayout
from kvarn_core.ops.quantize import dequantize, quantize
from kvarn_core.rotation import exact_rows, rotate

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Tiles = Callable[[Tensor, Tensor, Preset], tuple[Tensor, Tensor]]
    Rows = Callable[[Tensor, Preset], Tensor]


@dataclass(frozen=True)
class Method:
    """One way to store keys and values.

    Parameters
    ----------
    exact : callable
        ``exact(rows, preset)``: rows [..., D], fp32, as the method keeps rows that it does not
        quantise.
    quantise : callable or None
        ``quantise(key, value, preset)``: complete tiles [N, G, D], fp32, to what is read back, same
        shapes. None keeps every row exact.
    balanced : bool
        Whether the norms of queries and keys are balanced first (`kvarn_core.balance`).
    """

    exact: Rows
    quantise: Tiles | None
    balanced: bool = False


def half(rows: Tensor, preset: Preset) -> Tensor:
    """Rows rounded to fp16."""
    return rows.half().float()


def rotated_half(rows: Tensor, preset: Preset) -> Tensor:
    """Rows rounded to fp16 in the rotated basis, as KVarN keeps exact rows."""
    layout = RecordLayout(preset, rows.shape[-1])
    return rotate(exact_rows(rows, layout).float())


def round_to_grid(x: Tensor, dim: int, bits: int) -> Tensor:
    """Asymmetric round to nearest with one fp16 scale and zero per row along `dim`."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-10)
    codes = ((x - low) / scale).round().clamp(0, 2**bits - 1)
    read: Tensor = codes * scale.half().float() + low.half().float()
    return read


def rtn(key: Tensor, value: Tensor, preset: Preset) -> tuple[Tensor, Tensor]:
    """Round to nearest per token, keys and values alike."""
    return round_to_grid(key, 2, preset.key_bits), round_to_grid(value, 2, preset.value_bits)


def kivi(key: Tensor, value: Tensor, preset: Preset) -> tuple[Tensor, Tensor]:
    """Keys per channel over the tokens of a tile, values per token."""
    return round_to_grid(key, 1, preset.key_bits), round_to_grid(value, 2, preset.value_bits)


def hadamard(key: Tensor, value: Tensor, preset: Preset) -> tuple[Tensor, Tensor]:
    """As `kivi`, in the basis of a Hadamard rotation."""
    rotated = kivi(rotated_half_tiles(key), rotated_half_tiles(value), preset)
    return rotate(rotated[0]), rotate(rotated[1])


def rotated_half_tiles(tiles: Tensor) -> Tensor:
    """Tiles in the rotated basis, rounded to fp16."""
    return rotate(tiles).half().float()


def recorded(recipe: Recipe) -> Tiles:
    """Storage in KVarN records filled by `recipe`."""

    def through_records(key: Tensor, value: Tensor, preset: Preset) -> tuple[Tensor, Tensor]:
        layout = RecordLayout(preset, key.shape[-1])
        records = quantize(exact_rows(key, layout), exact_rows(value, layout), layout, recipe)
        key_tiles, value_tiles = dequantize(records, layout)
        return rotate(key_tiles), rotate(value_tiles)

    return through_records


METHODS: dict[str, Method] = {
    "fp16": Method(half, None),
    "rotated fp16": Method(rotated_half, None),
    "rtn": Method(half, rtn),
    "kivi": Method(half, kivi),
    "hadamard": Method(rotated_half, hadamard),
    "paper": Method(rotated_half, recorded(Recipe.PAPER)),
    "kvarn": Method(rotated_half, recorded(Recipe.KVARN), balanced=True),
}

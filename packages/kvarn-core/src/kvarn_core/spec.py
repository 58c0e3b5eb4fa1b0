"""What is stored, and how a tile is encoded: presets and recipes, as data.

A *preset* fixes bytes: code bits of keys and values and the tokens per tile. A *recipe* fixes how
the encoder fills those bytes; readers never depend on it. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Preset:
    """Bits and group size of a compressed KV cache.

    Parameters
    ----------
    key_bits, value_bits : int
        Bits per code: 2 or 4. Both 32 is the debug preset, which stores fp32 rows instead of codes.
    group : int
        Tokens per tile, and the page size: 64 or 128.

    Raises
    ------
    ValueError
        If the combination does not exist.
    """

    key_bits: int
    value_bits: int
    group: int

    def __post_init__(self) -> None:
        bits = (self.key_bits, self.value_bits)
        if bits not in {(4, 2), (4, 4), (2, 2), (32, 32)}:
            raise ValueError(f"No preset has {bits[0]}-bit keys and {bits[1]}-bit values.")
        if self.group not in {64, 128}:
            raise ValueError(f"group {self.group} is not supported. Use 64 or 128.")

    @property
    def is_debug(self) -> bool:
        """Whether records hold fp32 rows: nothing is quantised, everything else is real."""
        return self.key_bits == 32

    @property
    def name(self) -> str:
        """Name of the cache dtype, for example ``kvarn_k4v2_g128``."""
        if self.is_debug:
            return f"kvarn_debug32_g{self.group}"
        return f"kvarn_k{self.key_bits}v{self.value_bits}_g{self.group}"

    @classmethod
    def from_name(cls, name: str) -> Preset:
        """Look a preset up by its name.

        Raises
        ------
        ValueError
            If no preset, public or debug, has this name.
        """
        try:
            return {**PRESETS, **DEBUG_PRESETS}[name]
        except KeyError:
            raise ValueError(
                f"{name!r} is not a KVarN preset. Choose one of {', '.join(PRESETS)}."
            ) from None


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for group in (128, 64)
    for preset in (Preset(4, 2, group), Preset(4, 4, group), Preset(2, 2, group))
}
DEBUG_PRESETS: dict[str, Preset] = {
    preset.name: preset for preset in (Preset(32, 32, 128), Preset(32, 32, 64))
}


@dataclass(frozen=True)
class Recipe:
    """How the encoder turns a tile into a record.

    Parameters
    ----------
    name : str
        For reports.
    relative : bool
        Measure the tile relative to its own magnitude (scale invariant). False is the published
        log-domain form with absolute clips.
    iterations : int
        Passes of variance normalisation.
    range_refits : int
        Least-squares rounds of a 2-bit range; 0 takes the minimum and maximum of each row.
    factor_refits : int
        Least-squares rounds of the column factors against the decoded tile.
    restore_norm : bool
        Give 2-bit value rows their norm back after quantisation.

    Notes
    -----
    `Recipe.KVARN` is the default, `Recipe.PAPER` reproduces arXiv 2606.03458 as shipped.
    """

    name: str
    relative: bool
    iterations: int
    range_refits: int
    factor_refits: int
    restore_norm: bool

    KVARN: ClassVar[Recipe]
    PAPER: ClassVar[Recipe]

    @classmethod
    def from_name(cls, name: str) -> Recipe:
        """Look a recipe up by its name: ``kvarn`` or ``paper``.

        Raises
        ------
        ValueError
            If there is no such recipe.
        """
        recipes = {recipe.name: recipe for recipe in (cls.KVARN, cls.PAPER)}
        if name not in recipes:
            raise ValueError(f"{name!r} is not a recipe. Choose one of {', '.join(recipes)}.")
        return recipes[name]


Recipe.KVARN = Recipe(
    "kvarn", relative=True, iterations=4, range_refits=2, factor_refits=2, restore_norm=True
)
Recipe.PAPER = Recipe(
    "paper", relative=False, iterations=8, range_refits=0, factor_refits=0, restore_norm=False
)

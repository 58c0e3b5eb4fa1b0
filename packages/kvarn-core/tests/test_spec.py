from __future__ import annotations

import dataclasses
import re

import pytest

from kvarn_core.spec import DEBUG_PRESETS, PRESETS, Preset, Recipe

NAMES = {
    "kvarn_k4v2_g128": (4, 2, 128),
    "kvarn_k4v4_g128": (4, 4, 128),
    "kvarn_k2v2_g128": (2, 2, 128),
    "kvarn_k4v2_g64": (4, 2, 64),
    "kvarn_k4v4_g64": (4, 4, 64),
    "kvarn_k2v2_g64": (2, 2, 64),
}


def test_the_public_presets_are_exactly_these() -> None:
    bits = {name: (p.key_bits, p.value_bits, p.group) for name, p in PRESETS.items()}
    assert bits == NAMES
    assert next(iter(PRESETS)) == "kvarn_k4v2_g128", "the default comes first"
    assert not any(preset.is_debug for preset in PRESETS.values())


def test_the_debug_presets_are_not_public() -> None:
    assert set(DEBUG_PRESETS) == {"kvarn_debug32_g128", "kvarn_debug32_g64"}
    assert not set(DEBUG_PRESETS) & set(PRESETS)
    assert all(preset.is_debug for preset in DEBUG_PRESETS.values())


@pytest.mark.parametrize("name", [*NAMES, *DEBUG_PRESETS])
def test_a_name_gives_its_preset_back(name: str) -> None:
    assert Preset.from_name(name).name == name


def test_an_unknown_preset_is_refused_with_the_choices() -> None:
    sentence = (
        "'kvarn_k3v3_g128' is not a KVarN preset. Choose one of kvarn_k4v2_g128, kvarn_k4v4_g128, "
        "kvarn_k2v2_g128, kvarn_k4v2_g64, kvarn_k4v4_g64, kvarn_k2v2_g64."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        Preset.from_name("kvarn_k3v3_g128")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 4, 128), "No preset has 2-bit keys and 4-bit values."),
        ((8, 8, 128), "No preset has 8-bit keys and 8-bit values."),
        ((4, 2, 32), "group 32 is not supported. Use 64 or 128."),
    ],
)
def test_impossible_presets_are_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Preset(*arguments)


def test_presets_and_recipes_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Preset(4, 2, 128).group = 64  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe.KVARN.iterations = 1  # type: ignore[misc]


def test_the_recipes() -> None:
    assert Recipe.from_name("kvarn") is Recipe.KVARN
    assert Recipe.from_name("paper") is Recipe.PAPER
    assert (Recipe.KVARN.iterations, Recipe.PAPER.iterations) == (4, 8)
    with pytest.raises(ValueError, match=r"'none' is not a recipe. Choose one of kvarn, paper\."):
        Recipe.from_name("none")

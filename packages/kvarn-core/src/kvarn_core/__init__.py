"""KVarN: 4-bit keys and 2-bit values for the KV cache of large language models."""

from __future__ import annotations

from kvarn_core.layout import RecordLayout
from kvarn_core.spec import PRESETS, Preset, Recipe

__version__ = "0.1.0"
__all__ = ["PRESETS", "Preset", "Recipe", "RecordLayout"]

"""Write the golden records: python packages/kvarn-core/tests/golden/make.py.

Run it only for a deliberate change of the format or of the encoder, and say so in the changelog.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file

from kvarn_core import PRESETS, Recipe, RecordLayout
from kvarn_core.layout import HEAD_DIMS
from kvarn_core.ops.quantize import dequantize, quantize
from kvarn_core.testing.inputs import fixed_tile


def main() -> None:
    for name, preset in PRESETS.items():
        tensors: dict[str, torch.Tensor] = {}
        digests: dict[str, str] = {}
        for dim in HEAD_DIMS:
            layout = RecordLayout(preset, dim)
            key = fixed_tile(preset.group, dim, seed=dim)[None]
            value = fixed_tile(preset.group, dim, seed=dim + 1)[None]
            for recipe in (Recipe.KVARN, Recipe.PAPER):
                record = quantize(key, value, layout, recipe)
                case = f"d{dim}-{recipe.name}"
                tensors[case] = record[0]
                decoded = torch.cat(dequantize(record, layout))
                digests[case] = hashlib.sha256(decoded.numpy().tobytes()).hexdigest()
        save_file(tensors, Path(__file__).with_name(f"{name}.safetensors"), metadata=digests)


if __name__ == "__main__":
    main()

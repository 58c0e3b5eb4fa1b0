"""The small trained model: data, training, tasks, tokenizer, and outliers built into it."""

from pathlib import Path

SMALL_MODEL = Path(__file__).parents[3] / "models" / "small"  # in a checkout

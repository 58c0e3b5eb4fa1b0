"""The small model's vocabulary: one token per character or keyword, no merges.

Text and ids determine each other: a keyword is a label in brackets (`[7]`) or a name in angle
brackets (`<recall>`), everything else is one token per character of ASCII. The same table is
written as a Hugging Face `tokenizer.json`, so that any server reads exactly what training saw; what
is traded away is text outside ASCII, which becomes `<unk>`.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SPECIALS = ("<pad>", "<eos>", "<unk>")
DIGITS = "0123456789"
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
SYMBOLS = ":;?=+-@"
MAX_LABEL = 64
LABELS = tuple(f"[{n}]" for n in range(1, MAX_LABEL + 1))
KEYWORDS = ("<recall>", "<arith>")
PUNCTUATION = "\t\n !\"#$%&'()*,./<>[\\]^_`{|}~"
"""What program text needs beyond the alphabet of the tasks."""
LATER_KEYWORDS = ("<program>", "<graph>")
"""At the end, so that weights trained before they existed keep their ids."""

TOKENS: tuple[str, ...] = (
    *SPECIALS,
    *KEYWORDS,
    *DIGITS,
    *LETTERS,
    *SYMBOLS,
    *LABELS,
    *PUNCTUATION,
    *LATER_KEYWORDS,
)
IDS: dict[str, int] = {token: i for i, token in enumerate(TOKENS)}
PAD, EOS, UNK = (IDS[token] for token in SPECIALS)

PATTERN = "|".join((*map(re.escape, (*SPECIALS, *KEYWORDS, *LATER_KEYWORDS, *LABELS)), r"[\s\S]"))


def encode(text: str) -> list[int]:
    """Token ids of `text`; a character outside the vocabulary becomes `<unk>`."""
    return [IDS.get(token, UNK) for token in re.findall(PATTERN, text)]


def decode(ids: Iterable[int]) -> str:
    """Text of `ids`, without special tokens."""
    return "".join(TOKENS[i] for i in ids if i >= len(SPECIALS))


def save_tokenizer(folder: Path, *, max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` for Hugging Face tokenizers.

    Parameters
    ----------
    folder : Path
        Existing folder; files of the same name are replaced.
    max_length : int
        Largest sequence the model accepts, in tokens.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": IDS[t], "content": t, "special": True, **flags} for t in SPECIALS],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": PATTERN},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": IDS, "unk_token": "<unk>"},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

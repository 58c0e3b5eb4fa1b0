"""Random prompts of an exact length, as text, for load generators.

Text and token count must agree, or two arms are not loaded alike and a prompt may not fit. So
words are drawn that the tokenizer keeps apart: a space and letters, each one token, or single
letters where there are no such words; and every prompt is counted again. Prompts are random from
their first token on, so none is found in a prefix cache by chance.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from tokenizers import Tokenizer

_MANY_WORDS = 1000


class PromptSource:
    """Draws prompts for one tokenizer.

    Parameters
    ----------
    folder : Path
        Folder with ``tokenizer.json``.

    Raises
    ------
    ValueError
        If there is no such file, or the tokenizer has neither words nor letters of its own.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(
                f"{folder} has no tokenizer.json. Name a folder that has one with --tokenizer; "
                "speed does not depend on it."
            )
        self.tokenizer: Tokenizer = Tokenizer.from_file(str(file))
        texts = {i: self.tokenizer.decode([i]) for i in self.tokenizer.get_vocab().values()}
        words = sorted(i for i, text in texts.items() if re.fullmatch(r" [A-Za-z]+", text))
        letters = sorted(i for i, text in texts.items() if re.fullmatch(r"[A-Za-z]", text))
        self.ids = np.array(words if len(words) >= _MANY_WORDS else letters)
        if len(self.ids) == 0:
            raise ValueError(f"The tokenizer in {folder} has no token of letters to build prompts.")

    def draw(self, count: int, length: int, seed: int) -> list[str]:
        """`count` prompts of `length` tokens; a larger count begins with the same prompts.

        Raises
        ------
        ValueError
            If the tokenizer reads another number of tokens than were drawn.
        """
        rng = np.random.default_rng([seed, length])
        prompts = []
        for _ in range(count):
            prompt = self.tokenizer.decode(
                self.ids[rng.integers(0, len(self.ids), length)].tolist()
            )
            read = len(self.tokenizer.encode(prompt).ids)
            if read != length:
                raise ValueError(
                    f"The tokenizer reads {read} tokens where {length} were written. Choose "
                    "another with --tokenizer."
                )
            prompts.append(prompt)
        return prompts


def write_requests(file: Path, requests: Iterable[tuple[str, int]]) -> None:
    """Write prompts and answer lengths in tokens, one JSON object per line."""
    lines = (json.dumps({"prompt": text, "output_tokens": tokens}) for text, tokens in requests)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")

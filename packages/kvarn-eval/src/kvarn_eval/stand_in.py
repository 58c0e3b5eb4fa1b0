"""A tokenizer that reads back every token random weights can write.

Speed is measured with the tokenizer at hand, and a model has more token ids than a small or an
unpadded vocabulary. An id without text is dear: vLLM decodes an answer step by step behind its
prompt, and until some text comes out, every step decodes the whole prompt again. With prompts of
16,384 tokens that took 0.8 ms per token (one core of an AMD EPYC), more than a server has time for.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from kvarn_eval.preflight import Missing

if TYPE_CHECKING:
    from pathlib import Path


def vocabulary(config: dict[str, Any]) -> int:
    """Number of token ids of a model, from its ``config.json``.

    Raises
    ------
    Missing
        If the file does not say.
    """
    for part in (config, config.get("text_config", {})):  # the latter of a multimodal model
        if "vocab_size" in part:
            return int(part["vocab_size"])
    raise Missing("The config.json of the model has no vocab_size. Complete it.")


def complete_tokenizer(folder: Path, vocab_size: int, out: Path) -> Path:
    """A tokenizer whose ids 0 to `vocab_size` - 1 all have text; prompts read as before.

    Parameters
    ----------
    folder : Path
        Folder with ``tokenizer.json``.
    vocab_size : int
        Number of ids that the model can write.
    out : Path
        Folder for the completed copy.

    Returns
    -------
    Path
        `folder` if nothing is missing, otherwise `out`.

    Raises
    ------
    Missing
        If ids are missing and the vocabulary is no table of words.
    """
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = content["model"].get("vocab")
    added = {token["id"] for token in content.get("added_tokens", ())}
    known = added | set(vocab.values() if isinstance(vocab, dict) else range(len(vocab or ())))
    lacking = [i for i in range(vocab_size) if i not in known]
    if not lacking:
        return folder
    if not isinstance(vocab, dict):
        raise Missing(
            f"The tokenizer in {folder} has no text for {len(lacking)} of {vocab_size} ids. Name "
            "another with --tokenizer."
        )
    vocab.update({f"<id {i}>": i for i in lacking})
    out.mkdir(exist_ok=True)
    for file in folder.glob("*token*.json"):  # settings and special tokens
        shutil.copy(file, out)
    (out / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return out

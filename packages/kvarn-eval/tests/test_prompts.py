from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from kvarn_eval.prompts import PromptSource, write_requests
from kvarn_eval.small_model import SMALL_MODEL

if TYPE_CHECKING:
    from pathlib import Path


def words_tokenizer(folder: Path, *, merge: bool) -> None:
    """Two thousand words with a space in front; with `merge`, a rule joins the most common pair."""
    words = [
        f" {chr(97 + i // 676)}{chr(97 + i // 26 % 26)}{chr(97 + i % 26)}" for i in range(2000)
    ]
    vocab = {word: i for i, word in enumerate(words)} | {"<unk>": 2000}
    pattern = r" [a-z]+" if not merge else r"[ a-z]{8}"
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": split, "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("length", [1, 128, 1000])
def test_prompts_have_the_length_they_were_asked_for(length: int) -> None:
    source = PromptSource(SMALL_MODEL)
    prompts = source.draw(3, length, seed=1)
    assert [len(source.tokenizer.encode(text).ids) for text in prompts] == [length] * 3
    assert prompts == source.draw(4, length, seed=1)[:3]
    assert prompts != source.draw(3, length, seed=2)


def test_whole_words_are_used_where_there_are_many(tmp_path: Path) -> None:
    words_tokenizer(tmp_path, merge=False)
    source = PromptSource(tmp_path)
    (prompt,) = source.draw(1, 50, seed=0)
    assert prompt.count(" ") == 50


def test_a_tokenizer_that_reads_another_length_is_refused(tmp_path: Path) -> None:
    words_tokenizer(tmp_path, merge=True)
    with pytest.raises(ValueError, match="where 50 were written"):
        PromptSource(tmp_path).draw(1, 50, seed=0)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--tokenizer"):
        PromptSource(tmp_path)


def test_requests_are_lines_of_json(tmp_path: Path) -> None:
    write_requests(tmp_path / "r.jsonl", [("a", 1), ("b", 2)])
    lines = (tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"prompt": "a", "output_tokens": 1},
        {"prompt": "b", "output_tokens": 2},
    ]

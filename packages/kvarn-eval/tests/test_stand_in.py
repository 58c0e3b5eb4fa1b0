"""The tokenizer of random weights: every id has text, and prompts read as before."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from typer.testing import CliRunner

from kvarn_eval.cli import app
from kvarn_eval.preflight import Missing
from kvarn_eval.small_model import SMALL_MODEL
from kvarn_eval.small_model.tokenizer import TOKENS, save_tokenizer
from kvarn_eval.stand_in import complete_tokenizer, vocabulary

if TYPE_CHECKING:
    from pathlib import Path

    from kvarn_eval.schema import Run
    from kvarn_eval.suite_arm import Setup

VOCABULARY = 700


@pytest.fixture
def small(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    save_tokenizer(folder, max_length=8192)
    return folder


def test_a_stream_gives_text_for_every_id(small: Path, tmp_path: Path) -> None:
    folder = complete_tokenizer(small, VOCABULARY, tmp_path / "complete")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = tokenizer.encode("x = 12; [7]").ids
    stream = DecodeStream(ids=prompt, skip_special_tokens=True)
    assert all(stream.step(tokenizer, i) for i in range(3, VOCABULARY))
    assert tokenizer.get_vocab_size() == VOCABULARY
    assert (folder / "tokenizer_config.json").is_file()


def test_prompts_read_as_before(small: Path, tmp_path: Path) -> None:
    folder = complete_tokenizer(small, VOCABULARY, tmp_path / "complete")
    before, after = (Tokenizer.from_file(str(x / "tokenizer.json")) for x in (small, folder))
    text = "".join(TOKENS[3:]) + "<id 500>"
    assert after.encode(text).ids == before.encode(text).ids


def test_a_complete_tokenizer_stays(small: Path, tmp_path: Path) -> None:
    assert complete_tokenizer(small, len(TOKENS), tmp_path / "complete") == small


def test_the_vocabulary_is_that_of_the_text_model() -> None:
    assert vocabulary({"vocab_size": 9}) == vocabulary({"text_config": {"vocab_size": 9}}) == 9
    with pytest.raises(Missing, match="no vocab_size"):
        vocabulary({})


def test_random_weights_are_served_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    def run_suite(setup: Setup, *args: object, **kwargs: object) -> Run:
        seen.append(setup.tokenizer)
        raise RuntimeError("enough")

    monkeypatch.setattr("kvarn_eval.suite_run.run_suite", run_suite)
    for more in (["--load-format", "dummy"], []):
        arguments = ["run", "smoke", "--parts", "capacity", "--out", str(tmp_path), *more]
        assert CliRunner().invoke(app, arguments).exit_code == 1
    assert seen == [tmp_path / "tokenizer", SMALL_MODEL]


def test_special_tokens_keep_their_ids(tmp_path: Path) -> None:
    content = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
        "added_tokens": [{"id": 2, "content": "<end>", "special": True}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    folder = complete_tokenizer(tmp_path, 5, tmp_path / "complete")
    vocab = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert set(vocab.values()) == {0, 1, 3, 4}


def test_a_vocabulary_that_is_no_table_is_refused(tmp_path: Path) -> None:
    content = {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert complete_tokenizer(tmp_path, 2, tmp_path / "complete") == tmp_path
    with pytest.raises(Missing, match="no text for 3 of 5 ids"):
        complete_tokenizer(tmp_path, 5, tmp_path / "complete")

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import pytest
import torch

from kvarn_eval import preflight
from kvarn_eval.preflight import Missing
from kvarn_eval.small_model import SMALL_MODEL
from kvarn_eval.suite import load_suite

if TYPE_CHECKING:
    from pathlib import Path

PUBLIC = load_suite("qwen3-32b-tp2")


def test_missing_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Missing, match="needs 2 NVIDIA GPUs, and this machine has none"):
        preflight.check_gpus(PUBLIC, 2)
    with pytest.raises(Missing, match="needs 1 NVIDIA GPU, "):
        preflight.check_gpus(PUBLIC, 1)
    preflight.check_gpus(load_suite("rehearsal"), 2)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(Missing, match=r"no config\.json"):
        preflight.check_model(tmp_path, "auto")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(Missing, match="lacks weights"):
        preflight.check_model(tmp_path, "auto")
    assert preflight.check_model(tmp_path, "dummy") == {}
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (tmp_path / "1.safetensors").write_bytes(b"x")
    with pytest.raises(Missing, match=r"lacks weights: 2\.safetensors\."):
        preflight.check_model(tmp_path, "auto")


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    whole = (SMALL_MODEL / "model.safetensors").read_bytes()
    for damaged in (b"", b"x", b"version https://git-lfs.github.com/spec/v1", whole[:-1]):
        (tmp_path / "1.safetensors").write_bytes(damaged)
        with pytest.raises(Missing, match=r"1\.safetensors is damaged or incomplete .* Fetch it"):
            preflight.check_model(tmp_path, "auto")


@pytest.mark.parametrize("device", ["foo", "cuda:99", "meta"])
def test_a_device_that_torch_cannot_use_is_named(device: str) -> None:
    preflight.check_device("cpu")
    with pytest.raises(Missing, match=f"torch finds no device {device}"):
        preflight.check_device(device)


def test_random_weights_are_not_asked_questions() -> None:
    with pytest.raises(Missing, match="--parts capacity,throughput"):
        preflight.check_parts(PUBLIC, preflight.PARTS, "dummy")
    preflight.check_parts(PUBLIC, ("capacity", "throughput"), "dummy")
    with pytest.raises(Missing, match="no part speed"):
        preflight.check_parts(PUBLIC, ("speed",), "auto")


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(Missing, match=r"no tokenizer\.json"):
        preflight.check_tokenizer(tmp_path)


def test_weights_are_hashed_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    assert preflight.weights_sha256(tmp_path) == hashlib.sha256(b"ab").hexdigest()

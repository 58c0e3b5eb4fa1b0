"""What a measurement needs before it begins; each lack is one sentence.

A run of hours must not end for want of a file, and nothing that is missing is left out of a run.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from kvarn_eval.suite import Suite

ACCURACY, FIDELITY, CAPACITY, THROUGHPUT = PARTS = (
    "accuracy",
    "fidelity",
    "capacity",
    "throughput",
)
DUMMY = "dummy"
_CHUNK = 1 << 24


class Missing(Exception):
    """Something that the run needs is not there; the message says what to do."""


def check_parts(suite: Suite, parts: tuple[str, ...], load_format: str) -> None:
    """Refuse parts that do not exist, measure nothing, or that random weights cannot answer.

    Raises
    ------
    Missing
    """
    if unknown := set(parts) - set(PARTS):
        raise Missing(f"There is no part {min(unknown)}. Choose of {', '.join(PARTS)}.")
    served = bool(suite.arms)
    asked = {
        ACCURACY: bool(suite.tasks and (served or suite.emulated)),
        FIDELITY: served and suite.traces is not None,
        CAPACITY: served,
        THROUGHPUT: served and bool(suite.scenarios),
    }
    measured = [part for part in parts if asked[part]]
    if not measured:
        has = ", ".join(part for part in PARTS if asked[part])
        raise Missing(f"Suite {suite.name} measures no {' or '.join(parts)}. Choose of {has}.")
    if load_format == DUMMY and {ACCURACY, FIDELITY} & set(measured):
        raise Missing(
            "Random weights know no answers. Add --parts capacity,throughput, or name a folder "
            "with weights and drop --load-format dummy."
        )


def check_gpus(suite: Suite, tensor_parallel: int) -> None:
    """Count GPUs; a suite without need of one runs on the CPU.

    Raises
    ------
    Missing
    """
    import torch

    needed = tensor_parallel if suite.gpus else 0
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < needed:
        raise Missing(
            f"Suite {suite.name} needs {needed} NVIDIA GPU{'s' if needed > 1 else ''}, and this "
            f"machine has {found or 'none'}. Run it where there are enough."
        )


def check_model(folder: Path, load_format: str) -> dict[str, Any]:
    """The content of ``config.json``, once weights are known to be there.

    Raises
    ------
    Missing
    """
    config = folder / "config.json"
    if not config.is_file():
        raise Missing(
            f"{folder} has no config.json. Name the folder of a checkpoint with --model; a model "
            "hub's cache keeps it under snapshots."
        )
    if load_format != DUMMY:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            named = sorted(set(read_object(index)["weight_map"].values()))
        else:
            named = [file.name for file in folder.glob("*.safetensors")] or ["*.safetensors"]
        lacking = [name for name in named if not (folder / name).is_file()]
        if lacking:
            raise Missing(
                f"{folder} lacks weights: {', '.join(lacking[:3])}"
                f"{' and more' if len(lacking) > 3 else ''}. Complete the checkpoint, or measure "
                "speed alone with --load-format dummy --parts capacity,throughput."
            )
        for name in named:
            _check_weights(folder / name)
    return read_object(config)


def _check_weights(file: Path) -> None:
    """Read the header, which says how long a file of weights is."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise Missing(f"{file} is damaged or incomplete ({error}). Fetch it again.") from error


def read_object(file: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object.

    Raises
    ------
    Missing
        If it holds anything else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise Missing(f"{file} is damaged: it holds no JSON object. Fetch it again.")
    return content


def check_small_model(folder: Path) -> None:
    """Refuse folders of other checkpoints, and what is no checkpoint.

    Raises
    ------
    Missing
    """
    from kvarn_eval.small_model.model import ModelConfig

    config = check_model(folder, load_format="auto")
    fits = config.get("vocab_size") == ModelConfig().vocab_size
    if not fits or not (folder / "model.safetensors").is_file():
        raise Missing(f"{folder} holds another model. Name the small model's folder with --model.")


def check_device(device: str) -> None:
    """Refuse devices that torch cannot use on this machine.

    Raises
    ------
    Missing
    """
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise Missing(
            f"torch finds no device {device}. Use --device cpu, or cuda where there is a GPU."
        ) from error


def check_tokenizer(folder: Path) -> None:
    """Prompts are counted with the model's own tokenizer file.

    Raises
    ------
    Missing
    """
    if not (folder / "tokenizer.json").is_file():
        raise Missing(
            f"{folder} has no tokenizer.json. Name a folder that has one with --tokenizer; speed "
            "does not depend on which."
        )


def weights_sha256(folder: Path) -> str:
    """Hash of all weights of a checkpoint, files in the order of their names.

    The hash of a single file is that of the file itself.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as source:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()

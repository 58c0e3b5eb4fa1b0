"""What a suite needs before its first server starts; each lack is one sentence.

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
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            lacking = sorted(name for name in named if not (folder / name).is_file())
        else:
            lacking = [] if any(folder.glob("*.safetensors")) else ["*.safetensors"]
        if lacking:
            raise Missing(
                f"{folder} lacks weights: {', '.join(lacking[:3])}"
                f"{' and more' if len(lacking) > 3 else ''}. Complete the checkpoint, or measure "
                "speed alone with --load-format dummy --parts capacity,throughput."
            )
    content: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    return content


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

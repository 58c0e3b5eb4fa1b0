"""State of an unfinished training run: fp32 weights, both optimizers' averages, and the log.

A run that goes on from here computes what it would have computed without the break. Tensors are
written in files of at most 15 MiB, so that a checkpoint travels where large files do not.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import nn

LARGEST_FILE = 15 << 20  # bytes
_LOG = "checkpoint.json"


def _averages(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]
) -> dict[str, dict[str, Tensor]]:
    """Averages of every parameter by its name, as the optimizers hold them."""
    states = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
    return {
        name: {key: value for key, value in states[p].items() if key != "step"}
        for name, p in model.named_parameters()
    }


def save(
    folder: Path,
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    log: dict[str, Any],
) -> None:
    """Write `checkpoint-<n>.safetensors` and `checkpoint.json` to a folder, created if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    remove(folder)
    tensors = {f"weight/{name}": p.detach() for name, p in model.named_parameters()}
    for name, state in _averages(model, optimizers).items():
        tensors |= {f"{key}/{name}": value for key, value in state.items()}
    files: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if size > 0.99 * LARGEST_FILE:  # the rest is for the header
            files.append({})
            size = tensor.nbytes
        files[-1][name] = tensor.cpu().contiguous()
    for number, content in enumerate(files, 1):
        save_file(content, folder / f"checkpoint-{number}.safetensors")
    (folder / _LOG).write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def read_log(folder: Path) -> dict[str, Any]:
    """What `save` was given as `log`.

    Raises
    ------
    ValueError
        If the folder has no checkpoint.
    """
    if not (folder / _LOG).is_file():
        raise ValueError(f"{folder} has no {_LOG}. Name the folder of a run that was cut short.")
    log: dict[str, Any] = json.loads((folder / _LOG).read_text(encoding="utf-8"))
    return log


@torch.no_grad()
def load(
    folder: Path, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], steps: int
) -> None:
    """Restore weights and averages; `steps` is the number of steps that the run has made."""
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("checkpoint-*.safetensors"):
        tensors |= load_file(file)
    names = {p: name for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.copy_(tensors.pop(f"weight/{name}"))
    kept: dict[str, dict[str, Tensor]] = {name: {} for name in names.values()}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        kept[name][kind] = tensor
    for optimizer in optimizers:
        for p in optimizer.param_groups[0]["params"]:
            state = {kind: tensor.to(p.device) for kind, tensor in kept[names[p]].items()}
            if isinstance(optimizer, torch.optim.AdamW):
                state["step"] = torch.tensor(float(steps))
            optimizer.state[p] = state


def remove(folder: Path) -> None:
    """Delete the checkpoint in a folder, if there is one."""
    for file in (*folder.glob("checkpoint-*.safetensors"), folder / _LOG):
        file.unlink(missing_ok=True)

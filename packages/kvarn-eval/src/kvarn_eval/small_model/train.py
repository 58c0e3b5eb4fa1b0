"""Training of the small model: one seed, one GPU.

A step reads fresh task items and, in every third row, program text. Row lengths grow with a
curriculum of a few fixed shapes, because each shape is compiled once. Matrices are trained by Muon
and the rest by AdamW: look-up circuits appear several times sooner than under AdamW alone. What a
step reads and how large it is depend on its number only, so a run that a time limit cuts short goes
on from its checkpoint as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import platform
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvarn_eval.preflight import Missing
from kvarn_eval.schema import git_state
from kvarn_eval.small_model import checkpoint, corpus, noise
from kvarn_eval.small_model.examine import Examination, examine
from kvarn_eval.small_model.headroom import with_headroom
from kvarn_eval.small_model.model import ModelConfig, SmallModel
from kvarn_eval.small_model.muon import Muon
from kvarn_eval.small_model.tasks import FAMILIES, training_batch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from kvarn_eval.small_model.tasks import Floats, Ids

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of the curriculum."""

    steps: int
    lengths: tuple[int, ...]
    """Tokens per row; each step draws one."""
    weights: tuple[float, ...]
    """How often each length is drawn; sums to 1."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything about a run but its seed; the defaults are those of the published model.

    Parameters
    ----------
    phases : tuple of Phase
        The curriculum.
    batch_tokens : int
        Tokens per step; rows of any length must come in multiples of 12.
    matrix_lr, vector_lr : float
        Peak step sizes of Muon, for the matrices of the layers, and of AdamW, for the rest.
    weight_decay : float
        Of Muon.
    warmup, log_every : int
        Steps.
    compile : bool
        Compile one layer per row length.
    key_noise, value_noise : float
        Largest noise on keys and values (see `noise`).
    noise_ramp : float
        Share of the steps over which it grows from zero.
    """

    phases: tuple[Phase, ...] = (
        Phase(2000, (512,), (1.0,)),
        Phase(2000, (512, 2048), (0.3, 0.7)),
        Phase(4000, (512, 2048, 8192), (0.2, 0.3, 0.5)),
    )
    batch_tokens: int = 98_304
    matrix_lr: float = 6e-3
    vector_lr: float = 2e-3
    weight_decay: float = 0.01
    warmup: int = 100
    log_every: int = 250
    compile: bool = True
    key_noise: float = 0.5
    value_noise: float = 0.7
    noise_ramp: float = 0.25

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(phase.steps for phase in self.phases)

    def learning_rate(self, step: int) -> float:
        """Factor on both learning rates: linear warm-up, then a cosine to zero."""
        progress = step / self.steps
        return min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + float(np.cos(np.pi * progress)))

    def schedule(self) -> Iterator[Phase]:
        """The phase of every step."""
        for phase in self.phases:
            yield from itertools.repeat(phase, phase.steps)


def initialise(model: SmallModel, seed: int) -> None:
    """Normal weights of deviation 0.02, smaller where a layer writes to the residual stream."""
    generator = torch.Generator().manual_seed(seed)
    residual = 0.02 / (2 * model.config.num_hidden_layers) ** 0.5
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            std = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            nn.init.normal_(weight, std=std, generator=generator)


def batch(
    rng: np.random.Generator, text: NDArray[np.uint8], count: int, length: int
) -> tuple[Ids, Ids, Floats]:
    """Rows of one step, two thirds of tasks and then one third of program text.

    Parameters
    ----------
    rng : numpy Generator
        Source of everything random.
    text : uint8 [N]
        Program text as token ids.
    count, length : int
        Rows, a multiple of 12, and tokens per row.

    Returns
    -------
    ids, targets : int64 [count, length]
        Inputs and next tokens.
    weights : float32 [count, length]
        Of the loss.
    """
    items = training_batch(rng, count - count // 3, length)
    texts = corpus.training_rows(rng, text, count // 3, length)
    return (
        np.concatenate((items[0], texts[0])),
        np.concatenate((items[1], texts[1])),
        np.concatenate((items[2], texts[2])),
    )


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step reads; `B` rows of `T` tokens."""

    ids: Tensor  # [B, T] int64
    targets: Tensor  # [B, T] int64
    weights: Tensor  # [B, T] of the loss
    noise: Tensor  # [B] level, 0 to 1
    seed: int  # of the noise


def _step(plan: Plan, phase: Phase, seed: int, number: int, text: NDArray[np.uint8]) -> Step:
    rng = np.random.default_rng([seed, number])
    length = int(rng.choice(phase.lengths, p=phase.weights))
    count = plan.batch_tokens // length
    rows = batch(rng, text, count, length)
    grown = min(1.0, number / (plan.noise_ramp * plan.steps)) if plan.noise_ramp else 1.0
    level = noise.levels(rng, count) * np.float32(grown)
    ids, targets, weights, noises = (torch.from_numpy(array) for array in (*rows, level))
    return Step(ids, targets, weights, noises, seed=int(rng.integers(1 << 62)))


def batches(plan: Plan, seed: int, text: NDArray[np.uint8], first: int = 0) -> Iterator[Step]:
    """The steps of `plan` from number `first` on, made one thread ahead of their use."""
    ready: queue.Queue[Step] = queue.Queue(maxsize=8)
    left = list(enumerate(plan.schedule()))[first:]

    def produce() -> None:
        for number, phase in left:
            ready.put(_step(plan, phase, seed, number, text))

    threading.Thread(target=produce, daemon=True).start()
    for _ in left:
        yield ready.get()


def _counts(losses: Tensor, right: Tensor, weights: Tensor, clean: Tensor) -> Tensor:
    """Sums over the rows without noise, `[2 + 4 F]` for `F` families.

    Loss and rows of text; then per family wrong answer tokens, all of them, wrong answers, all.
    """
    items = len(right) - len(right) // 3
    answer = (weights[:items] == 1) & clean[:items, None]
    wrong = answer & ~right[:items]
    families = [slice(i, None, len(FAMILIES)) for i in range(len(FAMILIES))]
    sums = [(losses[items:].mean(1) * clean[items:]).sum(), clean[items:].sum()]
    for of in (wrong, answer, wrong.any(1), clean[:items]):
        sums += [of[rows].sum() for rows in families]
    return torch.stack([x.float() for x in sums])


def _point(totals: list[float], steps: int) -> dict[str, float]:
    """Loss, text loss and shares of right answer tokens and answers, from the sums of `steps`."""
    loss, text, texts, *counts = totals
    f = len(FAMILIES)
    tokens, items = (
        [1 - wrong / max(all_, 1) for wrong, all_ in zip(part[:f], part[f:], strict=True)]
        for part in (counts[: 2 * f], counts[2 * f :])
    )
    return {
        "loss": round(loss / steps, 5),
        "text_loss": round(text / max(texts, 1), 5),
        **{f"{name}_tokens": round(x, 5) for name, x in zip(FAMILIES, tokens, strict=True)},
        **{f"{name}_items": round(x, 5) for name, x in zip(FAMILIES, items, strict=True)},
    }


class _Run:
    """One training run: the model, its optimizers, and how far it has come."""

    def __init__(self, plan: Plan, config: ModelConfig, seed: int, device: str) -> None:
        self.plan, self.device = plan, torch.device(device)
        model = SmallModel(config)
        initialise(model, seed)
        self.model = model.to(device)
        if plan.compile:
            for layer in model.model.layers:
                layer.compile(dynamic=False)
        hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
        others = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(hidden, lr=plan.matrix_lr, weight_decay=plan.weight_decay),
            torch.optim.AdamW(others, lr=plan.vector_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.noise = noise.Noise(plan.key_noise, plan.value_noise)
        self.steps = self.tokens = 0
        self.seconds = 0.0
        self.curve: list[dict[str, float]] = []
        self.totals = torch.zeros(3 + 4 * len(FAMILIES), device=self.device)

    def progress(self) -> dict[str, Any]:
        """Everything but tensors that a checkpoint keeps."""
        kept = {name: getattr(self, name) for name in ("steps", "tokens", "seconds", "curve")}
        return {**kept, "totals": self.totals.tolist()}

    def restore(self, folder: Path, log: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name in ("steps", "tokens", "seconds", "curve"):
            setattr(self, name, log[name])
        self.totals = torch.tensor(log["totals"], device=self.device)
        checkpoint.load(folder, self.model, self.optimizers, self.steps)

    def take(self, data: Step) -> None:
        """One optimizer step."""
        plan = self.plan
        arrays = (data.ids, data.targets, data.weights, data.noise)
        ids, targets, weights, level = (x.to(self.device, non_blocking=True) for x in arrays)
        torch.manual_seed(data.seed)
        self.noise.set(level)
        hook = self.noise if plan.key_noise or plan.value_noise else None
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(ids, hook)
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
        ).view_as(targets)
        loss = (losses * weights).sum() / weights.sum()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, peak in zip(self.optimizers, (plan.matrix_lr, plan.vector_lr), strict=True):
            optimizer.param_groups[0]["lr"] = peak * plan.learning_rate(self.steps)
            optimizer.step()
            optimizer.zero_grad()
        self.steps, self.tokens = self.steps + 1, self.tokens + ids.numel()
        with torch.no_grad():
            right = logits.argmax(-1) == targets
            counts = _counts(losses, right, weights, level == 0)
            self.totals += torch.cat((loss[None], counts))

    def log_point(self, seconds: float) -> None:
        """Add the means since the last point to the curve."""
        point = _point(self.totals.tolist(), self.plan.log_every)
        self.totals.zero_()
        progress = {"step": self.steps, "seconds": round(seconds, 1), "tokens": self.tokens}
        self.curve.append({**progress, **point})
        logger.info("%s", self.curve[-1])


def train(
    out: Path,
    *,
    seed: int = 0,
    minutes: float = 12.0,
    plan: Plan | None = None,
    config: ModelConfig | None = None,
    device: str = "cuda",
    text: NDArray[np.uint8] | None = None,
    resume: Path | None = None,
    examination: Examination | None = None,
) -> dict[str, Any]:
    """Train the small model and write it to `out`.

    Parameters
    ----------
    out : Path
        Folder of the result: config, tokenizer, fp16 `model.safetensors`, and `training.json` with
        the loss curve. Created if missing. A run that is cut short leaves a checkpoint instead.
    seed : int
        Seed of the weights and of the data.
    minutes : float
        Longest wall time of this call, in minutes, the examination not counted.
    plan, config
        Schedule and model shape; the defaults are those of the published model.
    device : str
        Where to train; bf16 autocast over fp32 weights.
    text : uint8 [N], optional
        Program text as token ids; by default `corpus.training_ids`.
    resume : Path, optional
        Folder with the checkpoint of the same run.
    examination : Examination, optional
        What to measure of the finished model (see `examine`); nothing by default.

    Returns
    -------
    dict
        The content of `training.json`; `steps` is below `planned_steps` if the run was cut short.

    Raises
    ------
    preflight.Missing
        If `device` or the training text is missing.
    ValueError
        If the checkpoint is missing or that of another run, or Python has too little held-out text.
    """
    began = time.monotonic()
    plan, config = plan or Plan(), config or ModelConfig()
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise Missing(
            "Training needs a CUDA GPU and torch sees none. Run it on a machine with one."
        )
    text = corpus.training_ids() if text is None else text
    logger.info("%s tokens of program text", len(text))
    subject = {
        "seed": seed,
        "plan": json.loads(json.dumps(dataclasses.asdict(plan))),
        "config": config.to_json(),
        "text_sha256": hashlib.sha256(text.tobytes()).hexdigest(),
    }
    run = _Run(plan, config, seed, device)
    if resume is not None:
        log = checkpoint.read_log(resume)
        if different := [name for name, value in subject.items() if log["run"][name] != value]:
            raise ValueError(
                f"The checkpoint in {resume} is of a run with another {different[0]}. Repeat the "
                "options that it was begun with, on a machine with the same Python and torch."
            )
        run.restore(resume, log)

    earlier, started = run.seconds, time.monotonic()
    for data in batches(plan, seed, text, run.steps):
        run.take(data)
        now = time.monotonic()
        run.seconds = earlier + now - started
        if run.steps % plan.log_every == 0:
            run.log_point(run.seconds)
        if now - began > 60 * minutes and run.steps < plan.steps:
            logger.warning("Ended at step %d of %d by the time limit.", run.steps, plan.steps)
            break

    finished = {
        "families": list(FAMILIES),
        "seed": seed,
        "steps": run.steps,
        "planned_steps": plan.steps,
        "tokens": run.tokens,
        "text_tokens": len(text),
        "seconds": round(run.seconds, 1),
        "noise": {"key": plan.key_noise, "value": plan.value_noise},
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git_state().sha,
        "curve": run.curve,
    }
    if run.steps < plan.steps:
        checkpoint.save(out, run.model, run.optimizers, {"run": subject, **run.progress()})
        return finished
    with_headroom(run.model).save(out)
    checkpoint.remove(out)
    (out / "training.json").write_text(json.dumps(finished, indent=1) + "\n", encoding="utf-8")
    return examine(out, examination, device) if examination else finished

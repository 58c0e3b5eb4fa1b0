"""Training of the small model: one seed, one GPU, a few minutes.

Every step draws fresh items, so nothing is seen twice. Row lengths grow with a curriculum of a few
fixed shapes, because each shape is compiled once. Matrices are trained by Muon and the rest by
AdamW: look-up circuits appear several times sooner than under AdamW alone. Steps are counted, not
seconds, so the same seed gives the same items on every machine.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvarn_eval.small_model.evaluate import exact_match
from kvarn_eval.small_model.model import ModelConfig, SmallModel
from kvarn_eval.small_model.muon import Muon
from kvarn_eval.small_model.tasks import FAMILIES, IGNORE, held_out, training_batch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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
        Tokens per step.
    matrix_lr, vector_lr : float
        Peak step sizes of Muon, for the matrices of the layers, and of AdamW, for the rest.
    weight_decay : float
        Of Muon.
    warmup, log_every : int
        Steps.
    compile : bool
        Compile one layer per row length.
    test_items : int
        Held-out items per cell: family, share of rewrites, prompt length in tokens.
    test_lengths, test_rewrites, test_questions
        The cells, and the questions of an item.
    """

    phases: tuple[Phase, ...] = (
        Phase(2000, (512,), (1.0,)),
        Phase(2000, (512, 2048), (0.3, 0.7)),
        Phase(5000, (512, 2048, 8192), (0.2, 0.3, 0.5)),
    )
    batch_tokens: int = 65_536
    matrix_lr: float = 6e-3
    vector_lr: float = 2e-3
    weight_decay: float = 0.01
    warmup: int = 100
    log_every: int = 250
    compile: bool = True
    test_items: int = 128
    test_lengths: tuple[int, ...] = (1024, 2048, 4096, 7168)
    test_rewrites: tuple[float, ...] = (0.25, 0.5, 0.75, 0.87)
    test_questions: int = 16

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(phase.steps for phase in self.phases)

    def learning_rate(self, step: int) -> float:
        """Factor on both learning rates: linear warm-up, then a cosine to zero."""
        progress = step / self.steps
        return min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + float(np.cos(np.pi * progress)))


def initialise(model: SmallModel, seed: int) -> None:
    """Normal weights of deviation 0.02, smaller where a layer writes to the residual stream."""
    generator = torch.Generator().manual_seed(seed)
    residual = 0.02 / (2 * model.config.num_hidden_layers) ** 0.5
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            std = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            nn.init.normal_(weight, std=std, generator=generator)


def batches(plan: Plan, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The training data of `plan`, step by step, made one thread ahead of its use."""
    ready: queue.Queue[tuple[Tensor, Tensor]] = queue.Queue(maxsize=8)

    def produce() -> None:
        step = 0
        for phase in plan.phases:
            for _ in range(phase.steps):
                rng = np.random.default_rng([seed, step])
                length = int(rng.choice(phase.lengths, p=phase.weights))
                ids, targets = training_batch(rng, plan.batch_tokens // length, length)
                ready.put((torch.from_numpy(ids), torch.from_numpy(targets)))
                step += 1

    threading.Thread(target=produce, daemon=True).start()
    for _ in range(plan.steps):
        yield ready.get()


def _scores(logits: Tensor, targets: Tensor) -> Tensor:
    """Share of right answer tokens, then of right answers, each per family: `[4]`."""
    answer = targets != IGNORE
    wrong = (logits.argmax(-1) != targets) & answer
    tokens = [
        1 - wrong[i :: len(FAMILIES)].sum() / answer[i :: len(FAMILIES)].sum()
        for i in range(len(FAMILIES))
    ]
    items = [1 - wrong[i :: len(FAMILIES)].any(1).float().mean() for i in range(len(FAMILIES))]
    return torch.stack((*tokens, *items))


def _accuracy(model: SmallModel, plan: Plan) -> list[dict[str, Any]]:
    """Exact-match accuracy on held-out items, per family, share of rewrites and prompt length."""
    rows = []
    cases = itertools.product(FAMILIES, plan.test_rewrites, plan.test_lengths)
    for family, rewrites, length in cases:
        items = held_out(
            family,
            plan.test_items,
            min_tokens=length,
            max_tokens=length,
            questions=plan.test_questions,
            rewrites=rewrites,
        )
        chunks = (items[i : i + 16] for i in range(0, len(items), 16))
        right = sum(sum(exact_match(model, chunk)) for chunk in chunks)
        rows.append(
            {
                "family": family,
                "rewrites": rewrites,
                "prompt_tokens": items[0].prompt_tokens,
                "answer_tokens": items[0].answer_tokens,
                "items": len(items),
                "right": right,
            }
        )
        logger.info("%s", rows[-1])
    return rows


def train(
    out: Path,
    *,
    seed: int = 0,
    minutes: float = 12.0,
    plan: Plan | None = None,
    config: ModelConfig | None = None,
    device: str = "cuda",
) -> dict[str, Any]:
    """Train the small model and write it to `out`.

    Parameters
    ----------
    out : Path
        Folder of the result: config, tokenizer, fp16 `model.safetensors`, and `training.json` with
        the loss curve and the held-out accuracy. Created if missing.
    seed : int
        Seed of the weights and of the data.
    minutes : float
        Longest wall time of the steps, in minutes.
    plan, config
        Schedule and model shape; the defaults are those of the published model.
    device : str
        Where to train; bf16 autocast over fp32 weights.

    Returns
    -------
    dict
        The content of `training.json`.

    Raises
    ------
    RuntimeError
        If `device` is missing, or the plan does not fit into `minutes`.
    """
    plan, config = plan or Plan(), config or ModelConfig()
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RuntimeError(
            "Training needs a CUDA GPU and torch sees none. Run it on a machine with one."
        )
    torch.manual_seed(seed)
    model = SmallModel(config)
    initialise(model, seed)
    model.to(device)
    if plan.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)

    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(hidden, lr=plan.matrix_lr, weight_decay=plan.weight_decay),
        torch.optim.AdamW(others, lr=plan.vector_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peaks = (plan.matrix_lr, plan.vector_lr)

    began = time.monotonic()
    curve: list[dict[str, float]] = []
    tokens = 0
    totals = torch.zeros(1 + 2 * len(FAMILIES), device=device)
    for step, (ids, targets) in enumerate(batches(plan, seed)):
        ids, targets = ids.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits = model(ids)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * plan.learning_rate(step)
            optimizer.step()
            optimizer.zero_grad()
        tokens += ids.numel()
        with torch.no_grad():
            totals += torch.cat((loss[None], _scores(logits, targets)))
        if (step + 1) % plan.log_every == 0:
            values = [round(x, 5) for x in (totals / plan.log_every).tolist()]
            totals.zero_()
            names = (
                "loss",
                *(f"{family}_{what}" for what in ("tokens", "items") for family in FAMILIES),
            )
            seconds = round(time.monotonic() - began, 1)
            curve.append(
                {
                    "step": step + 1,
                    "seconds": seconds,
                    "tokens": tokens,
                    **dict(zip(names, values, strict=True)),
                }
            )
            logger.info("%s", curve[-1])
            if time.monotonic() - began > 60 * minutes:
                raise RuntimeError(
                    f"Training reached step {step + 1} of {plan.steps} in {minutes} minutes. "
                    "Allow more minutes or use a faster GPU."
                )

    seconds = time.monotonic() - began
    model.save(out)
    log = {
        "seed": seed,
        "steps": plan.steps,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "torch": torch.__version__,
        "curve": curve,
        "accuracy": _accuracy(SmallModel.load(out, dtype=torch.float16, device=device), plan),
    }
    (out / "training.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    return log

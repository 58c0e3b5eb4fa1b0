"""Training of the small model: one seed, one GPU, a few minutes.

A step reads fresh task items and, in every third row, program text. Row lengths grow with a
curriculum of a few fixed shapes, because each shape is compiled once. Matrices are trained by Muon
and the rest by AdamW: look-up circuits appear several times sooner than under AdamW alone. What a
step reads and how large it is depend on its number only; a time limit ends a run early, no more.
"""

from __future__ import annotations

import dataclasses
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

from kvarn_eval.small_model import corpus
from kvarn_eval.small_model.evaluate import exact_match
from kvarn_eval.small_model.model import ModelConfig, SmallModel
from kvarn_eval.small_model.muon import Muon
from kvarn_eval.small_model.tasks import FAMILIES, held_out, training_batch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
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
        Tokens per step; rows of any length must come in multiples of 6.
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
    test_texts, test_text_tokens : int
        Held-out program texts.
    """

    phases: tuple[Phase, ...] = (
        Phase(1500, (512,), (1.0,)),
        Phase(1500, (512, 2048), (0.3, 0.7)),
        Phase(3000, (512, 2048, 8192), (0.2, 0.3, 0.5)),
    )
    batch_tokens: int = 98_304
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
    test_texts: int = 12
    test_text_tokens: int = 4096

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
        Rows, a multiple of 6, and tokens per row.

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


def batches(plan: Plan, seed: int, text: NDArray[np.uint8]) -> Iterator[tuple[Tensor, ...]]:
    """The training data of `plan`, step by step, made one thread ahead of its use."""
    ready: queue.Queue[tuple[Tensor, ...]] = queue.Queue(maxsize=8)

    def produce() -> None:
        step = 0
        for phase in plan.phases:
            for _ in range(phase.steps):
                rng = np.random.default_rng([seed, step])
                length = int(rng.choice(phase.lengths, p=phase.weights))
                rows = batch(rng, text, plan.batch_tokens // length, length)
                ready.put(tuple(torch.from_numpy(array) for array in rows))
                step += 1

    threading.Thread(target=produce, daemon=True).start()
    for _ in range(plan.steps):
        yield ready.get()


def _scores(losses: Tensor, right: Tensor, weights: Tensor) -> Tensor:
    """Mean loss of text, then shares of right answer tokens and answers, each per family: `[5]`."""
    items = len(right) - len(right) // 3
    answer = weights[:items] == 1
    wrong = answer & ~right[:items]
    families = [slice(i, None, len(FAMILIES)) for i in range(len(FAMILIES))]
    tokens = [1 - wrong[rows].sum() / answer[rows].sum() for rows in families]
    whole = [1 - wrong[rows].any(1).float().mean() for rows in families]
    return torch.stack((losses[items:].mean(), *tokens, *whole))


_CURVE = (
    "loss",
    "text_loss",
    *(f"{family}_{what}" for what in ("tokens", "items") for family in FAMILIES),
)


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


@torch.inference_mode()
def _text_loss(model: SmallModel, texts: Iterable[list[int]]) -> float:
    """Mean loss on program texts, in nats per token."""
    device = model.model.embed_tokens.weight.device
    rows = (torch.tensor(ids, device=device) for ids in texts)
    return float(np.mean([F.cross_entropy(model(r[:-1]).float(), r[1:]).item() for r in rows]))


def train(
    out: Path,
    *,
    seed: int = 0,
    minutes: float = 12.0,
    plan: Plan | None = None,
    config: ModelConfig | None = None,
    device: str = "cuda",
    text: NDArray[np.uint8] | None = None,
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
        Longest wall time of the steps, in minutes; a run that reaches it ends there and says so.
    plan, config
        Schedule and model shape; the defaults are those of the published model.
    device : str
        Where to train; bf16 autocast over fp32 weights.
    text : uint8 [N], optional
        Program text as token ids; by default `corpus.training_ids`.

    Returns
    -------
    dict
        The content of `training.json`.

    Raises
    ------
    RuntimeError
        If `device` or the training text is missing.
    ValueError
        If Python has too little held-out text.
    """
    plan, config = plan or Plan(), config or ModelConfig()
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RuntimeError(
            "Training needs a CUDA GPU and torch sees none. Run it on a machine with one."
        )
    text = corpus.training_ids() if text is None else text
    unseen = corpus.held_out_texts(plan.test_texts, plan.test_text_tokens)
    logger.info("%s tokens of program text", len(text))
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
    tokens = steps = 0
    totals = torch.zeros(len(_CURVE), device=device)
    for step, arrays in enumerate(batches(plan, seed, text)):
        ids, targets, weights = (array.to(device, non_blocking=True) for array in arrays)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits = model(ids)
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
        ).view_as(targets)
        loss = (losses * weights).sum() / weights.sum()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * plan.learning_rate(step)
            optimizer.step()
            optimizer.zero_grad()
        tokens, steps = tokens + ids.numel(), step + 1
        with torch.no_grad():
            right = logits.argmax(-1) == targets
            totals += torch.cat((loss[None], _scores(losses, right, weights)))
        if steps % plan.log_every == 0:
            values = [round(x, 5) for x in (totals / plan.log_every).tolist()]
            totals.zero_()
            seconds = round(time.monotonic() - began, 1)
            progress = {"step": steps, "seconds": seconds, "tokens": tokens}
            curve.append({**progress, **dict(zip(_CURVE, values, strict=True))})
            logger.info("%s", curve[-1])
            if seconds > 60 * minutes:
                logger.warning("Ended at step %d of %d by the time limit.", steps, plan.steps)
                break

    seconds = time.monotonic() - began
    model.save(out)
    trained = SmallModel.load(out, dtype=torch.float16, device=device)
    log = {
        "seed": seed,
        "steps": steps,
        "planned_steps": plan.steps,
        "tokens": tokens,
        "text_tokens": len(text),
        "seconds": round(seconds, 1),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "curve": curve,
        "held_out_text": {
            "files": list(unseen),
            "tokens": plan.test_text_tokens,
            "loss": round(_text_loss(trained, unseen.values()), 4),
        },
        "accuracy": _accuracy(trained, plan),
    }
    (out / "training.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    return log

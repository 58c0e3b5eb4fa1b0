"""What a trained small model can do: held-out problems by family and length, held-out text.

Apart from training, so that a model can be measured again. The measurements go into
`training.json`, and the card of the model is written from that file.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from kvarn_eval.preflight import check_device, read_object
from kvarn_eval.small_model import card, corpus, tasks
from kvarn_eval.small_model.evaluate import exact_match
from kvarn_eval.small_model.model import SmallModel

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Examination:
    """What is measured; the defaults are those of the published model.

    Parameters
    ----------
    items : int
        Held-out items per cell: family, share of rewrites, prompt length in tokens.
    lengths, rewrites
        The cells.
    texts, text_tokens : int
        Held-out program texts.
    batch : int
        Items at a time.
    """

    items: int = 128
    lengths: tuple[int, ...] = (1024, 2048, 4096, 7168)
    rewrites: tuple[float, ...] = (0.25, 0.5, 0.75, 0.87)
    texts: int = 12
    text_tokens: int = 4096
    batch: int = 16


def _accuracy(
    model: SmallModel, families: Iterable[str], settings: Examination
) -> list[dict[str, Any]]:
    """Exact-match accuracy on held-out items, per family, share of rewrites and prompt length."""
    rows = []
    for family, rewrites, length in itertools.product(
        families, settings.rewrites, settings.lengths
    ):
        items = tasks.held_out(
            family, settings.items, min_tokens=length, max_tokens=length, rewrites=rewrites
        )
        chunks = (items[i : i + settings.batch] for i in range(0, len(items), settings.batch))
        right = sum(sum(exact_match(model, chunk)) for chunk in chunks)
        rows.append(
            {
                "family": family,
                "rewrites": rewrites,
                "questions": tasks.family(family).questions,
                "longest_prompt": length,
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


def examine(
    folder: Path, settings: Examination | None = None, device: str = "cuda"
) -> dict[str, Any]:
    """Measure a trained model in fp16; complete its `training.json` and write its card.

    Parameters
    ----------
    folder : Path
        As `train` leaves it.
    settings : Examination, optional
        What is measured; by default all that the card says.
    device : str
        Where the model runs.

    Returns
    -------
    dict
        The content of `training.json`.

    Raises
    ------
    ValueError
        If `training.json` is missing or of an earlier version, or Python has too little held-out
        text.
    preflight.Missing
        If `device` is, or `training.json` holds something else.
    """
    settings = settings or Examination()
    check_device(device)
    file = folder / "training.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no training.json. Name the folder of a trained model.")
    log = read_object(file)
    if "noise" not in log:
        raise ValueError(f"{file} is of an earlier version. Train the model again.")
    unseen = corpus.held_out_texts(settings.texts, settings.text_tokens)
    model = SmallModel.load(folder, dtype=torch.float16, device=device)
    log["held_out_text"] = {
        "files": list(unseen),
        "tokens": settings.text_tokens,
        "loss": round(_text_loss(model, unseen.values()), 4),
    }
    log["accuracy"] = _accuracy(model, tasks.trained(folder), settings)
    file.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    card.write(folder, model, log)
    return log

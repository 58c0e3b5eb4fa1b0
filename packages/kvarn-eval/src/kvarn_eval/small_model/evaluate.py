"""Exact-match accuracy of a model on held-out items, without a server.

The answer is fed with the prompt, and an item counts when every answer token is the most likely one.
That is the verdict of greedy decoding: as long as decoding is right it sees the same text, and the first
wrong token already fails the item. One forward pass replaces hundreds.
"""

from __future__ import annotations

import torch

from kvarn_eval.small_model.model import Attention, SmallModel
from kvarn_eval.small_model.tasks import Item
from kvarn_eval.small_model.tokenizer import EOS, encode


@torch.inference_mode()
def exact_match(model: SmallModel, item: Item, attention: Attention | None = None) -> bool:
    """Whether greedy decoding of `item` gives its answer and then ends.

    Parameters
    ----------
    model : SmallModel
        Weights, on any device.
    item : Item
        The problem.
    attention : callable, optional
        Hook of `SmallModel.forward`.

    Returns
    -------
    bool
    """
    device = model.model.embed_tokens.weight.device
    ids = torch.tensor([*encode(item.prompt + item.answer), EOS], device=device)
    best = model(ids[:-1], attention).argmax(-1)
    return torch.equal(best[item.prompt_tokens - 1 :], ids[item.prompt_tokens :])

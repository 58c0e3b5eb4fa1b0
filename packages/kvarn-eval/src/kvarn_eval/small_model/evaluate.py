"""Exact-match accuracy of a model on held-out items, without a server.

The answer is fed with the prompt, and an item counts when every answer token is the most likely
one. That is the verdict of greedy decoding: as long as decoding is right it sees the same text, and
the first wrong token already fails the item. One forward pass replaces hundreds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvarn_eval.small_model.tokenizer import EOS, encode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvarn_eval.small_model.model import Attention, SmallModel
    from kvarn_eval.small_model.tasks import Item


@torch.inference_mode()
def exact_match(
    model: SmallModel, items: Sequence[Item], attention: Attention | None = None
) -> list[bool]:
    """Whether greedy decoding of each item gives its answer and then ends.

    Parameters
    ----------
    model : SmallModel
        Weights, on any device.
    items : sequence of Item
        Problems of one prompt length and one answer length; they are evaluated as one batch.
    attention : callable, optional
        Hook of `SmallModel.forward`.

    Returns
    -------
    list of bool

    Raises
    ------
    ValueError
        If the items differ in length.
    """
    lengths = {(item.prompt_tokens, item.answer_tokens) for item in items}
    if len(lengths) != 1:
        raise ValueError(
            f"The items have {len(lengths)} different lengths. Evaluate one at a time."
        )
    start = items[0].prompt_tokens
    device = model.model.embed_tokens.weight.device
    ids = torch.tensor([[*encode(item.prompt + item.answer), EOS] for item in items], device=device)
    best = model(ids[:, :-1], attention)[:, start - 1 :].argmax(-1)
    right: list[bool] = (best == ids[:, start:]).all(1).tolist()
    return right

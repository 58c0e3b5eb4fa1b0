"""The same function with a smaller residual stream, so that fp16 does not overflow.

Every layer reads the residual stream through an RMS norm, so its magnitude means nothing, and
nothing in training holds it back: where no token of a prompt can be guessed, the last layer may
write a hundred thousand. Embedding and `o_proj` are scaled by a power of two, and `up_proj` with
them, which scales what `down_proj` reads and writes; the final norm is scaled back, because the
output head is the embedding. The epsilon of the norms follows as the square of the factor.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from kvarn_eval.small_model.model import SmallModel

if TYPE_CHECKING:
    from torch import Tensor, nn

FACTOR = 2.0**-4
LIMIT = 65_504 / 4
"""Largest magnitude that a published model may reach in fp16."""
_SCALED = ("embed_tokens.weight", "o_proj.weight", "up_proj.weight")


def with_headroom(model: SmallModel, factor: float = FACTOR) -> SmallModel:
    """A copy with the same logits whose residual stream is `factor` times as large.

    Parameters
    ----------
    model : SmallModel
        Read only.
    factor : float
        A power of two, so that the copy is exact.

    Returns
    -------
    SmallModel
        In fp32, on the CPU.
    """
    epsilon = model.config.rms_norm_eps * factor**2
    copy = SmallModel(dataclasses.replace(model.config, rms_norm_eps=epsilon))
    weights = {name: p.detach().to("cpu", torch.float32) for name, p in model.named_parameters()}
    for name, weight in weights.items():
        if name.endswith(_SCALED):
            weights[name] = weight * factor
    weights["model.norm.weight"] = weights["model.norm.weight"] / factor
    copy.load_state_dict(weights)
    return copy.eval()


@torch.inference_mode()
def largest_activation(model: SmallModel, ids: Tensor) -> float:
    """Largest magnitude that any module reads or writes.

    Parameters
    ----------
    model : SmallModel
        In a dtype that does not overflow.
    ids : Tensor [T] or [B, T], int64
        Tokens to look at.
    """
    largest = 0.0

    def look(module: nn.Module, given: tuple[object, ...], result: object) -> None:
        nonlocal largest
        for x in (*given, result):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                largest = max(largest, float(x.abs().max()))

    handles = [module.register_forward_hook(look) for module in model.modules()]
    try:
        model(ids)
    finally:
        for handle in handles:
            handle.remove()
    return largest

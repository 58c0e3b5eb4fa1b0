"""Find the norms of queries and keys in a loaded model and balance them (`kvarn_core.balance`)."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from kvarn_core.balance import balance_

if TYPE_CHECKING:
    from torch import nn

LOG = logging.getLogger("vllm.kvarn")


@torch.no_grad()
def balance_model(model: nn.Module) -> int:
    """Balance every attention layer with QK-norm of its own, in place; scores stay the same.

    A layer is left as it is if its norms do not multiply by a weight per channel of a head, if
    another layer uses them too, or if RoPE pairs neighbouring channels.

    Parameters
    ----------
    model : Module
        With weights, before CUDA graphs are captured.

    Returns
    -------
    int
        Number of layers that were balanced.
    """
    layers = [layer for layer in map(_norms, model.modules()) if layer is not None]
    users = Counter(id(norm) for layer in layers for norm in layer[:2])
    balanced = sum(
        balance_(query.weight.data, key.weight.data, rotary_dim)
        for query, key, rotary_dim in layers
        if users[id(query)] == users[id(key)] == 1
    )
    if layers:
        LOG.info("KVarN: query and key norms of %d of %d layers balanced.", balanced, len(layers))
    return balanced


def _norms(module: nn.Module) -> tuple[Any, Any, int] | None:
    """Norms of queries and keys of an attention module and its rotary dimension, if it has them."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.layernorm import RMSNorm

    query: Any = getattr(module, "q_norm", None)
    key: Any = getattr(module, "k_norm", None)
    attention: Any = getattr(module, "attn", None)
    rotary: Any = getattr(module, "rotary_emb", None)
    if not isinstance(attention, Attention) or not getattr(rotary, "is_neox_style", False):
        return None
    per_channel = all(
        type(norm) is RMSNorm and norm.has_weight and len(norm.weight) == attention.head_size
        for norm in (query, key)
    )
    return (query, key, int(rotary.rotary_dim)) if per_channel else None

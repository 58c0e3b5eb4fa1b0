"""Find the norms of queries and keys in a loaded model and balance them (`kvarn_core.balance`).

What a model was multiplied by is remembered: weights that are loaded again while keys are cached
are multiplied by the same factors, or queries would meet keys of another scale.
"""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from kvarn_core.balance import balance_

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

LOG = logging.getLogger("vllm.kvarn")
_factors: WeakKeyDictionary[nn.Module, list[tuple[Any, torch.Tensor]]] = WeakKeyDictionary()


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
    multiplied = []
    for query, key, rotary_dim in layers:
        if users[id(query)] == users[id(key)] == 1:
            factors = balance_(query.weight.data, key.weight.data, rotary_dim)
            if factors is not None:
                multiplied += [(query, factors), (key, 1 / factors)]
    _factors[model] = multiplied
    balanced = len(multiplied) // 2
    if layers:
        LOG.info("KVarN: query and key norms of %d of %d layers balanced.", balanced, len(layers))
    return balanced


def keep_balance(runner: Any) -> None:
    """Let weights that a model runner loads again be multiplied by the factors of before."""
    load = runner.reload_weights

    @wraps(load)
    def reload_weights(*args: Any, **kwargs: Any) -> None:
        with kept_balance(runner.get_model()):
            load(*args, **kwargs)

    runner.reload_weights = reload_weights


@contextmanager
def kept_balance(model: nn.Module) -> Iterator[None]:
    """Multiply weights of norms that change within a ``with`` block by the factors of before."""
    multiplied = _factors.get(model, [])
    before = [norm.weight.detach().clone() for norm, _ in multiplied]
    try:
        yield
    finally:  # also of what was loaded before an error
        with torch.no_grad():
            for (norm, factors), weight in zip(multiplied, before, strict=True):
                if not torch.equal(norm.weight, weight):
                    norm.weight.mul_(factors.to(norm.weight.device))


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

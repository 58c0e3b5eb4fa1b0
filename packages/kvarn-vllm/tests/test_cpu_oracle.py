"""Quantised answers of the real engine against a dense forward pass that knows the rule.

The oracle is a plain torch model. In mode ``sealed`` every query at position p sees the sink rows,
records of the tiles below ``packed_tiles(p)`` and exact rows after them, however the scheduler cut
the prompt. A last-bit difference may flip a code, so log-probabilities agree closely in the middle
and loosely at the edges; the same pass without quantisation has to disagree, or this test would
prove nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from kvarn_core import Preset, Recipe, RecordLayout
from kvarn_core.ops.quantize import dequantize, quantize
from kvarn_core.rotation import exact_rows, rotate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.engine
Q_HEADS, KV_HEADS = 4, 2


class Oracle:
    """The tiny model, dense; `attend` maps rotated-free q, k, v [T, H, D] to [T, H, D]."""

    def __init__(self, folder: Path, head_dim: int, attend: Callable[..., torch.Tensor]) -> None:
        self.weights = load_file(folder / "model.safetensors")
        self.head_dim = head_dim
        self.attend = attend

    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """Log-probabilities [T, vocabulary] of the token after each position."""
        x = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(2):
            x = self._layer(x, f"model.layers.{layer}.")
        logits = self._norm(x, "model.norm.weight") @ self.weights["lm_head.weight"].T
        return logits.log_softmax(-1)

    def _layer(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        y = self._norm(x, prefix + "input_layernorm.weight")
        q, k, v = (
            self._linear(y, prefix + f"self_attn.{name}_proj").unflatten(1, (-1, self.head_dim))
            for name in "qkv"
        )
        q = self._rope(self._norm(q, prefix + "self_attn.q_norm.weight"))
        k = self._rope(self._norm(k, prefix + "self_attn.k_norm.weight"))
        x = x + self._linear(self.attend(q, k, v).flatten(1), prefix + "self_attn.o_proj")
        y = self._norm(x, prefix + "post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(self._linear(y, prefix + "mlp.gate_proj"))
        return x + self._linear(
            gate * self._linear(y, prefix + "mlp.up_proj"), prefix + "mlp.down_proj"
        )

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.weights[name + ".weight"].T

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weights[name]

    def _rope(self, x: torch.Tensor) -> torch.Tensor:
        half = self.head_dim // 2
        frequencies = 1.0 / 10000.0 ** (torch.arange(half) / half)
        angles = torch.arange(len(x))[:, None, None] * frequencies
        a, b = x[..., :half], x[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention; the last row of `q` sees all of `k`."""
    k, v = (x.repeat_interleave(Q_HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    last = torch.arange(len(k) - len(q), len(k))
    scores[:, torch.arange(len(k))[None] > last[:, None]] = float("-inf")
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def compressed(layout: RecordLayout, recipe: Recipe) -> Callable[..., torch.Tensor]:
    """Attention of a cold request as its queries see the cache."""
    group = layout.group

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        exact = [exact_rows(x, layout) for x in (k, v)]
        tiles = len(k) // group
        whole = [x[: tiles * group].unflatten(0, (tiles, group)).transpose(1, 2) for x in exact]
        records = quantize(*(x.flatten(0, 1) for x in whole), layout, recipe)
        stored = [
            x.view(tiles, KV_HEADS, group, -1).transpose(1, 2).flatten(0, 1)
            for x in dequantize(records, layout)
        ]
        for old, new in zip(stored, exact, strict=True):
            old[: layout.sink_rows] = new[: layout.sink_rows]
        parts = []
        for start in range(0, len(k), group):
            stop = min(start + group, len(k))
            cut = max(start // group - 1, 0) * group
            seen = [torch.cat((old[:cut], new[cut:stop].float()))
                    for old, new in zip(stored, exact, strict=True)]  # fmt: skip
            parts.append(dense(rotate(q[start:stop]), *seen))
        return rotate(torch.cat(parts))

    return attend


CASES = {
    "k4v2-g128-d128": ("kvarn_k4v2_g128", 128, "kvarn"),
    "k4v2-g128-d128-paper": ("kvarn_k4v2_g128", 128, "paper"),
    "k4v4-g64-d64": ("kvarn_k4v4_g64", 64, "kvarn"),
    "k2v2-g64-d256": ("kvarn_k2v2_g64", 256, "kvarn"),
    "k4v2-g64-d128": ("kvarn_k4v2_g64", 128, "kvarn"),
}


@pytest.mark.parametrize(("preset", "head_dim", "recipe"), CASES.values(), ids=CASES)
def test_engine_equals_dense_oracle(
    start: Any, tiny_model: Any, preset: str, head_dim: int, recipe: str
) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    prompts = [torch.randint(2, 512, (n,), generator=generator).tolist() for n in (300, 600)]
    with start(
        preset,
        head_dim=head_dim,
        max_num_batched_tokens=200,
        enable_prefix_caching=False,
        additional_config={"kvarn": {"prefill": "sealed", "recipe": recipe}},
    ) as engine:
        answers = engine.generate(prompts, max_tokens=150)

    layout = RecordLayout(Preset.from_name(preset), head_dim)
    folder = tiny_model(head_dim)
    aware = Oracle(folder, head_dim, compressed(layout, Recipe.from_name(recipe)))
    unaware = Oracle(folder, head_dim, dense)
    errors, blind_errors = [], []
    for number, prompt in enumerate(prompts):
        [answer] = answers[number]
        tokens = prompt + answer.tokens
        rows = slice(len(prompt) - 1, len(tokens) - 1)
        chosen = torch.tensor(answer.tokens)[:, None]
        got = torch.tensor(answer.logprobs)
        expected = aware.logprobs(tokens)[rows]
        errors.append((expected.gather(1, chosen)[:, 0] - got).abs())
        blind = unaware.logprobs(tokens)[rows].gather(1, chosen)[:, 0]
        blind_errors.append((blind - got).abs())
        gap = expected.max(1).values - expected.gather(1, chosen)[:, 0]
        assert gap.max() < 0.1, "the engine chose a token that is not nearly the oracle's best"
    error, blind_error = torch.cat(errors), torch.cat(blind_errors)
    print(preset, recipe, "median", float(error.median()), "max", float(error.max()),
          "unquantised median", float(blind_error.median()))  # fmt: skip
    assert error.median() < 2e-3
    assert blind_error.median() > 10 * error.median()

"""Quantised answers of the real engine against a dense forward pass that knows the rule.

The oracle is a plain torch model. A query at position p sees the sink rows, records of the tiles
below ``packed_tiles(p)`` and exact rows after them; in mode ``chunk``, queries of one prefill chunk
see each other raw, and the context as a query at the start of the chunk would. A last-bit
difference may flip a code, and with recipe `kvarn` the factor fitted to it and more codes of that
column, so log-probabilities agree closely in the middle and loosely at the edges; the same pass
without quantisation has to disagree, or this test would prove nothing.
"""

from __future__ import annotations

from itertools import pairwise
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


def compressed(
    layout: RecordLayout, recipe: Recipe, chunks: list[tuple[int, int]]
) -> Callable[..., torch.Tensor]:
    """Attention of a cold request as its queries see the cache; `chunks` are seen raw."""
    group = layout.group

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        exact = [exact_rows(x, layout) for x in (k, v)]
        stored = _stored(exact, layout, recipe)
        first = chunks[-1][1] if chunks else 0
        edges = [first, *range((first // group + 1) * group, len(k), group), len(k)]
        parts = []
        for start, stop in [*chunks, *pairwise(edges)]:
            cut = max(start // group - 1, 0) * group
            raw = start if start < first else stop
            seen = [
                torch.cat((old[:cut], new[cut:raw].float(), rotate(x[raw:stop])))
                for old, new, x in zip(stored, exact, (k, v), strict=True)
            ]
            parts.append(dense(rotate(q[start:stop]), *seen))
        return rotate(torch.cat(parts))

    return attend


def _stored(exact: list[torch.Tensor], layout: RecordLayout, recipe: Recipe) -> list[torch.Tensor]:
    """K and V [tokens of whole tiles, Hkv, D] as records give them back, sink rows exact."""
    tiles = len(exact[0]) // layout.group
    whole = [
        x[: tiles * layout.group].unflatten(0, (tiles, layout.group)).transpose(1, 2) for x in exact
    ]
    records = quantize(*(x.flatten(0, 1) for x in whole), layout, recipe)
    stored = [
        x.view(tiles, KV_HEADS, layout.group, -1).transpose(1, 2).flatten(0, 1)
        for x in dequantize(records, layout)
    ]
    for old, new in zip(stored, exact, strict=True):
        old[: layout.sink_rows] = new[: layout.sink_rows]
    return stored


CHUNK = 200
CASES = {
    "k4v2-g128-d128": ("kvarn_k4v2_g128", 128, "kvarn", "sealed"),
    "k4v2-g128-d128-chunk": ("kvarn_k4v2_g128", 128, "kvarn", "chunk"),
    "k4v2-g128-d128-paper": ("kvarn_k4v2_g128", 128, "paper", "sealed"),
    "k4v4-g64-d64": ("kvarn_k4v4_g64", 64, "kvarn", "sealed"),
    "k2v2-g64-d256-chunk": ("kvarn_k2v2_g64", 256, "kvarn", "chunk"),
    "k4v2-g64-d128": ("kvarn_k4v2_g64", 128, "kvarn", "sealed"),
}


@pytest.mark.parametrize(("preset", "head_dim", "recipe", "prefill"), CASES.values(), ids=CASES)
def test_engine_equals_dense_oracle(
    start: Any, tiny_model: Any, preset: str, head_dim: int, recipe: str, prefill: str
) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    prompts = [torch.randint(2, 512, (n,), generator=generator).tolist() for n in (300, 600)]
    with start(
        preset,
        head_dim=head_dim,
        max_num_batched_tokens=CHUNK,
        enable_prefix_caching=False,
        additional_config={"kvarn": {"prefill": prefill, "recipe": recipe}},
    ) as engine:
        answers = [engine.generate([prompt], max_tokens=150)[0][0] for prompt in prompts]

    middle, most = (2e-3, 0.2) if recipe == "paper" else (0.02, 0.4)  # nat
    layout = RecordLayout(Preset.from_name(preset), head_dim)
    errors, blind_errors = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        size = len(prompt)
        chunks = [(c, min(c + CHUNK, size)) for c in range(0, size, CHUNK)]
        rule = compressed(layout, Recipe.from_name(recipe), chunks if prefill == "chunk" else [])
        tokens = prompt + answer.tokens
        chosen = torch.tensor(answer.tokens)[:, None]

        def predict(attend: Any, tokens: list[int] = tokens, size: int = size) -> torch.Tensor:
            oracle = Oracle(tiny_model(head_dim), head_dim, attend)
            return oracle.logprobs(tokens)[size - 1 : -1]

        expected, blind = predict(rule), predict(dense)
        got = torch.tensor(answer.logprobs)
        errors.append((expected.gather(1, chosen)[:, 0] - got).abs())
        blind_errors.append((blind.gather(1, chosen)[:, 0] - got).abs())
        gap = expected.max(1).values - expected.gather(1, chosen)[:, 0]
        assert gap.max() < most / 2, "the engine chose a token that is not nearly the oracle's best"
    error, blind_error = torch.cat(errors), torch.cat(blind_errors)
    assert error.median() < middle
    assert error.max() < most
    assert blind_error.median() > 20 * error.median()


def test_several_samples_share_a_prompt(start: Any, tiny_model: Any) -> None:
    """Three samples of each prompt, drawn at random: each has the probabilities of its own text."""
    prompts = [list(range(2, 2 + n)) for n in (127, 300)]
    with start("kvarn_debug32_g128", max_num_batched_tokens=CHUNK) as engine:
        answers = engine.generate(prompts, max_tokens=150, n=3, temperature=0.8)
    oracle = Oracle(tiny_model(128), 128, dense)
    for number, prompt in enumerate(prompts):
        assert len({tuple(sample.tokens) for sample in answers[number]}) == 3
        for sample in answers[number]:
            logprobs = oracle.logprobs(prompt + sample.tokens)[len(prompt) - 1 : -1]
            expected = logprobs.gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
            assert (expected - torch.tensor(sample.logprobs)).abs().max() < 1e-3

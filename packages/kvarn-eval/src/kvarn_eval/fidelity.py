"""How far the cache moves the model's predictions: teacher-forced, position by position.

Pseudo-decode: a text is read with every query seeing the cache as it would during generation. A
query in tile i sees older tiles as the policy under test stores them, so errors accumulate from
layer to layer and from token to token. The reference is the same model over an fp16 cache. Quality
is the Kullback-Leibler divergence of the next-token distribution over the full vocabulary, in nats.

Texts are program text that training never saw, and held-out problems with their right answers. In
program text the model is uncertain in every degree and every position from 2 G on counts. A problem
is random symbols, then an answer that is nearly certain, where only errors that would change the
text show; answers are also reported on their own. What is traded away: decode kernels, which a
running server exercises (`demo`).
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvarn_core import PRESETS, Preset, RecordLayout
from kvarn_core.balance import balance_
from kvarn_eval.baselines import METHODS
from kvarn_eval.small_model import corpus, outliers, tasks, tokenizer
from kvarn_eval.small_model.model import SmallModel, causal_attention

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Floats = NDArray[np.float64]

DEFAULT_PRESET = PRESETS["kvarn_k4v2_g128"]


@dataclass(frozen=True)
class CachePolicy:
    """What a cache stores exactly and how it stores the rest.

    Parameters
    ----------
    method : str
        Key of `baselines.METHODS`.
    window : int
        Complete tiles before the open one that stay exact.
    sink : int, optional
        First tokens that stay exact; by default as many as one page of the preset holds.
    """

    method: str
    window: int = 1
    sink: int | None = None

    def sink_rows(self, preset: Preset, head_dim: int) -> int:
        """First tokens that stay exact."""
        return RecordLayout(preset, head_dim).sink_rows if self.sink is None else self.sink


REFERENCE = "fp16"
ARMS: dict[str, CachePolicy] = {
    "fp16": CachePolicy("fp16"),
    "rotated fp16": CachePolicy("rotated fp16"),
    "kvarn": CachePolicy("kvarn"),
    "paper": CachePolicy("paper"),
    "hadamard": CachePolicy("hadamard"),
    "kivi": CachePolicy("kivi"),
    "rtn": CachePolicy("rtn"),
    "kvarn, no sink": CachePolicy("kvarn", sink=0),
    "kvarn, no window": CachePolicy("kvarn", window=0),
    "paper as served": CachePolicy("paper", window=0, sink=128),
    "kivi as published": CachePolicy("kivi", window=0, sink=0),
    "rtn as published": CachePolicy("rtn", window=0, sink=0),
}


class PolicyCache:
    """An attention hook that answers every query from the cache its position would find.

    Parameters
    ----------
    policy : CachePolicy
        What is exact and how the rest is stored.
    preset : Preset
        Bits and group, G.
    """

    def __init__(self, policy: CachePolicy, preset: Preset) -> None:
        self.policy = policy
        self.preset = preset

    def stored(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Complete tiles of rows [Hkv, T, D] as they are read once packed: [Hkv, T // G * G, D]."""
        heads, length, dim = key.shape
        group = self.preset.group
        quantise = METHODS[self.policy.method].quantise
        packed = length // group * group
        if quantise is None or packed == 0:
            return key[:, :packed], value[:, :packed]
        tiles = [x[:, :packed].reshape(-1, group, dim) for x in (key, value)]
        read_key, read_value = quantise(tiles[0], tiles[1], self.preset)
        return read_key.reshape(heads, packed, dim), read_value.reshape(heads, packed, dim)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention output [Hq, T, D] of queries [Hq, T, D] over rows [Hkv, T, D]."""
        length, group = q.shape[-2], self.preset.group
        method = METHODS[self.policy.method]
        sink = self.policy.sink_rows(self.preset, q.shape[-1])
        packed_k, packed_v = self.stored(k, v)
        exact_k, exact_v = method.exact(k, self.preset), method.exact(v, self.preset)
        blocks = []
        for start in range(0, length, group):
            stop = min(start + group, length)
            border = max(start - self.policy.window * group, 0)  # packed below, exact from here on
            head = min(sink, border)

            def view(packed: Tensor, exact: Tensor) -> Tensor:
                parts = (exact[:, :head], packed[:, head:border], exact[:, border:stop])  # noqa: B023
                return torch.cat(parts, 1)

            key, value = view(packed_k, exact_k), view(packed_v, exact_v)
            blocks.append(causal_attention(q[:, start:stop], key, value, scale))
        return torch.cat(blocks, 1)


@dataclass(frozen=True)
class Text:
    """Token ids of one text: a prompt of `prompt` tokens and its answer, if it has one."""

    source: str
    ids: tuple[int, ...]
    prompt: int


def program_texts(count: int, length: int) -> list[Text]:
    """Program text that training never saw: beginnings of files of as many modules.

    Parameters
    ----------
    count : int
        Number of texts.
    length : int
        Tokens per text.

    Returns
    -------
    list of Text

    Raises
    ------
    ValueError
        If there are not so many (see `corpus.held_out_texts`).
    """
    found = corpus.held_out_texts(count, length)
    return [Text(name, tuple(ids), len(ids)) for name, ids in found.items()]


def make_texts(
    count: int,
    length: int,
    *,
    first_seed: int = 50_000,
    families: Sequence[str] = tasks.FAMILIES,
) -> list[Text]:
    """Held-out problems with their answers, families in turn.

    Parameters
    ----------
    count : int
        Number of texts.
    length : int
        Tokens per text, prompt and answer; texts are a few tokens shorter.
    first_seed : int
        Seed of the first problem.
    families : sequence of str
        Kinds of problems.

    Returns
    -------
    list of Text
    """
    texts = []
    for i in range(count):
        family = families[i % len(families)]
        questions = min(max(length // 64, 4), tokenizer.MAX_LABEL)
        answer = tasks.question_tokens(family, questions)[1]
        item = tasks.make_item(
            family, first_seed + i, prompt_tokens=length - answer, questions=questions
        )
        prompt, ids = tokenizer.encode(item.prompt), tokenizer.encode(item.answer)
        texts.append(Text(family, (*prompt, *ids), len(prompt)))
    return texts


def load_model(folder: Path, profile: str, device: str = "cpu") -> SmallModel:
    """Read the small model in fp32, with the outliers of a profile (``plain`` has none)."""
    model = SmallModel.load(folder, device=device)
    if profile != "plain":
        model.load_state_dict(outliers.stress(model.state_dict(), model.config, profile))
    return model


def as_served(model: SmallModel, policy: CachePolicy) -> SmallModel:
    """The model whose keys a cache of this policy gets: another one of the same function, or it."""
    if not METHODS[policy.method].balanced:
        return model
    served = copy.deepcopy(model)
    weights = served.state_dict()
    for i in range(model.config.num_hidden_layers):
        query, key = (weights[f"model.layers.{i}.self_attn.{x}_norm.weight"] for x in "qk")
        balance_(query, key, model.config.head_dim)
    return served


def weights_sha256(folder: Path) -> str:
    """Hash of `model.safetensors` in a model folder."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def texts_sha256(texts: Sequence[Text]) -> str:
    """Hash of the token ids of all texts."""
    return hashlib.sha256(json.dumps([text.ids for text in texts]).encode()).hexdigest()


@torch.inference_mode()
def pseudo_decode(
    model: SmallModel, ids: Sequence[int], policy: CachePolicy, preset: Preset
) -> Tensor:
    """Log-probabilities of the next token, every position reading the cache of a policy.

    Parameters
    ----------
    model : SmallModel
        Weights in fp32.
    ids : sequence of int, length T
        Token ids.
    policy : CachePolicy
        Cache under test.
    preset : Preset
        Bits and group.

    Returns
    -------
    Tensor [T, V], fp64, on the model's device
    """
    device = model.model.embed_tokens.weight.device
    reader = as_served(model, policy)
    logits: Tensor = reader(torch.tensor(ids, device=device), PolicyCache(policy, preset))
    return logits.double().log_softmax(-1)


@dataclass(frozen=True)
class Distance:
    """Distance between two runs over one text, by position; arrays [T - 1]."""

    kld: Floats
    top1: Floats
    dlogp: Floats
    answer_from: int

    def answer(self, values: Floats, first: int) -> Floats:
        """Values at positions that predict the answer and are not before `first`."""
        return values[max(self.answer_from, first) :]


def compare(reference: Tensor, test: Tensor, text: Text) -> Distance:
    """Divergence of log-probabilities `test` from `reference`, both [T, V], position by position.

    Position t predicts token t + 1; the last position predicts nothing and is left out.
    """
    p, q = reference[:-1], test[:-1]
    following = torch.tensor(text.ids[1:], device=p.device)[:, None]
    return Distance(
        kld=(p.exp() * (p - q)).sum(-1).clamp(min=0).cpu().numpy(),
        top1=(p.argmax(-1) == q.argmax(-1)).double().cpu().numpy(),
        dlogp=(p - q).gather(1, following)[:, 0].abs().cpu().numpy(),
        answer_from=text.prompt - 1,
    )


def measure_arms(
    model: SmallModel,
    texts: Sequence[Text],
    arms: dict[str, CachePolicy],
    preset: Preset = DEFAULT_PRESET,
) -> dict[str, list[Distance]]:
    """Distances of every arm from the fp16 cache, one per text.

    Parameters
    ----------
    model : SmallModel
        Weights in fp32.
    texts : sequence of Text
        What is read.
    arms : dict
        Policies by name.
    preset : Preset
        Bits and group.

    Returns
    -------
    dict of list of Distance
    """
    found: dict[str, list[Distance]] = {name: [] for name in arms}
    for text in texts:
        reference = pseudo_decode(model, text.ids, ARMS[REFERENCE], preset)
        for name, policy in arms.items():
            same = policy == ARMS[REFERENCE]
            test = reference if same else pseudo_decode(model, text.ids, policy, preset)
            found[name].append(compare(reference, test, text))
    return found

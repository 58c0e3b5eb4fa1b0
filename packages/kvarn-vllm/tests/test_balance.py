"""Balanced keys in the real engine: what a model was scaled by does not reach the cache."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from kvarn_vllm.balance import balance_model, kept_balance

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OFF = {"additional_config": {"kvarn": {"balance": False}}}
PAPER = {"additional_config": {"kvarn": {"recipe": "paper"}}}
PRESET = "kvarn_k4v2_g128"


@pytest.fixture(scope="module")
def stressed(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with four pairs of key channels 16 times larger; the same function."""
    folder = tmp_path_factory.mktemp("stressed") / "model"
    shutil.copytree(tiny_model(), folder)
    weights = load_file(folder / "model.safetensors")
    factors = torch.ones(128)
    factors[[3, 17, 40, 63]] = 16.0
    factors[64:] = factors[:64]
    for name, weight in weights.items():
        if name.endswith("k_norm.weight"):
            weight.mul_(factors)
        elif name.endswith("q_norm.weight"):
            weight.div_(factors)
    save_file(weights, folder / "model.safetensors")
    return folder


def norms(engine: Any) -> list[torch.Tensor]:
    named = engine.runner.get_model().named_parameters()
    return [x.detach().clone() for name, x in named if "q_norm" in name or "k_norm" in name]


@pytest.mark.engine
def test_a_stressed_model_answers_as_the_plain_one(start: Any, stressed: Path) -> None:
    prompt = torch.randint(2, 512, (700,), generator=torch.Generator().manual_seed(1)).tolist()
    answers, weights = {}, {}
    arms = {
        "plain": {},
        "stressed": {"model": stressed},
        "stressed, off": {"model": stressed, **OFF},
        "stressed, paper": {"model": stressed, **PAPER},
    }
    for name, options in arms.items():
        with start(PRESET, **options) as engine:
            weights[name] = norms(engine)
            answers[name] = engine.generate([prompt])[0][0]
    assert answers["stressed"] == answers["plain"]
    assert all(map(torch.equal, weights["stressed"], weights["plain"]))
    assert answers["stressed, off"].logprobs != answers["plain"].logprobs
    assert weights["stressed, off"][1].max() == weights["stressed, paper"][1].max() == 16


@pytest.mark.engine
def test_reloaded_weights_meet_the_cached_keys(start: Any, stressed: Path) -> None:
    prompt = torch.randint(2, 512, (700,), generator=torch.Generator().manual_seed(1)).tolist()
    with start(PRESET, model=stressed) as engine:
        engine.generate([prompt])
        again = engine.generate([prompt])[0][0]  # begins with a hit
        before = norms(engine)
        engine.runner.reload_weights()
        assert all(map(torch.equal, norms(engine), before))
        assert engine.generate([prompt])[0][0] == again


@pytest.mark.engine
def test_a_stock_cache_keeps_the_weights(start: Any, stressed: Path) -> None:
    with start("auto", model=stressed) as engine:
        assert norms(engine)[1].max() == 16


@pytest.mark.engine
def test_balancing_changes_no_exact_answer(start: Any, stressed: Path) -> None:
    prompt = torch.randint(2, 512, (300,), generator=torch.Generator().manual_seed(2)).tolist()
    with start("kvarn_debug32_g128", model=stressed) as engine:
        balanced = engine.generate([prompt])[0][0]
    with start("kvarn_debug32_g128", model=stressed, **OFF) as engine:
        assert engine.generate([prompt])[0][0].tokens == balanced.tokens


def bare(kind: type[nn.Module], **fields: Any) -> Any:
    """A module of vLLM with these fields and nothing else."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, value in fields.items():
        setattr(module, name, value)
    return module


def layer(**changes: Any) -> nn.Module:
    """An attention layer of head size 8 whose keys are 16 times larger than its queries."""

    def norm(size: float) -> nn.Module:
        return bare(RMSNorm, weight=nn.Parameter(torch.full((8,), size)), has_weight=True)

    fields = {
        "attn": bare(Attention, head_size=8),
        "rotary_emb": bare(nn.Module, is_neox_style=True, rotary_dim=8),
        "q_norm": norm(1.0),
        "k_norm": norm(16.0),
    }
    return bare(nn.Module, **{**fields, **changes})


def test_layers_are_balanced_in_place() -> None:
    model = nn.ModuleList([layer(), layer()])
    assert balance_model(model) == 2
    assert all(torch.equal(x, torch.full((8,), 4.0)) for x in model.parameters())


def test_weights_that_are_loaded_again_get_the_same_factors() -> None:
    model = nn.ModuleList([layer(), layer()])
    balance_model(model)
    with torch.no_grad(), kept_balance(model):
        model[0].q_norm.weight.fill_(1.0)  # the same checkpoint
        model[0].k_norm.weight.fill_(16.0)
        model[1].q_norm.weight.fill_(2.0)  # other weights, and only these
    assert [float(x[0]) for x in model.parameters()] == [4.0, 4.0, 8.0, 4.0]


def test_a_model_that_was_not_balanced_is_loaded_as_it_is() -> None:
    model = nn.ModuleList([layer()])
    with torch.no_grad(), kept_balance(model):
        model[0].q_norm.weight.fill_(3.0)
    assert [float(x[0]) for x in model.parameters()] == [3.0, 16.0]


GEMMA = bare(GemmaRMSNorm, weight=nn.Parameter(torch.full((8,), 16.0)), has_weight=True)
WIDE = bare(RMSNorm, weight=nn.Parameter(torch.full((32,), 16.0)), has_weight=True)
SHARED = bare(RMSNorm, weight=nn.Parameter(torch.full((8,), 16.0)), has_weight=True)


@pytest.mark.parametrize(
    "models",
    [
        [layer(k_norm=GEMMA)],
        [layer(k_norm=WIDE)],
        [layer(k_norm=None)],
        [layer(attn=None)],
        [layer(rotary_emb=bare(nn.Module, is_neox_style=False, rotary_dim=8))],
        [layer(k_norm=SHARED), layer(k_norm=SHARED)],
        [nn.Linear(4, 4)],
    ],
    ids=["gemma", "wide", "one-norm", "no-attention", "neighbours", "shared", "linear"],
)
def test_other_layers_are_left_alone(models: list[nn.Module]) -> None:
    model = nn.ModuleList(models)
    before = [x.detach().clone() for x in model.parameters()]
    assert balance_model(model) == 0
    assert all(map(torch.equal, model.parameters(), before))

"""Fixtures: a tiny random model and a small finished run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvarn_eval.schema import Arm, Gate, Model, Run, Unit, Verdict, describe_run, measure
from kvarn_eval.small_model.model import ModelConfig, SmallModel

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model() -> SmallModel:
    """A random model of a few kilobytes whose attention is sharp enough for faults to show."""
    torch.manual_seed(0)
    config = ModelConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    model = SmallModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
            if name.endswith("q_norm.weight"):
                weight.fill_(3.0)
        model.model.embed_tokens.weight.normal_(std=0.5)
        model.model.norm.weight.fill_(0.3)
    return model


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Run]:
    return finished_run


def finished_run(verdict: Verdict = Verdict.PASS) -> Run:
    header = describe_run("demo", "0" * 64, Model(name="m", weights_sha256=None, dtype="float16"))
    measurements = []
    for arm, factor in (("fp16", 1), ("kvarn", 4)):
        measurements += [
            measure("pool_tokens", arm, Unit.TOKENS, 174_720 * factor),
            measure("tokens_per_gib", arm, Unit.TOKENS_PER_GIB, 174_720 * factor),
            measure("accuracy", arm, Unit.SHARE, 0.98, interval=(0.9, 1.0)),
        ]
        measurements += [
            measure(
                f"plain.kld_at_{start}",
                arm,
                Unit.NATS,
                1e-4 * factor,
                context={"profile": "plain", "from": start, "to": start + 256},
            )
            for start in (0, 256)
        ]
    gate = Gate(
        name="kld",
        rule="mean KLD <= limit",
        value=0.0123,
        limit=0.02,
        verdict=verdict,
        reason="mean KLD 0.0123 nats",
        evidence=["kvarn:accuracy"],
    )
    fields: dict[str, Any] = {
        "seconds": 1.0,
        "arms": {"fp16": Arm(), "kvarn": Arm(kv_cache_dtype="kvarn_k4v2_g128")},
        "measurements": measurements,
        "gates": [gate],
    }
    return Run.model_validate({**header, **fields})

"""Outlier stress: the cache changes, the function does not."""

from __future__ import annotations

import pytest
import torch

from kvarn_eval.small_model import outliers, tokenizer
from kvarn_eval.small_model.model import SmallModel

IDS = torch.randint(3, len(tokenizer.TOKENS), (200,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("profile", "key", "value"), [("large", 4, 1.5), ("tiny", 2**-5, 2**-5)])
def test_stress_moves_the_cache_and_not_the_logits(
    tiny_model: SmallModel, profile: str, key: float, value: float
) -> None:
    stressed = SmallModel(tiny_model.config).eval()
    stressed.load_state_dict(outliers.stress(tiny_model.state_dict(), tiny_model.config, profile))
    ids = IDS
    with torch.inference_mode():
        assert (stressed(ids) - tiny_model(ids)).abs().max() < 1e-5
    plain_k, plain_v = outliers.largest_rows(tiny_model, ids)
    k, v = outliers.largest_rows(stressed, ids)
    if profile == "large":
        assert k > key * plain_k
        assert v > value * plain_v
    else:
        assert k == pytest.approx(key * plain_k)
        assert v == pytest.approx(value * plain_v)


def test_stress_puts_the_stated_number_of_channels(tiny_model: SmallModel) -> None:
    stressed = outliers.stress(tiny_model.state_dict(), tiny_model.config, "large")
    name = "model.layers.1.self_attn.{}.weight"
    ratio = stressed[name.format("k_norm")] / tiny_model.state_dict()[name.format("k_norm")]
    assert torch.equal(ratio[:32], ratio[32:])
    counts = {float(f): int((ratio == f).sum()) for f in ratio.unique()}
    assert counts == {16.0: 4, 0.5: 8, 1.0: 52}  # of 64 channels: 2 and 4 of 32 pairs
    rows = (stressed[name.format("v_proj")] / tiny_model.state_dict()[name.format("v_proj")]).amax(
        1
    )
    assert [(rows[h * 64 : h * 64 + 64] == 8).sum().item() for h in range(2)] == [3, 3]


def test_stress_refuses_what_it_cannot_keep_equal(tiny_model: SmallModel) -> None:
    weights = {n: w for n, w in tiny_model.state_dict().items() if "q_norm" not in n}
    with pytest.raises(ValueError, match="Layer 0 has no QK-norm"):
        outliers.stress(weights, tiny_model.config, "large")
    with pytest.raises(ValueError, match="Choose one of moderate, large, tiny"):
        outliers.stress(tiny_model.state_dict(), tiny_model.config, "huge")
    with pytest.raises(ValueError, match="Factor 3 is not a power of two"):
        outliers.Scale(3, 0.5)


def test_an_overflowing_cache_is_reported(tiny_model: SmallModel) -> None:
    weights = {n: w * 1e6 if "k_norm" in n else w for n, w in tiny_model.state_dict().items()}
    loud = SmallModel(tiny_model.config).eval()
    loud.load_state_dict(weights)
    with pytest.raises(ValueError, match="the limit is 3e"):
        outliers.largest_rows(loud, IDS)

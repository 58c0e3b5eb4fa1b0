"""The divergence of the product on the small model may not grow beyond what was last accepted.

Problems are read, not program text: they are the same under every Python. After a deliberate
change of numbers, run this file as a program to record them anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kvarn_eval.fidelity import ARMS, load_model, make_texts, measure_arms, weights_sha256
from kvarn_eval.fidelity_gates import PROFILES, REGRESSION_LIMIT

MODEL = Path(__file__).parents[1] / "models" / "small"
RECORDED = Path(__file__).parent / "recorded" / "kld.json"
TEXTS, LENGTH, FIRST = 2, 768, 256


def mean_kld(profile: str) -> float:
    """Mean divergence in nats of the `kvarn` cache from position 2 G on."""
    arms = {name: ARMS[name] for name in ("fp16", "kvarn")}
    found = measure_arms(load_model(MODEL, profile, "cpu"), make_texts(TEXTS, LENGTH), arms)
    return float(np.concatenate([distance.kld[FIRST:] for distance in found["kvarn"]]).mean())


@pytest.mark.parametrize("profile", PROFILES)
def test_the_divergence_has_not_grown(profile: str) -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert recorded["weights_sha256"] == weights_sha256(MODEL)
    assert mean_kld(profile) <= REGRESSION_LIMIT * recorded["kld"][profile]


if __name__ == "__main__":
    kept = {
        "weights_sha256": weights_sha256(MODEL),
        "kld": {profile: mean_kld(profile) for profile in PROFILES},
    }
    RECORDED.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")

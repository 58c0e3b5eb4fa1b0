"""Triton stores the same bytes every time; what they are is in test_store_kernels.py."""

from __future__ import annotations

import pytest
import torch
from store_steps import assert_a_thousand_runs_agree

from kvarn_core.layout import RecordLayout
from kvarn_core.spec import PRESETS


@pytest.mark.gpu
def test_a_thousand_runs_give_one_result() -> None:
    layout = RecordLayout(PRESETS["kvarn_k4v2_g128"], 128)
    assert_a_thousand_runs_agree(layout, "triton", torch.device("cuda"))

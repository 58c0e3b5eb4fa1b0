"""The Muon optimizer against torch's own."""

from __future__ import annotations

import pytest
import torch

from kvarn_eval.small_model.muon import Muon, orthogonalise


def test_muon_agrees_with_torch() -> None:
    torch.manual_seed(0)
    start = [torch.randn(shape) * 0.02 for shape in ((64, 32), (32, 64), (32, 32), (64, 32))]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    optimizers = (
        Muon(ours, lr=1e-2, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert (a - before).abs().max() > 1e-2
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 24, 64)).float())
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_muon_refuses_vectors() -> None:
    with pytest.raises(ValueError, match="Give it matrices only"):
        Muon([torch.zeros(3, requires_grad=True)], lr=1e-2)

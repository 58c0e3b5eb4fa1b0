"""The Muon optimizer: momentum, orthogonalised, for the matrices of the small model.

A step moves every singular direction of a matrix equally. Matrices of one shape (after transposing
to wide) are orthogonalised in one batch; a loop over matrices would spend as long as the forward
pass on launching kernels.

References
----------
K. Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024; step size matched to
Adam's as in arXiv 2502.16982.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(g: Tensor) -> Tensor:
    """Approximate the nearest semi-orthogonal matrix by Newton-Schulz iterations in bf16.

    Parameters
    ----------
    g : Tensor [N, rows, columns], rows <= columns

    Returns
    -------
    Tensor [N, rows, columns], bf16
        Singular values between about 0.7 and 1.2.
    """
    a, b, c = _COEFFICIENTS
    x: Tensor = g.bfloat16()
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    Parameters
    ----------
    params : iterable of Parameter
        Matrices only.
    lr : float
        Step size; an update has the root mean square of an Adam update, about 0.2 of it.
    momentum, weight_decay : float
        As in SGD and in AdamW.

    Raises
    ------
    ValueError
        If a parameter is not a matrix.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(
                        f"Muon got a parameter of shape {tuple(p.shape)}. Give it matrices only."
                    )

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update all parameters from their gradients."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                average = self.state[p]["momentum"]
                average.lerp_(p.grad, 1 - group["momentum"])
                direction = p.grad.lerp(average, group["momentum"])
                by_shape[min(p.shape), max(p.shape)].append((p, direction))
            for (_, columns), members in by_shape.items():
                wide = torch.stack([d if d.shape[0] <= d.shape[1] else d.mT for _, d in members])
                step_size = group["lr"] * 0.2 * columns**0.5
                for (weight, _), update in zip(members, orthogonalise(wide).float(), strict=True):
                    fits = weight.shape[0] <= weight.shape[1]
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.sub_(update if fits else update.mT, alpha=step_size)

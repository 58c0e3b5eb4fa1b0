"""Decode on the emulator: the launcher of the cuda engine with a kernel that runs on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from emulator.build import EmulatedKernel

from kvarn_core.ops.decode import cuda, decode
from kvarn_core.testing.inputs import draw
from kvarn_core.testing.paging import Paging, allocate, store_sequence

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pytest

    from kvarn_core.layout import RecordLayout
    from kvarn_core.nvrtc import Variant
    from kvarn_core.ops.decode.shapes import Shape

ROUNDING = 4e-3  # fp16 queries, folded scales and probabilities; 4-bit codes lose 20 times as much


class Emulated:
    """Runs `cuda.decode` on the CPU with a given grid and order.

    Attributes
    ----------
    processors : int
        Multiprocessors of the machine.
    seed : int
        Order of lanes, warps and CTAs.
    magic : bool
        Codes with an exponent.
    changed : callable
        What is run instead of a variant.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.processors, self.seed, self.magic = 2, 0, False
        self.changed: Callable[[Variant], Variant] = lambda variant: variant
        monkeypatch.setattr(cuda, "_kernel", self._kernel)
        monkeypatch.setattr(cuda, "_processors", lambda device: self.processors)
        self.cache: torch.Tensor

    def _kernel(
        self, layout: RecordLayout, dtype: torch.dtype, shape: Shape, device: torch.device
    ) -> EmulatedKernel:
        variant = self.changed(cuda.variant(layout, dtype, shape, magic=self.magic))
        return EmulatedKernel(variant, [self.cache], self.seed)

    def decode(
        self,
        paging: Paging,
        query: torch.Tensor,
        tokens: Sequence[int],
        workspace: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cuda._scratch.cache_clear()  # the number of processors may have changed
        self.cache = paging.cache
        lens = torch.tensor(tokens, dtype=torch.int32)
        out = torch.full_like(query, float("nan"))
        lse = torch.full(query.shape[:2], float("nan"))
        run = cuda.prepare(
            query, paging.cache, paging.page_table, lens, paging.layout,
            paging.layout.head_dim**-0.5, out, lse, workspace,
        )  # fmt: skip
        run(query, paging.cache, out)
        return out, lse


def stored(layout: RecordLayout, tokens: tuple[int, ...], heads: int, **options: object) -> Paging:
    """A cache with random rows of requests of these lengths."""
    paging = allocate(layout, [max(n, 1) for n in tokens], num_kv_heads=heads, **options)  # type: ignore[arg-type]
    for i, n in enumerate(tokens):
        shape = (n, heads, layout.head_dim)
        if n:
            key, value = draw("gaussian", shape, seed=i), draw("gaussian", shape, seed=i + 50)
            store_sequence(paging, i, key, value, [n])
    return paging


def query_of(paging: Paging, ratio: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Random queries for every request of a cache."""
    batch, heads = len(paging.capacities), paging.cache.shape[1]
    return draw("gaussian", (batch, heads * ratio, paging.layout.head_dim), seed=9).to(dtype)


def expected(
    paging: Paging, query: torch.Tensor, tokens: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the reference makes of the same call."""
    lens = torch.tensor(tokens, dtype=torch.int32)
    scale = paging.layout.head_dim**-0.5
    where = (query, paging.cache, paging.page_table, lens)
    return decode(*where, layout=paging.layout, sm_scale=scale, engine="reference")

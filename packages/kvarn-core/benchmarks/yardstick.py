"""What the memory of this GPU can do: a sum that reads 2 GB, and a copy."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from cases import Job

BLOCK = 8192  # int32 elements of one program


@triton.jit
def _sum(source, partial_sums, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One sum per block of int32 elements."""
    i_block = tl.program_id(0).to(tl.int64)
    total = tl.sum(tl.load(source + i_block * BLOCK + tl.arange(0, BLOCK)))
    tl.store(partial_sums + i_block, total)


def block_sums(source: torch.Tensor, out: torch.Tensor) -> None:
    """Sum int32 [N] in blocks into `out` [N / BLOCK]; N is a multiple of `BLOCK`."""
    _sum[(out.numel(),)](source, out, BLOCK=BLOCK, num_warps=8)


def prepare(nbytes: int = 1 << 31) -> dict[str, Job]:
    """Calls that read, and that copy, `nbytes` bytes; each on two buffers in turn."""
    source = torch.randint(0, 1 << 15, (2, nbytes // 4), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    sums = torch.empty(nbytes // (4 * BLOCK), dtype=torch.int32, device="cuda")
    return {
        "read": Job.over([partial(block_sums, source[i], sums) for i in range(2)], nbytes),
        "copy": Job.over([partial(target[i].copy_, source[i]) for i in range(2)], 2 * nbytes),
    }

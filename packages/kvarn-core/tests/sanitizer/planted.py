"""Two bugs that compute-sanitizer must find: ``python planted.py memcheck | racecheck``.

A check that has never been red proves nothing; `nox -s sanitize` expects both of these to fail.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl

THREADS = 64  # two warps, which nothing keeps in step


@triton.jit
def out_of_bounds(p_out, THREADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write a megabyte behind the end."""
    tl.store(p_out + (1 << 18) + tl.arange(0, THREADS), 1)


@triton.jit
def race(p_out, THREADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Read from shared memory what the other warp writes, without a barrier."""
    o = tl.arange(0, THREADS)
    found = tl.inline_asm_elementwise(
        """{
            .shared .align 4 .b8 words[256];
            .reg .u32 base, place, other;
            mov.u32 base, words;
            mad.lo.u32 place, $1, 4, base;
            st.shared.u32 [place], $1;
            xor.b32 other, $1, 32;
            mad.lo.u32 place, other, 4, base;
            ld.shared.u32 $0, [place];
        }""",
        "=r,r", [o], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.store(p_out + o, found)


def main() -> None:
    """Run one of them."""
    kernel = {"memcheck": out_of_bounds, "racecheck": race}[sys.argv[1]]
    out = torch.zeros(THREADS, dtype=torch.int32, device="cuda")
    kernel[(1,)](out, THREADS, num_warps=2)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()

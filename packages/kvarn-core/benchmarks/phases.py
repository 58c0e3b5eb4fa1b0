"""Where the time of a decode launch goes: when each CTA reached what, on a Hopper GPU.

    python packages/kvarn-core/benchmarks/phases.py

The kernel in CUDA C++ is built once more with stamps of the GPU's clock, written by one thread of
each CTA. Its source has none: they are put behind the lines that `STAMPS` names, so the kernel that
is served stays as it is. Stamps take time themselves; read differences, not sums.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvarn_core import nvrtc
from kvarn_core.layout import RecordLayout
from kvarn_core.ops.decode import cuda
from kvarn_core.spec import PRESETS
from kvarn_core.testing.workload import lengths, random_cache, record_tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvarn_core.ops.decode.shapes import Shape

HEAD, ARGUMENT = "KERNEL void", "u32 inverse_blocks) {"
MACRO = """
DEVICE u64 now() {
    u64 t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t) :: "memory");
    return t;
}
#define STAMP(i) { \\
    u64& to = stamps[late_block() * 8 + i]; \\
    if (threadIdx.x == 0 && !to) to = now(); \\
}
"""
# what a CTA has reached, and the line before which that is so; the first time counts
STAMPS = {
    "share known": "    if (lane == 0) store_shared4(note,",
    "first fetch": "    if (share.begin < share.end) leave_query",
    "query there": "        State state;",
    "first record": "            if (unit.count) {\n                float scores",
    "loop left": "        leave_state(region,",
    "part written": "        if (parts > 1) {",
    "end": "    for (int request = late_block();",
}
PHASES = ("start", *STAMPS)
SHAPES = ((32, 16_384), (8, 16_384), (1, 131_072), (1, 16_384), (1, 4096), (1, 1024), (32, 1024))
QUERY_HEADS, KV_HEADS, CTAS = 64, 8, 4096
QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


def stamped(variant: nvrtc.Variant, folder: Path) -> nvrtc.Variant:
    """The variant with stamps; its sources are copied to `folder`, which must not exist.

    Raises
    ------
    ValueError
        If a line of `STAMPS` is not in the kernel exactly once.
    """
    program = variant.program
    shutil.copytree(program.source.parent, folder)
    text = program.source.read_text(encoding="utf-8")
    lines = {HEAD: MACRO + HEAD, ARGUMENT: f"{ARGUMENT[:-3]}, u64* stamps) {{\n    STAMP(0)"}
    lines |= {line: f"    STAMP({i})\n{line}" for i, line in enumerate(STAMPS.values(), 1)}
    for line, becomes in lines.items():
        if text.count(line) != 1:
            raise ValueError(f"{program.source.name} has {text.count(line)} lines {line!r}, not 1.")
        text = text.replace(line, becomes)
    source = folder / program.source.name
    source.write_text(text, encoding="utf-8")
    return dataclasses.replace(
        variant,
        program=dataclasses.replace(program, source=source),
        arguments=(*variant.arguments, "pointer"),
    )


class Stamping:
    """A kernel that is given the memory for its stamps."""

    def __init__(self, kernel: nvrtc.Kernel, stamps: torch.Tensor) -> None:
        self.kernel = kernel
        self.stamps = stamps

    def launch(self, grid: tuple[int, int, int], *values: int | float) -> None:
        """As `nvrtc.Kernel.launch`; earlier stamps are gone."""
        self.stamps.zero_()
        self.kernel.launch(grid, *values, self.stamps.data_ptr())


def table(stamps: torch.Tensor) -> list[str]:
    """Lines with quantiles over CTAs, in µs since the first CTA started; stamps [CTAs, 8], ns."""
    seen = stamps[stamps[:, 0] > 0]
    working = seen[seen[:, PHASES.index("loop left")] > 0]
    lines = [f"{len(working)} of {len(seen)} CTAs have work; µs at quantiles {QUANTILES}"]
    for i, name in enumerate(PHASES):
        times = (working[:, i] - seen[:, 0].min()).double() / 1000
        quantiles = times.quantile(torch.tensor(QUANTILES, dtype=torch.double))
        lines.append(f"  {name:13}" + " ".join(f"{x:8.2f}" for x in quantiles))
    return lines


def launch(layout: RecordLayout, batch: int, context: int, flush: torch.Tensor) -> None:
    """One decode of a batch on a cold L2 cache, after two others."""
    device = flush.device
    seq_lens = lengths(batch, context)
    tables, pages = record_tables(layout, seq_lens)
    cache = random_cache(layout, tables, pages, KV_HEADS, device=device)
    shape = (batch, QUERY_HEADS, layout.head_dim)
    query = torch.randn(shape, dtype=torch.float16, device=device)
    out, lse = torch.empty_like(query), torch.empty(shape[:2], device=device)
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    where = query, cache, tables[0].to(device), lens, layout, layout.head_dim**-0.5
    run = cuda.prepare(*where, out, lse, None)
    for _ in range(3):
        flush.zero_()
        run(query, cache, out)
        torch.cuda.synchronize()


def main(line: Sequence[str] | None = None) -> int:
    """Print a table per shape; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(PRESETS), default="kvarn_k4v2_g128")
    options = parser.parse_args(line)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != nvrtc.CAPABILITY:
        print("phases needs a GPU of compute capability 9.0.", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0)
    layout = RecordLayout(PRESETS[options.preset], 128)
    stamps = torch.zeros(CTAS, 8, dtype=torch.int64, device=device)

    @cache
    def kernel(
        layout: RecordLayout, dtype: torch.dtype, shape: Shape, device: torch.device
    ) -> Stamping:
        with tempfile.TemporaryDirectory() as folder:
            variant = stamped(cuda.variant(layout, dtype, shape), Path(folder) / "decode")
            return Stamping(nvrtc.load(variant, device), stamps)

    cuda._kernel = kernel  # type: ignore[assignment]
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    for batch, context in SHAPES:
        launch(layout, batch, context, flush)
        print(f"B {batch} x {context}:", *table(stamps.cpu()), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

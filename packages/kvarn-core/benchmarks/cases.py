"""What is timed: the shapes, and the lists of `--quick` and `--full`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from kvarn_core import Preset, RecordLayout
from kvarn_core.testing.timing import calls_per_graph
from kvarn_core.testing.workload import lengths

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

USUAL = "kvarn_k4v2_g128"
FLASH16, FLASH8, TURBOQUANT = "flash-fp16", "flash-fp8", "turboquant_4bit_nc"


@dataclass(frozen=True)
class Case:
    """One decode step of one layer.

    Parameters
    ----------
    batch, context : int
        Requests, and tokens of the longest one.
    preset : str
        KVarN preset.
    num_q_heads, num_kv_heads, head_dim : int
        Attention shape; Qwen3-32B by default.
    mixed : bool
        Lengths spread tenfold instead of within one tile.
    rivals : tuple of str
        Other caches timed in turns with ours.
    """

    batch: int
    context: int
    preset: str = USUAL
    num_q_heads: int = 64
    num_kv_heads: int = 8
    head_dim: int = 128
    mixed: bool = False
    rivals: tuple[str, ...] = (FLASH16, FLASH8, TURBOQUANT)

    @cached_property
    def layout(self) -> RecordLayout:
        """Byte layout of our cache."""
        return RecordLayout(Preset.from_name(self.preset), self.head_dim)

    @cached_property
    def seq_lens(self) -> list[int]:
        """Tokens of each request, the same for every cache."""
        return lengths(self.batch, self.context, mixed=self.mixed)

    @property
    def name(self) -> str:
        """Name of the measurement; preset and attention shape appear where they are not usual."""
        parts = [f"decode.b{self.batch}.n{self.context}"]
        if self.preset != USUAL:
            parts.append(self.preset.removeprefix("kvarn_"))
        if (self.num_q_heads, self.num_kv_heads, self.head_dim) != (64, 8, 128):
            parts.append(f"h{self.num_q_heads}x{self.num_kv_heads}.d{self.head_dim}")
        return ".".join(parts + ["mixed"] * self.mixed)


@dataclass(frozen=True)
class Job:
    """Calls for one graph, each on a cold part of memory, and the bytes that one call must move."""

    calls: list[Callable[[], object]]
    nbytes: int

    @classmethod
    def over(cls, calls: Sequence[Callable[[], object]], nbytes: int) -> Job:
        """Take turns on memory sets, given one call for each, until a graph is long enough."""
        return cls([calls[i % len(calls)] for i in range(calls_per_graph(len(calls)))], nbytes)


QUICK = [
    Case(1, 16_384),
    Case(8, 4096, rivals=(FLASH16, FLASH8)),
    Case(8, 16_384, rivals=(FLASH16, FLASH8)),
    Case(64, 4096, rivals=(FLASH16, FLASH8)),
    Case(32, 16_384),
]
_MAIN = [
    Case(batch, context)
    for context in (1024, 4096, 16_384)
    for batch in (1, 4, 8, 16, 32, 64, 128)
    if batch * context <= 64 * 16_384
]
_BUSY = Case(32, 16_384, rivals=(FLASH16,))
FULL = [
    *_MAIN,
    Case(1, 131_072),
    Case(32, 16_384, mixed=True),
    *(
        replace(_BUSY, preset=preset)
        for preset in (
            "kvarn_k4v4_g128",
            "kvarn_k2v2_g128",
            "kvarn_k4v2_g64",
            "kvarn_k4v4_g64",
            "kvarn_k2v2_g64",
        )
    ),
    *(replace(_BUSY, head_dim=head_dim) for head_dim in (64, 256)),
    *(replace(_BUSY, num_q_heads=num_q_heads) for num_q_heads in (8, 32, 40, 128)),
    *(  # a rank of two
        replace(_BUSY, batch=batch, context=context, num_q_heads=32, num_kv_heads=4)
        for batch, context in ((8, 4096), (32, 16_384), (128, 4096))
    ),
]

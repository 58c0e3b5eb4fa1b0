"""Sizes of CTAs of decode in CUDA C++, and which one a batch gets.

A processor holds a number of warps, and they are one CTA or several. Large CTAs leave few parts of
a head block to merge; small ones wait for each other less where a CTA has several head blocks. So
a batch gets the largest ones with which there is one for every head block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvarn_core.layout import RecordLayout

HEADS, WIDE_HEADS = 8, 16  # query heads of a head block; as many as are read in one pass
# warps that a processor holds, by head_dim and bits: what shared memory and registers allow; and
# into how many CTAs they may be cut
SIZES = {
    (64, 4, 2): (16, (1, 2, 4)), (64, 4, 4): (16, (1, 2, 4)), (64, 2, 2): (16, (1, 2, 4)),
    (128, 4, 2): (12, (1, 2, 3)), (128, 4, 4): (10, (1, 2)), (128, 2, 2): (12, (1, 2, 3)),
    (256, 4, 2): (6, (1, 2)), (256, 4, 4): (5, (1,)), (256, 2, 2): (8, (1, 2)),
}  # fmt: skip
WIDE_SIZES = 8, (1, 2)  # with 16 heads, which take up to 255 registers per thread


@dataclass(frozen=True)
class Shape:
    """A size that the kernel is built for.

    Parameters
    ----------
    heads : int
        Query heads of a head block.
    warps : int
        Of a CTA.
    ctas : int
        That a processor holds at once.
    """

    heads: int
    warps: int
    ctas: int

    def shared_bytes(self, layout: RecordLayout) -> int:
        """Shared memory of a CTA: records, query, outputs, states, barriers and notes of warps."""
        region = self.heads * (layout.head_dim + 4) * 4
        query = 2 * self.heads * layout.head_dim
        return self.warps * (layout.record_bytes + region + self.heads * 8 + 48) + query


def block_heads(layout: RecordLayout, ratio: int) -> int:
    """Heads of a head block for a GQA ratio: 16 where more than 8 can share a record."""
    return WIDE_HEADS if ratio > HEADS and layout.head_dim in (64, 128) else HEADS


def head_blocks(layout: RecordLayout, num_q_heads: int, num_kv_heads: int) -> tuple[int, int]:
    """Query heads of a head block, and head blocks of a KV head."""
    ratio = num_q_heads // num_kv_heads
    heads = block_heads(layout, ratio)
    return heads, -(-ratio // heads)


def shapes(layout: RecordLayout, heads: int = HEADS) -> list[Shape]:
    """All sizes for a layout, the largest CTAs first."""
    preset = layout.preset
    narrow = SIZES[layout.head_dim, preset.key_bits, preset.value_bits]
    warps, cuts = narrow if heads == HEADS else WIDE_SIZES
    return [Shape(heads, warps // ctas, ctas) for ctas in cuts]


def shape_for(layout: RecordLayout, heads: int, total: int, processors: int) -> Shape:
    """The size for a batch with `total` head blocks, whatever the lengths."""
    *larger, smallest = shapes(layout, heads)
    return next((s for s in larger if processors * s.ctas >= total), smallest)

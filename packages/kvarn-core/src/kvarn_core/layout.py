"""Where every byte lives: the record, its code order, and the columns of a page table.

This is the only definition of bytes and columns; encoders, kernels and the vLLM plugin read it.
Standard library only. The order functions use plain integer operators, so they accept Python
integers, numpy arrays and torch tensors alike.

A *record* holds one K tile and one V tile (G tokens, one KV head)::

    k_codes  k_scale[D]          k_zero[D]   k_token_scale[G]
    v_codes  v_channel_scale[D]  v_scale[G]  v_zero[G]

with fp16 vectors. Codes lie in *fragment order*: the 16 bytes one lane of a warp loads are its
registers A0..A3 of `mma.m16n8k16` for 16 / bits fragments, so unpacking is one AND per two codes.

A *page table row* is a header followed by record pages::

    column 0      hit count: tiles taken from the prefix cache (a number, not a page)
    column 1      sink page: exact rows of the first tokens, or the null page
    column 2 ...  ring pages: exact row of position p at ring row p mod 2G
    column H + t  record page of tile t

Source: PTX ISA, "Matrix Fragments for mma.m16n8k16"; docs/explanation/record-layout.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvarn_core.spec import Preset

HEAD_DIMS = (64, 128, 256)
HIT_COLUMN = 0
SINK_COLUMN = 1
RING_COLUMN = 2
MAX_SINK_ROWS = 27

CHUNK_BYTES = 512  # one 16-byte load of each of 32 lanes


@dataclass(frozen=True)
class Field:
    """Byte range of one record field."""

    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """First byte behind the field."""
        return self.offset + self.nbytes


@dataclass(frozen=True)
class RecordLayout:
    """Bytes of a record and geometry of its page table for one preset and head dimension.

    Parameters
    ----------
    preset : Preset
        Code bits and group.
    head_dim : int
        64, 128 or 256.

    Raises
    ------
    ValueError
        If the head dimension is not supported.
    """

    preset: Preset
    head_dim: int

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(
                f"head_dim {self.head_dim} is not supported. Use one of {HEAD_DIMS} "
                "(the rotation needs a power of two)."
            )

    @property
    def group(self) -> int:
        """Tokens per tile and per page, G."""
        return self.preset.group

    @cached_property
    def fields(self) -> dict[str, Field]:
        """Byte ranges by field name, in record order."""
        group, dim = self.group, self.head_dim
        key_codes = group * dim * self.preset.key_bits // 8
        value_codes = group * dim * self.preset.value_bits // 8
        if self.preset.is_debug:
            sizes = {"k_codes": key_codes, "v_codes": value_codes}
        else:
            sizes = {
                "k_codes": key_codes,
                "k_scale": 2 * dim,
                "k_zero": 2 * dim,
                "k_token_scale": 2 * group,
                "v_codes": value_codes,
                "v_channel_scale": 2 * dim,
                "v_scale": 2 * group,
                "v_zero": 2 * group,
            }
        fields, offset = {}, 0
        for name, nbytes in sizes.items():
            fields[name] = Field(offset, nbytes)
            offset += nbytes
        return fields

    @property
    def key_bytes(self) -> int:
        """Bytes of the K part, which begins the record; the V part is the rest."""
        return self.fields["v_codes"].offset

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of one record: one tile of K and V of one KV head."""
        return sum(field.nbytes for field in self.fields.values())

    @property
    def exact_itemsize(self) -> int:
        """Bytes per element of an exact row: fp16, or fp32 for the debug preset."""
        return 4 if self.preset.is_debug else 2

    @property
    def row_bytes(self) -> int:
        """Bytes of one exact row: D of K, then D of V."""
        return 2 * self.head_dim * self.exact_itemsize

    @property
    def rows_per_page(self) -> int:
        """Exact rows, R, that fit one head's share of a page."""
        return MAX_SINK_ROWS if self.preset.is_debug else self.record_bytes // self.row_bytes

    @property
    def ring_rows(self) -> int:
        """Exact rows the ring holds: the last two tiles."""
        return 2 * self.group

    @property
    def ring_pages(self) -> int:
        """Pages of the ring; the rest of the last one is unused."""
        return -(-self.ring_rows // self.rows_per_page)

    @property
    def header_columns(self) -> int:
        """Page table columns, H, before the first record page."""
        return RING_COLUMN + self.ring_pages

    @property
    def sink_rows(self) -> int:
        """Exact rows, S0, of the first tokens kept on the sink page."""
        return min(self.rows_per_page, MAX_SINK_ROWS)

    def columns(self, num_tokens: int) -> int:
        """Page table columns of a request of `num_tokens` tokens, header included."""
        return self.header_columns + max(num_tokens - 1, 0) // self.group

    def packed_tiles(self, position: Any, hits: Any = 0) -> Any:
        """Tiles that a query at `position` reads as records; later tokens are exact.

        Parameters
        ----------
        position : int or integer tensor
            Position of the query, in tokens.
        hits : int or integer tensor
            Tiles taken from the prefix cache at admission.
        """
        own = position // self.group - 1
        if isinstance(own, int):
            return max(own, hits, 0)
        return own.clamp(min=0).maximum(hits + 0 * own)


def fields_per_half(bits: int) -> int:
    """Codes of `bits` bits that fit a 16-bit half word."""
    return 16 // bits


def code_index(m: Any, k: Any, *, rows: int, cols: int, bits: int) -> Any:
    """Place of code (m, k) of a [rows, cols] matrix in the packed stream, counted in codes.

    K is packed as [G, D] (m = token, k = channel), V as [D, G] (m = channel, k = token). Code i
    occupies bits ``bits * (i % (8 / bits))`` upward of byte ``i * bits // 8``.

    Parameters
    ----------
    m, k : int or integer array
        Row and column of the code.
    rows, cols : int
        Matrix shape, multiples of 64.
    bits : int
        2 or 4.
    """
    fields = fields_per_half(bits)
    row_blocks, col_blocks = rows >> 4, cols >> 4
    fields_m = min(fields, row_blocks)
    fields_k = fields // fields_m
    block_m, row = m >> 4, m & 15
    block_k, col = k >> 4, k & 15
    field = block_m % fields_m + fields_m * (block_k % fields_k)
    chunk = block_m // fields_m * (col_blocks // fields_k) + block_k // fields_k
    lane = (row & 7) * 4 + ((col & 7) >> 1)
    register = (row >> 3) | ((col >> 3) << 1)
    word = (chunk * 32 + lane) * 4 + register
    return (word * 2 + (col & 1)) * fields + field


def k_order(d: Any) -> Any:
    """Stored place of element d of a vector along the k index (k_scale, k_zero)."""
    return (d >> 5) * 32 + ((d >> 1) & 3) * 8 + ((d >> 4) & 1) * 4 + ((d >> 3) & 1) * 2 + (d & 1)


def m_order(i: Any) -> Any:
    """Stored place of element i of a vector along the m index (the other four vectors)."""
    return (i >> 6) * 64 + (i & 7) * 8 + ((i >> 4) & 3) * 2 + ((i >> 3) & 1)


def exact_piece(piece: Any, page_row: Any) -> Any:
    """Stored place of 16-byte piece `piece` within its half of an exact row.

    The exclusive-or spreads eight consecutive rows over all shared-memory banks.
    """
    return piece ^ (page_row & 7)


def seal_phase(ring_page: int, layer: int, head: int, *, is_value: bool, group: int) -> int:
    """Tokens f in 0 .. G-1 by which sealing of a tile is delayed after its completion.

    Tile t is sealed in the step that writes position (t+1)·G + f. The phase spreads the work of
    requests that complete tiles together; readers do not depend on it.
    """
    return (29 * ring_page + 37 * layer + 13 * head + group // 2 * is_value) % group

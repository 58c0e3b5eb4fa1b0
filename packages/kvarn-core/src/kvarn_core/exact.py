"""Exact rows in pages: the first and the last tokens of a request, rotated but not quantised.

One head's share of a page holds R rows. A row is D elements of K, then D of V; the 16-byte pieces
of each half are permuted by `exact_piece`. This module is the only code that knows this.
"""

from __future__ import annotations

from functools import cache as memoize
from typing import TYPE_CHECKING

import torch

from kvarn_core.layout import RING_COLUMN, exact_piece

if TYPE_CHECKING:
    from kvarn_core.layout import RecordLayout


def ring_pages(table: torch.Tensor, layout: RecordLayout) -> torch.Tensor:
    """Return the ring pages of one page table row."""
    return table[RING_COLUMN : layout.header_columns]


def read_rows(
    cache: torch.Tensor, pages: torch.Tensor, rows: torch.Tensor, layout: RecordLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read exact rows.

    Parameters
    ----------
    cache : Tensor [P, Hkv, layout.record_bytes], uint8
        Pages. Read only.
    pages : Tensor [n_pages], int32
        Pages that hold consecutive runs of R rows.
    rows : Tensor [n], int64
        Row numbers, counted over `pages`.
    layout : RecordLayout
        Byte layout of the preset.

    Returns
    -------
    key, value : Tensor [n, Hkv, D], fp16 (fp32 for the debug preset)
        Rotated rows.
    """
    page, row = rows // layout.rows_per_page, rows % layout.rows_per_page
    stored = _rows_view(cache.index_select(0, pages), layout)[page, :, row]
    key, value = _permute_pieces(stored, row).flatten(3).unbind(2)  # from [n, Hkv, 2, ...]
    return key, value


def write_rows(
    cache: torch.Tensor,
    pages: torch.Tensor,
    rows: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: RecordLayout,
) -> None:
    """Write exact rows in place; the parameters are those of `read_rows`."""
    page, row = rows // layout.rows_per_page, rows % layout.rows_per_page
    view = _rows_view(cache, layout)
    pieces = torch.stack((key, value), dim=2).view(*key.shape[:2], *view.shape[3:])
    view[pages.long()[page], :, row] = _permute_pieces(pieces, row)


def _rows_view(cache: torch.Tensor, layout: RecordLayout) -> torch.Tensor:
    """View pages as exact rows [P, Hkv, R, 2, pieces, elements of a piece], without a copy."""
    pages, heads, _ = cache.shape
    used = cache[:, :, : layout.rows_per_page * layout.row_bytes]
    dtype = torch.float32 if layout.preset.is_debug else torch.float16
    elements = 16 // layout.exact_itemsize
    pieces = layout.head_dim // elements
    return used.view(dtype).view(pages, heads, layout.rows_per_page, 2, pieces, elements)


def _permute_pieces(rows: torch.Tensor, page_row: torch.Tensor) -> torch.Tensor:
    """Reorder the pieces of rows [n, Hkv, 2, pieces, elements]; its own inverse."""
    order = _piece_order(rows.shape[3], rows.device)[page_row & 7]
    return torch.gather(rows, 3, order[:, None, None, :, None].expand_as(rows))


@memoize
def _piece_order(pieces: int, device: torch.device) -> torch.Tensor:
    """Piece permutations [8, pieces] by page row modulo 8."""
    row = torch.arange(8, device=device)[:, None]
    order: torch.Tensor = exact_piece(torch.arange(pieces, device=device)[None, :], row)
    return order

"""The record layout as a C++ header, so that no CUDA source holds a byte offset of its own.

Standard library only. A kernel is compiled for one layout; it reads the constants below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvarn_core.layout import HIT_COLUMN, RING_COLUMN, SINK_COLUMN

if TYPE_CHECKING:
    from kvarn_core.layout import RecordLayout

HEADER_NAME = "layout.cuh"


def constants(layout: RecordLayout) -> dict[str, int]:
    """Name and value of every constant of a layout.

    Parameters
    ----------
    layout : RecordLayout
        Byte layout of a preset that stores codes.

    Returns
    -------
    dict of str to int
        Bytes for offsets and sizes, rows and columns for the others.
    """
    fields = {name.upper(): field.offset for name, field in layout.fields.items()}
    return {
        "D": layout.head_dim,
        "G": layout.group,
        "K_BITS": layout.preset.key_bits,
        "V_BITS": layout.preset.value_bits,
        **fields,
        "KEY_BYTES": layout.key_bytes,
        "VALUE_BYTES": layout.record_bytes - layout.key_bytes,
        "RECORD_BYTES": layout.record_bytes,
        "ROW_BYTES": layout.row_bytes,
        "ROWS_PER_PAGE": layout.rows_per_page,
        "SINK_ROWS": layout.sink_rows,
        "RING_ROWS": layout.ring_rows,
        "RING_PAGES": layout.ring_pages,
        "HEADER_COLUMNS": layout.header_columns,
        "HIT_COLUMN": HIT_COLUMN,
        "SINK_COLUMN": SINK_COLUMN,
        "RING_COLUMN": RING_COLUMN,
    }


def layout_header(layout: RecordLayout) -> str:
    """C++ text with one integer constant per entry of `constants`."""
    lines = [f"constexpr int {name} = {value};" for name, value in constants(layout).items()]
    return "\n".join(["#pragma once", *lines, ""])

"""The C++ header of a layout says what the layout says."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from kvarn_core.layout import HEAD_DIMS, RecordLayout
from kvarn_core.layout_header import constants, layout_header
from kvarn_core.spec import PRESETS


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_offset_is_there_and_the_halves_add_up(name: str, dim: int) -> None:
    layout = RecordLayout(PRESETS[name], dim)
    text = layout_header(layout)
    found = {k: int(v) for k, v in re.findall(r"^constexpr int (\w+) = (-?\d+);$", text, re.M)}
    assert found == constants(layout)
    for field, place in layout.fields.items():
        assert found[field.upper()] == place.offset
    assert found["KEY_BYTES"] + found["VALUE_BYTES"] == found["RECORD_BYTES"] == layout.record_bytes
    assert found["KEY_BYTES"] == found["V_CODES"]


def test_the_main_layout_is_the_one_of_the_table() -> None:
    found = constants(RecordLayout(PRESETS["kvarn_k4v2_g128"], 128))
    want = {
        "K_SCALE": 8192, "K_ZERO": 8448, "K_TOKEN_SCALE": 8704, "V_CODES": 8960,
        "V_CHANNEL_SCALE": 13056, "V_SCALE": 13312, "V_ZERO": 13568, "ROWS_PER_PAGE": 27,
    }  # fmt: skip
    assert {name: found[name] for name in want} == want


def test_it_needs_the_standard_library_only() -> None:
    code = "import sys; sys.modules.update(torch=None, numpy=None)\nimport kvarn_core.layout_header"
    subprocess.run([sys.executable, "-c", code], check=True)

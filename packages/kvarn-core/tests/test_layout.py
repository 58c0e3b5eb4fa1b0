"""Every byte count and offset of the record format, written out as numbers."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from kvarn_core.layout import HEAD_DIMS, RecordLayout, code_index, exact_piece, seal_phase
from kvarn_core.spec import DEBUG_PRESETS, PRESETS, Preset
from kvarn_core.testing import naive

# D, G, preset; offsets of k_scale, k_zero, k_token_scale, v_codes, v_channel_scale, v_scale, v_zero
# record bytes; bits per element; ratio to fp16; exact rows per page; header columns
TABLE = [
    (64, 64, "k4v2", 2048, 2176, 2304, 2432, 3456, 3584, 3712, 3840, 3.750, 4.267, 15, 11),
    (64, 64, "k4v4", 2048, 2176, 2304, 2432, 4480, 4608, 4736, 4864, 4.750, 3.368, 19, 9),
    (64, 64, "k2v2", 1024, 1152, 1280, 1408, 2432, 2560, 2688, 2816, 2.750, 5.818, 11, 14),
    (64, 128, "k4v2", 4096, 4224, 4352, 4608, 6656, 6784, 7040, 7296, 3.563, 4.491, 28, 12),
    (64, 128, "k4v4", 4096, 4224, 4352, 4608, 8704, 8832, 9088, 9344, 4.563, 3.507, 36, 10),
    (64, 128, "k2v2", 2048, 2176, 2304, 2560, 4608, 4736, 4992, 5248, 2.563, 6.244, 20, 15),
    (128, 64, "k4v2", 4096, 4352, 4608, 4736, 6784, 7040, 7168, 7296, 3.563, 4.491, 14, 12),
    (128, 64, "k4v4", 4096, 4352, 4608, 4736, 8832, 9088, 9216, 9344, 4.563, 3.507, 18, 10),
    (128, 64, "k2v2", 2048, 2304, 2560, 2688, 4736, 4992, 5120, 5248, 2.563, 6.244, 10, 15),
    (128, 128, "k4v2", 8192, 8448, 8704, 8960, 13056, 13312, 13568, 13824, 3.375, 4.741, 27, 12),
    (128, 128, "k4v4", 8192, 8448, 8704, 8960, 17152, 17408, 17664, 17920, 4.375, 3.657, 35, 10),
    (128, 128, "k2v2", 4096, 4352, 4608, 4864, 8960, 9216, 9472, 9728, 2.375, 6.737, 19, 16),
    (256, 64, "k4v2", 8192, 8704, 9216, 9344, 13440, 13952, 14080, 14208, 3.469, 4.613, 13, 12),
    (256, 64, "k4v4", 8192, 8704, 9216, 9344, 17536, 18048, 18176, 18304, 4.469, 3.580, 17, 10),
    (256, 64, "k2v2", 4096, 4608, 5120, 5248, 9344, 9856, 9984, 10112, 2.469, 6.481, 9, 17),
    (256, 128, "k4v2",16384, 16896, 17408, 17664, 25856, 26368, 26624, 26880, 3.281, 4.876, 26, 12),
    (256, 128, "k4v4",16384, 16896, 17408, 17664, 34048, 34560, 34816, 35072, 4.281, 3.737, 34, 10),
    (256, 128, "k2v2", 8192, 8704, 9216, 9472, 17664, 18176, 18432, 18688, 2.281, 7.014, 18, 17),
]  # fmt: skip

ROWS = [pytest.param(*row, id=f"{row[2]}-g{row[1]}-d{row[0]}") for row in TABLE]
COLUMNS = "dim, group, name, ka, kz, kt, vc, vch, vu, vz, size, bits, ratio, rows, header"


@pytest.mark.parametrize(COLUMNS, ROWS)
def test_record_bytes(
    dim: int, group: int, name: str, ka: int, kz: int, kt: int, vc: int, vch: int, vu: int,
    vz: int, size: int, bits: float, ratio: float, rows: int, header: int,
) -> None:  # fmt: skip
    layout = RecordLayout(Preset.from_name(f"kvarn_{name}_g{group}"), dim)
    offsets = {field: place.offset for field, place in layout.fields.items()}
    assert offsets == {
        "k_codes": 0, "k_scale": ka, "k_zero": kz, "k_token_scale": kt,
        "v_codes": vc, "v_channel_scale": vch, "v_scale": vu, "v_zero": vz,
    }  # fmt: skip
    assert layout.record_bytes == size
    assert layout.key_bytes == vc
    assert 8 * size / (2 * group * dim) == pytest.approx(bits, abs=6e-4)
    assert 4 * group * dim / size == pytest.approx(ratio, abs=6e-4)
    assert layout.row_bytes == 4 * dim
    assert layout.rows_per_page == rows
    assert layout.header_columns == header
    assert layout.ring_pages == header - 2
    assert layout.ring_rows == 2 * group
    assert layout.sink_rows == min(rows, 27)


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_fields_follow_one_another_on_boundaries_of_128_bytes(preset: Preset, dim: int) -> None:
    layout, end = RecordLayout(preset, dim), 0
    for field in layout.fields.values():
        assert field.offset == end
        assert field.offset % 128 == field.nbytes % 128 == 0
        end = field.end
    assert end == layout.record_bytes


@pytest.mark.parametrize(("group", "header"), [(128, 12), (64, 7)])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_debug_records_hold_fp32_rows(dim: int, group: int, header: int) -> None:
    layout = RecordLayout(DEBUG_PRESETS[f"kvarn_debug32_g{group}"], dim)
    assert list(layout.fields) == ["k_codes", "v_codes"]
    assert layout.record_bytes == 2 * group * dim * 4
    assert layout.row_bytes == 2 * dim * 4
    assert layout.rows_per_page == layout.sink_rows == 27
    assert layout.rows_per_page * layout.row_bytes <= layout.record_bytes
    assert layout.header_columns == header


def test_an_unsupported_head_dim_is_refused() -> None:
    sentence = (
        "head_dim 96 is not supported. Use one of (64, 128, 256) "
        "(the rotation needs a power of two)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        RecordLayout(PRESETS["kvarn_k4v2_g128"], 96)


# --- pages of a request ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "columns"),
    [(0, 12), (1, 12), (127, 12), (128, 12), (129, 13), (256, 13), (257, 14), (16000, 136)],
)
def test_columns_of_a_request(tokens: int, columns: int) -> None:
    assert RecordLayout(PRESETS["kvarn_k4v2_g128"], 128).columns(tokens) == columns


@pytest.mark.parametrize(
    ("position", "hits", "packed"),
    [
        (0, 0, 0),
        (255, 0, 0),  # two tiles are exact
        (256, 0, 1),
        (383, 0, 1),
        (384, 0, 2),
        (128, 1, 1),  # a hit tile is a record at once
        (256, 1, 1),
        (640, 5, 5),
        (896, 5, 6),
    ],
)
def test_packed_tiles(position: int, hits: int, packed: int) -> None:
    layout = RecordLayout(PRESETS["kvarn_k4v2_g128"], 128)
    assert layout.packed_tiles(position, hits) == packed
    many = layout.packed_tiles(torch.tensor([position, position]), torch.tensor([hits, 0]))
    assert many[0] == packed


def _ratio_read_and_held(layout: RecordLayout, tokens: int) -> tuple[float, float]:
    """fp16 bytes over bytes read by a decode step, and over bytes held: means over one group."""
    group, row = layout.group, layout.row_bytes
    read = held = 0.0
    for n in range(tokens, tokens + group):
        packed = layout.packed_tiles(n - 1)
        exact = n - packed * group + layout.sink_rows
        read += n * row / (packed * layout.record_bytes + exact * row)
        held += n * row / ((layout.columns(n) - 1) * layout.record_bytes)
    return read / group, held / group


RATIOS = {
    (64, "kvarn_k4v2_g128"): "2.61/2.01 3.77/3.39 4.28/4.15 4.39/4.31 4.46/4.45",
    (128, "kvarn_k4v2_g128"): "2.68/2.12 3.94/3.58 4.51/4.38 4.62/4.55 4.71/4.69",
    (128, "kvarn_k4v4_g128"): "2.35/1.83 3.19/2.90 3.53/3.43 3.59/3.54 3.64/3.63",
    (128, "kvarn_k2v2_g128"): "3.18/2.49 5.21/4.66 6.27/6.05 6.49/6.38 6.67/6.64",
    (128, "kvarn_k4v2_g64"): "3.26/2.74 4.10/3.86 4.38/4.31 4.44/4.40 4.48/4.47",
    (256, "kvarn_k4v2_g128"): "2.72/2.18 4.03/3.69 4.63/4.51 4.75/4.68 4.84/4.83",
    (256, "kvarn_k4v4_g128"): "2.38/1.87 3.25/2.96 3.60/3.51 3.67/3.62 3.72/3.71",
}


@pytest.mark.parametrize(("dim", "name"), list(RATIOS))
def test_effective_ratios_header_included(dim: int, name: str) -> None:
    layout = RecordLayout(PRESETS[name], dim)
    for thousands, pair in zip((1, 4, 16, 32, 128), RATIOS[dim, name].split(), strict=True):
        read, held = _ratio_read_and_held(layout, thousands * 1024)
        want_read, want_held = (float(ratio) for ratio in pair.split("/"))
        assert read == pytest.approx(want_read, abs=0.006), (thousands, "read")
        assert held == pytest.approx(want_held, abs=0.006), (thousands, "held")


def test_pages_of_16000_tokens_and_the_break_even_length() -> None:
    layout = RecordLayout(PRESETS["kvarn_k4v2_g128"], 128)
    pages = layout.columns(16000) - 1  # column 0 is a count, not a page
    assert pages == 125 - 1 + 11
    assert 16000 * layout.row_bytes / (136 * layout.record_bytes) == pytest.approx(4.36, abs=0.005)
    not_larger = [
        n for n in range(1, 1000)
        if (layout.columns(n) - 1) * layout.record_bytes <= n * layout.row_bytes
    ]  # fmt: skip
    assert not_larger == list(range(351, 1000))


# --- order of codes and vectors -------------------------------------------------------------------

# M, Kd, bits, (m, k): word, chunk, lane, register, bit
VECTORS = [
    (128, 128, 4, (0, 0), 0, 0, 0, 0, 0),
    (128, 128, 4, (0, 1), 0, 0, 0, 0, 16),
    (128, 128, 4, (1, 0), 16, 0, 4, 0, 0),
    (128, 128, 4, (8, 0), 1, 0, 0, 1, 0),
    (128, 128, 4, (0, 8), 2, 0, 0, 2, 0),
    (128, 128, 4, (16, 0), 0, 0, 0, 0, 4),
    (128, 128, 4, (37, 77), 602, 4, 22, 2, 24),
    (128, 128, 4, (100, 5), 1096, 8, 18, 0, 24),
    (128, 128, 4, (127, 127), 2047, 15, 31, 3, 28),
    (128, 128, 2, (37, 77), 602, 4, 22, 2, 20),
    (128, 128, 2, (127, 127), 1023, 7, 31, 3, 30),
    (64, 128, 2, (37, 77), 346, 2, 22, 2, 20),
]


@pytest.mark.parametrize(
    ("rows", "cols", "bits", "at", "word", "chunk", "lane", "reg", "bit"), VECTORS
)
def test_worked_examples_of_the_code_order(
    rows: int, cols: int, bits: int, at: tuple[int, int], word: int, chunk: int, lane: int,
    reg: int, bit: int,
) -> None:  # fmt: skip
    index = code_index(*at, rows=rows, cols=cols, bits=bits)
    per_word = 32 // bits
    assert (index // per_word, bits * (index % per_word)) == (word, bit)
    assert (word // 128, word // 4 % 32, word % 4) == (chunk, lane, reg)
    assert naive.code_place(*at, rows, cols, bits) == (word, bit)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("rows", "cols"), list(itertools.product((64, 128, 256), repeat=2)))
def test_the_code_order_uses_every_place_once(rows: int, cols: int, bits: int) -> None:
    m, k = torch.arange(rows)[:, None], torch.arange(cols)[None, :]
    index = code_index(m, k, rows=rows, cols=cols, bits=bits).flatten()
    assert index.sort().values.equal(torch.arange(rows * cols))


def test_exact_pieces_are_permuted_within_a_row_and_spread_over_eight_rows() -> None:
    for pieces in (8, 16, 32):
        for row in range(36):
            order = [exact_piece(piece, row) for piece in range(pieces)]
            assert sorted(order) == list(range(pieces))
            assert [exact_piece(place, row) for place in order] == list(range(pieces))
        # one logical piece of eight consecutive rows lies in eight different 16-byte bank groups
        assert len({exact_piece(3, row) % 8 for row in range(8)}) == 8


def test_seal_phases_stay_below_the_group_and_differ() -> None:
    phases = {
        seal_phase(page, layer, head, is_value=is_value, group=128)
        for page in range(1, 9) for layer in range(4) for head in range(2)
        for is_value in (False, True)
    }  # fmt: skip
    assert all(0 <= phase < 128 for phase in phases)
    assert len(phases) > 64

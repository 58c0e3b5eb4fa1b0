"""The CUDA source of decode, run by the emulator, against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from emulator.decoding import ROUNDING, Emulated, expected, query_of, stored

from kvarn_core.layout import HIT_COLUMN, SINK_COLUMN, RecordLayout
from kvarn_core.ops.decode import cuda
from kvarn_core.spec import PRESETS
from kvarn_core.testing.compare import assert_close, assert_same_bits
from kvarn_core.testing.inputs import draw
from kvarn_core.testing.paging import POISONS, allocate, store_sequence
from kvarn_core.testing.workload import fill_value_scales

pytest.importorskip("ziglang", reason="builds C++ for the CPU; the package ziglang is missing")
pytestmark = pytest.mark.emulate

SMALL = RecordLayout(PRESETS["kvarn_k4v2_g64"], 64)

# preset, head_dim, KV heads, query heads per KV head, tokens of each request
CASES = [
    ("kvarn_k4v2_g64", 64, 2, 1, (1, 0, 63, 64)),
    ("kvarn_k4v2_g64", 64, 1, 8, (65, 127, 128, 129)),
    ("kvarn_k4v2_g64", 64, 1, 4, (15, 16, 192, 30, 31)),
    ("kvarn_k4v2_g64", 128, 1, 5, (191, 192, 193)),
    ("kvarn_k4v2_g64", 64, 1, 16, (260, 321)),
    ("kvarn_k4v2_g64", 64, 2, 20, (200,)),
    ("kvarn_k4v2_g64", 256, 1, 16, (100,)),
    ("kvarn_k4v2_g128", 128, 1, 16, (27, 28, 512)),
    ("kvarn_k2v2_g128", 128, 2, 9, (385,)),
    ("kvarn_k4v4_g64", 128, 1, 12, (193,)),
    ("kvarn_k4v2_g128", 128, 1, 4, (1, 128, 257, 400)),
    ("kvarn_k4v2_g128", 128, 2, 8, (27, 28, 256, 384, 385)),
    ("kvarn_k4v4_g128", 128, 1, 7, (385,)),
    ("kvarn_k2v2_g128", 128, 1, 8, (385,)),
    ("kvarn_k4v2_g128", 256, 1, 4, (385,)),
    ("kvarn_k4v4_g128", 256, 1, 8, (385,)),
    ("kvarn_k2v2_g128", 256, 1, 8, (385,)),
    ("kvarn_k4v2_g128", 64, 1, 8, (385,)),
    ("kvarn_k4v4_g128", 64, 1, 8, (385,)),
    ("kvarn_k4v4_g64", 64, 1, 8, (193,)),
    ("kvarn_k2v2_g64", 64, 1, 8, (193,)),
    ("kvarn_k2v2_g64", 256, 1, 8, (193,)),
]
each_case = pytest.mark.parametrize(
    ("name", "dim", "heads", "ratio", "tokens"),
    [pytest.param(*c, id=f"{c[0][6:]}-d{c[1]}-kv{c[2]}-gqa{c[3]}-len{c[4][-1]}") for c in CASES],
)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Emulated:
    return Emulated(monkeypatch)


@each_case
def test_it_agrees_with_the_reference(
    name: str, dim: int, heads: int, ratio: int, tokens: tuple[int, ...], emulated: Emulated
) -> None:
    paging = stored(RecordLayout(PRESETS[name], dim), tokens, heads)
    query = query_of(paging, ratio)
    out, lse = emulated.decode(paging, query, tokens)
    want, want_lse = expected(paging, query, tokens)
    assert_close(out, want, tolerance=ROUNDING)
    assert_close(lse, want_lse, tolerance=ROUNDING)


@pytest.mark.parametrize(
    ("dtype", "unit"),
    [(torch.bfloat16, 2.0**-8), (torch.float32, 0.0)],
    ids=["bf16", "fp32"],
)
def test_other_dtypes_of_the_query(dtype: torch.dtype, unit: float, emulated: Emulated) -> None:
    tokens = (200, 64, 0)
    paging = stored(SMALL, tokens, 1)
    query = query_of(paging, 5, dtype)
    out, lse = emulated.decode(paging, query, tokens)
    want, want_lse = expected(paging, query, tokens)
    assert_close(out, want, tolerance=ROUNDING + unit)
    assert_close(lse, want_lse, tolerance=ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_probabilities_times_the_largest_scale_are_finite(
    dtype: torch.dtype, emulated: Emulated
) -> None:
    """A maximum may lag by a factor of 2^8: times a scale of 65504 that is beyond fp16."""
    tokens, emulated.processors = (1560,), 1
    paging = stored(SMALL, tokens, 1)
    records = paging.page_table[0, SMALL.header_columns : SMALL.columns(*tokens)]
    fill_value_scales(paging.cache, records, SMALL, 65504.0)
    out, lse = emulated.decode(paging, query_of(paging, 8, dtype), tokens)
    assert out.isfinite().all()
    assert lse.isfinite().all()


def test_a_query_that_is_no_number_gets_none(emulated: Emulated) -> None:
    tokens = (200, 40)
    paging = stored(SMALL, tokens, 1)
    query = query_of(paging, 4)
    query[0, 1, 5] = torch.nan
    lost = emulated.decode(paging, query, tokens)[0].isnan().any(2)
    assert lost[0].tolist() == [False, True, False, False]
    assert not lost[1].any()


@pytest.mark.parametrize("ratio", [8, 16])
def test_scores_that_keep_growing(ratio: int, emulated: Emulated) -> None:
    """Every warp meets larger and larger maxima, and rescales what it has."""
    tokens = (1560,)
    paging = stored(SMALL, tokens, 1)
    query = 8 * query_of(paging, ratio)
    out, lse = emulated.decode(paging, query, tokens)
    want, want_lse = expected(paging, query, tokens)
    assert_close(out, want, tolerance=ROUNDING)
    assert_close(lse, want_lse, tolerance=ROUNDING)


@pytest.mark.parametrize("name", ["kvarn_k4v2_g64", "kvarn_k2v2_g64", "kvarn_k4v4_g64"])
def test_codes_with_an_exponent_give_the_same_products(name: str, emulated: Emulated) -> None:
    """Products and factors are exact either way: only the order of roundings differs."""
    tokens = (333,)
    paging = stored(RecordLayout(PRESETS[name], 64), tokens, 1)
    query = query_of(paging, 8)
    plain, _ = emulated.decode(paging, query, tokens)
    emulated.magic = True
    magic, lse = emulated.decode(paging, query, tokens)
    assert_close(magic, plain, tolerance=1e-3)
    assert lse.isfinite().all()


@pytest.mark.parametrize("processors", [1, 3, 7, 40])
@pytest.mark.parametrize("ratio", [3, 16])
def test_any_grid_and_order_agree_and_leave_the_counters_zero(
    ratio: int, processors: int, emulated: Emulated
) -> None:
    tokens = (700, 0, 1, 0, 333, 64)
    paging = stored(SMALL, tokens, 2)
    query = query_of(paging, ratio)
    want, want_lse = expected(paging, query, tokens)
    emulated.processors = processors
    cuda._scratch.cache_clear()
    nbytes = cuda.workspace_bytes(9, 2 * ratio, 2, SMALL, torch.device("cpu"))
    workspace = torch.zeros(nbytes, dtype=torch.uint8)
    counters = workspace[nbytes - 4 * 9 * 2 :]
    results = []
    for seed in range(4):  # each launch finds the workspace as the one before left it
        emulated.seed = seed
        results.append(emulated.decode(paging, query, tokens, workspace))
        assert not counters.any()
    assert_close(results[0][0], want, tolerance=ROUNDING)
    assert_close(results[0][1], want_lse, tolerance=ROUNDING)
    for out, lse in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(lse, results[0][1])


def test_many_requests_share_a_lane_of_the_scan(emulated: Emulated) -> None:
    """More than 32 requests: lanes sum several lengths and the place is found in two steps."""
    tokens = tuple(itertools.islice(itertools.cycle((3, 0, 17, 64, 1)), 75))
    paging = stored(SMALL, tokens, 1)
    query = query_of(paging, 1)
    want, want_lse = expected(paging, query, tokens)
    for processors in (1, 9):
        emulated.processors = processors
        out, lse = emulated.decode(paging, query, tokens)
        assert_close(out, want, tolerance=ROUNDING)
        assert_close(lse, want_lse, tolerance=ROUNDING)


def test_hits_and_a_missing_sink(emulated: Emulated) -> None:
    tokens = (300, 230, 200)
    paging = allocate(SMALL, tokens, hits=[0, 3, 0], donors=[0, 0, 0])
    paging.page_table[2, SINK_COLUMN] = 0
    for i, first in ((0, 0), (1, 3 * SMALL.group), (2, 0)):
        rows = (tokens[i] - first, 2, SMALL.head_dim)
        key, value = draw("gaussian", rows, seed=i), draw("gaussian", rows, seed=i + 50)
        store_sequence(paging, i, key, value, [rows[0]], start=first)
    assert paging.page_table[1, HIT_COLUMN] == 3
    query = query_of(paging, 2)
    out, lse = emulated.decode(paging, query, tokens)
    want, want_lse = expected(paging, query, tokens)
    assert_close(out, want, tolerance=ROUNDING)
    assert_close(lse, want_lse, tolerance=ROUNDING)


def test_a_hit_count_beyond_the_request_is_not_followed(emulated: Emulated) -> None:
    tokens = (1, 40)
    paging = stored(SMALL, tokens, 1)
    query = query_of(paging, 8)
    want, _ = emulated.decode(paging, query, tokens)
    paging.page_table[:, HIT_COLUMN] = 1000
    got, _ = emulated.decode(paging, query, tokens)
    assert_same_bits(got, want)


def test_bytes_that_are_not_written_change_no_bit(emulated: Emulated) -> None:
    tokens = (250, 64, 1)
    results = []
    for fill in POISONS:
        paging = stored(SMALL, tokens, 1, fill=fill)
        paging.poison_unused(fill)
        results.append(emulated.decode(paging, query_of(paging, 4), tokens))
    for out, lse in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(lse, results[0][1])


def test_strides_are_respected(emulated: Emulated) -> None:
    tokens = (150, 0, 70)
    paging = stored(SMALL, tokens, 2)
    fused = query_of(paging, 5)  # a slice of a fused projection
    query = fused[:, :4]
    assert not query.is_contiguous()
    out, _ = emulated.decode(paging, query, tokens)
    want, _ = expected(paging, query.contiguous(), tokens)
    assert_close(out, want, tolerance=ROUNDING)
    with pytest.raises(ValueError, match=r"^query has strides .* Pass dense heads"):
        emulated.decode(paging, fused[:, ::2], tokens)


def test_rows_off_their_alignment_are_refused(emulated: Emulated) -> None:
    paging = stored(SMALL, (70, 1), 2)
    query = query_of(paging, 4)
    behind = torch.cat([query.new_zeros(1), query.flatten()])[1:].view_as(query)
    padded = torch.cat([query.flatten(1), query.new_zeros(2, 4)], 1)[:, :-4].unflatten(1, (8, 64))
    for wrong in (behind, padded):
        with pytest.raises(ValueError, match=r"^query has strides .* multiples of 16 bytes\.$"):
            emulated.decode(paging, wrong, (70, 1))


def test_a_request_in_more_parts_than_lanes(emulated: Emulated) -> None:
    """Lanes weigh 64 parts at a time; 70 are left by 280 units."""
    tokens = (SMALL.group * 270,)
    paging = stored(SMALL, tokens, 1)
    query = query_of(paging, 8)
    want, want_lse = expected(paging, query, tokens)
    emulated.processors = 30
    results = []
    for emulated.seed in (1, 2):
        results.append(emulated.decode(paging, query, tokens))
    out, lse = results[0]
    assert_close(out, want, tolerance=ROUNDING)
    assert_close(lse, want_lse, tolerance=ROUNDING)
    assert_same_bits(results[1][0], out)

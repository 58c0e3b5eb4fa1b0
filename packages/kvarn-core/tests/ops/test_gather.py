from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvarn_core.layout import HIT_COLUMN, SINK_COLUMN, RecordLayout
from kvarn_core.ops.gather import gather, rotate_rows
from kvarn_core.rotation import exact_rows, rotate
from kvarn_core.spec import DEBUG_PRESETS, PRESETS
from kvarn_core.testing import naive
from kvarn_core.testing.compare import assert_same_bits
from kvarn_core.testing.inputs import draw
from kvarn_core.testing.paging import POISONS, Paging, allocate, store_sequence

DEFAULT = RecordLayout(PRESETS["kvarn_k4v2_g128"], 128)
SMALL = RecordLayout(PRESETS["kvarn_k2v2_g64"], 64)


def _stored(
    layout: RecordLayout, tokens: int, *, sink: bool = True, fill: int = 0xFF, seed: int = 0
) -> Paging:
    paging = allocate(layout, [tokens], sink=sink, fill=fill, seed=seed)
    shape = (tokens, 2, layout.head_dim)
    key, value = draw("gaussian", shape, seed=1), draw("outlier_channel", shape, seed=2)
    store_sequence(paging, 0, key, value, [tokens])
    return paging


def _gather(
    paging: Paging, lengths: list[int], positions: list[int], **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    where = (torch.tensor(lengths, dtype=torch.int32), torch.tensor(positions, dtype=torch.int32))
    return gather(paging.cache, paging.page_table, *where, layout=paging.layout, **options)


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 255, 256, 257, 384, 385, 700])
@pytest.mark.parametrize("sink", [True, False], ids=["sink", "null-sink"])
def test_every_token_is_what_the_visibility_rule_says(tokens: int, sink: bool) -> None:
    paging = _stored(DEFAULT, tokens, sink=sink)
    want = naive.view(
        paging.cache.numpy(), paging.page_table[0].numpy(), tokens, tokens - 1,
        group=128, dim=128, key_bits=4, value_bits=2,
    )  # fmt: skip
    key, value, cu_seqlens = _gather(paging, [tokens], [tokens - 1])
    assert cu_seqlens.tolist() == [0, tokens]
    for got, expected in zip((key, value), want, strict=True):
        assert_same_bits(got, torch.from_numpy(expected))


def test_a_prefix_may_be_read_shorter_than_its_records() -> None:
    paging = _stored(SMALL, 400)
    whole = _gather(paging, [400], [399])
    for length in (1, 26, 63, 64, 65, 128, 200, 320, 321):
        part = _gather(paging, [length], [399])
        for got, want in zip(part[:2], whole[:2], strict=True):
            assert_same_bits(got, want[:length])


@pytest.mark.parametrize("first", [0, 1, 10, 11, 63, 64, 65, 255, 256, 300])
def test_a_run_may_start_anywhere(first: int) -> None:
    paging = _stored(SMALL, 400)
    whole = _gather(paging, [400], [399])
    starts = torch.tensor([first], dtype=torch.int32)
    for stop in (first + 1, 320, 321, 400):
        part = _gather(paging, [stop - first], [399], starts=starts)
        for got, want in zip(part[:2], whole[:2], strict=True):
            assert_same_bits(got, want[first:stop])


def test_given_tensors_are_filled_and_returned() -> None:
    paging = _stored(SMALL, 100)
    out = (torch.zeros(103, 2, 64), torch.zeros(103, 2, 64))
    bounds = torch.tensor([0, 100], dtype=torch.int32)
    want = _gather(paging, [100], [99])
    key, value, got_bounds = _gather(
        paging, [100], [99], out=out, cu_seqlens_k=bounds, max_context_len=100
    )
    assert key is out[0]
    assert value is out[1]
    assert got_bounds is bounds
    for got, expected in zip(out, want[:2], strict=True):
        assert_same_bits(got[:100], expected)
        assert not got[100:].any()


def test_a_query_in_the_past_of_the_ring_sees_exact_rows() -> None:
    """A prefill in which every query sees what a decode step at its position would see."""
    paging = _stored(SMALL, 3 * 64)
    table, cache = paging.page_table[0].numpy(), paging.cache.numpy()
    for position in (128, 150, 191):
        got = _gather(paging, [position + 1], [position])
        want = naive.view(
            cache, table, position + 1, position, group=64, dim=64, key_bits=2, value_bits=2
        )
        for x, y in zip(got[:2], want, strict=True):
            assert_same_bits(x, torch.from_numpy(y))


def test_hit_tiles_are_records_at_once() -> None:
    paging = _stored(SMALL, 300)
    paging.page_table[0, HIT_COLUMN], paging.page_table[0, SINK_COLUMN] = 3, 0
    got = _gather(paging, [200], [199])
    want = naive.view(
        paging.cache.numpy(), paging.page_table[0].numpy(), 200, 199,
        group=64, dim=64, key_bits=2, value_bits=2,
    )  # fmt: skip
    for x, y in zip(got[:2], want, strict=True):
        assert_same_bits(x, torch.from_numpy(y))


def test_requests_follow_one_another_and_empty_ones_read_nothing() -> None:
    paging = allocate(SMALL, [300, 10, 130], seed=3)
    for i, tokens in enumerate((300, 10, 130)):
        key, value = (draw("gaussian", (tokens, 2, 64), seed=i + j) for j in (0, 9))
        store_sequence(paging, i, key, value, [tokens])
    alone = [
        gather(
            paging.cache, paging.page_table[i : i + 1],
            torch.tensor([n], dtype=torch.int32), torch.tensor([n - 1], dtype=torch.int32),
            layout=SMALL,
        )
        for i, n in ((0, 300), (2, 130))
    ]  # fmt: skip
    paging.page_table[1] = 10**6  # a padded row names no page
    key, value, cu_seqlens = _gather(paging, [300, 0, 130], [299, -1, 129])
    assert cu_seqlens.tolist() == [0, 300, 300, 430]
    assert cu_seqlens.dtype == torch.int32
    assert_same_bits(key, torch.cat([part[0] for part in alone]))
    assert_same_bits(value, torch.cat([part[1] for part in alone]))


def test_a_batch_of_nothing_is_empty() -> None:
    paging = _stored(SMALL, 10)
    empty = torch.empty(0, dtype=torch.int32)
    key, value, cu_seqlens = gather(
        paging.cache, paging.page_table[:0], empty, empty, layout=SMALL, dtype=torch.float16
    )
    assert key.shape == value.shape == (0, 2, 64)
    assert key.dtype == torch.float16
    assert cu_seqlens.tolist() == [0]


@pytest.mark.parametrize("tokens", [5, 64, 129, 300])
def test_bytes_never_written_do_not_matter(tokens: int) -> None:
    results = []
    for poison in (0, *POISONS):
        paging = _stored(SMALL, tokens, fill=poison)
        paging.poison_unused(poison)
        results.append(_gather(paging, [tokens], [tokens - 1]))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("start", [64, 70, 99])
def test_no_page_is_read_but_those_of_the_request(start: int) -> None:
    paging = _stored(SMALL, 100)
    whole, *_ = _gather(paging, [100], [99])
    paging.page_table[:, SMALL.header_columns + 100 // 64 :] = -1  # the open tile has no record
    lens, positions, starts = (
        torch.tensor([x], dtype=torch.int32) for x in (100 - start, 99, start)
    )
    key, *_ = gather(paging.cache, paging.page_table, lens, positions, layout=SMALL, starts=starts)
    assert_same_bits(key, whole[start:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_result_dtype_rounds_once(dtype: torch.dtype) -> None:
    paging = _stored(DEFAULT, 400)
    exact = _gather(paging, [400], [399])
    for got, want in zip(_gather(paging, [400], [399], dtype=dtype)[:2], exact[:2], strict=True):
        assert_same_bits(got, want.to(dtype))


def test_a_fused_multiply_add_would_give_the_same_bits() -> None:
    """A code times an fp16 scale is exact in fp32, so kernels may fuse the addition or not."""
    scale = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    scale = scale[scale.isfinite()]
    code = torch.arange(16)[:, None]
    assert torch.equal((code * scale.float()).double(), code * scale.double())


def test_the_debug_preset_returns_rotated_rows() -> None:
    layout = RecordLayout(DEBUG_PRESETS["kvarn_debug32_g64"], 64)
    paging = _stored(layout, 333)
    key, value, _ = _gather(paging, [333], [332])
    assert_same_bits(key, exact_rows(draw("gaussian", (333, 2, 64), seed=1), layout))
    assert_same_bits(value, exact_rows(draw("outlier_channel", (333, 2, 64), seed=2), layout))


def test_the_naive_view_tells_records_from_exact_rows() -> None:
    """The oracle itself: a sink row must differ from the record of the same token."""
    paging = _stored(SMALL, 200)
    sizes = {"group": 64, "dim": 64, "key_bits": 2, "value_bits": 2}
    table = paging.page_table[0].numpy().copy()
    with_sink = naive.view(paging.cache.numpy(), table, 200, 199, **sizes)
    table[SINK_COLUMN] = 0
    without = naive.view(paging.cache.numpy(), table, 200, 199, **sizes)
    changed = np.unique(np.nonzero(with_sink[0] != without[0])[0])
    assert changed.tolist() == list(range(SMALL.sink_rows))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rotating_rows_rounds_once_and_may_work_in_place(dtype: torch.dtype) -> None:
    x = draw("gaussian", (9, 3, 128), seed=4).to(dtype)
    want = rotate(x).to(dtype)
    assert_same_bits(rotate_rows(x), want)
    assert rotate_rows(x, out=x) is x
    assert_same_bits(x, want)


def test_rotated_rows_saturate_in_fp16() -> None:
    assert rotate_rows(torch.full((1, 1, 64), 65504.0).half())[0, 0, 0] == 65504


def test_fp32_rows_of_the_debug_preset_saturate_in_fp16() -> None:
    layout = RecordLayout(next(iter(DEBUG_PRESETS.values())), 64)
    tokens = 2 * layout.group + 9
    paging, rows = allocate(layout, [tokens]), torch.full((tokens, 2, 64), 1e5)
    store_sequence(paging, 0, rows, rows, [tokens])
    lists = [torch.tensor([x], dtype=torch.int32) for x in (tokens, tokens - 1)]
    exact = gather(paging.cache, paging.page_table, *lists, layout=layout)[0]
    assert exact.max() > 65504
    out = gather(paging.cache, paging.page_table, *lists, layout=layout, dtype=torch.float16)
    assert_same_bits(out[0], exact.clamp(-65504, 65504).half())


LISTS = {"context_lens": torch.zeros(1, dtype=torch.int32), "positions": torch.zeros(1).int()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_lens": torch.zeros(1, dtype=torch.int64)}, "context_lens has dtype torch.int64"),
        ({"positions": torch.zeros(0, dtype=torch.int32)}, "positions has dtype .* and 0 rows"),
        ({"cu_seqlens_k": torch.zeros(1, dtype=torch.int32)}, "Pass int32 and 2 rows for 1 req"),
        ({"page_table": torch.zeros(1, 3, dtype=torch.int32)}, "page_table has 3 columns"),
        ({"page_table": torch.zeros(1, 30)}, "page_table has dtype torch.float32"),
        ({"cache": torch.zeros(4, 2, 100, dtype=torch.uint8)}, "cache has dtype .* Pass uint8"),
        ({"cache": torch.zeros(4, 4, 3840, dtype=torch.uint8)[:, ::2]}, "cache has strides"),
        ({"out": (torch.zeros(5, 2, 64), torch.zeros(4, 2, 64))}, "out has shapes"),
        ({"out": (torch.zeros(5, 64, 2).mT, torch.zeros(5, 64, 2).mT)}, "out is not contiguous"),
        ({"engine": "fast"}, "no engine 'fast'"),
    ],
    ids=lambda x: "" if isinstance(x, str) else next(iter(x)),
)
def test_a_wrong_argument_of_gather_is_named(change: dict[str, Any], message: str) -> None:
    layout = RecordLayout(PRESETS["kvarn_k4v2_g64"], 64)
    arguments = {
        "cache": torch.zeros(4, 2, layout.record_bytes, dtype=torch.uint8),
        "page_table": torch.zeros(1, 30, dtype=torch.int32),
        **LISTS,
    }
    with pytest.raises(ValueError, match=message):
        gather(**{**arguments, **change}, layout=layout)


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (torch.zeros(4, 96), None, "x has shape"),
        (torch.zeros(4, 2, 96), None, "x has shape"),
        (torch.zeros(4, 2, 64), torch.zeros(4, 2, 64).half(), "out has dtype"),
        (torch.zeros(4, 64, 2).mT, None, "x has strides"),
        (torch.zeros(4, 2, 66)[:, :, :64], None, "x has strides"),
        (torch.zeros(4, 2, 64), torch.zeros(4, 64, 2).mT, "out has strides"),
    ],
)
def test_a_wrong_argument_of_rotate_rows_is_named(
    x: torch.Tensor, out: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rotate_rows(x, out=out)

"""Triton gathers the bits of the reference. Pages hold random bytes under sane scales."""

from __future__ import annotations

import pytest
import torch

from kvarn_core.layout import SINK_COLUMN, RecordLayout
from kvarn_core.ops.gather import gather, rotate_rows
from kvarn_core.spec import PRESETS
from kvarn_core.testing.compare import assert_same_bits
from kvarn_core.testing.inputs import draw
from kvarn_core.testing.paging import NULL_PAGE, POISONS, Paging, allocate

pytestmark = pytest.mark.kernel

SMALL = RecordLayout(PRESETS["kvarn_k4v2_g64"], 64)
LENGTHS = (1, 15, 63, 64, 65, 0, 128, 129, 192, 250)
SHAPES = [
    pytest.param(name, dim, dtype, id=f"{name[6:]}-d{dim}-{str(dtype)[6:]}")
    for name, dim, dtype in (
        ("kvarn_k4v2_g64", 64, torch.float32),
        ("kvarn_k4v4_g64", 64, torch.bfloat16),
        ("kvarn_k2v2_g64", 64, torch.float16),
        ("kvarn_k4v2_g64", 128, torch.float16),
        ("kvarn_k2v2_g128", 64, torch.float32),
        ("kvarn_k4v2_g128", 128, torch.float16),
        ("kvarn_k2v2_g64", 256, torch.float16),
    )
]


def _pages(
    layout: RecordLayout,
    lengths: tuple[int, ...],
    device: torch.device,
    *,
    hits: tuple[int, ...] | None = None,
    sink: bool = True,
    heads: int = 2,
) -> Paging:
    """Pages whose records and exact rows are finite and whose every byte differs."""
    hits = hits or (0,) * len(lengths)
    paging = allocate(
        layout, [max(n, 1) for n in lengths], num_kv_heads=heads, hits=hits, sink=sink, seed=7
    )
    shape = (paging.cache.shape[0], heads, layout.record_bytes // 2)
    halves = draw("gaussian", shape, seed=3).half()  # as exact rows, and as scales of records
    codes = torch.randint(0, 256, paging.cache.shape, generator=torch.Generator().manual_seed(5))
    paging.cache = halves.view(torch.uint8)
    records = sorted(
        {page for i in range(len(lengths)) for page in paging.used_pages(i)}
        - {page for row in paging.page_table.tolist() for page in row[: layout.header_columns]}
    )
    for name in ("k_codes", "v_codes"):
        field = layout.fields[name]
        paging.cache[records, :, field.offset : field.end] = codes.to(torch.uint8)[
            records, :, field.offset : field.end
        ]
    paging.cache, paging.page_table = paging.cache.to(device), paging.page_table.to(device)
    return paging


def _both(
    paging: Paging,
    lens: tuple[int, ...] | list[int],
    positions: list[int],
    starts: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[tuple[torch.Tensor, ...]]:
    """Results of the kernel and of the reference; rows that nobody asked for must stay."""
    device = paging.cache.device
    lists = [
        None if x is None else torch.tensor(x, dtype=torch.int32, device=device)
        for x in (lens, positions, starts)
    ]
    results = []
    truncates = dtype == torch.bfloat16 and device.type == "cpu"
    for engine in ("triton", "reference"):
        shape = (sum(lens) + 3, paging.cache.shape[1], paging.layout.head_dim)
        wide = torch.float32 if truncates and engine == "reference" else dtype
        out = tuple(torch.full(shape, 7.0, dtype=wide, device=device) for _ in range(2))
        key, value, bounds = gather(
            paging.cache, paging.page_table, lists[0], lists[1], layout=paging.layout,
            starts=lists[2], out=out, engine=engine,
        )  # fmt: skip
        if wide != dtype:
            key, value = _truncated(key), _truncated(value)
        results.append((key, value, bounds))
    return results


def _truncated(x: torch.Tensor) -> torch.Tensor:
    """fp32 to bf16 as Triton's interpreter does it; a GPU rounds to nearest."""
    return (x.view(torch.int32) & -65536).view(torch.float32).bfloat16()


def _assert_same(results: list[tuple[torch.Tensor, ...]]) -> None:
    for got, want in zip(*results, strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize(("preset", "dim", "dtype"), SHAPES)
def test_every_length_has_the_bits_of_the_reference(
    preset: str, dim: int, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    layout = RecordLayout(PRESETS[preset], dim)
    lengths = LENGTHS if dim == 64 and layout.group == 64 else (layout.group * 3 + 1,)
    paging = _pages(layout, lengths, kernel_device, heads=1)
    _assert_same(_both(paging, lengths, [n - 1 for n in lengths], dtype=dtype))


def test_tiles_from_the_prefix_cache_are_records(kernel_device: torch.device) -> None:
    lengths = (300, 300, 200, 65)
    paging = _pages(SMALL, lengths, kernel_device, hits=(0, 4, 2, 1))
    _assert_same(_both(paging, lengths, [n - 1 for n in lengths]))


def test_a_null_sink_page_is_not_read(kernel_device: torch.device) -> None:
    paging = _pages(SMALL, (200, 200), kernel_device)
    paging.page_table[1, SINK_COLUMN] = NULL_PAGE
    results = _both(paging, (200, 200), [199, 199])
    _assert_same(results)
    tokens = torch.arange(SMALL.sink_rows)
    assert not torch.equal(results[0][0][tokens], results[0][0][200 + tokens])


@pytest.mark.parametrize("first", [0, 1, 10, 15, 16, 63, 64, 100, 127, 128, 190])
def test_a_run_may_start_anywhere(first: int, kernel_device: torch.device) -> None:
    paging = _pages(SMALL, (260, 260, 260), kernel_device)
    lens, starts = [260 - first, 3, 0], [first, first, first]
    results = _both(paging, lens, [259] * 3, starts)
    _assert_same(results)
    whole = _both(paging, [260, 260, 0], [259] * 3)[0]
    assert_same_bits(results[0][0][: lens[0]], whole[0][first:260])


def test_a_query_in_the_past_sees_exact_rows(kernel_device: torch.device) -> None:
    paging = _pages(SMALL, (192,), kernel_device)
    for position in (63, 127, 128, 191):
        _assert_same(_both(paging, [position + 1], [position]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_records_saturate_in_fp16(dtype: torch.dtype, kernel_device: torch.device) -> None:
    paging = _pages(SMALL, (200,), kernel_device)
    paging.page_table[0, SINK_COLUMN] = NULL_PAGE
    halves = paging.cache.view(torch.float16)
    record = int(paging.page_table[0, SMALL.header_columns])
    for name in ("k_scale", "k_zero", "k_token_scale", "v_channel_scale", "v_scale"):
        field = SMALL.fields[name]
        halves[record, :, field.offset // 2 : field.end // 2] = 60000.0
    results = _both(paging, [200], [199], dtype=dtype)
    _assert_same(results)
    most = torch.finfo(torch.float16).max
    assert (
        results[0][0].abs().max() == most if dtype == torch.float16 else results[0][0].max() > most
    )


def test_bytes_that_are_not_asked_for_do_not_matter(kernel_device: torch.device) -> None:
    lengths = (5, 64, 129, 250)
    results = []
    for byte in POISONS:
        paging = _pages(SMALL, lengths, kernel_device)
        paging.poison_unused(byte)
        for request, n in enumerate(lengths):
            ring = paging.page_table[request, 2 : SMALL.header_columns].tolist()
            for row in range(n, SMALL.ring_rows):  # ring rows never written
                page, at = ring[row // SMALL.rows_per_page], row % SMALL.rows_per_page
                paging.cache[page, :, at * SMALL.row_bytes : (at + 1) * SMALL.row_bytes] = byte
        results.append(_both(paging, lengths, [n - 1 for n in lengths])[0])
    for result in results[1:]:
        _assert_same([result, results[0]])


def test_a_padded_row_reads_no_page(kernel_device: torch.device) -> None:
    paging = _pages(SMALL, (250, 250), kernel_device)
    paging.page_table[1, SMALL.header_columns :] = 500_000_000
    lens, positions, starts = (
        torch.tensor(x, dtype=torch.int32, device=kernel_device)
        for x in ([60, 0], [249, 249], [100, 100])
    )
    where = paging.cache, paging.page_table
    options = {"layout": SMALL, "starts": starts}
    results = [
        gather(*where, lens, positions, **options, engine=e) for e in ("triton", "reference")
    ]
    assert len(results[0][0]) == 60
    _assert_same(results)


def test_pages_may_lie_apart(kernel_device: torch.device) -> None:
    paging = _pages(SMALL, (200,), kernel_device)
    whole = _both(paging, [200], [199])
    pages, heads, width = paging.cache.shape
    wide = torch.full((pages, heads * width + 48), 0xFF, dtype=torch.uint8, device=kernel_device)
    wide[:, : heads * width] = paging.cache.view(pages, -1)
    paging.cache = wide.as_strided((pages, heads, width), (wide.stride(0), width, 1))
    apart = _both(paging, [200], [199])
    _assert_same(apart)
    _assert_same([whole[0], apart[0]])


def test_nothing_is_computed_by_the_host_when_all_is_given(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    paging = _pages(SMALL, (100, 30), kernel_device)
    lens, positions, bounds = (
        torch.tensor(x, dtype=torch.int32, device=kernel_device)
        for x in ([100, 30], [99, 29], [0, 100, 130])
    )
    out = tuple(torch.zeros(130, 2, 64, dtype=torch.float16, device=kernel_device) for _ in "kv")
    want = gather(
        paging.cache, paging.page_table, lens, positions, layout=SMALL, dtype=torch.float16
    )
    for name in ("empty", "zeros", "cumsum"):
        monkeypatch.setattr(torch, name, None)
    got = gather(
        paging.cache, paging.page_table, lens, positions, layout=SMALL, cu_seqlens_k=bounds,
        max_context_len=200, out=out, engine="triton",
    )  # fmt: skip
    monkeypatch.undo()
    assert got[0] is out[0]
    assert got[2] is bounds
    _assert_same([got, want])


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rotated_rows_have_the_bits_of_the_reference(
    dim: int, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    x = draw("outlier_channel", (7, 3, dim), seed=1).to(dtype)
    x[0, 0], x[1, 1, 3], x[2, 2, 0] = 65504, float("nan"), float("inf")
    fused = torch.zeros(7, 5, dim, dtype=dtype)
    fused[:, 1:4] = x
    x, fused = x.to(kernel_device), fused.to(kernel_device)
    want = rotate_rows(x, engine="reference")
    if dtype == torch.bfloat16 and kernel_device.type == "cpu":
        want = _truncated(rotate_rows(x.float(), engine="reference"))
    assert want[1, 1].isnan().all()
    assert_same_bits(rotate_rows(x, engine="triton").nan_to_num(1), want.nan_to_num(1))
    rotate_rows(fused[:, 1:4], out=fused[:, 1:4], engine="triton")  # strided, in place
    assert_same_bits(fused[:, 1:4].nan_to_num(1), want.nan_to_num(1))
    assert not fused[:, 0].any()
    assert not fused[:, 4].any()


def test_no_rows_are_rotated_and_no_tokens_gathered(kernel_device: torch.device) -> None:
    empty = torch.empty(0, 4, 64, dtype=torch.float16, device=kernel_device)
    assert rotate_rows(empty, engine="triton").shape == (0, 4, 64)
    paging = _pages(SMALL, (10,), kernel_device)
    key, _, bounds = _both(paging, [0], [0])[0]
    assert (key == 7).all()
    assert bounds.tolist() == [0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_batches_have_the_bits_of_the_reference(
    preset: str, dim: int, dtype: torch.dtype
) -> None:
    layout = RecordLayout(PRESETS[preset], dim)
    lengths = (4000, 0, 1, 2 * layout.group, 1023, 777)
    paging = _pages(layout, lengths, torch.device("cuda"), heads=8)
    starts = [100, 0, 0, layout.group, 512, 26]
    lens = [n - start for n, start in zip(lengths, starts, strict=True)]
    positions = [max(n - 1, 0) for n in lengths]
    _assert_same(_both(paging, lens, positions, starts, dtype))


@pytest.mark.parametrize(
    "name", ["page_table", "context_lens", "positions", "starts", "cu_seqlens_k"]
)
def test_lists_that_kernels_cannot_read_are_refused(name: str, kernel_device: torch.device) -> None:
    paging = _pages(SMALL, (70, 9), kernel_device)
    numbers = {
        "context_lens": [70, 9], "positions": [69, 8], "starts": [0, 0], "cu_seqlens_k": [0, 70, 79]
    }  # fmt: skip
    lists = {what: torch.tensor(x).int().to(kernel_device) for what, x in numbers.items()}
    lists["page_table"] = paging.page_table
    for wrong, message in (
        (lists[name].repeat_interleave(2, -1)[..., ::2], "strides .* Pass it contiguous"),
        (lists[name].to("meta"), "is on meta. Pass it on "),
    ):
        with pytest.raises(ValueError, match=f"^{name} (has )?{message}"):
            gather(
                paging.cache, **{**lists, name: wrong}, max_context_len=70, layout=SMALL,
                out=tuple(torch.empty(79, 2, 64, device=kernel_device) for _ in range(2)),
                engine="triton",
            )  # fmt: skip

"""Triton stores what the reference stores: exact rows bit for bit, records up to rounding.

Every comparison covers the whole cache, so a byte written anywhere else fails it.
"""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvarn_core.layout import (
    HEAD_DIMS,
    HIT_COLUMN,
    RING_COLUMN,
    SINK_COLUMN,
    RecordLayout,
    seal_phase,
)
from kvarn_core.ops.store import append, seal, write_sink
from kvarn_core.rotation import exact_rows
from kvarn_core.spec import PRESETS, Recipe
from kvarn_core.testing.compare import assert_same_bits
from kvarn_core.testing.inputs import draw
from kvarn_core.testing.paging import NULL_PAGE, Paging, allocate
from kvarn_core.testing.records import assert_equivalent_records

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.kernel

SMALL = RecordLayout(PRESETS["kvarn_k4v2_g64"], 64)
G = SMALL.group
FILL = 0x3C  # an unwritten record is a valid one: scales of about 1
SHAPES = [
    pytest.param(name, dim, dtype, id=f"{name[6:]}-d{dim}-{str(dtype)[6:]}")
    for name, dim, dtype in (
        ("kvarn_k4v2_g64", 64, torch.bfloat16),
        ("kvarn_k4v4_g64", 64, torch.float32),
        ("kvarn_k2v2_g64", 64, torch.float16),
        ("kvarn_k4v2_g64", 128, torch.float16),
        ("kvarn_k4v2_g128", 64, torch.bfloat16),
        ("kvarn_k2v2_g64", 256, torch.float16),
    )
]

Rows = tuple[torch.Tensor, torch.Tensor]


def _rows(count: int, *, seed: int = 0, layout: RecordLayout = SMALL, heads: int = 2) -> Rows:
    shape = (count, heads, layout.head_dim)
    key, value = (draw("gaussian", shape, seed=2 * seed + i) for i in (0, 1))
    return key, value


def _store(
    paging: Paging,
    rows: Sequence[Rows],
    lengths: Sequence[int],
    news: Sequence[int],
    engine: str,
    device: torch.device,
    **seal_options: Any,
) -> None:
    """One step: the last `news` of the first `lengths` rows of each request.

    The reference always runs on the CPU, where it is the definition.
    """
    device = device if engine == "triton" else torch.device("cpu")
    parts = [[x[n - q : n] for x in kv] for kv, n, q in zip(rows, lengths, news, strict=True)]
    key, value = (torch.cat(part).to(device) for part in zip(*parts, strict=True))
    cache, table = paging.cache.to(device), paging.page_table.to(device)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    starts = torch.tensor([0, *news]).cumsum(0).int().to(device)
    where = (key, value, cache, table, seq_lens, starts)
    common: dict[str, Any] = {"layout": paging.layout, "engine": engine}
    if max(news) == 1:  # a decode step, in the order of serving
        append(*where, **common, max_query_len=1)
        seal(*where, **common, **seal_options, max_query_len=1)
    else:
        write_sink(*where, **common)
        seal(*where, **common, **seal_options)
        append(*where, **common)
    paging.cache = cache.cpu()


def _step(
    paging: Paging,
    rows: Sequence[Rows],
    lengths: Sequence[int],
    news: Sequence[int],
    device: torch.device,
    **seal_options: Any,
) -> None:
    """Store a step with both engines, compare, and keep the cache of the reference."""
    ours = dataclasses.replace(paging, cache=paging.cache.clone())
    _store(ours, rows, lengths, news, "triton", device, **seal_options)
    _store(paging, rows, lengths, news, "reference", device, **seal_options)
    _assert_same_cache(ours.cache, paging, rows, seal_options.get("recipe", Recipe.KVARN))


def _assert_same_cache(
    got: torch.Tensor, paging: Paging, rows: Sequence[Rows], recipe: Recipe = Recipe.KVARN
) -> None:
    """Check records by what they may differ in, everything else by its bits."""
    layout, want = paging.layout, paging.cache
    for request, row in enumerate(paging.page_table.tolist()):
        pages = row[layout.header_columns : layout.columns(paging.capacities[request])]
        exact = [exact_rows(x, layout).transpose(0, 1) for x in rows[request]]  # [Hkv, n, D]
        for tile in range(paging.hits[request], len(pages)):
            page, tokens = pages[tile], slice(tile * layout.group, (tile + 1) * layout.group)
            differs = (got[page] != want[page]).any(1)
            if differs.any():
                tiles = [x[differs, tokens] for x in exact]
                two = got[page, differs], want[page, differs]
                assert_equivalent_records(*two, *tiles, layout, recipe)
                got[page] = want[page]
    assert_same_bits(got, want)


def _sealed(paging: Paging, request: int) -> list[bool]:
    """Whether each record half of a request was written; tile, head, half in this order."""
    layout, cut = paging.layout, paging.layout.key_bytes
    columns = slice(layout.header_columns, layout.columns(paging.capacities[request]))
    records = paging.cache[paging.page_table[request, columns].long()]
    halves = (records[..., :cut] != FILL).any(-1), (records[..., cut:] != FILL).any(-1)
    found: list[bool] = torch.stack(halves, -1).flatten().tolist()
    return found


# --- steps of a serving engine --------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "dim", "dtype"), SHAPES)
def test_a_prompt_in_chunks_has_the_bytes_of_the_reference(
    preset: str, dim: int, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    layout = RecordLayout(PRESETS[preset], dim)
    group = layout.group
    total = 3 * group + 7
    rows = [tuple(x.to(dtype) for x in _rows(total, layout=layout))]
    paging = allocate(layout, [total], seed=1, fill=FILL)
    _step(paging, rows, [group + 20], [group + 20], kernel_device)
    _step(paging, rows, [total - 1], [total - group - 21], kernel_device)
    _step(paging, rows, [total], [1], kernel_device)
    assert all(_sealed(paging, 0)[: 2 * 2 * layout.packed_tiles(total - 1)])


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [Recipe.KVARN, Recipe.PAPER], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_the_bytes_of_the_reference(preset: str, dim: int, recipe: Recipe) -> None:
    layout = RecordLayout(PRESETS[preset], dim)
    total = 5 * layout.group
    rows = [_rows(total, seed=i, layout=layout) for i in range(3)]
    paging = allocate(layout, [total] * 3, seed=2, fill=FILL)
    device, half = torch.device("cuda"), 2 * layout.group + 9
    _step(paging, rows, [half, half + 1, 1], [half, half + 1, 1], device, recipe=recipe)
    _step(paging, rows, [total - 1, total, 2], [total - 1 - half, total - 1 - half, 1], device,
          recipe=recipe)  # fmt: skip
    for n in range(2):
        _step(paging, rows, [total, 0, 3 + n], [1 - n, 0, 1], device, recipe=recipe)


@pytest.mark.parametrize("seed", range(6))
def test_random_steps_of_a_batch_have_the_bytes_of_the_reference(
    seed: int, kernel_device: torch.device
) -> None:
    """Lengths, chunk sizes, hits, pages and layers at random; padded and idle rows between."""
    rng = random.Random(seed)  # noqa: S311 - test data, not a secret
    hits = [0, 0, rng.choice((0, 1, 2)), 0]
    rows = [_rows(8 * G, seed=4 * seed + i) for i in range(4)]
    paging = allocate(SMALL, [8 * G] * 4, hits=hits, donors=[0] * 4, seed=seed, fill=FILL)
    done = [h * G for h in hits]
    for i in range(4):  # a state to start from
        start = rng.randrange(1, 2 * G)
        done[i] += start
        news, lengths = [0] * 4, [0] * 4
        news[i], lengths[i] = start, done[i]
        _store(paging, rows, lengths, news, "reference", kernel_device)
    for most in (1, 3, 2 * G + 30):
        news = [rng.choice((0, 1, rng.randint(1, most))) for _ in range(4)]
        done = [n + q for n, q in zip(done, news, strict=True)]
        lengths = [n if q or rng.random() < 0.5 else 0 for n, q in zip(done, news, strict=True)]
        if any(news):
            _step(paging, rows, lengths, news, kernel_device, layer=rng.randrange(40))


@pytest.mark.parametrize("hits", [0, 2])
def test_every_decode_position_seals_what_is_due(hits: int, kernel_device: torch.device) -> None:
    """All phases: K and V of three heads have their deadlines somewhere in a group of steps."""
    begin = 2 * G
    rows = [_rows(begin + G, heads=3)]
    paging = allocate(SMALL, [begin + G], num_kv_heads=3, seed=3, fill=FILL)
    _store(paging, rows, [begin], [begin], "reference", kernel_device)
    before = _sealed(paging, 0)
    paging.page_table[0, HIT_COLUMN] = hits
    for n in range(begin + 1, begin + G + 1):
        _step(paging, rows, [n], [1], kernel_device, layer=11)
    assert _sealed(paging, 0) == [*before[:6], *(before[6:] if hits == 2 else [True] * 6)]


def test_more_heads_than_tokens_in_a_tile(kernel_device: torch.device) -> None:
    heads = G + 5
    paging = allocate(SMALL, [2 * G], num_kv_heads=heads, seed=4, fill=FILL)
    ring_page = int(paging.page_table[0, RING_COLUMN])
    n = G + seal_phase(ring_page, 0, 0, is_value=False, group=G) + 1
    rows = [_rows(n, heads=heads)]
    _store(paging, rows, [n - 1], [n - 1], "reference", kernel_device)
    before = _sealed(paging, 0)
    _step(paging, rows, [n], [1], kernel_device)
    new_keys = [a != b for a, b in zip(before[::2], _sealed(paging, 0)[::2], strict=True)]
    assert [head for head in range(heads) if new_keys[head]] == [0, G], "equal phases"


def test_the_recipe_reaches_the_records(kernel_device: torch.device) -> None:
    rows = [tuple(0.01 * x for x in _rows(2 * G))]
    caches = []
    for recipe in (Recipe.KVARN, Recipe.PAPER):
        paging = allocate(SMALL, [2 * G], seed=5, fill=FILL)
        _step(paging, rows, [2 * G], [2 * G], kernel_device, recipe=recipe)
        caches.append(paging.cache)
    assert (caches[0] != caches[1]).any()


# --- one way or another ---------------------------------------------------------------------------


def test_a_record_does_not_depend_on_how_its_rows_came(kernel_device: torch.device) -> None:
    """All rows at once, partly in the ring, all in the ring: the same bytes from Triton."""
    total = 2 * G
    rows = [_rows(total)]
    caches = []
    for first in (0, 1, G - 1, G, total - 1):
        paging = allocate(SMALL, [total], seed=6, fill=FILL)
        if first:
            _store(paging, rows, [first], [first], "triton", kernel_device)
        if first < total - 1:
            _store(paging, rows, [total - 1], [total - 1 - first], "triton", kernel_device)
        _store(paging, rows, [total], [1], "triton", kernel_device)
        caches.append(paging.cache)
    for n in range(G + 1, total + 1):  # from the ring alone
        if n == G + 1:
            paging = allocate(SMALL, [total], seed=6, fill=FILL)
            _store(paging, rows, [G], [G], "triton", kernel_device)
        _store(paging, rows, [n], [1], "triton", kernel_device)
    assert all(_sealed(paging, 0))
    for cache in caches:
        assert_same_bits(cache, paging.cache)


@pytest.mark.parametrize(("new", "length"), [(0, 0), (0, 150), (3, 0)])
@pytest.mark.parametrize("most", [1, 3, 200])
def test_rows_without_tokens_do_nothing(
    new: int, length: int, most: int, kernel_device: torch.device
) -> None:
    paging = allocate(SMALL, [200], seed=7, fill=FILL)
    cache = paging.cache.to(kernel_device)
    table = torch.full_like(paging.page_table, 10**6).to(kernel_device)  # is not read
    key, value = (x.to(kernel_device) for x in _rows(3))
    lens, starts = (
        torch.tensor(x, dtype=torch.int32, device=kernel_device) for x in ([length], [0, new])
    )
    for op in (write_sink, seal, append):
        op(
            key, value, cache, table, lens, starts,
            layout=SMALL, max_query_len=most, engine="triton",
        )  # fmt: skip
    assert_same_bits(cache.cpu(), paging.cache)


def test_the_null_page_is_never_a_sink(kernel_device: torch.device) -> None:
    rows = [_rows(20)]
    paging = allocate(SMALL, [20], sink=False, seed=8, fill=FILL)
    _step(paging, rows, [19], [19], kernel_device)
    _step(paging, rows, [20], [1], kernel_device)
    assert (paging.cache[NULL_PAGE] == FILL).all()


def test_hits_are_a_count_and_the_sink_a_page(kernel_device: torch.device) -> None:
    assert (HIT_COLUMN, SINK_COLUMN) == (0, 1)
    rows = [_rows(2 * G)]
    paging = allocate(SMALL, [2 * G], seed=9, fill=FILL)
    paging.page_table[0, HIT_COLUMN] = 1  # tile 0 is another request's: not sealed
    _step(paging, rows, [2 * G], [2 * G], kernel_device)
    assert not any(_sealed(paging, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_slices_of_larger_tensors(dtype: torch.dtype, kernel_device: torch.device) -> None:
    """Rows of a fused projection; tables and lengths at addresses that are no multiple of 16."""
    total = 2 * G
    fused = draw("gaussian", (total, 3 * 2 * 64), seed=10, dtype=dtype).to(kernel_device)
    key, value = (fused[:, i * 128 : (i + 1) * 128].unflatten(1, (2, 64)) for i in (1, 2))
    paging = allocate(SMALL, [total], seed=10, fill=FILL)
    cache = paging.cache.to(kernel_device)
    wide = torch.full((3, paging.page_table.shape[1] + 5), 10**6, dtype=torch.int32)
    wide[1, 3:-2] = paging.page_table[0]
    table = wide.to(kernel_device)[1:2, 3:-2]
    numbers = torch.tensor([9, total, 9, 0, total], dtype=torch.int32, device=kernel_device)
    where = (key, value, cache, table, numbers[1:2], numbers[3:5])
    for op in (write_sink, seal, append):
        op(*where, layout=SMALL, max_query_len=total + 50, engine="triton")
    rows = [(key.cpu(), value.cpu())]
    _store(paging, rows, [total], [total], "reference", kernel_device)
    _assert_same_cache(cache.cpu(), paging, rows)


def test_strides_that_kernels_cannot_read_are_refused(kernel_device: torch.device) -> None:
    paging = allocate(SMALL, [100])
    key, value = (x.to(kernel_device) for x in _rows(10))
    wide = torch.zeros(10, 2, 65, device=kernel_device)
    where = [
        torch.tensor(x, dtype=torch.int32, device=kernel_device) for x in ([10], [0, 10])
    ]  # fmt: skip
    table, cache = (x.to(kernel_device) for x in (paging.page_table, paging.cache))
    padded = torch.zeros(*cache.shape[:2], cache.shape[2] + 8, dtype=torch.uint8)
    common: dict[str, Any] = {"layout": SMALL, "engine": "triton"}
    with pytest.raises(
        ValueError, match=r"^value has strides \(130, 65, 1\)\. Pass contiguous hea"
    ):
        append(key, wide[..., :64], cache, table, *where, **common)
    with pytest.raises(ValueError, match=r"Pass contiguous pages at multiples of 16 bytes\.$"):
        seal(key, value, padded.to(kernel_device)[..., :-8], table, *where, **common)


@pytest.mark.gpu
def test_a_thousand_runs_give_one_result() -> None:
    layout = RecordLayout(PRESETS["kvarn_k4v2_g128"], 128)
    total, device = 700, torch.device("cuda")
    rows = [_rows(total, seed=i, layout=layout, heads=8) for i in range(4)]
    paging = allocate(layout, [total] * 4, num_kv_heads=8, seed=11, fill=FILL)
    key, value = (torch.cat(part).to(device) for part in zip(*rows, strict=True))
    empty, table = paging.cache.to(device), paging.page_table.to(device)
    lens = torch.full((4,), total, dtype=torch.int32, device=device)
    starts = torch.arange(5, dtype=torch.int32, device=device) * total
    first = None
    for _ in range(1000):
        cache = empty.clone()
        for write in (write_sink, seal, append):
            write(key, value, cache, table, lens, starts, layout=layout, max_query_len=total)
        first = cache if first is None else first
        assert torch.equal(cache, first)

"""Kernels store what the reference stores: exact rows bit for bit, records up to rounding.

The same tests for Triton, on a GPU or in its interpreter, and for CUDA C++, on a GPU or in the
emulator.
"""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from emulator.build import EmulatedKernel
from store_steps import FILL, Rows, assert_same_cache, new_rows, sealed, step, store

from kvarn_core import nvrtc
from kvarn_core.layout import (
    HEAD_DIMS,
    HIT_COLUMN,
    RING_COLUMN,
    SINK_COLUMN,
    RecordLayout,
    seal_phase,
)
from kvarn_core.ops.store import append, cuda, prepare, seal, write_sink
from kvarn_core.spec import PRESETS, Recipe
from kvarn_core.testing.compare import assert_same_bits
from kvarn_core.testing.inputs import draw
from kvarn_core.testing.paging import NULL_PAGE, allocate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SMALL = RecordLayout(PRESETS["kvarn_k4v2_g64"], 64)
G = SMALL.group
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

Target = tuple[str, torch.device]


@pytest.fixture(
    params=[
        pytest.param("triton", marks=pytest.mark.kernel),
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("emulated", marks=pytest.mark.emulate),
    ]
)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    """Engine under test, and where it runs."""
    if request.param == "triton":
        return "triton", request.getfixturevalue("kernel_device")
    if request.param == "cuda":
        if torch.cuda.get_device_capability() != nvrtc.CAPABILITY:
            pytest.skip("needs a GPU of compute capability 9.0")
        return "cuda", torch.device("cuda", 0)
    return _emulate(monkeypatch)


def _emulate(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[nvrtc.Program], nvrtc.Program] | None = None
) -> Target:
    """Engine cuda in the emulator, with changed sources if asked for."""
    pytest.importorskip("ziglang", reason="builds C++ for the CPU; the package ziglang is missing")
    monkeypatch.setattr("kvarn_core.dispatch._cuda_obstacle", lambda device: None)
    for name in ("rows", "seal"):
        variant = getattr(cuda, f"{name}_variant")

        def kernel(*shape: Any, variant: Any = variant) -> EmulatedKernel:
            found = variant(*shape[:-1])  # without the device
            if change:
                found = dataclasses.replace(found, program=change(found.program))
            return EmulatedKernel(found)

        monkeypatch.setattr(cuda, f"_{name}_kernel", kernel)
    return "cuda", torch.device("cpu")


def _rows(count: int, *, seed: int = 0, layout: RecordLayout = SMALL, heads: int = 2) -> Rows:
    return new_rows(layout, count, seed=seed, heads=heads)


# --- steps of a serving engine --------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "dim", "dtype"), SHAPES)
def test_a_prompt_in_chunks_has_the_bytes_of_the_reference(
    preset: str, dim: int, dtype: torch.dtype, target: Target
) -> None:
    layout = RecordLayout(PRESETS[preset], dim)
    group = layout.group
    total = 3 * group + 7
    rows = [tuple(x.to(dtype) for x in _rows(total, layout=layout))]
    paging = allocate(layout, [total], seed=1, fill=FILL)
    step(paging, rows, [group + 20], [group + 20], *target)
    step(paging, rows, [total - 1], [total - group - 21], *target)
    step(paging, rows, [total], [1], *target)
    assert all(sealed(paging, 0)[: 2 * 2 * layout.packed_tiles(total - 1)])


def test_a_prompt_longer_than_the_ring_keeps_its_first_rows(target: Target) -> None:
    """They are no longer among the rows that `append` writes."""
    total = 2 * G + SMALL.sink_rows + 1
    rows = [_rows(total)]
    paging = allocate(SMALL, [total], seed=14, fill=FILL)
    step(paging, rows, [total], [total], *target)


@pytest.mark.gpu
@pytest.mark.parametrize("target", ["triton", "cuda"], indirect=True)
@pytest.mark.parametrize("recipe", [Recipe.KVARN, Recipe.PAPER], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_the_bytes_of_the_reference(
    preset: str, dim: int, recipe: Recipe, target: Target
) -> None:
    layout = RecordLayout(PRESETS[preset], dim)
    total = 5 * layout.group
    rows = [_rows(total, seed=i, layout=layout) for i in range(3)]
    paging = allocate(layout, [total] * 3, seed=2, fill=FILL)
    half = 2 * layout.group + 9
    step(paging, rows, [half, half + 1, 1], [half, half + 1, 1], *target, recipe=recipe)
    step(paging, rows, [total - 1, total, 2], [total - 1 - half, total - 1 - half, 1], *target,
          recipe=recipe)  # fmt: skip
    for n in range(2):
        step(paging, rows, [total, 0, 3 + n], [1 - n, 0, 1], *target, recipe=recipe)


@pytest.mark.parametrize("seed", range(6))
def test_random_steps_of_a_batch_have_the_bytes_of_the_reference(seed: int, target: Target) -> None:
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
        store(paging, rows, lengths, news, "reference", target[1])
    for most in (1, 3, 2 * G + 30):
        news = [rng.choice((0, 1, rng.randint(1, most))) for _ in range(4)]
        done = [n + q for n, q in zip(done, news, strict=True)]
        lengths = [n if q or rng.random() < 0.5 else 0 for n, q in zip(done, news, strict=True)]
        if any(news):
            step(paging, rows, lengths, news, *target, layer=rng.randrange(40))


def test_one_prefill_among_many_decode_rows(target: Target) -> None:
    """More requests than lanes of a warp; some idle, some padded; work at both ends."""
    count = 36
    lengths = [G + 1 + 7 * i % G for i in range(count)]
    news = [(1, 0, 1, 3)[i % 4] for i in range(count)]
    news[0], news[20], news[35] = G + 1, 2 * G, G
    lengths[0], lengths[20], lengths[35], lengths[13] = 2 * G, 3 * G - 5, 2 * G + 9, 0
    rows = [_rows(max(n, 1), seed=i % 3, heads=1) for i, n in enumerate(lengths)]
    paging = allocate(SMALL, [max(n, 1) for n in lengths], num_kv_heads=1, seed=16, fill=FILL)
    before = [n - q if n else 0 for n, q in zip(lengths, news, strict=True)]
    store(paging, rows, before, before, "reference", target[1], layer=8)
    sealed_before = [sealed(paging, i) for i in range(count)]
    step(paging, rows, lengths, news, *target, layer=8)
    changed = {i for i in range(count) if sealed(paging, i) != sealed_before[i]}
    assert changed == {0, 20, 27, 32, 34, 35}


@pytest.mark.parametrize("hits", [0, 2])
def test_every_decode_position_seals_what_is_due(hits: int, target: Target) -> None:
    """All phases: K and V of three heads have their deadlines somewhere in a group of steps."""
    begin = 2 * G
    rows = [_rows(begin + G, heads=3)]
    paging = allocate(SMALL, [begin + G], num_kv_heads=3, seed=3, fill=FILL)
    store(paging, rows, [begin], [begin], "reference", target[1])
    before = sealed(paging, 0)
    paging.page_table[0, HIT_COLUMN] = hits
    for n in range(begin + 1, begin + G + 1):
        step(paging, rows, [n], [1], *target, layer=11)
    assert sealed(paging, 0) == [*before[:6], *(before[6:] if hits == 2 else [True] * 6)]


def test_more_heads_than_tokens_in_a_tile(target: Target) -> None:
    heads = G + 5
    paging = allocate(SMALL, [2 * G], num_kv_heads=heads, seed=4, fill=FILL)
    ring_page = int(paging.page_table[0, RING_COLUMN])
    n = G + seal_phase(ring_page, 0, 0, is_value=False, group=G) + 1
    rows = [_rows(n, heads=heads)]
    store(paging, rows, [n - 1], [n - 1], "reference", target[1])
    before = sealed(paging, 0)
    step(paging, rows, [n], [1], *target)
    new_keys = [a != b for a, b in zip(before[::2], sealed(paging, 0)[::2], strict=True)]
    assert [head for head in range(heads) if new_keys[head]] == [0, G], "equal phases"


def test_the_recipe_reaches_the_records(target: Target) -> None:
    rows = [tuple(0.01 * x for x in _rows(2 * G))]
    caches = []
    for recipe in (Recipe.KVARN, Recipe.PAPER):
        paging = allocate(SMALL, [2 * G], seed=5, fill=FILL)
        step(paging, rows, [2 * G], [2 * G], *target, recipe=recipe)
        caches.append(paging.cache)
    assert (caches[0] != caches[1]).any()


# --- one way or another ---------------------------------------------------------------------------


def test_a_record_does_not_depend_on_how_its_rows_came(target: Target) -> None:
    """All rows at once, partly in the ring, all in the ring: the same bytes."""
    total = 2 * G
    rows = [_rows(total)]
    caches = []
    for first in (0, 1, G - 1, G, total - 1):
        paging = allocate(SMALL, [total], seed=6, fill=FILL)
        if first:
            store(paging, rows, [first], [first], *target)
        if first < total - 1:
            store(paging, rows, [total - 1], [total - 1 - first], *target)
        store(paging, rows, [total], [1], *target)
        caches.append(paging.cache)
    for n in range(G + 1, total + 1):  # from the ring alone
        if n == G + 1:
            paging = allocate(SMALL, [total], seed=6, fill=FILL)
            store(paging, rows, [G], [G], *target)
        store(paging, rows, [n], [1], *target)
    assert all(sealed(paging, 0))
    for cache in caches:
        assert_same_bits(cache, paging.cache)


@pytest.mark.parametrize(("new", "length"), [(0, 0), (0, 150), (3, 0), (3, 2)])
@pytest.mark.parametrize("most", [1, 3, 200])
def test_rows_without_tokens_do_nothing(new: int, length: int, most: int, target: Target) -> None:
    paging = allocate(SMALL, [200], seed=7, fill=FILL)
    cache = paging.cache.clone().to(target[1])
    table = torch.full_like(paging.page_table, 10**6).to(target[1])  # is not read
    key, value = (x.to(target[1]) for x in _rows(3))
    lens, starts = (
        torch.tensor(x, dtype=torch.int32, device=target[1]) for x in ([length], [0, new])
    )
    for op in (write_sink, seal, append):
        op(
            key, value, cache, table, lens, starts,
            layout=SMALL, max_query_len=most, engine=target[0],
        )  # fmt: skip
    assert_same_bits(cache.cpu(), paging.cache)


@pytest.mark.parametrize(("new", "most"), [(2 * G + 30, 2 * G + 30), (1, 1)])
def test_what_one_layer_prepared_serves_another(new: int, most: int, target: Target) -> None:
    engine, device = target
    length = 3 * G + 20
    paging = allocate(SMALL, [length], seed=15, fill=FILL)
    table = paging.page_table.to(device)
    lens, starts = (torch.tensor(x).int().to(device) for x in ([length], [0, new]))
    first, second = (
        tuple(x.to(device) for x in (*_rows(new, seed=seed), paging.cache.clone()))
        for seed in (1, 2)
    )
    where = table, lens, starts
    options: dict[str, Any] = {"layout": SMALL, "max_query_len": most, "engine": engine}
    prepared = {
        op: prepare(op, *first, *where, **options) for op in ("write_sink", "seal", "append")
    }
    for layer, tensors in ((0, first), (5, second)):
        *rows, cache = tensors
        expected = cache.clone()
        prepared["write_sink"](*tensors)
        prepared["seal"](*tensors, layer)
        prepared["append"](*tensors)
        write_sink(*rows, expected, *where, **options)
        seal(*rows, expected, *where, layer=layer, **options)
        append(*rows, expected, *where, **options)
        assert_same_bits(cache.cpu(), expected.cpu())
        assert not torch.equal(cache.cpu(), paging.cache)


def test_the_null_page_is_never_a_sink(target: Target) -> None:
    rows = [_rows(20)]
    paging = allocate(SMALL, [20], sink=False, seed=8, fill=FILL)
    step(paging, rows, [19], [19], *target)
    step(paging, rows, [20], [1], *target)
    assert (paging.cache[NULL_PAGE] == FILL).all()


def test_hits_are_a_count_and_the_sink_a_page(target: Target) -> None:
    assert (HIT_COLUMN, SINK_COLUMN) == (0, 1)
    rows = [_rows(2 * G)]
    paging = allocate(SMALL, [2 * G], seed=9, fill=FILL)
    paging.page_table[0, HIT_COLUMN] = 1  # tile 0 is another request's: not sealed
    step(paging, rows, [2 * G], [2 * G], *target)
    assert not any(sealed(paging, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_slices_of_larger_tensors(dtype: torch.dtype, target: Target) -> None:
    """Rows of a fused projection, the first ones of another request; unaligned tables, lengths."""
    total = 2 * G
    fused = draw("gaussian", (G + total, 3 * 2 * 64), seed=10, dtype=dtype).to(target[1])
    key, value = (fused[:, i * 128 : (i + 1) * 128].unflatten(1, (2, 64)) for i in (1, 2))
    value = value.contiguous()  # another stride than that of the keys
    paging = allocate(SMALL, [total], seed=10, fill=FILL)
    cache = paging.cache.clone().to(target[1])
    wide = torch.full((3, paging.page_table.shape[1] + 5), 10**6, dtype=torch.int32)
    wide[1, 3:-2] = paging.page_table[0]
    table = wide.to(target[1])[1:2, 3:-2]
    numbers = torch.tensor([9, total, 9, G, G + total], dtype=torch.int32, device=target[1])
    where = (key, value, cache, table, numbers[1:2], numbers[3:5])
    for op in (write_sink, seal, append):
        op(*where, layout=SMALL, max_query_len=total + 50, engine=target[0])
    rows = [(key[G:].cpu(), value[G:].cpu())]
    store(paging, rows, [total], [total], "reference", target[1])
    assert_same_cache(cache.cpu(), paging, rows)


def test_strides_that_kernels_cannot_read_are_refused(target: Target) -> None:
    paging = allocate(SMALL, [100])
    key, value = (x.to(target[1]) for x in _rows(10))
    wide = torch.zeros(10, 2, 65, device=target[1])
    where = [
        torch.tensor(x, dtype=torch.int32, device=target[1]) for x in ([10], [0, 10])
    ]  # fmt: skip
    table, cache = (x.to(target[1]) for x in (paging.page_table, paging.cache))
    padded = torch.zeros(*cache.shape[:2], cache.shape[2] + 8, dtype=torch.uint8)
    common: dict[str, Any] = {"layout": SMALL, "engine": target[0]}
    with pytest.raises(
        ValueError, match=r"^value has strides \(130, 65, 1\)\. Pass contiguous hea"
    ):
        append(key, wide[..., :64], cache, table, *where, **common)
    with pytest.raises(ValueError, match=r"Pass contiguous pages at multiples of 16 bytes\.$"):
        seal(key, value, padded.to(target[1])[..., :-8], table, *where, **common)
    shifted = torch.zeros(cache.numel() + 8, dtype=torch.uint8, device=target[1])[8:]
    with pytest.raises(ValueError, match=r"^cache begins at 0x\w+\. Align it to 16 bytes\.$"):
        seal(key, value, shifted.view(cache.shape), table, *where, **common)
    with pytest.raises(ValueError, match=r"^seq_lens is on meta\. Pass it on "):
        seal(key, value, cache, table, where[0].to("meta"), where[1], **common)


@pytest.mark.parametrize("name", ["page_table", "seq_lens", "cu_seqlens_q"])
def test_lists_that_kernels_cannot_read_are_refused(target: Target, name: str) -> None:
    paging = allocate(SMALL, [100, 50])
    key, value = (x.to(target[1]) for x in _rows(10))
    lists = {
        "page_table": paging.page_table,
        "seq_lens": torch.tensor([10, 5]).int(),
        "cu_seqlens_q": torch.tensor([0, 5, 10]).int(),
    }
    lists = {what: x.to(target[1]) for what, x in lists.items()}
    cache = paging.cache.to(target[1])
    options: dict[str, Any] = {"layout": SMALL, "engine": target[0], "max_query_len": 5}
    for wrong, message in (
        (lists[name].repeat_interleave(2, -1)[..., ::2], r"strides .* Pass it contiguous\.$"),
        (lists[name].long(), "dtype torch.int64 .* Pass int32 "),
    ):
        for op in (write_sink, seal, append):
            with pytest.raises(ValueError, match=f"^{name} has {message}"):
                op(key, value, cache, **{**lists, name: wrong}, **options)


@pytest.mark.emulate
@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("rows.cu", "page != 0", "page >= 0"),
        ("exact_rows.cuh", "(row & 7)", "(row & 3)"),
        ("seal.cu", "deadline >= r.length", "deadline > r.length"),
        ("encode.cuh", "i < RANGE_REFITS", "i < RANGE_REFITS - 1"),
    ],
)
def test_a_slip_in_the_source_is_found(
    file: str, right: str, wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def change(program: nvrtc.Program) -> nvrtc.Program:
        texts = program.texts()
        source = tmp_path / program.source.name
        source.write_text(program.source.read_text())
        if file in texts:
            assert texts[file].count(right) == 1
            texts[file] = texts[file].replace(right, wrong)
        elif file == source.name:
            assert source.read_text().count(right) == 1
            source.write_text(source.read_text().replace(right, wrong))
        return dataclasses.replace(program, source=source, headers=texts)

    rows = [_rows(3 * G)]
    paging = allocate(SMALL, [3 * G], sink=False, seed=15, fill=FILL)
    ring_page = int(paging.page_table[0, RING_COLUMN])
    total = 2 * G + seal_phase(ring_page, 0, 1, is_value=True, group=G)  # one token is missing
    untouched = dataclasses.replace(paging, cache=paging.cache.clone())
    step(paging, rows, [total], [total], *_emulate(monkeypatch))
    target = _emulate(monkeypatch, change)
    with pytest.raises(AssertionError):
        step(untouched, rows, [total], [total], *target)

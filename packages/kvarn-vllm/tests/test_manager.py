"""The manager inside vLLM's own KVCacheManager, against a model of what every page holds.

A small worker follows the manager's columns and writes *identities* instead of keys and values: the
chain hash of a token and everything before it. Whatever the schedule, each step must read back
exactly the identities it needs. Two planted faults show that the model would notice.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from vllm.distributed.kv_events import BlockStored
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from kvarn_core.layout import seal_phase
from kvarn_vllm.cache_spec import KVarNFullAttentionSpec
from kvarn_vllm.patches import arm

GROUP, MAX_LEN = 64, 640
SPEC = KVarNFullAttentionSpec.for_layer("kvarn_k4v2_g64", GROUP, num_kv_heads=1, head_dim=64)
LAYOUT = SPEC.layout


def make_manager(pages: int, *, caching: bool = True) -> KVCacheManager:
    assert arm().armed
    init_none_hash(sha256)
    groups = [KVCacheGroupSpec(["layer"], SPEC)]
    config = KVCacheConfig(num_blocks=pages, kv_cache_tensors=[], kv_cache_groups=groups)
    return KVCacheManager(config, MAX_LEN, hash_block_size=GROUP, enable_caching=caching)


def make_request(number: int, tokens: list[int]) -> Request:
    return Request(
        str(number), tokens, SamplingParams(max_tokens=MAX_LEN), None,
        block_hasher=get_request_block_hasher(GROUP, sha256),
    )  # fmt: skip


class World:
    """Requests, the real manager, and identities by page: `rows[page, row]`, `records[page]`."""

    ring_rows = LAYOUT.ring_rows

    def __init__(self, pages: int, *, caching: bool = True) -> None:
        self.kv = make_manager(pages, caching=caching)
        self.manager = self.kv.coordinator.single_type_managers[0]
        self.pool = self.kv.block_pool
        self.free_pages = self.pool.get_num_free_blocks()
        self._take, self.pool.get_new_blocks = self.pool.get_new_blocks, self._new_pages
        self.rows: dict[tuple[int, int], int] = {}
        self.records: dict[int, int] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.count = self.preemptions = self.hits = 0

    # What a scheduler does

    def add(self, tokens: list[int]) -> None:
        self.waiting.append(make_request(self.count, tokens))
        self.count += 1

    def preempt(self, request: Request) -> None:
        """As the scheduler does, whose method is ours in part."""
        self.running.remove(request)
        request.status = RequestStatus.RUNNING
        scheduler = SimpleNamespace(
            kv_cache_manager=self.kv,
            encoder_cache_manager=SimpleNamespace(free=lambda request: None),
            waiting=SimpleNamespace(prepend_request=lambda one: self.waiting.insert(0, one)),
            log_stats=False,
        )
        Scheduler._preempt_request(scheduler, request, 0.0)
        self.preemptions += 1

    def abort(self, request: Request) -> None:
        if request in self.running:
            self.running.remove(request)
            self.kv.free(request)
        else:
            self.waiting.remove(request)

    def step(self, rng: random.Random) -> None:
        """Schedule some requests with chunks of 1 to 4G + 1 tokens, in a random order."""
        self.kv.new_step_starts()
        work = []
        for request in list(self.running):
            if request in self.running and rng.random() < 0.8:
                chunk = self._chunk(request, rng)
                while self.kv.allocate_slots(request, chunk) is None:
                    victim = rng.choice(self.running)  # its tiles of this step may be published
                    work = [(other, n) for other, n in work if other is not victim]
                    self.preempt(victim)
                    if victim is request:
                        break
                else:
                    work.append((request, chunk))
        while self.waiting and rng.random() < 0.8:
            request = self.waiting[0]
            hits, num_hits = self.kv.get_computed_blocks(request)
            request.num_computed_tokens = num_hits
            chunk = self._chunk(request, rng)
            request.num_computed_tokens = 0
            if self.kv.allocate_slots(request, chunk, num_hits, hits) is None:
                break
            self.hits += num_hits // GROUP
            request.num_computed_tokens = num_hits
            self.running.append(self.waiting.pop(0))
            work.append((request, chunk))
        rng.shuffle(work)
        self._run(work)
        for request, chunk in work:
            request.num_computed_tokens += chunk
            if request.num_computed_tokens == request.num_tokens:
                if request.num_tokens == MAX_LEN or rng.random() < 0.05:
                    self.abort(request)
                else:
                    request.append_output_token_ids(rng.randrange(3))

    def _chunk(self, request: Request, rng: random.Random) -> int:
        left = request.num_tokens - request.num_computed_tokens
        anything = rng.randint(1, 4 * GROUP + 1)
        return min(left, rng.choice((1, GROUP - 1, GROUP, GROUP + 1, anything)))

    # What a worker does

    def columns(self, request: Request) -> list[int]:
        return self.kv.get_block_ids(request.request_id)[0]

    def _run(self, work: list[tuple[Request, int]]) -> None:
        steps = []
        for request, chunk in work:
            first = request.num_computed_tokens
            steps.append((self.columns(request), identities(request), first, first + chunk))
        for step in steps:
            self._seal(*step)
        for columns, ids, first, stop in steps:
            if stop - first == 1:
                self._append(columns, ids, first, stop)
                self._read(columns, ids, position=first, upto=stop)
            else:
                self._read(columns, ids, position=first, upto=first)
                self._append(columns, ids, first, stop)
        for columns, ids, _, stop in steps:
            self._read(columns, ids, position=stop - 1, upto=stop)

    def _seal(self, columns: list[int], ids: list[int], first: int, stop: int) -> None:
        hits, sink = columns[0], columns[1]
        if sink:
            for p in range(first, min(stop, LAYOUT.sink_rows)):
                self.rows[sink, p] = ids[p]
        for tile in range(hits, (stop - 1) // GROUP):
            phase = seal_phase(columns[2], 0, 0, is_value=False, group=GROUP)
            if first <= (tile + 1) * GROUP + phase < stop:
                for p in range(tile * GROUP, min(first, (tile + 1) * GROUP)):
                    assert self._ring(columns, p) == ids[p], "a source row is gone"
                page = columns[LAYOUT.header_columns + tile]
                assert page not in self.records, "a record is written twice"
                self.records[page] = ids[(tile + 1) * GROUP - 1]

    def _append(self, columns: list[int], ids: list[int], first: int, stop: int) -> None:
        for page in columns[2 : LAYOUT.header_columns]:
            assert self.pool.blocks[page].ref_cnt == 1, "a ring page has two owners"
            assert self.pool.blocks[page].block_hash is None
        for p in range(max(first, stop - self.ring_rows), stop):
            self.rows[self._place(columns, p)] = ids[p]

    def _read(self, columns: list[int], ids: list[int], position: int, upto: int) -> None:
        """What a query at `position` sees of the tokens below `upto`."""
        packed = LAYOUT.packed_tiles(position, columns[0])
        for tile in range(packed):
            page = columns[LAYOUT.header_columns + tile]
            assert self.records.get(page) == ids[(tile + 1) * GROUP - 1], "a foreign record"
        if packed and columns[1]:
            for p in range(LAYOUT.sink_rows):
                assert self.rows.get((columns[1], p)) == ids[p], "a foreign sink row"
        for p in range(packed * GROUP, upto):
            assert self._ring(columns, p) == ids[p], "a foreign exact row"

    def _ring(self, columns: list[int], position: int) -> int | None:
        return self.rows.get(self._place(columns, position))

    def _place(self, columns: list[int], position: int) -> tuple[int, int]:
        row = position % self.ring_rows
        return columns[2 + row // LAYOUT.rows_per_page], row % LAYOUT.rows_per_page

    def _new_pages(self, count: int) -> list[Any]:
        """A page that changes hands holds nothing of use."""
        pages = self._take(count)
        taken = {page.block_id for page in pages}
        self.records = {k: v for k, v in self.records.items() if k not in taken}
        self.rows = {k: v for k, v in self.rows.items() if k[0] not in taken}
        return pages

    def check_idle(self) -> None:
        for request in [*self.running, *self.waiting]:
            self.abort(request)
        assert self.pool.get_num_free_blocks() == self.free_pages
        assert not self.manager.req_to_blocks
        assert not self.manager.num_cached_block


def identities(request: Request) -> list[int]:
    """Chain hash of each token and everything before it."""
    chain, ids = 0, []
    for token in request.all_token_ids:
        chain = hash((chain, token))
        ids.append(chain)
    return ids


class Lifecycle(RuleBasedStateMachine):
    """Random schedules. Prompts share prefixes that end inside and at tiles."""

    world_class = World

    @initialize(pages=st.integers(22, 48), caching=st.sampled_from((True, True, False)))
    def begin(self, pages: int, caching: bool) -> None:
        self.world = self.world_class(pages, caching=caching)

    @rule(family=st.integers(0, 2), shared=st.integers(0, 420), own=st.integers(1, 90))
    def add(self, family: int, shared: int, own: int) -> None:
        if len(self.world.waiting) < 6:
            tail = [7 + self.world.count] * own
            self.world.add([family] * shared + tail)

    @rule(seed=st.integers(0, 2**32))
    def steps(self, seed: int) -> None:
        rng = random.Random(seed)  # noqa: S311
        for _ in range(8):
            self.world.step(rng)
        TOTALS["steps"] += 8

    @rule(count=st.integers(1, 4))
    def preempt(self, count: int) -> None:
        for request in self.world.running[-count:]:
            self.world.preempt(request)

    @rule(which=st.integers(0, 9))
    def abort(self, which: int) -> None:
        requests = self.world.running + self.world.waiting
        if requests:
            self.world.abort(requests[which % len(requests)])

    @invariant()
    def no_page_is_lost(self) -> None:
        if hasattr(self, "world"):
            held = sum(page.ref_cnt > 0 for page in self.world.pool.blocks[1:])
            assert held + self.world.pool.get_num_free_blocks() == self.world.free_pages

    def teardown(self) -> None:
        if hasattr(self, "world"):
            TOTALS["preemptions"] += self.world.preemptions
            TOTALS["hits"] += self.world.hits
            self.world.check_idle()


TOTALS = {"steps": 0, "preemptions": 0, "hits": 0}
PROFILE = settings(
    max_examples=100,
    stateful_step_count=60,  # more than 5,000 scheduler steps in all
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_lifecycle_on_the_stock_manager() -> None:
    run_machine(Lifecycle, settings=PROFILE)
    assert TOTALS["steps"] >= 5000
    assert TOTALS["preemptions"] >= 100  # what is drawn depends on the modules that are loaded
    assert TOTALS["hits"] >= 100


def test_a_ring_one_page_short_is_noticed() -> None:
    class ShortRing(World):
        ring_rows = LAYOUT.ring_rows - LAYOUT.rows_per_page

    class Broken(Lifecycle):
        world_class = ShortRing

    with pytest.raises(AssertionError, match="row"):
        run_machine(Broken, settings=PROFILE)


def test_publishing_one_tile_early_is_noticed() -> None:
    class EarlyPublication(World):
        def __init__(self, pages: int, *, caching: bool = True) -> None:
            super().__init__(pages, caching=caching)
            cache_blocks = self.manager.cache_blocks
            self.manager.cache_blocks = lambda request, n, *rest: cache_blocks(
                request, n + GROUP, *rest
            )

    class Broken(Lifecycle):
        world_class = EarlyPublication

    with pytest.raises(AssertionError, match="foreign record"):
        run_machine(Broken, settings=PROFILE)


def test_a_request_taken_out_of_a_step_takes_back_what_it_published() -> None:
    """Under priority scheduling a victim may have been scheduled in the same step."""
    for withdrawn in (True, False):
        world = World(60)
        world.kv.new_step_starts()
        world.add([3] * 300)
        [request] = world.running = world.waiting
        world.waiting = []
        world.kv.allocate_slots(request, 300)
        if not withdrawn:  # what the prefix cache would then hold
            world.manager.withdraw = lambda request_id: None
        world.preempt(request)
        hits, tokens = world.kv.get_computed_blocks(make_request(1, [3] * 290))
        assert tokens == (0 if withdrawn else 3 * GROUP)
        sink = world.manager._shared_sink(hits.blocks[0])
        assert (sink is None) is withdrawn


def test_what_was_published_before_stays_after_preemption() -> None:
    kv = make_manager(60)
    manager = kv.coordinator.single_type_managers[0]
    first, second = make_request(0, [3] * 300), make_request(1, [3] * 290)
    kv.new_step_starts()
    kv.allocate_slots(first, 300)
    kv.new_step_starts()
    manager.withdraw("0")
    kv.free(first)
    assert kv.get_computed_blocks(second)[1] == 3 * GROUP


def test_pages_that_nobody_can_find_do_not_sweep_the_prefix_cache() -> None:
    kv = make_manager(100)
    queue = kv.block_pool.free_block_queue
    free = queue.num_free_blocks

    def serve(number: int, tokens: list[int]) -> None:
        request = make_request(number, tokens)
        kv.new_step_starts()
        assert kv.allocate_slots(request, len(tokens)) is not None
        kv.free(request)

    prompt = [1] * MAX_LEN
    serve(0, prompt)
    hits = kv.get_computed_blocks(make_request(1, prompt))[1]
    assert hits == MAX_LEN - 2 * GROUP
    for number in range(2, 100):  # without a complete tile, but each with a ring and a sink
        serve(number, [number] * (GROUP - 1))
        assert len(queue.get_all_free_blocks()) == queue.num_free_blocks == free
    assert kv.get_computed_blocks(make_request(100, prompt))[1] == hits


def test_events_are_those_of_tiles() -> None:
    kv = make_manager(40)
    kv.block_pool.enable_kv_cache_events = True
    kv.allocate_slots(make_request(0, [3] * 300), 300)
    published = kv.block_pool.take_events()
    assert [type(event) for event in published] == [BlockStored]
    kv.free(make_request(0, [3] * 300))
    for page in range(1, 40):
        kv.evict_blocks({page})
    removed = [digest for event in kv.block_pool.take_events() for digest in event.block_hashes]
    assert sorted(removed) == sorted(published[0].block_hashes), "and no sink among them"


def test_columns_of_a_cold_request() -> None:
    kv = make_manager(40)
    request = make_request(0, [3] * 300)
    blocks = kv.allocate_slots(request, 300)
    [columns] = kv.get_block_ids("0")
    assert blocks is not None
    assert [len(columns)] == [LAYOUT.columns(300)] == [LAYOUT.header_columns + 4]
    assert columns[0] == 0
    assert len(set(columns[1:])) == len(columns) - 1
    assert kv.block_pool.get_num_free_blocks() == 39 - (len(columns) - 1)


def test_columns_after_a_hit_share_records_and_sink() -> None:
    kv = make_manager(60)
    first, second = make_request(0, [3] * 300), make_request(1, [3] * 290)
    kv.allocate_slots(first, 300)
    hits, tokens = kv.get_computed_blocks(second)
    assert tokens == 3 * GROUP, "tile 3 is complete but not sealed at latest in this step"
    free = kv.block_pool.get_num_free_blocks()
    kv.allocate_slots(second, 290 - tokens, tokens, hits)
    [maker], [hit] = kv.get_block_ids("0"), kv.get_block_ids("1")
    header = LAYOUT.header_columns
    assert hit[0] == 3
    assert hit[1] == maker[1]
    assert hit[header : header + 3] == maker[header : header + 3]
    assert not set(hit[2:header]) & set(maker)
    assert free - kv.block_pool.get_num_free_blocks() == LAYOUT.ring_pages + 1


def test_a_hit_without_its_sink_gets_the_null_page() -> None:
    kv = make_manager(60)
    kv.allocate_slots(make_request(0, [3] * 300), 300)
    kv.evict_blocks({kv.get_block_ids("0")[0][1]})
    second = make_request(1, [3] * 290)
    hits, tokens = kv.get_computed_blocks(second)
    kv.allocate_slots(second, 290 - tokens, tokens, hits)
    assert kv.get_block_ids("1")[0][1] == kv.block_pool.null_block.block_id
    kv.free(second)


def test_pages_wanted_are_pages_taken() -> None:
    """The admission gate and the allocation agree to the page, with hits that are evictable."""
    kv = make_manager(60)
    first = make_request(0, [3] * 300)
    kv.allocate_slots(first, 300)
    kv.free(first)
    second = make_request(1, [3] * 290)
    hits, tokens = kv.get_computed_blocks(second)
    manager = kv.coordinator.single_type_managers[0]
    free = kv.block_pool.get_num_free_blocks()
    wanted = manager.get_num_blocks_to_allocate("1", 290, hits.blocks[0], tokens, 290)
    kv.allocate_slots(second, 290 - tokens, tokens, hits)
    assert free - kv.block_pool.get_num_free_blocks() == wanted
    assert manager.get_num_common_prefix_blocks("1") == 0


def test_a_request_that_was_never_admitted_can_be_freed() -> None:
    pages = LAYOUT.columns(600)  # the null page stands in for the hit count
    kv = make_manager(pages - 1)
    assert kv.allocate_slots(make_request(0, [3] * 600), 600) is None
    kv.free(make_request(0, [3] * 600))
    assert kv.block_pool.get_num_free_blocks() == pages - 2
    kv = make_manager(pages)
    assert kv.allocate_slots(make_request(0, [3] * 600), 600) is not None

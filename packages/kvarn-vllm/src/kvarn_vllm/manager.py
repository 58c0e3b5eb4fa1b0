"""Which pages a request holds: the scheduler's side of the cache.

A request's blocks, in vLLM's words, are the columns of its page table row: hit count, sink page,
ring pages, record pages. All state of a request is reachable from them, so preemption, abort and
reordering need no code here. What differs from stock full attention is the header, and that a
record page is published to the prefix cache only once its tile is sealed. vLLM publishes while it
schedules a step; a request that is taken out of the step again takes back what it published.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    KVCacheBlock,
    get_block_hash,
    make_block_hash_with_group_id,
)
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from kvarn_core.layout import RING_COLUMN, SINK_COLUMN

SINK_MARK = b"kvarnsnk"  # the last 8 bytes of a key, all that vLLM's events keep of it

if TYPE_CHECKING:
    from collections.abc import Sequence


class KVarNManager(FullAttentionManager):  # type: ignore[misc]
    """Pages of requests whose layers have a `KVarNFullAttentionSpec`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layout = self.kv_cache_spec.layout
        self.header = self.layout.header_columns
        self.published_this_step: dict[str, list[KVCacheBlock]] = {}

    def new_step_starts(self) -> None:
        """What was published before has been scheduled for good."""
        self.published_this_step.clear()

    def withdraw(self, request_id: str) -> None:
        """Take back what a request published in this step, which will not run for it."""
        for page in self.published_this_step.pop(request_id, []):
            self.block_pool._maybe_evict_cached_block(page)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
    ) -> int:
        """Count the free pages a request takes from the pool to hold `num_tokens` tokens.

        Hits that nobody uses count too: touching them removes them from the free pages.
        """
        columns: int = self.layout.columns(num_tokens)
        held = len(self.req_to_blocks.get(request_id, ()))
        if held:
            assert not new_computed_blocks, "Only a new request hits the prefix cache."
            return max(columns - held, 0)
        hits = self._pages_of_hits(new_computed_blocks)
        hit_count, own_sink = 1, not new_computed_blocks
        fresh = columns - hit_count - (not own_sink) - len(new_computed_blocks)
        return fresh + sum(1 for page in hits if page.ref_cnt == 0)

    def allocate_new_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Admit a request that hits the prefix cache: header first, then the hits."""
        assert num_external_computed_tokens == 0, "KV transfer is refused at start-up."
        if new_computed_blocks:
            self._admit(request_id, new_computed_blocks)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Give a request the record pages that `num_tokens` tokens need, and a header if new.

        Returns
        -------
        list of KVCacheBlock
            The columns added by this call.
        """
        # vLLM skips allocate_new_computed_blocks when there are no hits.
        added = [] if self.req_to_blocks.get(request_id) else self._admit(request_id, [])
        columns = self.req_to_blocks[request_id]
        missing = self.layout.columns(num_tokens) - len(columns)
        if missing > 0:
            records = self.block_pool.get_new_blocks(missing)
            columns.extend(records)
            added = added + records
        return added

    def cache_blocks(
        self, request: Any, num_tokens: int, alignment_tokens: int | None = None
    ) -> None:
        """Publish the tiles that are sealed once `num_tokens` tokens are stored.

        vLLM publishes when it schedules, before the step runs. Another request of the same step
        may already read the page, so a tile appears here only in the step that seals it at latest.
        """
        sealed = self.layout.packed_tiles(num_tokens - 1)
        published = self.num_cached_block.get(request.request_id, 0)
        if sealed <= published:
            return
        columns = self.req_to_blocks[request.request_id]
        self.block_pool.cache_full_blocks(
            request=request,
            blocks=columns[self.header :],
            num_cached_blocks=published,
            num_full_blocks=sealed,
            block_size=self.block_size,
            kv_cache_group_id=self.kv_cache_group_id,
        )
        self.num_cached_block[request.request_id] = sealed
        pages = columns[self.header + published : self.header + sealed]
        if published == 0 and self._publish_sink(columns[SINK_COLUMN], request.block_hashes[0]):
            pages.append(columns[SINK_COLUMN])
        self.published_this_step.setdefault(request.request_id, []).extend(pages)

    def free(self, request_id: str) -> None:
        """Return all pages. Those worth most to the prefix cache are reused last.

        Pages that nobody can find are reused first, before anything cached is given up: every
        request leaves a ring of them, which would sweep the cache if they queued behind it.
        """
        columns = self.req_to_blocks.pop(request_id, [])
        self.num_cached_block.pop(request_id, None)
        ring = columns[RING_COLUMN : self.header]
        records = columns[self.header :]
        sink = columns[SINK_COLUMN:RING_COLUMN]
        pages = [page for page in (*ring, *reversed(records), *sink) if not page.is_null]
        self.block_pool.free_blocks([page for page in pages if page.block_hash is not None])
        _free_first(self.block_pool, [page for page in pages if page.block_hash is None])

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """Return 0: columns of two requests never agree, each has its own header."""
        return 0

    def _admit(self, request_id: str, hits: Sequence[KVCacheBlock]) -> list[KVCacheBlock]:
        """Build the header of a new request, followed by its hits."""
        # Touch first: taking ring pages could evict the hits.
        self.block_pool.touch(self._pages_of_hits(hits))
        hit_count = KVCacheBlock(block_id=len(hits), ref_cnt=1, is_null=True)
        if hits:
            sink = self._shared_sink(hits) or self.block_pool.null_block
        else:
            [sink] = self.block_pool.get_new_blocks(1)
        ring = self.block_pool.get_new_blocks(self.layout.ring_pages)
        columns = [hit_count, sink, *ring, *hits]
        self.req_to_blocks[request_id].extend(columns)
        self.num_cached_block[request_id] = len(hits)
        return columns

    def _pages_of_hits(self, hits: Sequence[KVCacheBlock]) -> list[KVCacheBlock]:
        """Pages that a new request shares: its hits and the sink page that belongs to them."""
        sink = self._shared_sink(hits)
        return [*hits, sink] if sink else list(hits)

    def _shared_sink(self, hits: Sequence[KVCacheBlock]) -> KVCacheBlock | None:
        """Sink page of the sequence that begins with `hits`, if it is still cached."""
        if not hits:
            return None
        key = self._sink_key(get_block_hash(hits[0].block_hash))
        page: KVCacheBlock | None = self.block_pool.cached_block_hash_to_block.get_one_block(key)
        return page

    def _publish_sink(self, sink: KVCacheBlock, first_hash: bytes) -> bool:
        """Let later requests find the sink page through the hash of the first tile.

        Returns
        -------
        bool
            False if it can be found already, or is not one.
        """
        if sink.is_null or sink.block_hash is not None:
            return False
        sink.block_hash = self._sink_key(first_hash)
        self.block_pool.cached_block_hash_to_block.insert(sink.block_hash, sink)
        return True

    def _sink_key(self, first_hash: bytes) -> Any:
        digest = hashlib.sha256(b"kvarn-sink" + first_hash).digest()[: -len(SINK_MARK)]
        return make_block_hash_with_group_id(BlockHash(digest + SINK_MARK), self.kv_cache_group_id)


def _free_first(pool: Any, pages: Sequence[KVCacheBlock]) -> None:
    """Return pages to the head of vLLM's queue of free pages, which it can only append to."""
    queue = pool.free_block_queue
    head = queue.fake_free_list_head
    for page in pages:
        page.ref_cnt -= 1
        if page.ref_cnt == 0:
            follower = head.next_free_block
            page.prev_free_block, page.next_free_block = head, follower
            head.next_free_block = follower.prev_free_block = page
            queue.num_free_blocks += 1


def is_sink(event: Any) -> bool:
    """Whether an event of the prefix cache is about a sink page, which readers never heard of."""
    return any(
        digest.to_bytes(8, "big") == SINK_MARK
        if isinstance(digest, int)
        else digest.endswith(SINK_MARK)
        for digest in getattr(event, "block_hashes", ())
    )

"""How much fits: the pool of a running server, in its own numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvarn_core import PRESETS, RecordLayout
from kvarn_eval.server import samples

if TYPE_CHECKING:
    from kvarn_eval.server import Metric

GIB = 1 << 30


@dataclass(frozen=True)
class Pool:
    """The KV cache that a server allocated.

    Parameters
    ----------
    pages : int
        Pages (vLLM blocks).
    page_size : int
        Tokens per page.
    cache_bytes : int or None
        Bytes of the cache of one rank, if the server was told; None if it took what was free.
    cache_dtype : str
        The server's KV cache dtype.
    """

    pages: int
    page_size: int
    cache_bytes: int | None
    cache_dtype: str

    @property
    def tokens(self) -> int:
        """Tokens that the pages hold."""
        return self.pages * self.page_size

    @property
    def tokens_per_gib(self) -> float:
        """Tokens per GiB of cache; ValueError if its size is unknown."""
        if self.cache_bytes is None:
            raise ValueError(
                "The size of the server's cache is unknown. Start it with --kv-cache-memory-bytes."
            )
        return self.tokens * GIB / self.cache_bytes

    def requests(self, num_tokens: int, head_dim: int) -> int:
        """Requests of `num_tokens` tokens that are resident at the same time."""
        return requests_that_fit(
            pages=self.pages,
            page_size=self.page_size,
            cache_dtype=self.cache_dtype,
            num_tokens=num_tokens,
            head_dim=head_dim,
        )

    @classmethod
    def from_metrics(cls, metrics: list[Metric]) -> Pool:
        """Read ``vllm:cache_config_info``.

        Raises
        ------
        RuntimeError
            If the server does not report its cache.
        """
        info = samples(metrics, "vllm:cache_config_info")[0].labels
        size = info["kv_cache_memory_bytes"]
        return cls(
            pages=int(info["num_gpu_blocks"]),
            page_size=int(info["block_size"]),
            cache_bytes=int(size) if size.isdecimal() else None,
            cache_dtype=info["cache_dtype"],
        )


def requests_that_fit(
    *, pages: int, page_size: int, cache_dtype: str, num_tokens: int, head_dim: int
) -> int:
    """Requests that are resident at the same time.

    One page is vLLM's null block. A compressed request also holds its header pages (sink and
    ring); the hit count is a column, not a page.

    Parameters
    ----------
    pages, page_size : int
        Pages of the pool, and tokens per page.
    cache_dtype : str
        KV cache dtype of the server.
    num_tokens : int
        Tokens of each request.
    head_dim : int
        Head dimension of the model.

    Returns
    -------
    int
    """
    if cache_dtype in PRESETS:
        held = RecordLayout(PRESETS[cache_dtype], head_dim).columns(num_tokens) - 1
    else:
        held = -(-num_tokens // page_size)
    return (pages - 1) // held

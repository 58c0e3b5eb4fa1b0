"""Attention of one layer: store the new rows of a step, attend to everything stored.

The order of a step carries two guarantees, however it is served. Records and sink rows of *all*
requests are written before anything is read, because another request of the same step may already
share the pages. The ring of a prefill row is written last, because its own chunk still reads the
old rows.
"""

from __future__ import annotations

import logging
import re
from functools import cache as memoize
from typing import TYPE_CHECKING, Any

from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from kvarn_vllm.batched import Batched
from kvarn_vllm.by_request import ByRequest
from kvarn_vllm.cache_spec import record_layout
from kvarn_vllm.config import Options
from kvarn_vllm.engine import choose, explain, serves_batches
from kvarn_vllm.flash import FlashAttention
from kvarn_vllm.layer_checks import check_layer
from kvarn_vllm.workspace import Workspace

if TYPE_CHECKING:
    import torch

    from kvarn_vllm.metadata import KVarNMetadata

LOG = logging.getLogger("vllm.kvarn")


class KVarNImpl(AttentionImpl):  # type: ignore[misc]
    """Attention of one layer over a compressed cache. Arguments are those of vLLM's base class.

    Raises
    ------
    NotImplementedError
        If the layer needs ALiBi, a sliding window, soft capping, attention sinks or the cache of
        another layer.
    ValueError, RuntimeError
        If the engine that was asked for cannot run.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        check_layer(
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
            shares_cache=kv_sharing_target_layer_name is not None,
            extra=extra,
        )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.layout = record_layout(kv_cache_dtype, head_size)
        self.path = self._path(get_current_vllm_config())

    def _path(self, vllm_config: Any) -> Batched | ByRequest:
        """How steps are served, under vLLM's configuration."""
        options, layout = Options.from_config(vllm_config.additional_config), self.layout
        _announce(explain(options, layout))
        engine = choose(options, layout)
        if not serves_batches(options, layout):
            sealed = options.prefill == "sealed"
            return ByRequest(layout, options.recipe, self.scale, engine, sealed)
        workspace = Workspace(
            layout, self.num_heads, self.num_kv_heads,
            vllm_config.scheduler_config.max_num_seqs, engine,
        )  # fmt: skip
        attention = FlashAttention.for_gpu(self.scale, self.head_size)
        return Batched(layout, options.recipe, self.scale, engine, attention, workspace)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: KVarNMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store the new rows of a step and attend to everything stored.

        Parameters
        ----------
        layer : Attention
            The layer; its name gives the index that spreads sealing over layers.
        query : Tensor [T, Hq, D], fp16, bf16 or fp32
            After RoPE. T may exceed the new tokens of the step.
        key, value : Tensor [T, Hkv, D], dtype of `query`
            After RoPE.
        kv_cache : Tensor [P, Hkv, layout.record_bytes], uint8
            Written in place.
        attn_metadata : KVarNMetadata or None
            None in vLLM's profile and warm-up runs, which get zeros. The first reserves scratch
            memory and loads every kernel.
        output : Tensor [T, Hq, D], dtype of `query`
            Written in place and returned.
        output_scale, output_block_scale
            Not used; vLLM passes them only to backends that quantise their output.
        """
        if attn_metadata is None:
            self.path.warm_up(query)
            return output.fill_(0)
        new = slice(0, attn_metadata.num_tokens)
        self.path.serve(
            query[new], key[new], value[new], kv_cache, attn_metadata, output[new],
            layer=layer_index(layer.layer_name),
        )  # fmt: skip
        return output


@memoize
def layer_index(layer_name: str) -> int:
    """Index in a name such as ``model.layers.3.self_attn.attn``; 0 if it has none."""
    number = re.search(r"\d+", layer_name)
    return int(number.group()) if number else 0


@memoize
def _announce(sentence: str) -> None:
    """Log a sentence once per process, not once per layer."""
    LOG.info("KVarN: %s", sentence)

"""Attention of one layer: seal, then decode rows, then prefill rows.

The order carries two guarantees. Records and sink rows of *all* requests are written before
anything is read, because another request of the same step may already share the pages. The ring of
a prefill row is written last, because its own chunk still reads the old rows.

Prefill has two modes. ``chunk``: new tokens see each other unquantised, and older ones as a decode
step would. ``sealed``: every token sees exactly what a decode step at its position would, so a
result does not depend on how a prompt is cut into chunks.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from kvarn_core.ops.decode import attend, decode
from kvarn_core.ops.gather import gather
from kvarn_core.ops.store import append, seal, write_sink
from kvarn_core.rotation import rotate
from kvarn_vllm.cache_spec import record_layout
from kvarn_vllm.config import Options, check_layer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvarn_vllm.metadata import KVarNMetadata

QUERY_BLOCK = 256  # bounds the score matrix of a prefill


class KVarNImpl(AttentionImpl):  # type: ignore[misc]
    """Attention of one layer over a compressed cache. Arguments are those of vLLM's base class.

    Raises
    ------
    NotImplementedError
        If the layer needs ALiBi, a sliding window, soft capping, attention sinks or the cache of
        another layer.
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
        self.options = Options.from_config(get_current_vllm_config().additional_config)

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
            None in vLLM's warm-up, which gets zeros.
        output : Tensor [T, Hq, D], dtype of `query`
            Written in place and returned.
        output_scale, output_block_scale
            Not used; vLLM passes them only to backends that quantise their output.
        """
        if attn_metadata is None:
            return output.fill_(0)
        step = attn_metadata
        new = slice(0, step.num_tokens)
        query, key, value = query[new], key[new], value[new]
        everything = step.rows(0, len(step.seq_lens))
        decodes = step.rows(0, step.num_decodes)

        write_sink(key, value, kv_cache, *everything, layout=self.layout)
        seal(
            key, value, kv_cache, *everything,
            layout=self.layout, recipe=self.options.recipe, layer=layer_index(layer.layer_name),
        )  # fmt: skip
        append(key, value, kv_cache, *decodes, layout=self.layout)
        table, lens, _ = decodes
        rows = slice(0, step.num_decodes)
        output[rows], _ = decode(
            query[rows], kv_cache, table, lens, layout=self.layout, sm_scale=self.scale
        )

        prefill = self._prefill_sealed if self.options.prefill == "sealed" else self._prefill_chunk
        for tokens, page_table, length in _prefills(step):
            output[tokens] = prefill(
                query[tokens], key[tokens], value[tokens], kv_cache, page_table, length
            )
        return output

    def _prefill_chunk(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        page_table: torch.Tensor,
        length: int,
    ) -> torch.Tensor:
        """New rows of one request see each other raw and the context as a decode would."""
        new = len(query)
        context = _int32([length - new], kv_cache)
        old_key, old_value, _ = gather(kv_cache, page_table, context, context, layout=self.layout)
        keys = torch.cat((old_key, rotate(key)))
        values = torch.cat((old_value, rotate(value)))
        out = self._attend(rotate(query), keys, values)
        self._append(key, value, kv_cache, page_table, length)
        return out.to(query.dtype)

    def _prefill_sealed(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        page_table: torch.Tensor,
        length: int,
    ) -> torch.Tensor:
        """New rows of one request, tile by tile: queries of one tile see the same records."""
        first, group = length - len(query), self.layout.group
        cuts = [first, *range((first // group + 1) * group, length, group), length]
        parts = []
        for start, stop in pairwise(cuts):
            part = slice(start - first, stop - first)
            self._append(key[part], value[part], kv_cache, page_table, stop)
            lens = _int32([stop], kv_cache)
            keys, values, _ = gather(kv_cache, page_table, lens, lens - 1, layout=self.layout)
            parts.append(self._attend(rotate(query[part]), keys, values))
        return torch.cat(parts).to(query.dtype)

    def _append(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        page_table: torch.Tensor,
        length: int,
    ) -> None:
        """Write new rows of one request, which has `length` tokens then, to its ring."""
        lens, cu_seqlens_q = _int32([length], kv_cache), _int32([0, len(key)], kv_cache)
        append(key, value, kv_cache, page_table, lens, cu_seqlens_q, layout=self.layout)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal attention in rotated space [Q, Hq, D] fp32, rotated back, a block at a time."""
        context = len(key) - len(query)
        blocks = []
        for start in range(0, len(query), QUERY_BLOCK):
            queries = query[start : start + QUERY_BLOCK]
            visible = slice(0, context + start + len(queries))
            out, _ = attend(queries, key[visible], value[visible], sm_scale=self.scale)
            blocks.append(out)
        return rotate(torch.cat(blocks))


def _int32(values: list[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=like.device)


def layer_index(layer_name: str) -> int:
    """Index in a name such as ``model.layers.3.self_attn.attn``; 0 if it has none."""
    number = re.search(r"\d+", layer_name)
    return int(number.group()) if number else 0


def _prefills(step: KVarNMetadata) -> Iterator[tuple[slice, torch.Tensor, int]]:
    """Yield (new tokens, page table [1, columns], length) of rows with more than one new token."""
    starts = step.cu_seqlens_q.tolist()
    for row in range(step.num_decodes, len(step.seq_lens)):
        length = int(step.seq_lens[row])
        if length and starts[row + 1] > starts[row]:
            yield slice(starts[row], starts[row + 1]), step.page_table[row : row + 1], length

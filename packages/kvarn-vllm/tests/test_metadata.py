from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from kvarn_vllm.cache_spec import KVarNFullAttentionSpec
from kvarn_vllm.metadata import KVarNMetadataBuilder

SPEC = KVarNFullAttentionSpec.for_layer("kvarn_k4v2_g128", 128, num_kv_heads=2, head_dim=128)


def builder(max_model_len: int = 1024) -> KVarNMetadataBuilder:
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=max_model_len),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        speculative_config=None,
    )
    return KVarNMetadataBuilder(SPEC, ["layer"], config, torch.device("cpu"))


def step(query_lens: list[int], seq_lens: list[int], columns: int = 19) -> Any:
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0).int()
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=len(seq_lens),
        num_actual_tokens=sum(query_lens),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        block_table_tensor=torch.arange(len(seq_lens) * columns).int().view(-1, columns),
        slot_mapping=torch.zeros(sum(query_lens), dtype=torch.int64),
    )


@pytest.mark.parametrize(
    ("query_lens", "num_decodes"), [([1, 1, 5, 200], 2), ([7, 3, 2, 9], 0), ([1, 1, 1, 1], 4)]
)
def test_decodes_come_first(query_lens: list[int], num_decodes: int) -> None:
    given = step(query_lens, [10, 20, 30, 400])
    built = builder().build(0, given)
    assert built.num_decodes == num_decodes
    assert built.num_tokens == sum(query_lens)
    table, lens, starts = built.rows(1, 3)
    assert torch.equal(table, given.block_table_tensor[1:3])
    assert lens.tolist() == [20, 30]
    assert starts.tolist() == given.query_start_loc[1:4].tolist()


def test_keyword_arguments_are_those_of_vllm() -> None:
    given = step([1], [10])
    built = builder().build(common_prefix_len=0, common_attn_metadata=given, fast_build=True)
    assert built.num_decodes == 1


def test_a_narrow_page_table_is_an_error() -> None:
    builder().build(0, step([1], [10], columns=19))
    with pytest.raises(AssertionError, match="too narrow"):
        builder().build(0, step([1], [10], columns=18))


def test_decode_rows_are_asked_for_first() -> None:
    assert builder().reorder_batch_threshold == 1

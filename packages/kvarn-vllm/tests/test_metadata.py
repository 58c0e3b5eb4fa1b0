from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from kvarn_vllm import metadata
from kvarn_vllm.cache_spec import KVarNFullAttentionSpec
from kvarn_vllm.metadata import KVarNMetadataBuilder, lay_out

SPEC = KVarNFullAttentionSpec.for_layer("kvarn_k4v2_g128", 128, num_kv_heads=2, head_dim=128)


def vllm_config(max_model_len: int = 1024, **options: str) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=max_model_len, get_head_size=lambda: 128),
        cache_config=SimpleNamespace(cache_dtype="kvarn_k4v2_g128"),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        speculative_config=None,
        additional_config={"kvarn": options},
    )


def builder(max_model_len: int = 1024) -> KVarNMetadataBuilder:
    config = vllm_config(max_model_len)
    return KVarNMetadataBuilder(SPEC, ["layer"], config, torch.device("cpu"))


@pytest.fixture
def on_a_gpu(monkeypatch: Any) -> None:
    """Decide as on a GPU; tensors stay on the CPU."""
    monkeypatch.setattr(metadata, "serves_batches", lambda options, layout: True)


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
        seq_lens_cpu_upper_bound=torch.tensor(seq_lens, dtype=torch.int32),
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
    assert built.max_query_len == max(query_lens)
    assert built.prefill is None, "rows are served one by one on a CPU"


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


def test_graphs_hold_decode_steps_where_steps_are_served_whole(on_a_gpu: None) -> None:
    support = KVarNMetadataBuilder.get_cudagraph_support(vllm_config(), SPEC)
    assert support is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


def test_no_graphs_where_rows_are_served_one_by_one() -> None:
    config = vllm_config()
    assert KVarNMetadataBuilder.get_cudagraph_support(config, SPEC) is AttentionCGSupport.NEVER


def test_a_decode_step_takes_only_the_tensors_of_vllm(on_a_gpu: None) -> None:
    """A captured graph reads them again and again, padded rows included."""
    given = step([1, 1, 0, 0], [10, 300, 0, 0])
    built = builder().build_for_cudagraph_capture(given)
    assert built.num_decodes == 4
    assert built.prefill is None
    assert built.page_table is given.block_table_tensor
    assert built.seq_lens is given.seq_lens
    assert built.cu_seqlens_q is given.query_start_loc


def test_prefill_rows_of_a_mixed_step(on_a_gpu: None) -> None:
    prefill = builder().build(0, step([1, 1, 5, 200, 30], [10, 20, 5, 400, 31])).prefill
    assert prefill is not None
    assert prefill.first_token == 2
    assert prefill.cu_seqlens.tolist() == [0, 5, 205, 235]
    assert prefill.max_query_len == 200
    [part] = prefill.passes
    assert (part.rows, part.tokens) == (slice(1, 3), slice(5, 235))
    assert part.starts.tolist() == [0, 0]
    assert part.context_lens.tolist() == part.positions.tolist() == [200, 1]
    assert part.cu_seqlens_q.tolist() == [0, 200, 230]
    assert part.cu_seqlens_k.tolist() == [0, 200, 201]
    assert (part.max_query_len, part.max_context_len, part.num_context_tokens) == (200, 200, 201)


def test_first_chunks_have_no_passes(on_a_gpu: None) -> None:
    """A one-token prompt may come last, behind longer ones."""
    prefill = builder().build(0, step([7, 200, 1], [7, 200, 1])).prefill
    assert prefill is not None
    assert prefill.passes == ()
    assert prefill.cu_seqlens.tolist() == [0, 7, 207, 208]


@pytest.mark.parametrize("seed", range(100))
def test_tables_of_all_passes_against_brute_force(seed: int) -> None:
    draw = random.Random(seed)  # noqa: S311
    group, width = 64, 64 * draw.randint(1, 5)
    rows = draw.randint(1, 9)
    new = [draw.randint(1, 90) for _ in range(rows)]
    contexts = [draw.choice([0, draw.randint(1, 700)]) for _ in range(rows)]
    prefill = lay_out(draw.randint(0, 3), new, contexts, group, torch.device("cpu"), width)
    owner = [row for row in range(rows) for _ in range(new[row])]
    read = [[] for _ in range(rows)]
    for part in prefill.passes:
        numbers = range(rows)[part.rows]
        tables = (part.starts, part.context_lens, part.positions)
        assert all(table.dtype == torch.int32 for table in tables)
        for row, start, count, position in zip(
            numbers, *(table.tolist() for table in tables), strict=True
        ):
            read[row] += range(start, start + count)
            assert position == contexts[row]
        assert part.cu_seqlens_q.diff().tolist() == [new[row] for row in numbers]
        assert part.cu_seqlens_k.diff().tolist() == part.context_lens.tolist()
        assert owner[part.tokens] == [row for row in numbers for _ in range(new[row])]
        assert part.max_query_len == max(new[row] for row in numbers)
        assert part.max_context_len == part.context_lens.max() > 0
        assert part.num_context_tokens == part.cu_seqlens_k[-1] <= width
    assert read == [list(range(context)) for context in contexts]

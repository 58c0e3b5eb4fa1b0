"""The caches that stock vLLM offers, called the way its attention backends call them.

FlashAttention 3 reads pages of 16 tokens, with the scheduler metadata and the number of splits that
vLLM uses for CUDA graphs. TurboQuant reads its own slots. The only file here that imports vLLM.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from cases import FLASH8, FLASH16, TURBOQUANT, Case, Job

from kvarn_core.rotation import hadamard_matrix
from kvarn_core.testing.timing import distinct_sets
from kvarn_core.testing.workload import dense_decode_bytes, page_tables

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = 16  # tokens of a vLLM block
GRAPH_SPLITS = 32  # vLLM's default for CUDA graphs, both backends
ORDINARY = 0xBF  # random bytes with this mask are finite in fp16 and fp8


def prepare(kind: str, case: Case, query: torch.Tensor, l2_bytes: int) -> Job:
    """Calls of a stock cache.

    Parameters
    ----------
    kind : {"flash-fp16", "flash-fp8", "turboquant_4bit_nc"}
        Which cache.
    case : Case
        Shape and lengths.
    query : Tensor [B, Hq, D], fp16, CUDA
        Queries.
    l2_bytes : int
        Size of the L2 cache.

    Returns
    -------
    Job

    Raises
    ------
    ValueError
        If there is no such cache.
    """
    makers: dict[str, Callable[[Case, torch.Tensor, int], Job]] = {
        FLASH16: _flash,
        FLASH8: partial(_flash, fp8=True),
        TURBOQUANT: _turboquant,
    }
    if kind not in makers:
        raise ValueError(f"{kind!r} is not a baseline. Choose one of {', '.join(makers)}.")
    return makers[kind](case, query, l2_bytes)


def token_bytes(kind: str, case: Case) -> int:
    """Bytes of one token of one layer in a stock cache."""
    per_head = {FLASH16: 4 * case.head_dim, FLASH8: 2 * case.head_dim}
    if kind in per_head:
        return case.num_kv_heads * per_head[kind]
    return case.num_kv_heads * int(_turboquant_config(kind, case).slot_size_aligned)


def _tables(case: Case, nbytes: int, l2_bytes: int) -> tuple[torch.Tensor, int]:
    """Block tables [sets, B, columns] on the GPU, and the blocks they need."""
    columns = [math.ceil(n / PAGE) for n in case.seq_lens]
    tables, pages = page_tables(columns, sets=distinct_sets(nbytes, l2_bytes))
    return tables.cuda(), pages


def _flash(case: Case, query: torch.Tensor, l2_bytes: int, *, fp8: bool = False) -> Job:
    from vllm.vllm_flash_attn import (  # noqa: TID251
        flash_attn_varlen_func,
        get_scheduler_metadata,
    )

    size = token_bytes(FLASH8 if fp8 else FLASH16, case)
    nbytes = dense_decode_bytes(size, case.seq_lens, case.num_q_heads, case.head_dim)
    tables, pages = _tables(case, nbytes, l2_bytes)
    shape = (2, pages, PAGE, case.num_kv_heads, case.head_dim)
    dtype, out_dtype = (torch.float8_e4m3fn, torch.bfloat16) if fp8 else (torch.float16,) * 2
    if fp8:
        random = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
        cache = random.bitwise_and_(ORDINARY).view(dtype)
    else:
        cache = torch.empty(shape, dtype=dtype, device="cuda").normal_()
    seq_lens = torch.tensor(case.seq_lens, dtype=torch.int32, device="cuda")
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device="cuda")
    schedule = get_scheduler_metadata(
        batch_size=case.batch,
        max_seqlen_q=1,
        max_seqlen_k=case.context,
        num_heads_q=case.num_q_heads,
        num_heads_kv=case.num_kv_heads,
        headdim=case.head_dim,
        cache_seqlens=seq_lens,
        qkv_dtype=dtype,
        cu_seqlens_q=starts,
        page_size=PAGE,
        causal=True,
        num_splits=GRAPH_SPLITS,
    )
    scale = torch.ones((), device="cuda").expand(case.batch, case.num_kv_heads) if fp8 else None
    attend = partial(
        flash_attn_varlen_func,
        q=query.contiguous().to(dtype),
        k=cache[0],
        v=cache[1],
        out=torch.empty(query.shape, dtype=out_dtype, device="cuda"),
        cu_seqlens_q=starts,
        max_seqlen_q=1,
        seqused_k=seq_lens,
        max_seqlen_k=case.context,
        softmax_scale=case.head_dim**-0.5,
        causal=True,
        scheduler_metadata=schedule,
        fa_version=3,
        q_descale=scale,
        k_descale=scale,
        v_descale=scale,
        num_splits=GRAPH_SPLITS,
    )
    return Job.over([partial(attend, block_table=table) for table in tables], nbytes)


def _turboquant_config(kind: str, case: Case):  # type: ignore[no-untyped-def]
    from vllm.model_executor.layers.quantization.turboquant.config import (  # noqa: TID251
        TurboQuantConfig,
    )

    return TurboQuantConfig.from_cache_dtype(kind, case.head_dim)


def _turboquant(case: Case, query: torch.Tensor, l2_bytes: int) -> Job:
    from vllm.model_executor.layers.quantization.turboquant.centroids import (  # noqa: TID251
        get_centroids,
    )
    from vllm.v1.attention.ops.triton_turboquant_decode import (  # noqa: TID251
        triton_turboquant_decode_attention,
    )

    config = _turboquant_config(TURBOQUANT, case)
    size = token_bytes(TURBOQUANT, case)
    nbytes = dense_decode_bytes(size, case.seq_lens, case.num_q_heads, case.head_dim)
    tables, pages = _tables(case, nbytes, l2_bytes)
    shape = (pages, PAGE, case.num_kv_heads, config.slot_size_aligned)
    cache = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda").bitwise_and_(ORDINARY)
    rotation = hadamard_matrix(case.head_dim).float().cuda()
    heads = (case.batch, case.num_q_heads)
    attend = partial(
        triton_turboquant_decode_attention,
        query=query.contiguous(),
        kv_cache=cache,
        seq_lens=torch.tensor(case.seq_lens, dtype=torch.int32, device="cuda"),
        Pi=rotation,
        PiT=rotation,
        centroids=get_centroids(case.head_dim, config.centroid_bits).float().cuda(),
        scale=case.head_dim**-0.5,
        mse_bits=config.key_mse_bits,
        key_packed_size=config.key_packed_size,
        value_quant_bits=config.effective_value_quant_bits,
        key_fp8=config.key_fp8,
        norm_correction=config.norm_correction,
        mid_o_buf=torch.empty(*heads, GRAPH_SPLITS, case.head_dim + 1, device="cuda"),
        output_buf=torch.empty(*heads, case.head_dim, dtype=query.dtype, device="cuda"),
        lse_buf=torch.empty(heads, device="cuda"),
        max_num_kv_splits=GRAPH_SPLITS,
    )
    return Job.over([partial(attend, block_table=table) for table in tables], nbytes)

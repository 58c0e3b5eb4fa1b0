"""The vLLM that the patches were written for, recorded: version and parameter names.

Private interfaces may change in any release. What the plugin wraps, overrides or calls is compared
with this record first, so that an unknown vLLM is refused instead of patched wrongly.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

TESTED_VERSIONS = ("0.22.0",)

_MANAGER = "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager"
_BACKEND = "vllm.v1.attention.backend"
SIGNATURES: dict[str, str] = {
    # wrapped
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": "self usage_context headless",
    "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls": (
        "cls selected_backend attn_selector_config num_heads"
    ),
    "vllm.model_executor.layers.attention.attention:Attention.get_kv_cache_spec": (
        "self vllm_config"
    ),
    "vllm.v1.worker.block_table:MultiGroupBlockTable.__init__": (
        "self max_num_reqs max_model_len max_num_batched_tokens pin_memory device block_sizes "
        "kernel_block_sizes max_num_blocks cp_kv_cache_interleave_size"
    ),
    "vllm.v1.worker.gpu.block_table:BlockTables.__init__": (
        "self block_sizes max_num_reqs max_num_batched_tokens max_num_blocks_per_group device "
        "kernel_block_sizes cp_size cp_rank cp_interleave"
    ),
    "vllm.v1.worker.worker_base:WorkerWrapperBase.initialize_from_config": "self kv_cache_configs",
    "vllm.v1.core.sched.scheduler:Scheduler._preempt_request": "self request timestamp",
    "vllm.v1.core.block_pool:BlockPool.take_events": "self",
    # overridden
    f"{_MANAGER}.__init__": (
        "self kv_cache_spec block_pool enable_caching kv_cache_group_id dcp_world_size "
        "pcp_world_size max_admission_blocks_per_request"
    ),
    f"{_MANAGER}.get_num_blocks_to_allocate": (
        "self request_id num_tokens new_computed_blocks total_computed_tokens "
        "num_tokens_main_model apply_admission_cap"
    ),
    f"{_MANAGER}.allocate_new_computed_blocks": (
        "self request_id new_computed_blocks num_local_computed_tokens num_external_computed_tokens"
    ),
    f"{_MANAGER}.allocate_new_blocks": "self request_id num_tokens num_tokens_main_model",
    f"{_MANAGER}.cache_blocks": "self request num_tokens alignment_tokens",
    f"{_MANAGER}.free": "self request_id",
    f"{_MANAGER}.new_step_starts": "self",
    f"{_BACKEND}:AttentionMetadataBuilder.__init__": (
        "self kv_cache_spec layer_names vllm_config device"
    ),
    f"{_BACKEND}:AttentionMetadataBuilder.build": (
        "self common_prefix_len common_attn_metadata fast_build"
    ),
    f"{_BACKEND}:AttentionMetadataBuilder.get_cudagraph_support": ("cls vllm_config kv_cache_spec"),
    f"{_BACKEND}:AttentionImpl.__init__": (
        "self num_heads head_size scale num_kv_heads alibi_slopes sliding_window kv_cache_dtype "
        "logits_soft_cap attn_type kv_sharing_target_layer_name"
    ),
    f"{_BACKEND}:AttentionImpl.forward": (
        "self layer query key value kv_cache attn_metadata output output_scale output_block_scale"
    ),
    f"{_BACKEND}:AttentionBackend.get_kv_cache_shape": (
        "num_blocks block_size num_kv_heads head_size cache_dtype_str"
    ),
    # called
    "vllm.v1.core.block_pool:BlockPool.cache_full_blocks": (
        "self request blocks num_cached_blocks num_full_blocks block_size kv_cache_group_id "
        "block_mask"
    ),
    "vllm.v1.core.block_pool:BlockPool.get_new_blocks": "self num_blocks",
    "vllm.v1.core.block_pool:BlockPool.touch": "self blocks",
    "vllm.v1.core.block_pool:BlockPool.free_blocks": "self ordered_blocks",
    "vllm.v1.core.block_pool:BlockPool._maybe_evict_cached_block": "self block",
    "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.append": "self block",  # ours prepends
    "vllm.v1.worker.workspace:WorkspaceManager.get_simultaneous": "self shapes_and_dtypes",
    "vllm.v1.attention.ops.merge_attn_states:merge_attn_states": (
        "output prefix_output prefix_lse suffix_output suffix_lse output_lse "
        "prefill_tokens_with_context output_scale"
    ),
    "vllm.v1.worker.worker_base:WorkerBase.get_model": "self",
    "vllm.v1.core.block_pool:BlockHashToBlockMap.get_one_block": "self key",
    "vllm.v1.core.block_pool:BlockHashToBlockMap.insert": "self key block",
}

# Only a CUDA build of vLLM can import these.
CUDA_SIGNATURES: dict[str, str] = {
    "vllm.platforms.cuda:CudaPlatformBase.get_attn_backend_cls": (
        "cls selected_backend attn_selector_config num_heads"
    ),
}


def locate(target: str) -> tuple[Any, str]:
    """Resolve ``module:Class.attribute`` to the class and the attribute's name.

    Raises
    ------
    ImportError, AttributeError
        If the module or the class is gone.
    """
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    return functools.reduce(getattr, owners, importlib.import_module(module)), name


def version_problem() -> str:
    """Sentence about an untested vLLM version; empty if it is tested."""
    import vllm

    version = vllm.__version__
    if version.split("+")[0] in TESTED_VERSIONS:
        return ""
    tested = ", ".join(TESTED_VERSIONS)
    return (
        f"KVarN: vLLM {version} is not supported (tested: {tested}). "
        f"Install vllm=={TESTED_VERSIONS[-1]} or a newer kvarn-vllm."
    )


def changed_signature() -> str:
    """Sentence about the first callable that is not as recorded; empty if all are."""
    import vllm
    from vllm.platforms import current_platform

    signatures = SIGNATURES | (CUDA_SIGNATURES if current_platform.is_cuda() else {})
    for target, recorded in signatures.items():
        if parameters(target) != recorded:
            return (
                f"KVarN: {target.partition(':')[2]} of vLLM {vllm.__version__} is not the one "
                f"this plugin was written for. Install an unmodified vllm=={TESTED_VERSIONS[-1]}."
            )
    return ""


def parameters(target: str) -> str:
    """Parameter names of a callable, joined by spaces; empty if it is gone."""
    try:
        owner, name = locate(target)
        function = inspect.getattr_static(owner, name)
    except (ImportError, AttributeError):
        return ""
    function = getattr(function, "__func__", function)
    return " ".join(inspect.signature(function).parameters)

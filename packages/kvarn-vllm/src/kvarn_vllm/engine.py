"""Which kernels serve, and whether a whole batch is served at once.

Asked in the worker, where the device is known. The command line process must not touch CUDA, or
vLLM could not start its workers by forking.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kvarn_core import dispatch
from kvarn_vllm.cache_spec import record_layout

if TYPE_CHECKING:
    from kvarn_core import RecordLayout
    from kvarn_vllm.config import Options


def model_layout(vllm_config: Any) -> RecordLayout:
    """Record layout of an engine's cache dtype and model."""
    head_dim = vllm_config.model_config.get_head_size()
    return record_layout(vllm_config.cache_config.cache_dtype, head_dim)


def choose(options: Options, layout: RecordLayout, device_type: str | None = None) -> str:
    """Name the engine of `kvarn_core` that runs a step; on a GPU plain torch must be asked for.

    Parameters
    ----------
    options : Options
        The user's; ``auto`` takes kernels on a GPU.
    layout : RecordLayout
        Byte layout of the preset.
    device_type : str, optional
        ``cuda`` or ``cpu``; that of vLLM's platform by default.

    Raises
    ------
    ValueError, RuntimeError
        If an engine was asked for by name and cannot run, or no kernel can run on a GPU.
    """
    device = _device(device_type)
    chosen = dispatch.select(device, layout, options.forced_engine, kernels=dispatch.ENGINES)
    unasked = chosen == "reference" and options.forced_engine is None
    if unasked and device.type == "cuda" and not layout.preset.is_debug:
        why = dispatch.explain(device, layout)
        raise RuntimeError(
            f"KVarN: no kernel can serve. {why} That is slow and must be asked for, with "
            '--additional-config \'{"kvarn": {"engine": "reference"}}\'.'
        )
    return chosen


def explain(options: Options, layout: RecordLayout, device_type: str | None = None) -> str:
    """Say in one sentence which engine `choose` takes and why; same parameters and errors."""
    return dispatch.explain(_device(device_type), layout, options.forced_engine)


def serves_batches(options: Options, layout: RecordLayout, device_type: str | None = None) -> bool:
    """Whether each op runs once per step and layer, without reading anything back.

    Only then can CUDA graphs hold a decode step. The reference engine and prefill mode ``sealed``
    go through a step request by request. Parameters and errors are those of `choose`.
    """
    return options.prefill == "chunk" and choose(options, layout, device_type) != "reference"


def _device(device_type: str | None) -> torch.device:
    if device_type is None:
        from vllm.platforms import current_platform

        device_type = current_platform.device_type
    return torch.device(device_type)

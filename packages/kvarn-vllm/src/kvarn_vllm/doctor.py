"""What this installation would do, without starting an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import kvarn_vllm
from kvarn_core import PRESETS, Preset, RecordLayout

NO_ENGINE = {"engine": None, "engine_reason": "", "cuda_graphs": None, "cuda_engine": None}
DEFAULT_PRESET = "kvarn_k4v2_g128"


@dataclass(frozen=True)
class Shape:
    """What of a model decides its cache: layers, KV heads and elements per head."""

    layers: int
    kv_heads: int
    head_dim: int


def report(model: str | None = None) -> dict[str, Any]:
    """Collect what a bug report needs.

    Parameters
    ----------
    model : str, optional
        Folder or name of a model. Its head dimension replaces 128, and sizes are also given for
        all its layers and heads.

    Returns
    -------
    dict
        Versions, whether the plugin is armed or the reason why not, the platform, the engine and
        why, what CUDA graphs hold, on a GPU what asking for engine ``cuda`` would give, and per
        preset: bytes per token and KV head, their ratio to 16 bits, header pages; with a model also
        bytes per token and tokens per GiB. JSON types.

    Raises
    ------
    ValueError
        If the model's head dimension is not supported.
    """
    shape = _shape(model) if model else None
    head_dim = shape.head_dim if shape else 128
    try:
        import vllm
        from vllm.platforms import current_platform
    except ImportError as error:
        found = {"vllm": None, "platform": None, "armed": False, "reason": _missing(error)}
        served: dict[str, Any] = NO_ENGINE
    else:
        from kvarn_vllm.patches import arm

        status = arm()
        found = {
            "vllm": vllm.__version__,
            "platform": current_platform.device_type,
            "armed": status.armed,
            "reason": status.reason,
        }
        served = _served(RecordLayout(Preset.from_name(DEFAULT_PRESET), head_dim))
    presets = {name: RecordLayout(preset, head_dim) for name, preset in PRESETS.items()}
    return {
        "kvarn_vllm": kvarn_vllm.__version__,
        **found,
        **served,
        "head_dim": head_dim,
        "presets": {name: _sizes(layout, shape) for name, layout in presets.items()},
    }


def as_text(found: dict[str, Any]) -> str:
    """Format a report for people."""
    armed = "yes" if found["armed"] else f"no. {found['reason']}"
    lines = [
        f"kvarn-vllm  {found['kvarn_vllm']}",
        f"vLLM        {found['vllm'] or 'not installed'}",
        f"armed       {armed}",
        f"platform    {found['platform'] or 'unknown'}",
        f"engine      {found['engine'] or 'none for this platform'}. {found['engine_reason']}",
        f"graphs      {found['cuda_graphs'] or 'none'}",
        *([f"cuda        {found['cuda_engine']}"] if found["cuda_engine"] else []),
        "",
        f"Head dimension {found['head_dim']}; bytes of keys and values per token and KV head:",
    ]
    for name, sizes in found["presets"].items():
        size, ratio = sizes["bytes_per_token_and_head"], sizes["ratio"]
        line = (
            f"  {name:<17}{size:8.1f}   {ratio:.2f}x   + {sizes['header_pages']} pages per request"
        )
        if "tokens_per_gib" in sizes:
            whole, tokens = sizes["bytes_per_token"], sizes["tokens_per_gib"]
            line += f"; this model: {whole:,.0f} bytes per token, {tokens:,} tokens per GiB"
        lines.append(line)
    return "\n".join(lines)


def _served(layout: RecordLayout) -> dict[str, Any]:
    """Engine of a default configuration on this machine, and what CUDA graphs hold."""
    from vllm.platforms import current_platform

    from kvarn_vllm.config import Options
    from kvarn_vllm.engine import choose, explain, serves_batches

    device = current_platform.device_type
    if device not in ("cpu", "cuda"):
        return NO_ENGINE
    options = Options()
    in_cuda = _in_cuda(layout) if device == "cuda" else None
    try:
        engine = choose(options, layout, device)
    except RuntimeError as error:
        return {**NO_ENGINE, "engine_reason": str(error), "cuda_engine": in_cuda}
    graphs = "decode steps whole, steps with prefills in pieces"
    return {
        "engine": engine,
        "engine_reason": explain(options, layout, device),
        "cuda_graphs": graphs if serves_batches(options, layout, device) else None,
        "cuda_engine": in_cuda,
    }


def _in_cuda(layout: RecordLayout) -> str:
    """What engine ``cuda`` would run here, in which form, or why it cannot."""
    from kvarn_core.ops.decode import codes_in_cuda
    from kvarn_vllm.config import Options
    from kvarn_vllm.engine import explain

    try:
        return f"{explain(Options(engine='cuda'), layout, 'cuda')} Codes are {codes_in_cuda()}."
    except RuntimeError as error:
        return str(error)


def _sizes(layout: RecordLayout, shape: Shape | None) -> dict[str, float]:
    size = layout.record_bytes / layout.group
    sizes: dict[str, float] = {
        "bytes_per_token_and_head": size,
        "ratio": 4 * layout.head_dim / size,
        "header_pages": layout.header_columns - 1,
    }
    if shape:
        sizes["bytes_per_token"] = size * shape.layers * shape.kv_heads
        sizes["tokens_per_gib"] = int(2**30 / sizes["bytes_per_token"])
    return sizes


def _shape(model: str) -> Shape:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    heads = config.num_attention_heads
    return Shape(
        layers=int(config.num_hidden_layers),
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
    )


def _missing(error: ImportError) -> str:
    return f"KVarN: vLLM cannot be imported ({error}). Install vllm==0.22.0."

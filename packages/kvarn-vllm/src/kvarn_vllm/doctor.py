"""What this installation would do, without starting an engine."""

from __future__ import annotations

from typing import Any

import kvarn_vllm
from kvarn_core import PRESETS, RecordLayout


def report(model: str | None = None) -> dict[str, Any]:
    """Collect what a bug report needs.

    Parameters
    ----------
    model : str, optional
        Folder or name of a model; its head dimension replaces 128.

    Returns
    -------
    dict
        Versions, whether the plugin is armed or the reason why not, the platform, the engine, and
        per preset: bytes per token and KV head, their ratio to 16 bits, header pages. JSON types.
    """
    try:
        import vllm
        from vllm.platforms import current_platform
    except ImportError as error:
        found = {"vllm": None, "platform": None, "armed": False, "reason": _missing(error)}
    else:
        from kvarn_vllm.patches import arm

        status = arm()
        found = {
            "vllm": vllm.__version__,
            "platform": current_platform.device_type,
            "armed": status.armed,
            "reason": status.reason,
        }
    head_dim = _head_dim(model) if model else 128
    return {
        "kvarn_vllm": kvarn_vllm.__version__,
        **found,
        "engine": "reference" if found["platform"] == "cpu" else None,
        "head_dim": head_dim,
        "presets": {name: _sizes(RecordLayout(p, head_dim)) for name, p in PRESETS.items()},
    }


def as_text(found: dict[str, Any]) -> str:
    """Format a report for people."""
    armed = "yes" if found["armed"] else f"no. {found['reason']}"
    lines = [
        f"kvarn-vllm  {found['kvarn_vllm']}",
        f"vLLM        {found['vllm'] or 'not installed'}",
        f"armed       {armed}",
        f"platform    {found['platform'] or 'unknown'}",
        f"engine      {found['engine'] or 'none for this platform in this version'}",
        "",
        f"Head dimension {found['head_dim']}; bytes of keys and values per token and KV head:",
    ]
    for name, sizes in found["presets"].items():
        size, ratio = sizes["bytes_per_token_and_head"], sizes["ratio"]
        header = sizes["header_pages"]
        lines.append(f"  {name:<17}{size:8.1f}   {ratio:.2f}x   + {header} pages per request")
    return "\n".join(lines)


def _sizes(layout: RecordLayout) -> dict[str, float]:
    size = layout.record_bytes / layout.group
    return {
        "bytes_per_token_and_head": size,
        "ratio": 4 * layout.head_dim / size,
        "header_pages": layout.header_columns - 1,
    }


def _head_dim(model: str) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    head_dim = getattr(config, "head_dim", None)
    return int(head_dim or config.hidden_size // config.num_attention_heads)


def _missing(error: ImportError) -> str:
    return f"KVarN: vLLM cannot be imported ({error}). Install kvarn-vllm[cpu] or kvarn-vllm[cuda]."

"""What one attention layer may ask for that kvarn cannot give: each is refused with a remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvarn_core.layout import HEAD_DIMS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def check_head_size(head_size: int, *, expected: int | None = None) -> None:
    """Refuse head sizes that the rotation cannot handle, or that differ from `expected`.

    Raises
    ------
    NotImplementedError
        With the head size and what is possible.
    """
    if expected not in (None, head_size):
        raise refusal(
            f"layers with head sizes {expected} and {head_size} in one model are not supported",
            "Use another --kv-cache-dtype",
        )
    if head_size not in HEAD_DIMS:
        raise refusal(
            f"head size {head_size} is not supported",
            f"Choose a model with head size {', '.join(map(str, HEAD_DIMS[:-1]))} or "
            f"{HEAD_DIMS[-1]} (the rotation needs a power of two)",
        )


def check_selection(selection: Any) -> None:
    """Refuse what one layer asks of its attention backend.

    Parameters
    ----------
    selection : AttentionSelectorConfig
        vLLM's description of a decoder layer.

    Raises
    ------
    NotImplementedError
        If the layer needs something that is not implemented.
    """
    check_head_size(selection.head_size)
    needs = {
        "a compressed latent (MLA)": selection.use_mla,
        "sparse attention": selection.use_sparse,
        "attention sinks": selection.has_sink,
        "bidirectional attention to images": selection.use_mm_prefix,
        "non-causal attention": selection.use_non_causal,
        "scales per head from the checkpoint": selection.use_per_head_quant_scales,
    }
    refuse_needs(needs)


def check_spec(spec: object) -> None:
    """Refuse a layer whose pages are planned by vLLM although the cache is ours.

    Raises
    ------
    NotImplementedError
        If its class plans pages of its own, or its model did not pass it the cache dtype.
    """
    if not hasattr(spec, "preset"):
        raise refusal(
            f"a layer of this model plans a {type(spec).__name__} of its own",
            "Use another --kv-cache-dtype",
        )


def check_plans(configs: Iterable[Any]) -> None:
    """Refuse, in the plans of the whole cache, what `check_spec` refuses of a layer."""
    for config in configs:
        for group in config.kv_cache_groups:
            spec = group.kv_cache_spec
            for one in getattr(spec, "kv_cache_specs", {"": spec}).values():
                check_spec(one)


def check_layer(
    *,
    alibi_slopes: object = None,
    sliding_window: object = None,
    logits_soft_cap: float | None = None,
    shares_cache: bool = False,
    extra: Mapping[str, object] | None = None,
) -> None:
    """Refuse what one layer's constructor asks for; the arguments are vLLM's.

    Raises
    ------
    NotImplementedError
        If the layer needs something that is not implemented.
    """
    needs = {
        "ALiBi": alibi_slopes is not None,
        "a sliding window": sliding_window is not None,
        "soft capping of logits": bool(logits_soft_cap),
        "the cache of another layer": shares_cache,
    }
    needs |= {f"the argument {name}": value is not None for name, value in (extra or {}).items()}
    refuse_needs(needs)


def refuse_needs(needs: dict[str, bool]) -> None:
    """Refuse the first of what is needed, if anything is."""
    for what, needed in needs.items():
        if needed:
            raise refusal(
                f"this model's attention needs {what}, which kvarn does not implement",
                "Use another --kv-cache-dtype",
            )


def refusal(fact: str, remedy: str) -> NotImplementedError:
    """Say what is not supported, and what to do instead."""
    return NotImplementedError(f"KVarN: {fact}. {remedy}.")

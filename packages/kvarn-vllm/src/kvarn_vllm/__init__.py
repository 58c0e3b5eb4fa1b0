"""KVarN for stock vLLM: a KV cache more than four times smaller, chosen by one flag.

vLLM finds `register` through the entry point group ``vllm.general_plugins`` and calls it in every
process. Nothing changes until a ``kvarn_*`` cache dtype is asked for.
"""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["register"]


def register() -> None:
    """Teach vLLM the ``kvarn_*`` cache dtypes. Never raises; repeated calls do nothing.

    Where vLLM cannot be patched safely, the reason is kept and raised only when a ``kvarn_*``
    dtype is asked for, so other users of the same installation are not disturbed.
    """
    from kvarn_vllm import patches

    patches.arm()

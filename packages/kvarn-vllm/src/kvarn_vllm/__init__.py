"""KVarN for stock vLLM: a KV cache more than four times smaller, chosen by one flag.

vLLM finds `register` through the entry point group ``vllm.general_plugins`` and calls it in every
process. Nothing changes until a ``kvarn_*`` cache dtype is asked for.
"""

from __future__ import annotations

import logging

__version__ = "0.1.0"
__all__ = ["register"]


def register() -> None:
    """Teach vLLM the ``kvarn_*`` cache dtypes. Never raises; repeated calls do nothing.

    Where vLLM cannot be patched safely, the reason is kept and raised only when a ``kvarn_*``
    dtype is asked for, so other users of the same installation are not disturbed. Where the plugin
    itself cannot be loaded, a warning gives the reason, and vLLM knows no such dtype.
    """
    try:
        from kvarn_vllm import patches

        patches.arm()
    except Exception as error:
        logging.getLogger("vllm.kvarn").warning(
            "KVarN: the plugin cannot be loaded (%r). Install kvarn-core and kvarn-vllm of one "
            "version.", error,
        )  # fmt: skip

"""Fidelity of a running server: log-probabilities of a given text, compared between two arms.

The whole text is sent as a prompt with `prompt_logprobs`. On a server whose prefill chunk is one
tile (`--long-prefill-token-threshold`), every chunk attends to records, the exact window and its
own rows: the state that decoding sees. Servers report the top K of each position; the outcomes that
both arms report are compared one by one and the rest as one bucket. Merging outcomes can only lower
the divergence, so the result is a lower bound, and the merged mass is reported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvarn_eval.server import Server

    Position = dict[int, float]

TOP = 64  # needs --max-logprobs; the default of servers is 20
MIN_COVERED = 0.99
_SMALLEST = 1e-6  # rounding of sums of fp32 probabilities; a smaller bucket is noise


@dataclass(frozen=True)
class Divergence:
    """Comparison of two distributions at one position.

    Parameters
    ----------
    kld : float
        Lower bound of the divergence, in nats.
    covered : float
        Reference probability of the outcomes compared one by one.
    same_top : bool
        Whether both arms have the same most likely token.
    """

    kld: float
    covered: float
    same_top: bool


def prompt_logprobs(server: Server, ids: Sequence[int], top: int = TOP) -> list[Position]:
    """Log-probabilities of the next token, one dict from token id to nats per predicted position.

    Parameters
    ----------
    server : Server
        Started with prefill chunks of one tile.
    ids : sequence of int, length T
        Token ids.
    top : int
        Outcomes per position; the given token is reported as well.

    Returns
    -------
    list of dict, length T - 1
        Entry t predicts token t + 1.
    """
    body = {
        "model": server.model,
        "prompt": list(ids),
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": top,
    }
    positions = server.post("/v1/completions", body)["choices"][0]["prompt_logprobs"]
    return [
        {int(token): float(entry["logprob"]) for token, entry in position.items()}
        for position in positions[1:]
    ]


def compare(reference: Position, test: Position) -> Divergence:
    """Divergence of `test` from `reference` with everything that either lacks in one bucket."""
    shared = reference.keys() & test.keys()
    p = {token: math.exp(reference[token]) for token in shared}
    kld = sum(p[token] * (reference[token] - test[token]) for token in shared)
    covered = sum(p.values())
    rest_p = max(1 - covered, _SMALLEST)
    rest_q = max(1 - sum(math.exp(test[token]) for token in shared), _SMALLEST)
    kld += rest_p * math.log(rest_p / rest_q)
    same_top = max(reference, key=reference.__getitem__) == max(test, key=test.__getitem__)
    return Divergence(max(kld, 0.0), min(covered, 1.0), same_top)

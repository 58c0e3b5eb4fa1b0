"""Fidelity of served models on texts that the reference arm wrote itself.

The reference writes texts of given lengths; every arm then scores them, on a server whose prefill
chunk is one tile, so that each chunk reads the cache as decoding does (see `logprobs`). Reference
scores stay on disk, one file per text, because a long text has a million of them. The reference
scores its first texts twice, alone and together: what differs then is the floor.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from kvarn_eval import logprobs
from kvarn_eval.fidelity import program_texts
from kvarn_eval.schema import Measurement, Unit, measure
from kvarn_eval.small_model import tokenizer
from kvarn_eval.stats import interval, ratio_samples

if TYPE_CHECKING:
    from pathlib import Path

    from kvarn_eval.logprobs import Position
    from kvarn_eval.schema import Scalar
    from kvarn_eval.server import Server
    from kvarn_eval.suite import Option, Traces

PROGRAM = "<program>"
FLOOR_TEXTS = 2
AT_ONCE = 4
BUCKET = 1024
_PROGRAM_TOKENS = 256
_MISSING = -1


@dataclass(frozen=True)
class Divergences:
    """Of one text: divergence by position; covered mass and top-1 agreement from 2 G on."""

    length: int
    kld: list[float]
    covered: float
    top1: float

    def to_json(self) -> dict[str, Any]:
        """Fields as plain data."""
        return asdict(self)


def scoring_options(group: int) -> dict[str, Option]:
    """Server options for scoring: prefill in chunks of one tile, a few texts at once."""
    return {
        "long-prefill-token-threshold": group,
        "max-num-batched-tokens": group * AT_ONCE,
        "max-num-seqs": AT_ONCE,
        "max-logprobs": logprobs.TOP,
    }


def write_traces(server: Server, traces: Traces, seqs: int) -> list[list[int]]:
    """Let the reference write all texts; token ids, prompt included.

    Raises
    ------
    RuntimeError
        If a text is shorter than was asked for.
    """
    starts = _starts(traces)

    def write(job: tuple[int, int]) -> list[int]:
        length, number = job
        start = starts[number % len(starts)]
        body = {**traces.sampling, "model": server.model, "seed": number, "return_token_ids": True}
        if traces.chat:
            path = "/v1/chat/completions"
            body["messages"] = [{"role": "user", "content": start}]
        else:
            path, body["prompt"] = "/v1/completions", start
        body |= {"max_tokens": length, "min_tokens": length}
        answer = server.post(path, body, seconds=3600.0)
        choice = answer["choices"][0]
        prompt = choice.get("prompt_token_ids") or answer["prompt_token_ids"]
        if len(choice["token_ids"]) != length:
            raise RuntimeError(f"A text has {len(choice['token_ids'])} tokens, not {length}.")
        return [*prompt, *choice["token_ids"]]

    jobs = [(length, number) for length in traces.lengths for number in range(traces.count)]
    with ThreadPoolExecutor(seqs) as pool:
        return list(pool.map(write, jobs))


def _starts(traces: Traces) -> list[str]:
    programs = sum(prompt == PROGRAM for prompt in traces.prompts)
    texts = iter(program_texts(programs, _PROGRAM_TOKENS) if programs else [])
    return [tokenizer.decode(next(texts).ids) if p == PROGRAM else p for p in traces.prompts]


def save_scores(file: Path, positions: list[Position]) -> None:
    """Write the scores of one text."""
    width = max(len(position) for position in positions)
    ids = np.full((len(positions), width), _MISSING, np.int32)
    values = np.zeros((len(positions), width), np.float32)
    for row, position in enumerate(positions):
        ids[row, : len(position)] = list(position)
        values[row, : len(position)] = list(position.values())
    save_file({"ids": ids, "values": values}, file)


def load_scores(file: Path) -> list[Position]:
    """Read what `save_scores` wrote."""
    stored = load_file(file)
    return [
        {
            int(token): float(value)
            for token, value in zip(ids, values, strict=True)
            if token != _MISSING
        }
        for ids, values in zip(stored["ids"], stored["values"], strict=True)
    ]


def score_reference(
    server: Server, texts: list[list[int]], out: Path, first: int
) -> list[Divergences]:
    """Score all texts with the reference and keep the scores; then its floor.

    Parameters
    ----------
    server : Server
        Started with `scoring_options`.
    texts : list of list of int
        Token ids.
    out : Path
        Existing folder for the scores.
    first : int
        First position that counts, 2 G.

    Returns
    -------
    list of Divergences
        Of the first texts, scored alone, from the same texts scored together.
    """

    def score(number: int) -> None:
        positions = logprobs.prompt_logprobs(server, texts[number])
        save_scores(out / f"scores-{number}.safetensors", positions)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(score, range(len(texts))))
    return [_against(server, texts, number, out, first) for number in range(FLOOR_TEXTS)]


def score_arm(server: Server, texts: list[list[int]], out: Path, first: int) -> list[Divergences]:
    """Divergence of an arm from the stored scores of the reference, one per text."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda i: _against(server, texts, i, out, first), range(len(texts))))


def _against(
    server: Server, texts: list[list[int]], number: int, out: Path, first: int
) -> Divergences:
    reference = load_scores(out / f"scores-{number}.safetensors")
    tested = logprobs.prompt_logprobs(server, texts[number])
    points = [logprobs.compare(p, q) for p, q in zip(reference, tested, strict=True)]
    return Divergences(
        length=len(points),
        kld=[point.kld for point in points],
        covered=float(np.mean([point.covered for point in points[first:]])),
        top1=float(np.mean([point.same_top for point in points[first:]])),
    )


def measurements(
    arm: str, profile: str, found: list[Divergences], first: int, name: str = "traces"
) -> list[Measurement]:
    """Measurements of one arm over all texts, positions from `first` on.

    Parameters
    ----------
    arm, profile : str
        Configuration and outlier profile.
    found : list of Divergences
        One per text.
    first : int
        First position that counts, 2 G.
    name : str
        Prefix of the measurements: ``traces``, or ``floor`` for the reference against itself.
    """
    parts = [np.array(text.kld[first:]) for text in found]
    everything = np.concatenate(parts)
    spread = interval(
        ratio_samples([float(p.sum()) for p in parts], [float(len(p)) for p in parts])
    )
    subject = f"{profile}.{name}"
    context: dict[str, Scalar] = {"profile": subject, "positions": len(everything)}

    def nats(what: str, value: float, **more: Any) -> Measurement:
        return measure(
            f"{subject}.{what}", arm, Unit.NATS, value, better="lower", context=context, **more
        )

    result = [
        nats("kld_mean", float(everything.mean()), interval=spread),
        nats("kld_p999", float(np.quantile(everything, 0.999))),
    ]
    for what in ("top1", "covered"):
        shares = [getattr(text, what) for text in found]
        value = float(np.average(shares, weights=[len(part) for part in parts]))
        result.append(
            measure(f"{subject}.{what}", arm, Unit.SHARE, value, better="higher", context=context)
        )
    for start in range(0, max(text.length for text in found), BUCKET):
        bucket = [value for text in found for value in text.kld[start : start + BUCKET]]
        result.append(
            measure(
                f"{subject}.kld_at_{start}",
                arm,
                Unit.NATS,
                float(np.mean(bucket)),
                better="lower",
                context={"profile": subject, "from": start, "to": start + BUCKET},
            )
        )
    return result


def save_texts(file: Path, texts: list[list[int]]) -> None:
    """Write token ids as JSON."""
    file.write_text(json.dumps(texts), encoding="utf-8")


def load_texts(file: Path) -> list[list[int]]:
    """Read what `save_texts` wrote."""
    texts: list[list[int]] = json.loads(file.read_text(encoding="utf-8"))
    return texts

"""Task accuracy of a served model: the same held-out problems for every arm, graded exactly.

Problems go to the completions endpoint, decoded greedily. A text shorter than two tiles never reads
a record, so a run also says which share of its tokens was generated while reading one, and is
invalid below one half. Truncated answers are wrong; a failed request ends the run.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvarn_eval.schema import Gate, Measurement, Unit, Verdict, measure
from kvarn_eval.small_model import tasks
from kvarn_eval.stats import mcnemar, non_inferiority, score_interval

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvarn_eval.server import Server

MIN_SHARE_READING_RECORDS = 0.5
SPARE_TOKENS = 8  # room for an answer that rambles, so that it ends as wrong and not as truncated


@dataclass(frozen=True)
class Answer:
    """What one arm answered to one problem; token counts come from the server."""

    family: str
    seed: int
    text: str
    right: bool
    truncated: bool
    prompt_tokens: int
    answer_tokens: int

    @property
    def key(self) -> tuple[str, int]:
        """Identity of the problem, to pair arms."""
        return self.family, self.seed

    def tokens_reading_records(self, first_packed: int) -> int:
        """Generated tokens whose query stands at or after position `first_packed`."""
        before = max(
            first_packed - self.prompt_tokens + 1, 0
        )  # the first query is the last of the prompt
        return max(self.answer_tokens - before, 0)

    def to_json(self) -> dict[str, Any]:
        """Fields as plain data."""
        return asdict(self)


def ask(server: Server, item: tasks.Item) -> Answer:
    """Let the server answer one problem greedily.

    Raises
    ------
    RuntimeError
        If the request fails, or the server saw another number of prompt tokens than was sent.
    """
    body = {
        "model": server.model,
        "prompt": item.prompt,
        "max_tokens": item.answer_tokens + SPARE_TOKENS,
        "temperature": 0,
    }
    result = server.post("/v1/completions", body)
    choice, usage = result["choices"][0], result["usage"]
    if usage["prompt_tokens"] != item.prompt_tokens:
        raise RuntimeError(
            f"The server read {usage['prompt_tokens']} prompt tokens, not {item.prompt_tokens}. "
            "Serve the model with its own tokenizer and a sufficient --max-model-len."
        )
    return Answer(
        family=item.family,
        seed=item.seed,
        text=choice["text"],
        right=tasks.grade(item, choice["text"]),
        truncated=choice["finish_reason"] == "length",
        prompt_tokens=usage["prompt_tokens"],
        answer_tokens=usage["completion_tokens"],
    )


def ask_all(
    server: Server,
    items: Sequence[tasks.Item],
    progress: Callable[[int], None] = lambda done: None,
    concurrency: int = 8,
) -> list[Answer]:
    """Answers to all problems, in their order; `progress` receives the number of answers so far."""
    with ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(ask, server, item) for item in items]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                progress(done)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def summarise(
    arm: str, answers: Sequence[Answer], first_packed: int, raw: str
) -> list[Measurement]:
    """Measurements of one arm: accuracy by family and pooled, lengths, share reading records."""
    generated = sum(answer.answer_tokens for answer in answers)
    reading = sum(answer.tokens_reading_records(first_packed) for answer in answers)
    found = []
    for family in dict.fromkeys(answer.family for answer in answers):
        right = [float(answer.right) for answer in answers if answer.family == family]
        found.append(_accuracy(f"accuracy.{family}", arm, right, raw))
    found.append(_accuracy("accuracy", arm, [float(answer.right) for answer in answers], raw))
    lengths = [float(answer.answer_tokens) for answer in answers]
    truncated = sum(answer.truncated for answer in answers)
    return [
        *found,
        measure("answer_tokens", arm, Unit.TOKENS, lengths, raw=raw),
        measure("truncated", arm, Unit.COUNT, truncated, better="lower", raw=raw),
        measure("reading_records", arm, Unit.SHARE, reading / generated, better="higher", raw=raw),
    ]


def _accuracy(name: str, arm: str, right: list[float], raw: str) -> Measurement:
    return measure(
        name,
        arm,
        Unit.SHARE,
        sum(right) / len(right),
        better="higher",
        interval=score_interval(right),
        context={"items": len(right)},
        raw=raw,
    )


def gates(
    reference: tuple[str, Sequence[Answer]],
    tested: tuple[str, Sequence[Answer]],
    margin: float,
    first_packed: int,
) -> list[Gate]:
    """Non-inferiority of pooled accuracy, and the validity of the run.

    Parameters
    ----------
    reference, tested : (str, sequence of Answer)
        Name of the arm and its answers, to the same problems.
    margin : float
        Largest acceptable loss, as a share.
    first_packed : int
        First position that reads a record, in tokens.

    Raises
    ------
    ValueError
        If the arms did not answer the same problems in the same order.
    """
    if [a.key for a in reference[1]] != [a.key for a in tested[1]]:
        raise ValueError("The two arms answered different problems and cannot be paired.")
    pairs = list(zip(reference[1], tested[1], strict=True))
    differences = [float(t.right) - float(r.right) for r, t in pairs]
    result = non_inferiority(differences, margin, [r.family for r, _ in pairs])
    lost = sum(r.right and not t.right for r, t in pairs)
    won = sum(t.right and not r.right for r, t in pairs)
    p_value = mcnemar(lost, won)
    generated = sum(answer.answer_tokens for answer in tested[1])
    share = sum(answer.tokens_reading_records(first_packed) for answer in tested[1]) / generated
    valid = share >= MIN_SHARE_READING_RECORDS
    return [
        Gate(
            name="accuracy",
            rule=f"lower 95 % bound of accuracy({tested[0]}) - accuracy({reference[0]}) > limit",
            value=result.lower_bound,
            limit=-margin,
            verdict=result.verdict,
            reason=(
                f"{100 * result.difference:+.1f} points on {len(pairs)} problems: "
                f"{lost} lost, {won} won (McNemar p = {p_value:.2f})"
            ),
            evidence=[f"{name}:accuracy" for name in (reference[0], tested[0])],
        ),
        Gate(
            name="reading_records",
            rule="share of generated tokens that read a record >= limit",
            value=share,
            limit=MIN_SHARE_READING_RECORDS,
            verdict=Verdict.PASS if valid else Verdict.FAIL,
            reason="most of the text was generated out of records"
            if valid
            else "texts are too short",
            evidence=[f"{tested[0]}:reading_records"],
        ),
    ]

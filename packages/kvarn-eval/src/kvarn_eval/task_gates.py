"""From task scores to measurements, and the paired comparison of an arm with the reference."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from kvarn_eval.accuracy import MIN_SHARE_READING_RECORDS
from kvarn_eval.schema import Gate, Measurement, Unit, Verdict, measure
from kvarn_eval.stats import mcnemar, non_inferiority, ratio_samples, score_interval

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvarn_eval.lm_tasks import Scores
    from kvarn_eval.schema import Scalar

POOLED = "accuracy"
ANSWERS = "answers.jsonl"  # in the folder of an arm


def save_answers(folder: Path, found: Sequence[Scores]) -> None:
    """Write the score of every item, averaged over seeds, for `compare` to pair."""
    lines = [
        json.dumps({"family": task.task, "seed": item, "right": mean})
        for task in found
        for item, mean in zip(task.scores, task.means, strict=True)
    ]
    (folder / ANSWERS).write_text("\n".join(lines) + "\n", encoding="utf-8")


def accuracy(
    arm: str,
    profile: str,
    name: str,
    values: list[float],
    strata: list[str],
    raw: str | None = None,
) -> Measurement:
    """Share of right answers with its interval.

    Parameters
    ----------
    arm, profile, name : str
        Configuration, outlier profile of the model, and what is measured.
    values : list of float
        Score of each item, 0 to 1.
    strata : list of str
        Task of each item; items are resampled within their task.
    raw : str, optional
        File with the answers, relative to the result.
    """
    context: dict[str, Scalar] = {"profile": profile, "items": len(values)}
    return measure(
        f"{profile}.{name}",
        arm,
        Unit.SHARE,
        sum(values) / len(values),
        better="higher",
        interval=score_interval(values, strata),
        context=context,
        raw=raw,
    )


def measurements(
    arm: str, profile: str, found: Sequence[Scores], first_packed: int, folder: str
) -> list[Measurement]:
    """Measurements of one arm: accuracy by task and pooled over items, lengths, truncations.

    Parameters
    ----------
    arm : str
        Configuration.
    profile : str
        Outlier profile of the model.
    found : sequence of Scores
        All tasks.
    first_packed : int
        First position that reads a record, in tokens.
    folder : str
        Folder of the raw files, relative to the result.
    """
    result = []
    pooled = [value for task in found for value in task.means]
    strata = [task.task for task in found for _ in task.scores]
    raw = f"{folder}/{ANSWERS}"
    for task in found:
        labels, name = [task.task] * len(task.scores), f"{POOLED}.{task.task}"
        result.append(accuracy(arm, profile, name, task.means, labels, raw))
    result.append(accuracy(arm, profile, POOLED, pooled, strata, raw))
    for task in found:
        context: dict[str, Scalar] = {"profile": profile, "seeds": len(task.raw)}
        for name, unit, value in (
            ("answer_tokens", Unit.TOKENS, task.generated),
            ("truncated", Unit.COUNT, task.truncated),
            ("reading_records", Unit.SHARE, task.share_reading_records(first_packed)),
        ):
            result.append(
                measure(f"{profile}.{name}.{task.task}", arm, unit, value, context=context)
            )
    return result


def compare(
    profile: str,
    reference: tuple[str, Sequence[Scores]],
    tested: tuple[str, Sequence[Scores]],
    margin: float,
    *,
    required: bool,
) -> list[Gate]:
    """Accuracy of an arm against the reference, items paired by identity.

    Pooled over all items, tasks as strata, a loss of `margin` must be excluded. Items of a small
    task weigh little there, so for each task a loss of more than `margin` must not be proven.

    Raises
    ------
    ValueError
        If the arms did not answer the same items.
    """
    items = [
        {
            (task.task, key): value
            for task in of
            for key, value in zip(task.scores, task.means, strict=True)
        }
        for of in (reference[1], tested[1])
    ]
    if items[0].keys() != items[1].keys():
        raise ValueError(
            f"Arms {reference[0]} and {tested[0]} answered different items and cannot be paired."
        )
    differences = {key: items[1][key] - items[0][key] for key in items[0]}
    result = non_inferiority(list(differences.values()), margin, [task for task, _ in differences])
    lost = sum(value < 0 for value in differences.values())
    won = sum(value > 0 for value in differences.values())
    pooled = Gate(
        name=f"{profile}.{POOLED}.{tested[0]}",
        rule=f"lower 95 % bound of accuracy({tested[0]}) - accuracy({reference[0]}) > limit",
        value=result.lower_bound,
        limit=-margin,
        required=required,
        verdict=result.verdict,
        reason=(
            f"{100 * result.difference:+.2f} points on {len(differences)} items: {lost} lost, "
            f"{won} won (McNemar p = {mcnemar(lost, won):.2f})"
        ),
        evidence=[f"{name}:{profile}.{POOLED}" for name in (reference[0], tested[0])],
    )
    arms = reference[0], tested[0]
    by_task = [
        (task.task, [value for (name, _), value in differences.items() if name == task.task])
        for task in tested[1]
    ]
    return [pooled, *(_task(profile, name, arms, of, margin, required) for name, of in by_task)]


def _task(
    profile: str,
    name: str,
    arms: tuple[str, str],
    differences: list[float],
    margin: float,
    required: bool,
) -> Gate:
    """No loss of more than `margin` is proven on one task."""
    samples = ratio_samples(differences, [1.0] * len(differences))
    bound, mean = float(np.quantile(samples, 0.95)), float(np.mean(differences))
    return Gate(
        name=f"{profile}.{POOLED}.{name}.{arms[1]}",
        rule=f"upper 95 % bound of accuracy({arms[1]}) - accuracy({arms[0]}) >= limit",
        value=bound,
        limit=-margin,
        required=required,
        verdict=Verdict.PASS if bound >= -margin else Verdict.FAIL,
        reason=f"{100 * mean:+.2f} points on {len(differences)} items",
        evidence=[f"{arm}:{profile}.{POOLED}.{name}" for arm in arms],
    )


def floors(profile: str, arm: str, found: Sequence[Scores], least: dict[str, float]) -> list[Gate]:
    """The reference must solve every task, or the task says nothing about caches."""
    rules = []
    for task in found:
        score = float(np.mean(task.means))
        rules.append(
            Gate(
                name=f"{profile}.{POOLED}.{task.task}.{arm}",
                rule=f"accuracy({arm}) >= limit",
                value=score,
                limit=least[task.task],
                verdict=Verdict.PASS if score >= least[task.task] else Verdict.FAIL,
                reason=f"{100 * score:.1f} % with the reference",
                evidence=[f"{arm}:{profile}.{POOLED}.{task.task}"],
            )
        )
    return rules


def validity(profile: str, arm: str, found: Sequence[Scores], first_packed: int) -> Gate:
    """Most generated tokens of every task must stand past two tiles, or the run tested nothing."""
    shares = {task.task: task.share_reading_records(first_packed) for task in found}
    worst = min(shares, key=shares.__getitem__)
    valid = shares[worst] >= MIN_SHARE_READING_RECORDS
    return Gate(
        name=f"{profile}.reading_records",
        rule="share of generated tokens that read a record >= limit, every task",
        value=shares[worst],
        limit=MIN_SHARE_READING_RECORDS,
        verdict=Verdict.PASS if valid else Verdict.FAIL,
        reason=f"least on {worst}: {100 * shares[worst]:.0f} %",
        evidence=[f"{arm}:{profile}.reading_records.{worst}"],
    )

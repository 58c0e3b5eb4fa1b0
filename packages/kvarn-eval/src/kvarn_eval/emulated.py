"""Task accuracy of caches that no server has: the small model reads through an emulated one.

Round to nearest per token, a KIVI-style cache and the published recipe are known to be worse than
an exact cache, so a task that does not show it measures nothing. Each item is read once, prompt and
answer, and counts if every answer token is the most likely one (see `small_model.evaluate`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvarn_core import PRESETS
from kvarn_eval.fidelity import CachePolicy, PolicyCache, as_served, load_model
from kvarn_eval.lm_tasks import HELD_OUT_SEED
from kvarn_eval.schema import Arm, Measurement
from kvarn_eval.small_model import tasks as families
from kvarn_eval.small_model.evaluate import exact_match
from kvarn_eval.task_gates import POOLED, accuracy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from kvarn_eval.suite import EmulatedArm, Suite, Task


class _Single:
    """A cache hook for a batch of one text: [1, H, T, D] in and out."""

    def __init__(self, cache: PolicyCache) -> None:
        self.cache = cache

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return self.cache(layer, q[0], k[0], v[0], scale)[None]


def policy(arm: EmulatedArm) -> CachePolicy:
    """What the arm keeps exact and how it stores the rest."""
    return CachePolicy(arm.method, window=arm.window, sink=arm.sink)


def describe(arm: EmulatedArm, head_dim: int) -> Arm:
    """The arm as a result states it."""
    preset = PRESETS[arm.preset]
    return Arm(
        kv_cache_dtype=arm.preset,
        method=arm.method,
        window_tiles=arm.window,
        sink_rows=policy(arm).sink_rows(preset, head_dim),
    )


def held_out(task: Task, count: int) -> list[families.Item]:
    """Items of a family as the served arms get them, `count` of them."""
    return families.held_out(
        task.name,
        count,
        min_tokens=task.prompt_tokens[0],
        max_tokens=task.prompt_tokens[1],
        questions=task.questions,
        first_seed=HELD_OUT_SEED,
        rewrites=task.rewrites,
    )


def run_emulated(
    suite: Suite, model: Path, device: str, progress: Callable[[str, int, int], None]
) -> list[Measurement]:
    """Accuracy of every emulated arm of a suite on every profile.

    Parameters
    ----------
    suite : Suite
        With `emulated` arms and tasks of families.
    model : Path
        Folder of the small model.
    device : str
        Where it runs.
    progress : callable
        Receives what happens, items done and items in total.

    Returns
    -------
    list of Measurement
        As `<profile>.accuracy.<task>` and, pooled, `<profile>.accuracy`.
    """
    tasks = [task for task in suite.tasks if task.source == "family"]
    items = {task.name: held_out(task, suite.emulated_items) for task in tasks}
    found = []
    for profile in suite.profiles:
        weights = load_model(model, profile, device)
        for name, arm in suite.emulated.items():
            cache = _Single(PolicyCache(policy(arm), PRESETS[arm.preset]))
            reader = as_served(weights, policy(arm))
            right: dict[str, list[float]] = {task: [] for task in items}
            done, total = 0, sum(map(len, items.values()))
            for task, problems in items.items():
                for item in problems:
                    right[task] += map(float, exact_match(reader, [item], cache))
                    done += 1
                    progress(f"{profile} {name}", done, total)
            found += _accuracy(profile, name, right)
    return found


def _accuracy(profile: str, arm: str, right: dict[str, list[float]]) -> list[Measurement]:
    pooled = [value for values in right.values() for value in values]
    strata = [task for task, values in right.items() for _ in values]
    parts = [
        accuracy(arm, profile, f"{POOLED}.{task}", values, [task] * len(values))
        for task, values in right.items()
    ]
    return [*parts, accuracy(arm, profile, POOLED, pooled, strata)]

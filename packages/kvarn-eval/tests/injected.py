"""Results with a known loss, for the tests of whatever judges them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RECORDED = Path(__file__).parent / "recorded" / "bench.json"
RESULTS = Path(__file__).parents[1] / "results"
OURS = "kvarn_k4v2_g128"
STEADY = (1.0, 1.001, 0.999, 1.0005, 0.9995)


def scaled(name: str, arm: str, factor: float, shape: Sequence[float] = STEADY) -> Any:
    """A change that puts the samples of one measurement around `factor` times its median."""

    def change(data: dict[str, Any]) -> None:
        for m in data["measurements"]:
            if m["name"] == name and m["arm"] == arm:
                set_samples(m, [m["median"] * factor * x for x in shape])

    return change


def set_samples(measurement: dict[str, Any], samples: list[float]) -> None:
    from kvarn_eval.schema import summary

    measurement["samples"] = samples
    measurement["median"], measurement["noise"] = summary(samples)


def write(
    path: Path,
    *changes: Callable[[dict[str, Any]], None],
    source: Path = RECORDED,
    run_id: str | None = None,
) -> Path:
    """Write a recorded result with changes, as another run unless told otherwise."""
    data = json.loads(source.read_text(encoding="utf-8"))
    data["run_id"] = run_id or path.stem
    for change in changes:
        change(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def write_answers(
    path: Path, right: dict[str, list[tuple[str, int, bool]]], *, keep: bool = True
) -> Path:
    """Write a result of answers, by arm, and the answers beside it unless they are not kept."""
    from kvarn_eval.schema import Arm, Model, Run, Unit, describe_run, measure

    path.parent.mkdir(parents=True, exist_ok=True)
    measurements = []
    for arm, answers in right.items():
        raw = f"answers-{arm}.jsonl"
        lines = [json.dumps({"family": f, "seed": s, "right": r}) for f, s, r in answers]
        (path.parent / raw).write_text("\n".join(lines) + "\n", encoding="utf-8")
        share = sum(r for *_, r in answers) / len(answers)
        kept = {"raw": raw} if keep else {}
        measurements.append(measure("accuracy", arm, Unit.SHARE, share, better="higher", **kept))
    header = describe_run("tasks", "0" * 64, Model(name="m", weights_sha256=None, dtype="float16"))
    dtypes = {"fp16": "auto", "kvarn": OURS}
    Run.model_validate(
        {
            **header,
            "seconds": 1.0,
            "arms": {arm: Arm(kv_cache_dtype=dtypes[arm]) for arm in right},
            "measurements": measurements,
            "gates": [],
        }
    ).save(path)
    return path

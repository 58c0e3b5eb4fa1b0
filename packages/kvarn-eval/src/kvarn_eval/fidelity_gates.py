"""The fidelity suite: from distances to measurements, gates and a result document.

Three claims are gated. The `kvarn` cache stays well below the published recipe as it is served; at
equal exact rows it is never worse than the published recipe; and before position 2 G nothing is
read packed. All three are ratios of mean KLD over the same texts, so the model's own difficulty
cancels. The first two are required on program text, where the model predicts a language at every
position; on problems, named `<profile>-problems`, they are reported.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvarn_eval.fidelity import (
    ARMS,
    DEFAULT_PRESET,
    Distance,
    load_model,
    make_texts,
    measure_arms,
    program_texts,
    texts_sha256,
    weights_sha256,
)
from kvarn_eval.schema import (
    Arm,
    Gate,
    Measurement,
    Model,
    Run,
    Unit,
    Verdict,
    describe_run,
    measure,
)
from kvarn_eval.small_model.model import ModelConfig
from kvarn_eval.small_model.tasks import trained
from kvarn_eval.stats import interval, ratio_samples

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kvarn_core import Preset
    from kvarn_eval.fidelity import Floats, Text
    from kvarn_eval.schema import Scalar

SERVED_LIMITS = {"plain": 0.45, "large": 0.30}
REGRESSION_LIMIT = 1.05
FLOOR_FACTOR = 3.0
LEAST_OVER_ROUNDING = 10.0  # some 10,000 are measured
PROFILES = ("plain", "large", "tiny")
PROBLEMS = "-problems"
"""Marks what was measured on problems in place of program text: `plain-problems`."""


@dataclass(frozen=True)
class Settings:
    """Size of a fidelity run.

    Parameters
    ----------
    sequences, problems : int
        Program texts and problems to read.
    length : int
        Tokens per text.
    profiles : tuple of str
        Outlier profiles.
    preset : Preset
        Bits and group.
    device : str
        Where the model runs.
    """

    sequences: int = 8
    problems: int = 4
    length: int = 2048
    profiles: tuple[str, ...] = PROFILES
    preset: Preset = DEFAULT_PRESET
    device: str = "cpu"

    def texts(self, families: Sequence[str]) -> dict[str, list[Text]]:
        """What is read, by the mark of its kind; problems are of these families."""
        kinds = {"": program_texts(self.sequences, self.length)}
        if self.problems:
            kinds[PROBLEMS] = make_texts(self.problems, self.length, families=families)
        return kinds

    @property
    def first_packed(self) -> int:
        """First position, in tokens, at which every arm reads packed rows: 2 G."""
        return 2 * self.preset.group


def summarise(
    profile: str, arm: str, distances: Sequence[Distance], settings: Settings
) -> list[Measurement]:
    """Measurements of one arm: KLD, its tail, its curve over positions, top-1 agreement.

    Answers are measured on their own where every text has one.
    """
    first = settings.first_packed
    kld = [d.kld[first:] for d in distances]
    everything = np.concatenate(kld)
    spread = interval(ratio_samples([float(x.sum()) for x in kld], [float(len(x)) for x in kld]))
    context: dict[str, Scalar] = {"profile": profile, "positions": len(everything)}

    def nats(name: str, value: float, **more: Any) -> Measurement:
        return measure(
            f"{profile}.{name}", arm, Unit.NATS, value, better="lower", context=context, **more
        )

    def agreement(name: str, parts: list[Floats]) -> Measurement:
        value = float(np.concatenate(parts).mean())
        return measure(
            f"{profile}.{name}", arm, Unit.SHARE, value, better="higher", context=context
        )

    found = [
        nats("kld_mean", float(everything.mean()), interval=spread),
        nats("kld_median", float(np.median(everything))),
        nats("kld_p999", float(np.quantile(everything, 0.999))),
        nats("kld_early", float(np.concatenate([d.kld[:first] for d in distances]).mean())),
        nats("dlogp", float(np.concatenate([d.dlogp[first:] for d in distances]).mean())),
        agreement("top1", [d.top1[first:] for d in distances]),
    ]
    answers = [d.answer(d.kld, first) for d in distances]
    if all(len(answer) for answer in answers):
        found += [
            nats("answer_kld", float(np.concatenate(answers).mean())),
            agreement("answer_top1", [d.answer(d.top1, first) for d in distances]),
        ]
    return found + _curve(profile, arm, distances, settings)


def _curve(
    profile: str, arm: str, distances: Sequence[Distance], settings: Settings
) -> list[Measurement]:
    """Mean KLD in buckets of 2 G positions, of problems with their prompts."""
    longest = max(len(d.kld) for d in distances)
    width = settings.first_packed
    points = []
    for start in range(0, longest, width):
        parts = [d.kld[start : start + width] for d in distances]
        values = np.concatenate(parts)
        points.append(
            measure(
                f"{profile}.kld_at_{start}",
                arm,
                Unit.NATS,
                float(values.mean()),
                better="lower",
                context={"profile": profile, "from": start, "to": start + width},
            )
        )
    return points


def _kld_sums(distances: Sequence[Distance], first: int) -> list[float]:
    return [float(d.kld[first:].sum()) for d in distances]


def ratio_gate(
    name: str,
    arm: tuple[str, Sequence[Distance]],
    base: tuple[str, Sequence[Distance]],
    limit: float,
    profile: str,
    first: int,
    *,
    required: bool = True,
) -> Gate:
    """Require mean KLD of one arm over that of another to be at most `limit`.

    Fails above the limit; inconclusive if the one-sided 95 % bound over texts is above it.
    """
    top, bottom = _kld_sums(arm[1], first), _kld_sums(base[1], first)
    value = sum(top) / sum(bottom)
    bound = float(np.quantile(ratio_samples(top, bottom), 0.95))
    verdict = Verdict.FAIL if value > limit else Verdict.PASS
    if verdict is Verdict.PASS and bound > limit:
        verdict = Verdict.INCONCLUSIVE
    return Gate(
        name=name,
        rule=f"KLD({arm[0]}) / KLD({base[0]}) <= limit",
        value=value,
        limit=limit,
        required=required,
        verdict=verdict,
        reason=f"{value:.3f}, at most {bound:.3f} with 95 % confidence; limit {limit:g}",
        evidence=[f"{name}:{profile}.kld_mean" for name in (arm[0], base[0])],
    )


def early_gate(profile: str, arms: dict[str, list[Distance]], first: int) -> Gate:
    """Self-check: before position 2 G no arm with an exact window reads a packed row."""
    floor = max(float(np.mean([d.kld[:first].mean() for d in arms["rotated fp16"]])), 1e-9)
    windowed = [name for name in arms if ARMS[name].window >= 1]
    worst = max(windowed, key=lambda name: np.mean([d.kld[:first].mean() for d in arms[name]]))
    value = float(np.mean([d.kld[:first].mean() for d in arms[worst]]))
    limit = FLOOR_FACTOR * floor
    return Gate(
        name=f"{profile}.early",
        rule="KLD before position 2 G <= 3 x KLD of fp16 rounding",
        value=value,
        limit=limit,
        verdict=Verdict.PASS if value <= limit else Verdict.FAIL,
        reason=f"largest on {worst}: {value:.1e} nats; limit {limit:.1e}",
        evidence=[f"{name}:{profile}.kld_early" for name in (worst, "rotated fp16")],
    )


def quantises_gate(profile: str, arms: dict[str, list[Distance]], first: int) -> Gate:
    """Self-check: records are read. An arm that never quantises would pass every other gate."""
    rounding = max(float(np.mean([d.kld[first:].mean() for d in arms["rotated fp16"]])), 1e-12)
    value = float(np.mean([d.kld[first:].mean() for d in arms["kvarn"]])) / rounding
    return Gate(
        name=f"{profile}.quantises",
        rule="KLD(kvarn) / KLD(rotated fp16) >= limit",
        value=value,
        limit=LEAST_OVER_ROUNDING,
        verdict=Verdict.PASS if value >= LEAST_OVER_ROUNDING else Verdict.FAIL,
        reason=f"{value:.3g} times the divergence of fp16 rounding",
        evidence=[f"{name}:{profile}.kld_mean" for name in ("kvarn", "rotated fp16")],
    )


def gates(found: dict[str, dict[str, list[Distance]]], settings: Settings) -> list[Gate]:
    """All rules that the distances by profile (with its mark) and arm allow to check."""
    first = settings.first_packed
    rules = []
    for profile, arms in found.items():
        plain = profile.removesuffix(PROBLEMS)
        bounds = {"paper as served": SERVED_LIMITS.get(plain), "paper": 1.0}
        names = {"paper as served": "over_served", "paper": "over_paper"}
        for base, limit in bounds.items():
            if limit is not None:
                rules.append(
                    ratio_gate(
                        f"{profile}.{names[base]}",
                        ("kvarn", arms["kvarn"]),
                        (base, arms[base]),
                        limit,
                        profile,
                        first,
                        required=profile == plain,
                    )
                )
        rules.append(early_gate(profile, arms, first))
        rules.append(quantises_gate(profile, arms, first))
    return rules


def regression_gates(run: Run, baseline: Run) -> list[Gate]:
    """Require that the mean KLD of `kvarn` has not grown by more than 5 % on any profile.

    Raises
    ------
    ValueError
        If the runs read different texts or weights.
    """

    def subject(of: Run) -> tuple[object, ...]:
        return of.suite_sha256, of.model.weights_sha256, of.arms

    if subject(run) != subject(baseline):
        raise ValueError(
            "The baseline was made with other texts, weights or arms. Repeat it with this version."
        )
    found = []
    for measurement in run.measurements:
        profile, _, quantity = measurement.name.partition(".")
        if measurement.arm != "kvarn" or quantity != "kld_mean":
            continue
        stored = baseline.value("kvarn", measurement.name)
        limit = REGRESSION_LIMIT * stored
        worse = measurement.median > limit
        found.append(
            Gate(
                name=f"{profile}.regression",
                rule="KLD(kvarn) <= 1.05 x stored KLD",
                value=measurement.median,
                limit=limit,
                verdict=Verdict.FAIL if worse else Verdict.PASS,
                reason=f"{measurement.median / stored:.3f} times the stored value",
                evidence=[measurement.key],
            )
        )
    return found


def run_fidelity(
    model_folder: Path,
    settings: Settings,
    progress: Callable[[str, int, int], None],
    baseline: Run | None = None,
) -> Run:
    """Measure every arm on every profile and apply the gates.

    Parameters
    ----------
    model_folder : Path
        Folder of the small model.
    settings : Settings
        What is read, on which profiles, preset and device.
    progress : callable
        Receives what happens, steps done and steps in total.
    baseline : Run, optional
        An earlier run on the same texts and weights, to find regressions.

    Returns
    -------
    Run
    """
    began = time.monotonic()
    texts = settings.texts(trained(model_folder))
    model = Model(
        name=model_folder.name, weights_sha256=weights_sha256(model_folder), dtype="float32"
    )
    everything = [text for kind in texts.values() for text in kind]
    header = describe_run("fidelity", texts_sha256(everything), model)
    found: dict[str, dict[str, list[Distance]]] = {}
    for profile in settings.profiles:
        weights = load_model(model_folder, profile, settings.device)
        for mark, kind in texts.items():
            subject = found[profile + mark] = {name: [] for name in ARMS}
            for done, text in enumerate(kind, 1):
                for name, distances in measure_arms(weights, [text], ARMS, settings.preset).items():
                    subject[name] += distances
                progress(f"{profile}{mark}", done, len(kind))
    measurements = [
        measurement
        for profile, arms in found.items()
        for name, distances in arms.items()
        for measurement in summarise(profile, name, distances, settings)
    ]
    head_dim = ModelConfig.load(model_folder).head_dim
    arms = {
        name: Arm(
            kv_cache_dtype=settings.preset.name if policy.method in {"kvarn", "paper"} else "auto",
            method=policy.method,
            window_tiles=policy.window,
            sink_rows=policy.sink_rows(settings.preset, head_dim),
        )
        for name, policy in ARMS.items()
    }
    run = Run.model_validate(
        {
            **header,
            "seconds": round(time.monotonic() - began, 1),
            "arms": arms,
            "measurements": measurements,
            "gates": gates(found, settings),
        }
    )
    if baseline is None:
        return run
    return run.model_copy(update={"gates": run.gates + regression_gates(run, baseline)})

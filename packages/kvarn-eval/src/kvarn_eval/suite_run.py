"""A suite from end to end: check what it needs, observe every arm, apply the limits.

The result document is written anew after each arm, so it always says what is known so far; it
passes only once every arm and every required limit of the suite is in it.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvarn_eval import preflight, scenarios, task_gates, traces
from kvarn_eval.capacity import Pool
from kvarn_eval.emulated import describe
from kvarn_eval.lm_tasks import Checked, Scores, check_tasks
from kvarn_eval.schema import (
    Arm,
    Gate,
    Measurement,
    Model,
    Run,
    Unit,
    Verdict,
    describe_run,
    find_gpus,
    measure,
    portable,
)
from kvarn_eval.sources import sources
from kvarn_eval.suite_arm import Setup, head_dim
from kvarn_eval.suite_jobs import EMULATED, observe_all
from kvarn_eval.suite_kept import forget

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from kvarn_eval.suite import Limit, Suite

    Progress = Callable[[str, int, int], None]
    Found = dict[tuple[str, str], dict[str, Any]]  # by profile and arm

LEAST_OVER_FLOOR = 2.0  # an exact cache would have about 1
LEAST_FLOOR = 1e-6  # nats; a reference may score itself without any difference


def check_all(setup: Setup, progress: Progress) -> dict[str, Checked]:
    """Everything that a run needs; tasks are loaded and their prompts counted.

    Raises
    ------
    preflight.Missing
        If something is not there.
    """
    suite = setup.suite
    preflight.check_parts(suite, setup.parts, setup.load_format)
    preflight.check_gpus(suite, setup.tensor_parallel)
    config = preflight.check_model(setup.model, setup.load_format)
    preflight.check_tokenizer(setup.tokenizer)
    if suite.small_model and config.get("vocab_size") != _small_vocabulary():
        raise preflight.Missing(
            f"Suite {suite.name} is for the small model, and {setup.model} is another. Drop "
            "--model, or choose another suite."
        )
    if preflight.ACCURACY not in setup.parts or not suite.arms:
        return {}
    folder = setup.out / "tasks"
    folder.mkdir(exist_ok=True)
    progress("tasks", 0, 1)
    try:
        checked = check_tasks(suite, setup.tokenizer, folder, setup.lm)
    except (RuntimeError, ValueError) as error:
        raise preflight.Missing(str(error)) from error
    progress("tasks", 1, 1)
    return checked


def _small_vocabulary() -> int:
    from kvarn_eval.small_model.model import ModelConfig

    return ModelConfig().vocab_size


def run_suite(setup: Setup, progress: Progress, *, reuse: bool = False) -> Run:
    """Run all arms of a suite.

    Parameters
    ----------
    setup : Setup
        What is compared, with which checkpoint.
    progress : callable
        Receives what happens, steps done and steps in total.
    reuse : bool
        Take what an earlier run with the same plan left in `setup.out`.

    Returns
    -------
    Run

    Raises
    ------
    preflight.Missing
        If something that the run needs is not there; no server has started then.
    RuntimeError
        If a server or a request fails; the other arms are in ``result.json``.
    ValueError
        If figures to be reused do not fit.
    """
    began = time.monotonic()
    suite = setup.suite
    checked = check_all(setup, progress)
    setup = replace(setup, items_sha256={name: one.sha256 for name, one in checked.items()})
    if not reuse:
        forget(setup)
    model = Model(
        name=setup.model.name,
        weights_sha256=setup.weights_sha256,
        dtype=suite.dtype,
        tensor_parallel=setup.tensor_parallel,
    )
    header = describe_run(suite.name, suite.sha256, model)
    emulated: list[Measurement] = []
    found: Found = {}
    run = assemble(header, setup, found, emulated, 0.0)
    for what, figures in observe_all(setup, checked, progress, reuse=reuse):
        if what == EMULATED:
            emulated = [Measurement(**one) for one in figures["measurements"]]
        else:
            found[what] = figures
            if figures["tasks"]:
                scores = [Scores(**task) for task in figures["tasks"]]
                task_gates.save_answers(setup.folder(*what), scores)
        run = assemble(header, setup, found, emulated, time.monotonic() - began)
        run.save(setup.out / "result.json")
    return run


def assemble(
    header: dict[str, object],
    setup: Setup,
    found: Found,
    emulated: list[Measurement],
    seconds: float,
) -> Run:
    """The result of the arms observed so far."""
    suite = setup.suite
    order = [(profile, arm) for profile in suite.profiles for arm in suite.arms]
    found = {what: found[what] for what in order if what in found}
    measured = list(emulated)
    for (profile, arm), figures in found.items():
        measured += _measure(setup, profile, arm, figures)
    arms = {arm for _, arm in found}
    described = {
        arm: Arm(
            kv_cache_dtype=suite.arms[arm].kv_cache_dtype,
            options=portable(setup.description(arm)),
        )
        for arm in suite.arms
        if arm in arms and any(m.arm == arm for m in measured)
    }
    if emulated:
        size = head_dim(setup.model)
        described |= {name: describe(arm, size) for name, arm in suite.emulated.items()}
    missing = [" ".join(what) for what in order if what not in found]
    slow = {
        (arm, load["scenario"])
        for (_, arm), figures in found.items()
        for load in figures["loads"]
        if load.get("slowdown_us")
    }
    rules = [
        *_paired(setup, found),
        *_valid(found),
        *limit_gates(suite, measured, slow),
        *quantises_gates(suite, measured),
    ]
    if missing:
        rules.append(_undecided("complete", missing, measured))
    return Run.model_validate(
        {
            **header,
            "seconds": round(seconds, 1),
            "arms": described,
            "commits": _commits(found, header["git"]),
            "texts": {p: sha for p in suite.profiles if (sha := setup.texts_sha256(p))},
            "measurements": measured,
            "gates": rules,
        }
    )


def _commits(found: Found, git: Any) -> dict[str, list[str]]:
    """By arm, where it was measured at others than the commit of this run."""
    result: dict[str, set[str]] = {}
    for (_, arm), figures in found.items():
        of = [figures.get("commit"), *(load.get("commit") for load in figures["loads"])]
        result.setdefault(arm, set()).update(name for name in of if name)
    return {arm: sorted(of) for arm, of in result.items() if of - {sources(git)}}


def _measure(setup: Setup, profile: str, arm: str, figures: dict[str, Any]) -> list[Measurement]:
    """Measurements of one arm on one profile."""
    folder, result = setup.folder(profile, arm).name, []
    if figures["tasks"]:
        scores = [Scores(**task) for task in figures["tasks"]]
        result += task_gates.measurements(arm, profile, scores, setup.first_packed, folder)
    if figures["pool"] is not None:
        result += _capacity(setup, arm, Pool(**figures["pool"]), figures["startup_seconds"])
    result += scenarios.measurements(arm, figures["loads"], f"{folder}/")
    for name in ("texts", "floor"):
        if figures[name]:
            scored = [traces.Divergences(**text) for text in figures[name]]
            label = "traces" if name == "texts" else name
            result += traces.measurements(arm, profile, scored, setup.first_packed, label)
    return result


def _capacity(setup: Setup, arm: str, pool: Pool, startup: float | None) -> list[Measurement]:
    tokens = setup.suite.capacity_tokens
    fitting = pool.requests(tokens, head_dim(setup.model))
    result = [
        measure("pool_tokens", arm, Unit.TOKENS, pool.tokens, better="higher"),
        measure(
            "requests_that_fit",
            arm,
            Unit.REQUESTS,
            fitting,
            better="higher",
            context={"tokens": tokens},
        ),
    ]
    if startup is not None:
        result.append(measure("startup", arm, Unit.SECONDS, startup, better="lower"))
    if pool.cache_bytes is not None:
        density = pool.tokens_per_gib
        result.append(measure("tokens_per_gib", arm, Unit.TOKENS_PER_GIB, density, better="higher"))
    return result


def _paired(setup: Setup, found: Found) -> list[Gate]:
    """Accuracy of every arm against the reference; required of the tested arm alone."""
    suite, rules = setup.suite, []
    for (profile, arm), figures in found.items():
        scores = [Scores(**task) for task in figures["tasks"]]
        if not scores or (profile, suite.reference) not in found:
            continue
        if arm == suite.reference:
            rules.append(task_gates.validity(profile, arm, scores, setup.first_packed))
            least = {task.name: task.min_score for task in suite.tasks}
            rules += task_gates.floors(profile, arm, scores, least)
            continue
        reference = [Scores(**task) for task in found[profile, suite.reference]["tasks"]]
        rules += task_gates.compare(
            profile,
            (suite.reference, reference),
            (arm, scores),
            suite.margin,
            required=arm == suite.tested,
        )
    return rules


def _valid(found: Found) -> list[Gate]:
    """What a load measured is another thing if it was not primed, or if the GPU slowed down."""
    rules = []
    for (_, arm), figures in found.items():
        for load in figures["loads"]:
            if load.get("slowdown_us"):
                rules.append(
                    Gate(
                        name=f"{load['name']}.steady.{arm}",
                        rule="microseconds that the GPU slowed down for heat or power <= limit",
                        value=load["slowdown_us"],
                        limit=0,
                        verdict=Verdict.INCONCLUSIVE,
                        reason=f"the GPU slowed down for {load['slowdown_us'] / 1e6:.3g} s",
                        evidence=[f"{arm}:{load['name']}.output_throughput"],
                    )
                )
            if load["min_hit_share"] is None:
                continue
            primed = load["hit_share"] >= load["min_hit_share"] and load["preemptions"] == 0
            rules.append(
                Gate(
                    name=f"{load['name']}.valid.{arm}",
                    rule="share of prompt tokens found in the prefix cache >= limit, no preemption",
                    value=load["hit_share"],
                    limit=load["min_hit_share"],
                    verdict=Verdict.PASS if primed else Verdict.FAIL,
                    reason=f"{load['hit_share']:.1%} found, {load['preemptions']} preempted",
                    evidence=[f"{arm}:{load['name']}.{x}" for x in ("hit_share", "preemptions")],
                )
            )
    return rules


def quantises_gates(suite: Suite, measured: list[Measurement]) -> list[Gate]:
    """Self-check: records are read. An arm that never quantises would pass every bound on KLD."""
    rules = []
    values = {m.key: m.median for m in measured}
    texts = any(".traces." in key or ".floor." in key for key in values)
    for profile in suite.profiles:
        keys = [
            f"{suite.tested}:{profile}.traces.kld_mean",
            f"{suite.reference}:{profile}.floor.kld_mean",
        ]
        if all(key in values for key in keys):
            value = values[keys[0]] / max(values[keys[1]], LEAST_FLOOR)
            rules.append(
                Gate(
                    name=f"{profile}.traces.quantises",
                    rule=f"KLD({suite.tested}) / KLD({suite.reference} scored twice) >= limit",
                    value=value,
                    limit=LEAST_OVER_FLOOR,
                    verdict=Verdict.PASS if value >= LEAST_OVER_FLOOR else Verdict.FAIL,
                    reason=f"{value:.3g} times what the reference differs from itself",
                    evidence=keys,
                )
            )
        elif texts:
            lacking = [key for key in keys if key not in values]
            rules.append(_undecided(f"{profile}.traces.quantises", lacking, measured))
    return rules


def limit_gates(
    suite: Suite, measured: list[Measurement], slow: Collection[tuple[str, str]] = ()
) -> list[Gate]:
    """The limits of a suite.

    One whose measurements are not there yet decides nothing, and neither does one on a load of
    `slow`, pairs of arm and scenario during which the GPU slowed down.
    """
    by_key = {m.key: m for m in measured}
    names = [gpu.name for gpu in find_gpus()]
    rules = []
    for limit in suite.limits:
        other = limit.over or limit.minus
        keys = [f"{arm}:{limit.quantity}" for arm in (limit.arm, other) if arm]
        here = limit.gpu is None or any(limit.gpu in name for name in names)
        scenario = limit.quantity.partition(".")[0]
        if all(key in by_key for key in keys):
            gate = limit_gate(limit, [by_key[key] for key in keys], here)
            if {(arm, scenario) for arm in (limit.arm, other)} & set(slow):
                reason = f"{gate.reason}; the GPU slowed down"
                undecided = {"verdict": Verdict.INCONCLUSIVE, "reason": reason}
                gate = gate.model_copy(update=undecided)
            rules.append(gate)
        elif limit.required and here:
            lacking = [key for key in keys if key not in by_key]
            rules.append(_undecided(f"{limit.quantity}.{limit.arm}", lacking, measured))
    return rules


def limit_gate(limit: Limit, measured: list[Measurement], here: bool) -> Gate:
    """One limit; `here` says whether this is the machine that it was set for."""
    values = [m.median for m in measured]
    value, rule, over_nothing = values[0], f"{limit.quantity}({limit.arm})", False
    if limit.over:
        value, rule = values[0] / max(values[1], 1e-12), f"{rule} / {limit.quantity}({limit.over})"
        over_nothing = values[1] <= 0
    elif limit.minus:
        value, rule = values[0] - values[1], f"{rule} - {limit.quantity}({limit.minus})"
    bound = limit.at_least if limit.at_least is not None else limit.at_most
    assert bound is not None
    holds = value >= bound if limit.at_least is not None else value <= bound
    verdict = Verdict.PASS if holds else Verdict.FAIL
    against = " against ".join(f"{x:,.6g}" for x in values)
    return Gate(
        name=f"{limit.quantity}.{limit.arm}",
        rule=f"{rule} {'>=' if limit.at_least is not None else '<='} limit",
        value=value,
        limit=bound,
        required=limit.required and here,
        verdict=Verdict.INCONCLUSIVE if over_nothing else verdict,
        reason=f"{against} {measured[0].unit.value}" + f"; {limit.over} has none" * over_nothing,
        evidence=[m.key for m in measured],
    )


def _undecided(name: str, missing: list[str], measured: list[Measurement]) -> Gate:
    return Gate(
        name=name,
        rule="number of things that were not measured <= limit",
        value=len(missing),
        limit=0,
        verdict=Verdict.INCONCLUSIVE,
        reason=f"not measured: {', '.join(missing)}",
        evidence=[m.key for m in measured[:1]],
    )

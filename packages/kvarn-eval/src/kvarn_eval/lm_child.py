"""Child process that runs tasks of lm-eval: ``python -m kvarn_eval.lm_child PLANS``.

The file is a JSON list. A plan names its task, the items, the server and the file for the result;
without a server the task is only loaded and its prompts counted, which shows what is missing before
anything has started. lm-eval is imported here and nowhere else, once for all tasks, which takes
longer than many of them; its result is kept as it comes.
"""

from __future__ import annotations

import hashlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from kvarn_eval.lm_tasks import counters


def items(plan: dict[str, Any]) -> list[int] | None:
    """Numbers of the items to run, None for all."""
    if plan["spans"] is None:
        return None
    return [i for start, stop in plan["spans"] for i in range(start, stop)]


def manager(plan: dict[str, Any]) -> Any:
    """The catalogue of tasks: one folder, or all that lm-eval knows."""
    from lm_eval.tasks import TaskManager

    folder = plan["include"]
    return TaskManager(
        include_path=folder, include_defaults=folder is None, metadata=metadata(plan)
    )


def metadata(plan: dict[str, Any]) -> dict[str, Any]:
    """What tasks that make their own items need to know."""
    return {"tokenizer": plan["tokenizer"], **plan["metadata"]}


def check(plan: dict[str, Any]) -> dict[str, Any]:
    """Load the task and count the tokens of its prompts."""
    from tokenizers import Tokenizer

    task = manager(plan).load([plan["task"]])["tasks"][plan["task"]]
    task.build_all_requests(samples=items(plan), rank=0, world_size=1)
    tokenizer = Tokenizer.from_file(str(Path(plan["tokenizer"]) / "tokenizer.json"))
    counts = [
        len(tokenizer.encode(str(found.args[0]), add_special_tokens=False).ids)
        for found in task.instances
    ]
    documents = json.dumps([found.doc for found in task.instances], sort_keys=True, default=str)
    return {
        "prompt_tokens": counts,
        "sha256": hashlib.sha256(documents.encode()).hexdigest(),
        "answer_tokens": int(task.config.generation_kwargs.get("max_gen_toks", 256)),
    }


def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Let the server answer all items; the result is lm-eval's own."""
    from lm_eval import simple_evaluate

    chat = plan["endpoint"] == "chat"
    found = simple_evaluate(
        model="local-chat-completions" if chat else "local-completions",
        model_args={
            "model": plan["served"],
            "base_url": plan["url"] + ("/v1/chat/completions" if chat else "/v1/completions"),
            "tokenizer": plan["tokenizer"],
            # of a chat only the server knows the template, so it counts the tokens
            "tokenizer_backend": None if chat else "huggingface",
            "tokenized_requests": not chat,
            # by default 2,048: longer prompts would lose their beginning without a word
            "max_length": plan["max_length"] + 1,
            "num_concurrent": plan["concurrency"],
            "timeout": plan["timeout"],
            "max_retries": 1,  # a request that fails ends the run
        },
        tasks=[plan["task"]],
        samples=None if plan["spans"] is None else {plan["task"]: items(plan)},
        gen_kwargs={**plan["generation"], "seed": plan["seed"]},
        apply_chat_template=chat,
        task_manager=manager(plan),
        metadata=metadata(plan),
        bootstrap_iters=0,
        log_samples=True,
    )
    return dict(found or {})


def look(plan: dict[str, Any]) -> dict[str, Any]:
    """What `check` found, or why lm-eval cannot load the task."""
    try:
        return check(plan)
    except Exception as error:  # whatever the loader of some data set raises
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def ask(plan: dict[str, Any]) -> dict[str, Any]:
    """What lm-eval found, and what the server counted meanwhile."""
    before = counters(plan["url"])
    found = run(plan)
    spent = {key: value - before[key] for key, value in counters(plan["url"]).items()}
    return {"lm_eval": found, "spent": spent}


def main() -> None:
    """Do one plan after the other."""
    for plan in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        found = look(plan) if plan["url"] is None else ask(plan)
        text = json.dumps(found, indent=1, default=str)
        Path(plan["result"]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

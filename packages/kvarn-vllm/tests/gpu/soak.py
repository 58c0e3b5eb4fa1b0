"""A thousand requests through a full pool, with aborts and repeats; `test_soak.py` judges.

Called with the number of requests, of GPUs, and the file for the report. What lies on the GPUs is
asked of the workers, which with several GPUs are processes of their own.

Every prompt is a table of its own, so an answer that lists rows of another request's table has seen
another request's cache.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import torch
from serve import MODEL, PARALLEL, PRESET, Engine, Watch, ask

from kvarn_eval.small_model import tasks, tokenizer

SETTINGS: dict[str, Any] = {
    "max_model_len": 2048,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 1024,
    "num_gpu_blocks_override": 200,
    "gpu_memory_utilization": 0.15,
}
WAITING = 48  # requests in the engine at a time; far more than the pool holds
ABORTED = 0.1
REPEATED = 0.5


def problem(seed: int, draw: random.Random) -> tasks.Item:
    return tasks.make_item(
        "recall", 40_000 + seed, prompt_tokens=draw.choice([384, 512, 900, 1300])
    )


def rows(text: str) -> set[str]:
    """Rows ``qB:417`` of a table or an answer."""
    return set(re.findall(r"[a-zA-Z]{2}:\d{3}", text))


class Soak:
    """Feeds an engine and keeps the books."""

    def __init__(self, engine: Engine, requests: int) -> None:
        self.engine, self.requests = engine, requests
        self.draw = random.Random(7)  # noqa: S311
        self.items: dict[str, tasks.Item] = {}
        self.aborts: dict[str, int] = {}
        self.answers: dict[str, str] = {}
        self.aborted: set[str] = set()
        self.hits = 0
        self.usage: list[float] = []

    def submit(self) -> None:
        """Add a request: a new table, or a recent one again, which hits the prefix cache."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        number = len(self.items)
        recent = list(self.items.values())[-40:]
        again = recent and self.draw.random() < REPEATED
        item = self.draw.choice(recent) if again else problem(number, self.draw)
        name = str(number)
        self.items[name] = item
        if self.draw.random() < ABORTED:
            self.aborts[name] = len(self.usage) + self.draw.randint(1, 120)
        params = SamplingParams(
            max_tokens=item.answer_tokens + 8, temperature=0.0, ignore_eos=True, detokenize=False,
            stop_token_ids=[tokenizer.EOS], output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        prompt = {"prompt_token_ids": tokenizer.encode(item.prompt)}
        self.engine.engine.add_request(name, prompt, params)

    def open_requests(self) -> int:
        return len(self.items) - len(self.answers) - len(self.aborted)

    def step(self) -> None:
        """Abort what is due, then one step of the engine."""
        now = len(self.usage)
        due = [name for name, when in self.aborts.items() if when == now]
        due = [name for name in due if name not in self.answers]
        self.engine.engine.abort_request(due)
        self.aborted |= set(due)
        for output in self.engine.engine.step():
            if output.finished and output.request_id not in self.aborted:
                self.answers[output.request_id] = tokenizer.decode(output.outputs[0].token_ids)
                self.hits += bool(output.num_cached_tokens)
        pool = self.engine.pool
        self.usage.append(1 - pool.get_num_free_blocks() / pool.num_gpu_blocks)

    def run(self) -> None:
        while len(self.items) < self.requests or self.open_requests():
            while len(self.items) < self.requests and self.open_requests() < WAITING:
                self.submit()
            self.step()
        self.engine.drain()

    def wrong(self) -> list[str]:
        return [name for name, text in self.answers.items() if text != self.items[name].answer]

    def lost(self) -> list[str]:
        """Requests answered wrongly that this engine answers rightly when they come alone."""
        solved = set()
        items = {self.items[name].prompt: self.items[name] for name in self.wrong()}
        for prompt, item in items.items():
            self.engine.kv_cache_manager.reset_prefix_cache()
            if ask(self.engine, [item])["right"]:
                solved.add(prompt)
        return [name for name in self.wrong() if self.items[name].prompt in solved]

    def foreign(self) -> list[str]:
        """Requests whose answer lists two or more rows of one other table."""
        tables = {name: rows(item.prompt) for name, item in self.items.items()}
        found = []
        for name, answer in self.answers.items():
            strange = rows(answer) - rows(self.items[name].answer) - tables[name]
            if any(len(strange & tables[other]) >= 2 for other in tables):
                found.append(name)
        return found


def watch(worker: Any) -> None:
    """Let a worker note which kernels it launches for the first time from now on."""
    worker.watch = Watch()


def compiled(worker: Any) -> list[str]:
    return worker.watch.compiled


def memory(worker: Any) -> tuple[int, int]:
    """Bytes that are allocated and reserved on a worker's GPU."""
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def main() -> None:
    requests, gpus, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    options = {**SETTINGS, **(PARALLEL if gpus > 1 else {})}
    engine = Engine(MODEL, PRESET, dtype="float16", enforce_eager=False, **options)
    ask_workers = engine.llm.collective_rpc
    ask_workers(watch)
    Soak(engine, 40).run()  # lets the allocator reach its level
    before = ask_workers(memory)
    soak = Soak(engine, requests)
    soak.run()
    after = ask_workers(memory)
    drifts = [
        [now - then for then, now in zip(*pair, strict=True)]
        for pair in zip(before, after, strict=True)
    ]
    report = {
        "answered": len(soak.answers),
        "aborted": len(soak.aborted),
        "wrong": len(soak.wrong()),
        "foreign": soak.foreign(),
        "hits": soak.hits,
        "preemptions": engine.preemptions,
        "steps": len(soak.usage),
        "median usage": sorted(soak.usage)[len(soak.usage) // 2],
        "free pages lost": engine.free_pages - engine.pool.get_num_free_blocks(),
        "requests left": len(engine.manager.req_to_blocks),
        "drifts": drifts,
        "compiled while serving": [name for names in ask_workers(compiled) for name in names],
    }
    report["lost"] = len(soak.lost())  # serves again
    out.write_text(json.dumps(report), encoding="utf-8")
    engine.stop()


if __name__ == "__main__":
    main()

"""Serve the small model on one GPU and write down what happened; `test_serving.py` judges.

A process of its own per configuration, because the model runner is chosen by the environment. The
engine runs in this process, so that its scheduler, its pages and every kernel launch can be seen.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import triton
from conftest import Engine

from kvarn_core import nvrtc
from kvarn_eval.fidelity import program_texts
from kvarn_eval.small_model import tasks, tokenizer
from kvarn_vllm.batched import Batched
from kvarn_vllm.metadata import KVarNMetadataBuilder

if TYPE_CHECKING:
    from collections.abc import Callable

MODEL = Path(__file__).parents[3] / "kvarn-eval" / "models" / "small"
PRESET = "kvarn_k4v2_g128"
VOCABULARY = 192
PAGES = 205  # ten prompts fit, their answers do not
SETTINGS: dict[str, Any] = {
    "max_model_len": 4096,
    "max_num_seqs": 24,
    "max_num_batched_tokens": 2048,
    "num_gpu_blocks_override": PAGES,
    "gpu_memory_utilization": 0.15,
    "max_logprobs": VOCABULARY,
}
PARALLEL = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


class Watch:
    """Counts compilations and served steps; turns a wait for the device into an error."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.steps: Counter[str] = Counter()
        triton.knobs.compilation.listener = self._note

    def _note(self, *, src: Any, **_: Any) -> None:
        """Note a kernel that was not launched before, even if its code lies in the disk cache."""
        function = src.fn.fn
        if function.__module__.startswith("kvarn"):
            self.compiled.append(f"{function.__module__}.{function.__name__}")

    def guard(self) -> None:
        """From now on neither the op nor the builder may wait for the device."""
        serve, build = Batched.serve, KVarNMetadataBuilder.build

        @wraps(serve)
        def watched(path: Any, *tensors: Any, layer: int) -> None:
            step = tensors[4]
            if layer == 0:
                self.steps["prefill" if step.prefill else "decode"] += 1
                self.steps["passes"] += len(step.prefill.passes) if step.prefill else 0
            no_waiting(serve)(path, *tensors, layer=layer)

        Batched.serve = watched
        KVarNMetadataBuilder.build = no_waiting(build)


def no_waiting(function: Any) -> Any:
    @wraps(function)
    def strict(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return strict


def items(count: int, first_seed: int, tokens: int = 1200) -> list[tasks.Item]:
    families = tasks.trained(MODEL)
    return [
        tasks.make_item(
            families[i % len(families)], first_seed + i, prompt_tokens=tokens, questions=16
        )
        for i in range(count)
    ]


def ask(
    engine: Engine,
    problems: list[tasks.Item],
    *,
    tokens: int | None = None,
    before_step: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Right answers, their tokens and log-probabilities, and hits in the prefix cache.

    With `tokens` every answer is that long, so that the batches of a run do not depend on when the
    host learns that an answer has ended.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    for number, item in enumerate(problems):
        end: dict[str, Any] = {"max_tokens": item.answer_tokens, "stop_token_ids": [tokenizer.EOS]}
        params = SamplingParams(
            temperature=0.0, detokenize=False, logprobs=1, ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **({"max_tokens": tokens} if tokens else end),
        )  # fmt: skip
        prompt = {"prompt_token_ids": tokenizer.encode(item.prompt)}
        engine.engine.add_request(str(number), prompt, params)
    found: dict[int, Any] = {}
    while engine.engine.has_unfinished_requests():
        if before_step:
            before_step()
        found |= {int(one.request_id): one for one in engine.engine.step() if one.finished}
    engine.drain()
    assert engine.pool.get_num_free_blocks() == engine.free_pages, "pages leaked"
    answers = [found[number] for number in range(len(problems))]
    ids = [list(answer.outputs[0].token_ids) for answer in answers]
    expected = [[*tokenizer.encode(item.answer), tokenizer.EOS][:tokens] for item in problems]
    return {
        "asked": len(problems),
        "right": sum(map(list.__eq__, ids, expected)),
        "hits": sum(answer.num_cached_tokens or 0 for answer in answers),
        "tokens": ids,
        "logprobs": [
            [entry[token].logprob for token, entry in zip(one.token_ids, one.logprobs, strict=True)]
            for one in (answer.outputs[0] for answer in answers)
        ],
    }


def read(engine: Engine, texts: list[Any]) -> list[np.ndarray]:
    """Log-probabilities [T - 1, V] of each text, read tile by tile as a decode would see it."""
    from vllm import SamplingParams

    config = engine.scheduler.scheduler_config
    config.long_prefill_token_threshold = 128
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=VOCABULARY,
                            detokenize=False)  # fmt: skip
    for number, text in enumerate(texts):
        engine.engine.add_request(str(number), {"prompt_token_ids": list(text.ids)}, params)
    found: dict[int, np.ndarray] = {}
    while engine.engine.has_unfinished_requests():
        for one in engine.engine.step():
            if one.finished:
                rows = np.full((len(one.prompt_logprobs) - 1, VOCABULARY), -np.inf)
                for row, entries in zip(rows, one.prompt_logprobs[1:], strict=True):
                    row[list(entries)] = [entry.logprob for entry in entries.values()]
                found[int(one.request_id)] = rows
    engine.drain()
    config.long_prefill_token_threshold = 0
    return [found[number] for number in range(len(texts))]


def poison(engine: Engine) -> None:
    """Overwrite all bytes that no request owns, the null page too."""
    free = [p.block_id for p in engine.pool.blocks if not p.ref_cnt and not p.block_hash]
    pages = torch.tensor([0, *free], device="cuda")
    for cache in engine.caches:
        cache.index_fill_(0, pages, 0xFF)


def engine_of(engine: Engine) -> str:
    """Which engine of kvarn_core the first layer runs."""
    layers = engine.engine.vllm_config.compilation_config.static_forward_context
    return next(iter(layers.values())).impl.path.engine


def run(dtype: str, eager: bool, kernels: str, arrays: Path) -> dict[str, Any]:
    """Everything that one configuration is asked; `kernels` is an engine of kvarn_core."""
    watch = Watch()
    options = {"additional_config": {"kvarn": {"engine": kernels}}}
    engine = Engine(MODEL, PRESET, dtype=dtype, enforce_eager=eager, **SETTINGS, **options)
    report: dict[str, Any] = {
        "runner": type(engine.runner).__module__,
        "graphs": str(engine.engine.vllm_config.compilation_config.cudagraph_mode),
        "asynchronous": engine.engine.vllm_config.scheduler_config.async_scheduling,
        "kernels": len(watch.compiled) + nvrtc.load.cache_info().misses,
        "engine": engine_of(engine),
    }
    watch.compiled.clear()
    loaded = nvrtc.load.cache_info().misses
    watch.guard()
    scheduler = engine.scheduler.scheduler_config

    problems = items(24, 30_000)
    report["cold"] = ask(engine, problems)
    report["preemptions"] = engine.preemptions
    report["steps"] = dict(watch.steps)
    for threshold in (64, 129, 512):
        scheduler.long_prefill_token_threshold = threshold
        engine.kv_cache_manager.reset_prefix_cache()
        report[f"chunks of {threshold}"] = ask(engine, items(8, 30_100))
    scheduler.long_prefill_token_threshold = 0
    report["again"] = ask(engine, items(8, 30_100))

    # eight rows at a time, so that every batch has the size of a graph
    same = items(8, 30_200)
    for name, before_step in (("same", None), ("poisoned", lambda: poison(engine))):
        engine.kv_cache_manager.reset_prefix_cache()
        report[name] = ask(engine, same, tokens=130, before_step=before_step)

    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["segment.all.allocated"]
    engine.kv_cache_manager.reset_prefix_cache()
    report["repeated"] = ask(engine, problems)
    report["segments"] = torch.cuda.memory_stats()["segment.all.allocated"] - before

    engine.kv_cache_manager.reset_prefix_cache()
    texts = program_texts(4, 2048)
    rows = read(engine, texts)
    np.savez(arrays, **{str(number): row for number, row in enumerate(rows)})
    report["compiled while serving"] = watch.compiled
    report["loaded while serving"] = nvrtc.load.cache_info().misses - loaded
    engine.stop()
    return report


def main() -> None:
    out, mode, dtype, kernels = sys.argv[1:]
    report = run(dtype, mode == "eager", kernels, Path(out).with_suffix(".npz"))
    Path(out).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()

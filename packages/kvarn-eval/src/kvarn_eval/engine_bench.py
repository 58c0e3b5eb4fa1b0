"""One arm of the throughput comparison, in a process of its own: vLLM's engine without a server.

Started by `throughput.py` as ``python -m kvarn_eval.engine_bench plan.json result.json``. This is
the one file here that imports vLLM, and only inside functions. It knows nothing of KVarN's plugin,
which vLLM loads by itself if the plan names one of its cache dtypes.

Decode is measured while *all* requests generate: the clock starts at the step after which each of
them has its first token and stops before the first of them ends, so neither prefill nor draining
is in the number. A burst is the opposite: everything from the first prompt to the last answer.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvarn_eval.capacity import requests_that_fit
from kvarn_eval.engine_steps import Burst, Decode, Trace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WARM_UP = (2, 8)  # requests, output tokens
SPARE_STEPS = 8
BURST = re.compile(r"(\d+)x(\d+)\+(\d+)")


def burst_shape(text: str) -> tuple[int, int, int]:
    """Requests, tokens per prompt and tokens per answer of a burst such as ``64x16000+2048``.

    Raises
    ------
    ValueError
        If it is written in another way, or a number is zero.
    """
    match = BURST.fullmatch(text)
    requests, prompt, answer = map(int, match.groups()) if match else (0, 0, 0)
    if not requests * prompt * answer:
        raise ValueError(
            f"{text} is no burst. Write requests, prompt and answer as in 64x16000+2048."
        )
    return requests, prompt, answer


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Parameters
    ----------
    engine : dict
        Arguments of vLLM's ``EngineArgs``, among them ``max_num_batched_tokens`` and
        ``max_num_seqs``.
    flash_attn_version : int, optional
        Set after vLLM has made its configuration: it forces version 2 for TurboQuant, which some
        builds do not have. None leaves vLLM's choice.
    prompt_tokens, requests, output_tokens : int
        Size of the equal batch.
    capacity_tokens : int
        Prompt length of the run with as many requests as fit; 0 skips it.
    decode_seconds : float
        Longest time of one decode window.
    bursts : list of str
        Bursts to measure, as `burst_shape` reads them. One that is named twice is measured twice.
    seed : int
        Of the random prompts.
    """

    engine: dict[str, Any]
    flash_attn_version: int | None
    prompt_tokens: int
    requests: int
    output_tokens: int
    capacity_tokens: int
    decode_seconds: float
    bursts: list[str] = field(default_factory=list)
    seed: int = 0

    def prompts(
        self, count: int, vocabulary: int, length: int | None = None, of: str = ""
    ) -> list[list[int]]:
        """The first `count` prompts of random tokens; no two share a prefix.

        Parameters
        ----------
        count, vocabulary : int
            Prompts and different tokens.
        length : int, optional
            Tokens of a prompt; `prompt_tokens` by default.
        of : str
            Prompts of another name are others.
        """
        prompts = []
        for number in range(count):
            draw = random.Random(f"{self.seed}-{of}{number}")  # noqa: S311 - a workload
            prompts.append(draw.choices(range(vocabulary), k=length or self.prompt_tokens))
        return prompts


class Driver:
    """Feeds requests to a vLLM engine and watches its steps."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.count = 0

    def counter(self, name: str) -> int:
        """Value of one of vLLM's counters."""
        return sum(metric.value for metric in self.engine.get_metrics() if metric.name == name)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        output_tokens: int,
        *,
        window_tokens: int | None = None,
        seconds: float = float("inf"),
    ) -> Trace:
        """Generate until all requests end, or the window has had its tokens or its time.

        Parameters
        ----------
        prompts : sequence of token ids
            One request each.
        output_tokens : int
            Tokens of each answer; end-of-sequence tokens are ignored.
        window_tokens : int, optional
            Stop when this many tokens per request came while all requests generated.
        seconds : float
            Stop when all requests have generated for this long.

        Returns
        -------
        Trace
        """
        from vllm import SamplingParams  # noqa: TID251
        from vllm.sampling_params import RequestOutputKind  # noqa: TID251

        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=output_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        names = []
        for prompt in prompts:
            names.append(f"request-{self.count}")
            self.count += 1
            self.engine.add_request(names[-1], {"prompt_token_ids": list(prompt)}, parameters)
        trace, started, ended, tokens = Trace(), set(), 0, 0
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                new = len(output.outputs[0].token_ids)
                tokens += new
                ended += output.finished
                if new:
                    started.add(output.request_id)
            trace.times.append(time.monotonic())
            trace.tokens.append(tokens)
            trace.started.append(len(started))
            trace.ended.append(ended)
            window = trace.window(len(prompts))
            if window is not None:
                first, last = window
                enough = window_tokens is not None and (
                    trace.tokens[last] - trace.tokens[first] >= window_tokens * len(prompts)
                )
                if enough or trace.times[last] - trace.times[first] >= seconds:
                    self.engine.abort_request(names)
        return trace

    def counted(
        self, prompts: Sequence[Sequence[int]], output_tokens: int, **stop: Any
    ) -> tuple[Trace, int, float]:
        """Run; the trace, preemptions and the share of prompt tokens hit."""
        names = ("vllm:num_preemptions", "vllm:prefix_cache_hits", "vllm:prefix_cache_queries")
        before = [self.counter(name) for name in names]
        trace = self.run(prompts, output_tokens, **stop)
        preempted, hit, asked = (
            self.counter(name) - value for name, value in zip(names, before, strict=True)
        )
        return trace, preempted, hit / max(asked, 1)

    def decode(self, prompts: Sequence[Sequence[int]], output_tokens: int, **stop: Any) -> Decode:
        """Run, and reduce to decode speed while all requests generate."""
        trace, preempted, hit = self.counted(prompts, output_tokens, **stop)
        return Decode.of(trace, len(prompts), preempted, hit)

    def burst(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> Burst:
        """Run to the last answer, and reduce to the time that all of it took."""
        began = time.monotonic()
        trace, preempted, hit = self.counted(prompts, output_tokens)
        return Burst.of(trace, began, preempted, hit)


def start_engine(plan: Plan) -> Any:
    """Start vLLM's engine as its own offline interface does."""
    from vllm import EngineArgs  # noqa: TID251
    from vllm.usage.usage_lib import UsageContext  # noqa: TID251
    from vllm.v1.engine.llm_engine import LLMEngine  # noqa: TID251

    context = UsageContext.LLM_CLASS
    config = EngineArgs(**plan.engine).create_engine_config(context)
    if plan.flash_attn_version is not None:
        config.attention_config.flash_attn_version = plan.flash_attn_version
    return LLMEngine.from_vllm_config(config, usage_context=context)


def measure_arm(plan: Plan, began: float, keep: Callable[[dict[str, Any]], None]) -> None:
    """Start the engine and measure everything.

    Parameters
    ----------
    plan : Plan
        What to measure.
    began : float
        When this process started, on the monotonic clock.
    keep : callable
        Receives all figures so far, ready for JSON, after each measurement.
    """
    engine = start_engine(plan)
    startup = time.monotonic() - began
    config = engine.vllm_config
    cache, vocabulary = config.cache_config, config.model_config.get_vocab_size()

    def fits(num_tokens: int) -> int:
        return requests_that_fit(
            pages=cache.num_gpu_blocks,
            page_size=cache.block_size,
            cache_dtype=cache.cache_dtype,
            num_tokens=num_tokens,
            head_dim=config.model_config.get_head_size(),
        )

    longest = plan.prompt_tokens + plan.output_tokens
    batch = min(fits(longest), plan.engine["max_num_seqs"])
    found: dict[str, Any] = {
        "startup_seconds": startup,
        "pages": cache.num_gpu_blocks,
        "page_size": cache.block_size,
        "requests_that_fit": fits(longest),
        "tokens_per_request": longest,
        "bursts": [],
    }
    keep(found)
    driver = Driver(engine)
    prompts = plan.prompts(max(plan.requests, batch, WARM_UP[0]), vocabulary)

    driver.run([list(reversed(p)) for p in prompts[: WARM_UP[0]]], WARM_UP[1])
    engine.reset_prefix_cache()

    equal = prompts[: plan.requests]
    start = time.monotonic()
    driver.run(equal, 1)
    found["prefill_tokens"] = sum(map(len, equal))
    found["prefill_seconds"] = time.monotonic() - start
    limit = {"seconds": plan.decode_seconds}
    found["equal"] = asdict(driver.decode(equal, plan.output_tokens, **limit))
    keep(found)

    if plan.capacity_tokens:
        # early requests must still generate when the last one has been prefilled
        budget = plan.engine["max_num_batched_tokens"] - batch
        prefill_steps = -(-batch * plan.capacity_tokens // budget)
        output = prefill_steps + plan.output_tokens + SPARE_STEPS
        batch = min(batch, fits(plan.capacity_tokens + output))
        full = [prompt[: plan.capacity_tokens] for prompt in prompts[:batch]]
        stop = {"window_tokens": plan.output_tokens, **limit}
        found["capacity"] = asdict(driver.decode(full, output, **stop))
        found["capacity"]["prompt_tokens"] = plan.capacity_tokens
        keep(found)

    for number, text in enumerate(plan.bursts):
        requests, prompt_tokens, output_tokens = burst_shape(text)
        sent = plan.prompts(requests, vocabulary, prompt_tokens, f"burst-{number}-")
        engine.reset_prefix_cache()
        answered = asdict(driver.burst(sent, output_tokens))
        found["bursts"].append({"burst": text, **answered})
        keep(found)
    engine.engine_core.shutdown()


def main(plan_file: str, result_file: str, began: float) -> None:
    """Measure the arm of a plan file; the result file holds what is known so far."""
    plan = Plan(**json.loads(Path(plan_file).read_text(encoding="utf-8")))
    result = Path(result_file)

    def keep(found: dict[str, Any]) -> None:
        unfinished = result.with_suffix(".part")
        unfinished.write_text(json.dumps(found, indent=1, allow_nan=False), encoding="utf-8")
        unfinished.replace(result)

    measure_arm(plan, began, keep)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], time.monotonic())

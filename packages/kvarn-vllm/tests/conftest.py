"""A tiny model, and a real vLLM engine whose scheduler and pages tests can reach.

The engine runs in this process with one thread, so that starting one takes seconds.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

os.environ |= {
    "KVARN_DEBUG_PRESETS": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import pytest
import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

if not torch.cuda.is_available():
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # else warming up compiles for half a minute

VOCABULARY = 512
POOL_BYTES = 1 << 27


def write_tiny_model(folder: Path, head_dim: int = 128, max_len: int = 2048) -> Path:
    hidden, intermediate, layers, heads, kv_heads = 128, 256, 2, 4, 2
    generator = torch.Generator().manual_seed(20)

    def weight(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * gain / columns**0.5

    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, hidden, generator=generator),
        "lm_head.weight": weight(VOCABULARY, hidden, 3.0),
        "model.norm.weight": torch.ones(hidden),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": torch.ones(hidden),
            prefix + "post_attention_layernorm.weight": torch.ones(hidden),
            prefix + "self_attn.q_proj.weight": weight(heads * head_dim, hidden),
            prefix + "self_attn.k_proj.weight": weight(kv_heads * head_dim, hidden),
            prefix + "self_attn.v_proj.weight": weight(kv_heads * head_dim, hidden),
            prefix + "self_attn.o_proj.weight": weight(hidden, heads * head_dim, 4.0),
            prefix + "self_attn.q_norm.weight": 1.5 * torch.ones(head_dim),
            prefix + "self_attn.k_norm.weight": torch.ones(head_dim),
            prefix + "mlp.gate_proj.weight": weight(intermediate, hidden),
            prefix + "mlp.up_proj.weight": weight(intermediate, hidden),
            prefix + "mlp.down_proj.weight": weight(hidden, intermediate),
        }
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "max_position_embeddings": max_len,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": VOCABULARY,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@dataclass
class Answer:
    """Generated tokens with their log-probabilities, and those of the most likely tokens."""

    tokens: list[int]
    logprobs: list[float]
    best: list[float]


class Engine:
    """An engine under test; `options` are vLLM's."""

    def __init__(self, model: Path, kv_cache_dtype: str, **options: Any) -> None:
        from vllm import LLM
        from vllm.v1.executor.uniproc_executor import UniProcExecutor

        settings = {
            "dtype": "float32",
            "max_model_len": 1024,
            "max_num_batched_tokens": 2048,
            "kv_cache_memory_bytes": POOL_BYTES,
            "distributed_executor_backend": UniProcExecutor,
            "enforce_eager": True,
        }
        self.llm = LLM(
            str(model),
            skip_tokenizer_init=True,
            kv_cache_dtype=kv_cache_dtype,
            **{**settings, **options},
        )
        self.engine = self.llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.kv_cache_manager = self.scheduler.kv_cache_manager
        self.pool = self.kv_cache_manager.block_pool
        self.manager = self.kv_cache_manager.coordinator.single_type_managers[0]
        self.free_pages = self.pool.get_num_free_blocks()
        self.preemptions = 0
        self._count_preemptions()

    def _count_preemptions(self) -> None:
        preempt = self.scheduler._preempt_request

        def counting(*args: Any) -> None:
            self.preemptions += 1
            preempt(*args)

        self.scheduler._preempt_request = counting

    @property
    def runner(self) -> Any:
        """vLLM's model runner."""
        return self.core.model_executor.driver_worker.worker.model_runner

    @property
    def caches(self) -> list[torch.Tensor]:
        """Cache of each layer."""
        return self.runner.kv_caches

    def drain(self) -> None:
        """Finish the step that asynchronous scheduling has under way."""
        while getattr(self.core, "batch_queue", None):
            self.core.step_fn()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int | Sequence[int] = 40,
        before_step: Callable[[int], None] | None = None,
        adapters: Sequence[Any] = (None,),
        **sampling: Any,
    ) -> dict[int, list[Answer]]:
        """Answers by prompt number, one per sample. Aborted requests are left out.

        Prompts take the `adapters`, LoRA requests or None, in turn.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            params = SamplingParams(
                max_tokens=limit, ignore_eos=True, detokenize=False, logprobs=1,
                output_kind=RequestOutputKind.FINAL_ONLY, **{"temperature": 0.0, **sampling},
            )  # fmt: skip
            self.engine.add_request(
                str(number), {"prompt_token_ids": list(prompt)}, params,
                lora_request=adapters[number % len(adapters)],
            )  # fmt: skip
        answers, step = {}, 0
        while self.engine.has_unfinished_requests():
            if before_step:
                before_step(step)
            for output in self.engine.step():
                if output.finished:
                    answers[int(output.request_id)] = [_answer(one) for one in output.outputs]
            step += 1
        self.drain()
        assert self.pool.get_num_free_blocks() == self.free_pages
        assert not self.manager.req_to_blocks
        return answers

    def preempt_all(self) -> None:
        """Take the pages of every running request; the prefix cache is emptied as well."""
        self.scheduler.reset_prefix_cache(reset_running_requests=True)

    def stop(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self.engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def _answer(output: Any) -> Answer:
    tokens = list(output.token_ids)
    pairs = list(zip(tokens, output.logprobs, strict=True))
    return Answer(
        tokens,
        [entry[token].logprob for token, entry in pairs],
        [max(one.logprob for one in entry.values()) for _, entry in pairs],
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of the tiny model with a given head dimension."""
    folder = tmp_path_factory.mktemp("models")

    def model(head_dim: int = 128) -> Path:
        path = folder / f"tiny-{head_dim}"
        return path if path.exists() else write_tiny_model(path, head_dim)

    return model


@pytest.fixture(scope="session")
def start(tiny_model: Callable[..., Path]) -> Callable[..., Any]:
    """Context manager that runs an engine: ``with start("kvarn_k4v2_g128", head_dim=64) as e``."""

    @contextmanager
    def started(
        kv_cache_dtype: str, *, head_dim: int = 128, model: Path | None = None, **options: Any
    ) -> Iterator[Engine]:
        engine = Engine(model or tiny_model(head_dim), kv_cache_dtype, **options)
        try:
            yield engine
        finally:
            engine.stop()

    return started

"""The plugin in the real engine: vLLM's scheduler, block pool, prefix cache and preemption.

The strongest oracle is the debug preset. It takes every path of a quantised preset but stores rows
unquantised, so whatever the scheduler does, its tokens must be those of the stock cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvarn_core import Preset, RecordLayout

pytestmark = pytest.mark.engine

DEBUG = "kvarn_debug32_g128"
SEALED = {"additional_config": {"kvarn": {"prefill": "sealed"}}}
NEAR_TIE = 0.02  # nat


def random_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 512, (count,), generator=generator).tolist()


def requests() -> list[list[int]]:
    """Prompts at page edges, and prompts that share prefixes ending inside and at tiles."""
    edges = [random_tokens(n, n) for n in (1, 127, 128, 129, 255, 256, 257)]
    common = random_tokens(640, 7)
    shared = [common[:640], common[:640], common[:500] + random_tokens(40, 8), common[:385]]
    return edges + shared


def assert_same(answers: dict[int, list[Any]], expected: dict[int, list[Any]], near_tie=0.0):
    """Equal tokens; a difference is accepted only where the two candidates nearly tie."""
    assert answers.keys() == expected.keys()
    for number, samples in expected.items():
        for answer, wanted in zip(answers[number], samples, strict=True):
            assert len(answer.tokens) == len(wanted.tokens)
            for step, (got, want) in enumerate(zip(answer.tokens, wanted.tokens, strict=True)):
                if got != want:
                    gap = abs(answer.best[step] - wanted.best[step])
                    assert gap <= near_tie, f"request {number}, token {step}: {got} != {want}"
                    break


@pytest.fixture(scope="module")
def stock(start) -> dict[int, list[Any]]:
    """Answers of the stock cache to `requests`, given twice."""
    with start("auto") as engine:
        return engine.generate(requests() * 2)


VARIANTS = {
    "one-chunk": {},
    "chunks-of-64": {"max_num_batched_tokens": 64},
    "chunks-of-200-sealed": {
        "max_num_batched_tokens": 200,
        **SEALED,
    },
    "sealed": SEALED,
    "no-prefix-cache": {"enable_prefix_caching": False, "max_num_batched_tokens": 300},
    "few-pages": {"num_gpu_blocks_override": 40, "max_num_batched_tokens": 200},
    "few-pages-no-prefix-cache": {
        "num_gpu_blocks_override": 34,
        "enable_prefix_caching": False,
    },
    "one-maximal-request": {"num_gpu_blocks_override": 19, "max_num_batched_tokens": 200},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_debug_preset_equals_stock(start, stock, options: dict[str, Any]) -> None:
    with start(DEBUG, **options) as engine:
        assert_same(engine.generate(requests() * 2), stock)


def test_hundreds_of_preemptions_change_no_token(start, stock) -> None:
    """All pages of all running requests are taken away again and again."""
    with start(DEBUG, max_num_batched_tokens=300) as engine:

        def preempt(step: int) -> None:
            if step % 4 == 3:
                engine.preempt_all()

        assert_same(engine.generate(requests() * 2, before_step=preempt), stock)
        assert engine.preemptions >= 200


@pytest.fixture(scope="module")
def quantised(start) -> dict[int, list[Any]]:
    """Answers of the default preset in mode sealed, one chunk per prompt, no prefix cache."""
    with start("kvarn_k4v2_g128", enable_prefix_caching=False, **SEALED) as engine:
        return engine.generate(requests(), max_tokens=150)


def test_chunk_sizes_and_preemption_change_no_quantised_token(start, quantised) -> None:
    """A full pool and small chunks: records are sealed in other steps, with the same bytes."""
    options = {"enable_prefix_caching": False, "num_gpu_blocks_override": 50, **SEALED}
    with start("kvarn_k4v2_g128", max_num_batched_tokens=64, **options) as engine:
        assert_same(engine.generate(requests(), max_tokens=150), quantised, NEAR_TIE)
        assert engine.preemptions > 0


def test_same_step_hits_and_shared_sinks_under_eviction(start, stock) -> None:
    """Hits in the step that makes the pages, sink pages found again, and sink pages lost."""
    hits, sinks, sink_keys = [], {"shared": 0, "lost": 0}, set()
    with start(DEBUG, num_gpu_blocks_override=60) as engine:
        admit, sink_key = engine.manager._admit, engine.manager._sink_key

        def watched(request_id: str, pages: Any) -> Any:
            columns = admit(request_id, pages)
            hits.append(len(pages))
            if pages:
                sinks["lost" if columns[1].is_null else "shared"] += 1
            return columns

        def noted(first_hash: bytes) -> Any:
            sink_keys.add(key := sink_key(first_hash))
            return key

        engine.manager._admit, engine.manager._sink_key = watched, noted
        same = random_tokens(640, 7)
        engine.generate([same, same], max_tokens=1)
        assert hits == [0, 3], "the second request hits the tiles sealed in the same step"

        def evict_sinks(step: int) -> None:
            if step % 2:
                engine.pool.evict_blocks(
                    {page.block_id for page in engine.pool.blocks if page.block_hash in sink_keys}
                )

        assert_same(engine.generate(requests() * 2), stock)
        assert_same(engine.generate(requests() * 2, before_step=evict_sinks), stock)
    assert sinks["shared"] > 0
    assert sinks["lost"] > 0


def test_abort_leaves_the_others_alone(start, stock) -> None:
    with start(DEBUG, max_num_batched_tokens=200) as engine:

        def abort(step: int) -> None:
            if step == 5:
                engine.engine.abort_request(["8", "3"])
            if step == 25:
                engine.engine.abort_request(["20", "0"])

        answers = engine.generate(requests() * 2, before_step=abort)
    gone = {3, 8, 20, 0} - {n for n, samples in answers.items() if len(samples[0].tokens) == 40}
    assert {3, 8} <= gone
    kept = {n: samples for n, samples in answers.items() if n not in gone}
    assert_same(kept, {n: stock[n] for n in kept})
    assert len(kept) >= 18


def test_until_max_model_len_and_refused_lengths(start) -> None:
    """Requests that end in the last column of the page table, and lengths that vLLM refuses."""
    prompts, limits = [random_tokens(n, n) for n in (1, 400, 511)], [511, 112, 1]
    with start("auto", max_model_len=512) as engine:
        expected = engine.generate(prompts, limits)
    pages = RecordLayout(Preset.from_name(DEBUG), 128).columns(512)
    options = {"max_model_len": 512, "num_gpu_blocks_override": pages}
    with start(DEBUG, max_num_batched_tokens=300, **options) as engine:
        answers = engine.generate(prompts, limits)
        with pytest.raises(ValueError, match="cannot be empty"):
            engine.generate([[]])
        with pytest.raises(ValueError, match="longer than the maximum model length"):
            engine.generate([random_tokens(512, 1)], max_tokens=1)
        assert_same(engine.generate(prompts[2:], limits[2:]), {0: expected[2]})
    assert [len(answers[n][0].tokens) for n in range(3)] == limits
    assert_same(answers, expected)


def test_a_pool_that_cannot_hold_one_request_is_refused(start) -> None:
    pages = RecordLayout(Preset.from_name(DEBUG), 128).columns(512)
    with (
        pytest.raises(ValueError, match="KV cache"),
        start(DEBUG, max_model_len=512, num_gpu_blocks_override=pages - 1),
    ):
        pass


SHAPES = {
    "g64-d128": ("kvarn_debug32_g64", 128, "float32", 0.0),
    "g64-d64": ("kvarn_debug32_g64", 64, "float32", 0.0),
    "g128-d256": (DEBUG, 256, "float32", 0.0),
    "float16": (DEBUG, 128, "float16", 0.05),
    "bfloat16": (DEBUG, 64, "bfloat16", 0.3),
}


@pytest.mark.parametrize(("preset", "head_dim", "dtype", "near_tie"), SHAPES.values(), ids=SHAPES)
def test_groups_head_sizes_and_model_dtypes(start, preset, head_dim, dtype, near_tie) -> None:
    """Half-precision models round differently, so their near ties are wider."""
    options = {"head_dim": head_dim, "dtype": dtype, "max_num_batched_tokens": 200}
    with start("auto", **options) as engine:
        expected = engine.generate(requests())
    with start(preset, **options) as engine:
        assert_same(engine.generate(requests()), expected, near_tie)
    with start(preset.replace("debug32", "k4v2"), **options) as engine:
        answers = engine.generate(requests())
    assert all(len(answers[n][0].tokens) == 40 for n in range(len(requests())))


POISON = {"ff": [0xFF], "fp16-nan": [0x00, 0x7E], "fp16-large": [0xFF, 0x7B]}


@pytest.mark.parametrize("pattern", POISON.values(), ids=POISON)
def test_poisoned_free_pages_change_no_bit(start, pattern: list[int]) -> None:
    """Before every step, all bytes that no request owns are overwritten, the null page too."""
    with start("kvarn_k4v2_g128", num_gpu_blocks_override=60) as engine:

        def poison(step: int) -> None:
            free = [p.block_id for p in engine.pool.blocks if not p.ref_cnt and not p.block_hash]
            for cache in engine.caches:
                fill = torch.tensor(pattern, dtype=torch.uint8)
                cache[[0, *free]] = fill.repeat(cache.shape[2] // len(pattern))

        def poison_owned(step: int) -> None:
            poison(step)
            for columns in engine.manager.req_to_blocks.values():
                for cache in engine.caches:
                    cache[columns[2].block_id] = 0xFF

        clean = engine.generate(requests())
        engine.kv_cache_manager.reset_prefix_cache()
        assert engine.generate(requests(), before_step=poison) == clean
        engine.kv_cache_manager.reset_prefix_cache()
        assert engine.generate(requests(), before_step=poison_owned) != clean


def test_tensor_parallel(start, stock) -> None:
    """Two ranks over gloo, one KV head each, the same page numbers on both."""
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with start(DEBUG, **options) as engine:
        assert_same(engine.generate(requests() * 2), stock)


def test_pipeline_parallel(start, stock) -> None:
    """Two ranks with a layer each, the same page numbers on both."""
    options = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
    with start(DEBUG, **options) as engine:
        assert_same(engine.generate(requests() * 2), stock)


def write_adapter(folder: Path, seed: int, head_dim: int = 128, rank: int = 8) -> Path:
    """A LoRA adapter of the tiny model that changes queries, keys and values beyond recognition."""
    generator = torch.Generator().manual_seed(seed)
    outputs = {"q_proj": 4 * head_dim, "k_proj": 2 * head_dim, "v_proj": 2 * head_dim}
    tensors = {}
    for layer in range(2):
        for name, width in outputs.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}."
            tensors[prefix + "lora_A.weight"] = torch.randn(rank, 128, generator=generator) / 11
            tensors[prefix + "lora_B.weight"] = torch.randn(width, rank, generator=generator) / 3
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
              "target_modules": list(outputs), "bias": "none"}  # fmt: skip
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_adapters_share_no_page(start, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal prompts with two LoRA adapters, twice, so that each finds its own pages."""
    from vllm.lora.request import LoRARequest
    from vllm.utils.torch_utils import async_tensor_h2d

    # vLLM pins memory here by the name of the system, with or without a GPU
    monkeypatch.setattr(async_tensor_h2d, "__defaults__", (False,))
    folders = [write_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    adapters = [LoRARequest(f.name, i, str(f)) for i, f in enumerate(folders, 1)]
    prompts = [prompt for prompt in requests() for _ in adapters] * 2
    options = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    with start("auto", enable_prefix_caching=False, **options) as engine:
        expected = engine.generate(prompts, adapters=adapters)
    for n in range(0, len(prompts), 2):
        assert expected[n][0].tokens != expected[n + 1][0].tokens
    hits = []
    with start(DEBUG, max_num_batched_tokens=300, **options) as engine:
        admit = engine.manager._admit

        def watched(request_id: str, pages: Any) -> Any:
            hits.append(len(pages))
            return admit(request_id, pages)

        engine.manager._admit = watched
        assert_same(engine.generate(prompts, adapters=adapters), expected)
    assert sum(hits) > 0


WITHOUT_PLUGIN = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import Engine
engine = Engine(Path({model!r}), "auto")
import kvarn_vllm.patches
assert kvarn_vllm.patches._status is None, "the plugin was loaded"
prompts = json.loads({prompts!r})
tokens = [engine.generate(prompts)[n][0].tokens for n in range(len(prompts))]
print("\\nRESULT" + json.dumps([engine.pool.num_gpu_blocks, tokens]))
"""


def test_stock_cache_is_untouched_by_the_plugin(start, tiny_model) -> None:
    """The default cache with the plugin installed: same pages, same tokens as without it."""
    prompts = requests()[:5]
    with start("auto") as engine:
        tokens = engine.generate(prompts)
        pages = engine.pool.num_gpu_blocks
    script = WITHOUT_PLUGIN.format(
        tests=str(Path(__file__).parent), model=str(tiny_model()), prompts=json.dumps(prompts)
    )
    environment = {**os.environ, "VLLM_PLUGINS": "none"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    expected = json.loads(done.stdout.split("RESULT")[1])
    assert [pages, [tokens[n][0].tokens for n in range(len(prompts))]] == expected

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import EngineArgs

from kvarn_core import Recipe, nvrtc
from kvarn_vllm.config import (
    Options,
    check_engine,
    group_size,
    is_kvarn,
)

NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
TRANSFER = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
WINDOWS = {
    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32,
    "use_sliding_window": True, "max_window_layers": 1,
}  # fmt: skip
LONG_WINDOW = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 262_144,
}  # fmt: skip
CONTEXT_PARALLEL = (
    "KVarN: context parallelism splits the tokens of a tile over ranks. "
    "Set --decode-context-parallel-size and --prefill-context-parallel-size to 1."
)
FLAGS = {
    "speculative-decoding": (
        {"speculative_config": NGRAM},
        "KVarN: speculative decoding is not supported with a kvarn KV cache yet. "
        "Remove --speculative-config, or name the base model of a speculator.",
    ),
    "context-parallelism": (
        {"prefill_context_parallel_size": 2},
        CONTEXT_PARALLEL,
    ),
    "context-parallelism-of-decode": (
        {"tensor_parallel_size": 4, "decode_context_parallel_size": 2},
        CONTEXT_PARALLEL,
    ),
    "scales": (
        {"calculate_kv_scales": True},
        "KVarN: kvarn computes its own scales. Remove --calculate-kv-scales.",
    ),
    "block-size": (
        {"block_size": 64},
        "KVarN: --block-size 64 does not fit kvarn_k4v2_g128. Drop --block-size or set it to 128.",
    ),
    "kv-transfer": (
        {"kv_transfer_config": TRANSFER},
        "KVarN: transfer and offloading of kvarn pages are not supported yet. "
        "Remove --kv-transfer-config and --kv-offloading-size.",
    ),
    "kv-offloading": (
        {"kv_offloading_size": 1.0},
        "KVarN: transfer and offloading of kvarn pages are not supported yet. "
        "Remove --kv-transfer-config and --kv-offloading-size.",
    ),
    "fast-prefill": (
        {"kv_sharing_fast_prefill": True},
        "KVarN: fast prefill over shared caches is not supported. "
        "Remove --kv-sharing-fast-prefill.",
    ),
    "attention-backend": (
        {"attention_backend": "CPU_ATTN"},
        "KVarN: attention backend CPU_ATTN cannot read a kvarn cache. "
        "Remove --attention-backend; kvarn selects its own.",
    ),
    "skip-layers": (
        {"kv_cache_dtype_skip_layers": ["0"]},
        "KVarN: layers outside kvarn need a cache group of their own, which is not supported yet. "
        "Remove --kv-cache-dtype-skip-layers.",
    ),
    "routed-experts": (
        {"enable_return_routed_experts": True},
        "KVarN: returning routed experts needs stock block tables. "
        "Remove --enable-return-routed-experts.",
    ),
    "options-not-an-object": (
        {"additional_config": {"kvarn": 3}},
        "KVarN: additional config 'kvarn' is 3. "
        'Pass an object, for example {"kvarn": {"prefill": "sealed"}}.',
    ),
    "unknown-option": (
        {"additional_config": {"kvarn": {"prefil": "chunk"}}},
        "KVarN: there is no option 'prefil'. Use prefill, recipe, engine, balance.",
    ),
    "unknown-prefill-mode": (
        {"additional_config": {"kvarn": {"prefill": "fast"}}},
        "KVarN: option prefill cannot be 'fast'. Use chunk or sealed.",
    ),
    "unknown-balance": (
        {"additional_config": {"kvarn": {"balance": "no"}}},
        "KVarN: option balance cannot be 'no'. Use true or false.",
    ),
    "unknown-recipe": (
        {"additional_config": {"kvarn": {"recipe": ["paper"]}}},
        "KVarN: option recipe cannot be ['paper']. Use kvarn or paper.",
    ),
}


def engine_args(model: Any, **flags: Any) -> EngineArgs:
    settings = {"kv_cache_dtype": "kvarn_k4v2_g128", **flags}
    return EngineArgs(model=str(model), skip_tokenizer_init=True, **settings)


def refusal(model: Any, **flags: Any) -> str:
    with pytest.raises((NotImplementedError, ValueError)) as caught:
        engine_args(model, **flags).create_engine_config()
    return str(caught.value)


@pytest.mark.parametrize(("flags", "sentence"), FLAGS.values(), ids=FLAGS)
def test_refused_flags(tiny_model: Any, flags: dict[str, Any], sentence: str) -> None:
    assert refusal(tiny_model(), **flags) == sentence


def test_batch_invariant_mode_is_refused(tiny_model: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert refusal(tiny_model()) == (
        "KVarN: batch-invariant mode is not supported yet. Unset VLLM_BATCH_INVARIANT."
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"head_dim": 96},
            "KVarN: head size 96 is not supported. Choose a model with head size 64, 128 or 256 "
            "(the rotation needs a power of two).",
        ),
        (
            WINDOWS,
            "KVarN: this model's attention needs a sliding window, which kvarn does not implement. "
            "Use another --kv-cache-dtype.",
        ),
        (
            {**WINDOWS, "sliding_window": 262_144},  # which no flag lifts from some layers
            "KVarN: this model's attention needs a sliding window, which kvarn does not implement. "
            "Use another --kv-cache-dtype.",
        ),
        (
            LONG_WINDOW,
            "KVarN: this model's sliding window of 262144 tokens hides nothing, but layers ask for "
            "it. Add --disable-sliding-window.",
        ),
    ],
    ids=["head-size", "sliding-window", "long-window-of-some-layers", "long-window"],
)  # fmt: skip
def test_refused_models(tiny_model: Any, tmp_path: Any, changes: Any, sentence: str) -> None:
    config = json.loads((tiny_model() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    assert refusal(tmp_path) == sentence


def test_a_window_longer_than_any_request_can_be_disabled(tiny_model: Any, tmp_path: Any) -> None:
    config = json.loads((tiny_model() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **LONG_WINDOW}))
    found = engine_args(tmp_path, disable_sliding_window=True).create_engine_config()
    assert found.model_config.max_model_len == config["max_position_embeddings"]


def complete_config(
    platform: str = "cpu",
    capability: int = 90,
    ranks: int = 1,
    engine: str = "auto",
    prefill: str = "chunk",
    graphs: str = "FULL_AND_PIECEWISE",
    executor: str = "mp",
    **model: Any,
) -> tuple[Any, Any]:
    """An engine configuration that passes, with a model changed by `model`, and a platform."""
    facts = {
        "use_mla": False,
        "is_hybrid": False,
        "is_encoder_decoder": False,
        "attn_type": "decoder",
        "is_moe": False,
        "attention_chunk_size": None,
        "dtype": torch.bfloat16,
        "enable_return_routed_experts": False,
        "hf_text_config": SimpleNamespace(),
        "get_head_size": lambda: 128,
        "get_sliding_window": lambda: None,
    }
    config = SimpleNamespace(
        model_config=SimpleNamespace(**{**facts, **model}),
        cache_config=SimpleNamespace(
            cache_dtype="kvarn_k4v2_g64",
            block_size=64,
            calculate_kv_scales=False,
            kv_cache_dtype_skip_layers=[],
            kv_sharing_fast_prefill=False,
            kv_offloading_size=None,
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            data_parallel_size=ranks,
            distributed_executor_backend=executor,
        ),
        compilation_config=SimpleNamespace(cudagraph_mode=SimpleNamespace(name=graphs)),
        attention_config=SimpleNamespace(backend=None),
        speculative_config=None,
        kv_transfer_config=None,
        additional_config={"kvarn": {"engine": engine, "prefill": prefill}},
    )
    return config, SimpleNamespace(
        is_cpu=lambda: platform == "cpu",
        is_cuda=lambda: platform == "cuda",
        has_device_capability=lambda needed: capability >= needed,
        is_device_capability=lambda needed: divmod(capability, 10) == needed,
    )


FACTS = {
    "mla": (
        {"use_mla": True},
        "KVarN: MLA models keep a compressed latent, not keys and values. "
        "Use another --kv-cache-dtype.",
    ),
    "hybrid": (
        {"is_hybrid": True},
        "KVarN: hybrid state-space models are not supported yet. Use another model.",
    ),
    "encoder-decoder": (
        {"is_encoder_decoder": True},
        "KVarN: encoder-decoder models are not supported. Use another model.",
    ),
    "chunked-attention": (
        {"attention_chunk_size": 8192},
        "KVarN: this model's attention needs attention within chunks, which kvarn does not "
        "implement. Use another --kv-cache-dtype.",
    ),
    "float32-on-a-gpu": (
        {"platform": "cuda", "dtype": torch.float32},
        "KVarN: float32 models are not supported on a GPU. Use --dtype float16 or bfloat16.",
    ),
    "old-gpu": (
        {"platform": "cuda", "capability": 75},
        "KVarN: the kernels need a GPU of compute capability 8.0 or higher. Use another GPU, "
        'or plain torch, slow, with --additional-config \'{"kvarn": {"engine": "reference"}}\'.',
    ),
    "kernels-on-the-cpu": (
        {"engine": "triton"},
        "KVarN: The triton engine cannot run: the kernels need a CUDA GPU, or TRITON_INTERPRET=1 "
        "on the CPU. Use the reference engine.",
    ),
    "cuda-on-the-cpu": (
        {"engine": "cuda"},
        "KVarN: The cuda engine cannot run: its kernels need a GPU of compute capability 9.0. "
        "Use the reference engine.",
    ),
    "cuda-on-a-newer-gpu": (
        {"platform": "cuda", "capability": 100, "engine": "cuda"},
        "KVarN: the cuda engine needs a GPU of compute capability 9.0 exactly. "
        "Use engine auto or triton.",
    ),
    "experts-on-several-ranks": (
        {"ranks": 2, "is_moe": True},
        "KVarN: data parallel mixture-of-experts models are not supported yet. "
        "Set --data-parallel-size to 1.",
    ),
    "an-external-launcher-of-several-ranks": (
        {"ranks": 2, "executor": "external_launcher"},
        "KVarN: data parallel engines of an external launcher are not supported yet. "
        "Set data_parallel_size to 1, or use vllm serve.",
    ),
    "no-cache": (
        {"attn_type": "encoder_only"},
        "KVarN: this model keeps no KV cache. Remove --kv-cache-dtype.",
    ),
    "no-attention": (
        {"attn_type": "attention_free", "get_head_size": lambda: 0},
        "KVarN: this model keeps no KV cache. Remove --kv-cache-dtype.",
    ),
    "whole-graphs-of-single-requests": (
        {"platform": "cuda", "graphs": "FULL", "prefill": "sealed"},
        "KVarN: CUDA graphs cannot hold steps that are served request by request. "
        "Remove cudagraph_mode FULL, or use prefill chunk and another engine.",
    ),
    "whole-graphs-of-plain-torch": (
        {"platform": "cuda", "graphs": "FULL", "engine": "reference"},
        "KVarN: CUDA graphs cannot hold steps that are served request by request. "
        "Remove cudagraph_mode FULL, or use prefill chunk and another engine.",
    ),
    "tpu": (
        {"platform": "tpu"},
        "KVarN: this platform is not supported. Use an NVIDIA GPU or vLLM's CPU engine.",
    ),
}


@pytest.mark.parametrize(("facts", "sentence"), FACTS.values(), ids=FACTS)
def test_refused_kinds_of_model_and_platform(
    facts: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    check_engine(*complete_config(), batch_invariant=False)
    with pytest.raises(NotImplementedError) as caught:
        check_engine(*complete_config(**facts), batch_invariant=False)
    assert str(caught.value) == sentence


def test_a_gpu_of_capability_8_serves_and_plain_torch_serves_on_any() -> None:
    check_engine(*complete_config("cuda", capability=80, ranks=2), batch_invariant=False)
    config, platform = complete_config("cuda", capability=75, engine="reference")
    check_engine(config, platform, batch_invariant=False)
    check_engine(*complete_config("cuda", graphs="FULL"), batch_invariant=False)


def test_the_cuda_engine_is_refused_without_its_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    config, platform = complete_config("cuda", engine="cuda")
    monkeypatch.setattr(nvrtc, "obstacle", lambda: None)
    monkeypatch.setattr(nvrtc, "driver_obstacle", lambda: None)
    check_engine(config, platform, batch_invariant=False)
    monkeypatch.setattr(nvrtc, "driver_obstacle", lambda: "it is of CUDA 12")
    with pytest.raises(
        NotImplementedError, match=r"too old for the cuda engine \(it is of CUDA 12\)"
    ):
        check_engine(config, platform, batch_invariant=False)
    monkeypatch.setattr(nvrtc, "obstacle", lambda: "the package cuda-bindings")
    with pytest.raises(NotImplementedError) as caught:
        check_engine(config, platform, batch_invariant=False)
    assert str(caught.value) == (
        "KVarN: the cuda engine needs the package cuda-bindings. "
        "Install kvarn-core[cuda], or use engine auto or triton."
    )


def test_options() -> None:
    assert Options.from_config({}) == Options() == Options("chunk", Recipe.KVARN)
    assert Options.from_config({"another plugin": 1, "kvarn": {}}) == Options()
    given = {"kvarn": {"prefill": "sealed", "recipe": "paper", "engine": "reference"}}
    assert Options.from_config(given) == Options("sealed", Recipe.PAPER, "reference")
    assert Options.from_config(given).forced_engine == "reference"
    assert Options().forced_engine is None
    assert Options().balances
    assert not Options.from_config({"kvarn": {"balance": False}}).balances
    assert not Options("chunk", Recipe.PAPER).balances


def test_group_is_the_default_block_size(tiny_model: Any) -> None:
    assert group_size("kvarn_k4v2_g64", None) == group_size("kvarn_k4v2_g64", 64) == 64
    for preset, size in (("kvarn_k2v2_g64", 64), ("kvarn_k4v4_g128", 128)):
        config = engine_args(tiny_model(), kv_cache_dtype=preset).create_engine_config()
        assert config.cache_config.block_size == size
        assert config.cache_config.cache_dtype == preset


def test_names() -> None:
    assert is_kvarn("kvarn_k4v2_g128")
    assert is_kvarn("kvarn_debug32_g64")
    assert not is_kvarn("auto")
    assert not is_kvarn("kvarn_k8v8_g128")

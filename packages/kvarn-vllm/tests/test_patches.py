from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import EngineArgs
from vllm.config import set_current_vllm_config
from vllm.platforms.cpu import CpuPlatform
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.core.single_type_kv_cache_manager import spec_manager_map
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.block_table import MultiGroupBlockTable

from kvarn_core import PRESETS
from kvarn_vllm import patches
from kvarn_vllm.backend import backend_path
from kvarn_vllm.cache_spec import KVarNFullAttentionSpec, record_layout
from kvarn_vllm.manager import KVarNManager
from kvarn_vllm.patches import BACKEND, PATCHES, Status, arm, slot_problem
from kvarn_vllm.signatures import SIGNATURES, locate

PRESET = "kvarn_k4v2_g128"
INSTALLED = (*PATCHES, patches._platform_patch())


@pytest.fixture(scope="module", autouse=True)
def armed() -> None:
    assert arm() == Status(True)


def config(model: Any, dtype: str = PRESET, **flags: Any) -> Any:
    return EngineArgs(
        model=str(model()), skip_tokenizer_init=True, kv_cache_dtype=dtype, **flags
    ).create_engine_config()


@pytest.mark.parametrize("patch", INSTALLED, ids=lambda patch: patch.target.partition(":")[2])
def test_each_target_is_wrapped_once(patch: Any) -> None:
    owner, name = locate(patch.target)
    wrapper = inspect.getattr_static(owner, name)
    function = getattr(wrapper, "__func__", wrapper)
    assert function.__kvarn__
    assert not hasattr(function.__wrapped__, "__kvarn__")
    assert list(inspect.signature(function).parameters) == SIGNATURES[patch.target].split()
    assert patch.reason


def test_tables() -> None:
    assert {STR_DTYPE_TO_TORCH_DTYPE[name] for name in PRESETS} == {torch.uint8}
    assert spec_manager_map[KVarNFullAttentionSpec] is KVarNManager
    assert AttentionBackendEnum.CUSTOM.get_path() == BACKEND


def test_arming_again_would_stand_down() -> None:
    assert patches._arm() == Status(False, "KVarN: this vLLM serves kvarn cache dtypes itself.")


def test_arming_never_raises_and_what_is_half_patched_does_not_serve(monkeypatch: Any) -> None:
    def broken() -> Status:
        raise AttributeError("gone")

    monkeypatch.setattr(patches, "_arm", broken)
    monkeypatch.setattr(patches, "_status", None)
    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda self: "stock")
    status = arm()
    assert not status.armed
    assert status.reason == "KVarN: vLLM could not be patched (AttributeError('gone'))."
    assert EngineArgs.create_engine_config(SimpleNamespace(kv_cache_dtype="auto")) == "stock"
    with pytest.raises(RuntimeError, match="could not be patched"):
        EngineArgs.create_engine_config(SimpleNamespace(kv_cache_dtype=PRESET))


def test_unarmed_engines_refuse_ours_and_nothing_else() -> None:
    create = patches._refusing("KVarN: because.").wrap(lambda self: "stock")
    assert create(SimpleNamespace(kv_cache_dtype="fp8")) == "stock"
    with pytest.raises(RuntimeError, match=r"^KVarN: because\.$"):
        create(SimpleNamespace(kv_cache_dtype=PRESET))


def test_a_taken_slot_is_refused(tiny_model: Any) -> None:
    assert slot_problem() == ""
    register_backend(AttentionBackendEnum.CUSTOM, "rival.Backend")
    try:
        with pytest.raises(ValueError, match="CUSTOM") as caught:
            config(tiny_model)
    finally:
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    assert str(caught.value) == (
        "KVarN: vLLM's attention slot CUSTOM is taken by rival.Backend. "
        "Uninstall one of the two plugins."
    )


def test_other_dtypes_pass_through(tiny_model: Any) -> None:
    stock = config(tiny_model, "auto", block_size=32)
    assert stock.cache_config.block_size == 32
    assert stock.cache_config.cache_dtype == "auto"
    flags = {"additional_config": {"kvarn": "not looked at"}}
    stock = config(tiny_model, "auto", **flags)
    assert stock.additional_config == flags["additional_config"]
    planned: list[Any] = []
    initialize = patches._ready_model(lambda worker, plans: planned.append(plans))
    initialize(SimpleNamespace(vllm_config=stock), ["a plan"])  # and no worker to be balanced
    assert planned == [["a plan"]]


@pytest.mark.parametrize(
    ("offload", "transfer", "balanced"),
    [
        ({}, None, True),
        ({"cpu_offload_gb": 1.0}, None, True),  # a view of memory that stays where it is
        ({"offload_group_size": 2}, None, False),
        ({"load_format": "dummy"}, None, False),  # the first weights of some trainings
        ({}, "new weights", False),
    ],
)
def test_weights_that_arrive_later_are_not_balanced(
    offload: dict[str, Any],
    transfer: object,
    balanced: bool,
    tiny_model: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger=patches.LOG.name)
    found = config(tiny_model, **offload)
    found.weight_transfer_config = transfer
    done: list[str] = []
    monkeypatch.setattr("kvarn_vllm.balance.balance_model", lambda model: done.append(model))
    monkeypatch.setattr("kvarn_vllm.balance.keep_balance", lambda runner: done.append(runner))
    worker = SimpleNamespace(get_model=lambda: "model", model_runner="runner")
    initialize = patches._ready_model(lambda worker, plans: None)
    initialize(SimpleNamespace(vllm_config=found, worker=worker), [])
    assert done == (["model", "runner"] if balanced else [])
    assert ("norms are not balanced" in caplog.text) is not balanced


def selection(dtype: str, **changes: Any) -> AttentionSelectorConfig:
    return AttentionSelectorConfig(128, torch.bfloat16, dtype, 128, **changes)


def test_backend_selection() -> None:
    stock = AttentionBackendEnum.CPU_ATTN.get_path()
    choose = CpuPlatform.get_attn_backend_cls
    assert choose(None, attn_selector_config=selection("auto"), num_heads=4) == stock
    assert choose(None, selection(PRESET, attn_type="encoder_only")) == stock
    assert choose(None, attn_selector_config=selection(PRESET)) == backend_path(PRESET)
    with pytest.raises(NotImplementedError, match="attention sinks"):
        choose(None, selection(PRESET, has_sink=True))


def test_layer_spec(tiny_model: Any) -> None:
    from vllm.model_executor.layers.attention.attention import Attention

    layer = SimpleNamespace(
        kv_cache_dtype=PRESET, head_size=128, head_size_v=128, num_kv_heads=2,
        sliding_window=None, attn_type="decoder", kv_cache_torch_dtype=torch.bfloat16,
    )  # fmt: skip
    spec = Attention.get_kv_cache_spec(layer, config(tiny_model))
    assert spec == KVarNFullAttentionSpec.for_layer(PRESET, 128, 2, 128)
    layer.head_size_v = 64
    with pytest.raises(NotImplementedError, match="head sizes 128 and 64"):
        Attention.get_kv_cache_spec(layer, config(tiny_model))
    layer.kv_cache_dtype, layer.head_size_v = "auto", 128
    stock = Attention.get_kv_cache_spec(layer, config(tiny_model, "auto"))
    assert type(stock) is FullAttentionSpec
    with pytest.raises(NotImplementedError, match="plans a FullAttentionSpec of its own"):
        Attention.get_kv_cache_spec(
            layer, config(tiny_model)
        )  # its model did not pass the dtype on


def table_width(block_size: int = 128) -> int:
    table = MultiGroupBlockTable(
        max_num_reqs=2, max_model_len=1000, max_num_batched_tokens=64, pin_memory=False,
        device=torch.device("cpu"), block_sizes=[block_size], kernel_block_sizes=[block_size],
    )  # fmt: skip
    return int(table[0].block_table.cpu.shape[1])


def test_page_tables_have_room_for_the_header(tiny_model: Any, monkeypatch: Any) -> None:
    import vllm.v1.worker.block_table as module

    monkeypatch.setattr(module, "get_total_cp_world_size", lambda: 1)
    monkeypatch.setattr(module, "get_dcp_group", _no_group)
    monkeypatch.setattr(module, "get_pcp_group", _no_group)
    assert table_width() == 8
    with set_current_vllm_config(config(tiny_model, "auto", max_model_len=1000)):
        assert table_width() == 8
    with set_current_vllm_config(config(tiny_model, max_model_len=1000)):
        assert table_width() == record_layout(PRESET, 128).columns(1000) == 12 + 7
    longer = {"max_model_len": 1000, "max_num_seqs": 2, "max_num_batched_tokens": 4001}
    with set_current_vllm_config(config(tiny_model, **longer)):  # vLLM only warns of this
        assert table_width() == record_layout(PRESET, 128).columns(2001)


def _no_group() -> Any:
    raise AssertionError("not initialised")


def test_page_tables_of_the_second_runner(tiny_model: Any) -> None:
    seen: list[Any] = []
    make = patches._wider_table_v2(lambda self, *args, **kwargs: seen.append((args, kwargs)))
    make(None, [128], 2, 64, [8], "device", kernel_block_sizes=[128])
    with set_current_vllm_config(config(tiny_model, max_model_len=1000)):
        make(None, [128], 2, 64, max_num_blocks_per_group=[8], device="device")
    assert [args[3] for args, _ in seen] == [[8], [19]]
    assert seen[0] == (([128], 2, 64, [8], "device"), {"kernel_block_sizes": [128]})

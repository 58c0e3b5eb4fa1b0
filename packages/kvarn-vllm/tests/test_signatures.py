from __future__ import annotations

import hashlib
import inspect
from typing import Any

import pytest
import vllm

from kvarn_vllm import signatures
from kvarn_vllm.patches import PATCHES, _platform_patch, arm
from kvarn_vllm.signatures import (
    SIGNATURES,
    changed_signature,
    locate,
    parameters,
    version_problem,
)

QUEUE = "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.append"  # whose links we write as well
# SHA-256 of the wrapped sources: a change behind an unchanged signature has to be read as well.
SOURCES = {
    "EngineArgs.create_engine_config": "49dc8b55e8cb0cfd",
    "CpuPlatform.get_attn_backend_cls": "aeca3a581a88d5d7",
    "Attention.get_kv_cache_spec": "8ea8d60b58701bf4",
    "MultiGroupBlockTable.__init__": "4fb846b5be571362",
    "BlockTables.__init__": "58cfb5671406d3e0",
    "WorkerWrapperBase.initialize_from_config": "3b298834beaea7f5",
    "Scheduler._preempt_request": "2a89cd7178fe260c",
    "BlockPool.take_events": "1c196296d76b7aa7",
    "FreeKVCacheBlockQueue.append": "eaf61ab5f821542d",
}


@pytest.mark.parametrize("target", SIGNATURES)
def test_vllm_is_the_recorded_one(target: str) -> None:
    assert parameters(target) == SIGNATURES[target]
    assert changed_signature() == version_problem() == ""


@pytest.mark.parametrize(
    "target",
    [*(patch.target for patch in (*PATCHES, _platform_patch())), QUEUE],
    ids=lambda target: target.partition(":")[2],
)
def test_wrapped_sources_are_the_recorded_ones(target: str) -> None:
    assert arm().armed
    owner, name = locate(target)
    source = inspect.getsource(inspect.unwrap(getattr(owner, name)))
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    assert digest == SOURCES[target.partition(":")[2]]


def test_a_renamed_parameter_is_noticed(monkeypatch: Any) -> None:
    from vllm.v1.core.block_pool import BlockPool

    monkeypatch.setattr(BlockPool, "touch", lambda self, pages: None)
    assert changed_signature() == (
        "KVarN: BlockPool.touch of vLLM 0.22.0 is not the one this plugin was written for. "
        "Install an unmodified vllm==0.22.0."
    )


def test_a_missing_callable_or_module_is_noticed(monkeypatch: Any) -> None:
    from vllm.v1.core.block_pool import BlockPool

    assert parameters("vllm.no_such_module:Thing.method") == ""
    monkeypatch.delattr(BlockPool, "touch")
    assert "BlockPool.touch" in changed_signature()


@pytest.mark.parametrize("version", ["0.21.3", "0.22.1", "0.24.1", "0.22.0.dev1"])
def test_other_versions_are_refused(monkeypatch: Any, version: str) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    assert version_problem() == (
        f"KVarN: vLLM {version} is not supported (tested: 0.22.0). "
        "Install vllm==0.22.0 or a newer kvarn-vllm."
    )


def test_a_local_build_of_a_tested_version_is_accepted(monkeypatch: Any) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.22.0+cpu")
    assert version_problem() == ""
    assert signatures.TESTED_VERSIONS == ("0.22.0",)

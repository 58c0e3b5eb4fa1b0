from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvarn_core import dispatch
from kvarn_vllm.cache_spec import record_layout
from kvarn_vllm.config import Options
from kvarn_vllm.engine import choose, explain, model_layout, serves_batches

LAYOUT = record_layout("kvarn_k4v2_g128", 64)


def test_the_cpu_engine_is_served_by_the_reference_row_by_row() -> None:
    assert choose(Options(), LAYOUT) == choose(Options(engine="reference"), LAYOUT) == "reference"
    assert not serves_batches(Options(), LAYOUT)
    assert explain(Options(), LAYOUT).startswith("The reference engine runs on cpu, because")
    assert "as asked for" in explain(Options(engine="reference"), LAYOUT)


def test_kernels_that_cannot_run_are_refused_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="The triton engine cannot run"):
        choose(Options(engine="triton"), LAYOUT)


def test_a_gpu_without_kernels_is_refused_not_served_slowly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "triton_installed", lambda: False)
    with pytest.raises(RuntimeError, match=r"KVarN: no kernel can serve.*triton is not installed"):
        choose(Options(), LAYOUT, "cuda")
    assert choose(Options(engine="reference"), LAYOUT, "cuda") == "reference"
    assert choose(Options(), record_layout("kvarn_debug32_g64", 64), "cuda") == "reference"


def test_sealed_prefill_is_served_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert serves_batches(Options(engine="triton"), LAYOUT)
    assert not serves_batches(Options(engine="triton", prefill="sealed"), LAYOUT)


def test_layout_of_a_model() -> None:
    config = SimpleNamespace(
        model_config=SimpleNamespace(get_head_size=lambda: 64),
        cache_config=SimpleNamespace(cache_dtype="kvarn_k4v2_g128"),
    )
    assert model_layout(config) is LAYOUT

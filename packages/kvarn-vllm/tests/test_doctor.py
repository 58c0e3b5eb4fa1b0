from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvarn_core import dispatch, nvrtc
from kvarn_core.ops.decode import cuda
from kvarn_vllm import config, engine
from kvarn_vllm.__main__ import main
from kvarn_vllm.config import Options
from kvarn_vllm.doctor import as_text, report

if TYPE_CHECKING:
    from pathlib import Path


def test_report_of_a_working_installation(tiny_model: Any) -> None:
    found = report(str(tiny_model(64)))
    assert found["armed"] is True
    assert found["vllm"] == "0.22.0"
    assert found["platform"] == "cpu"
    assert found["engine"] == "reference"
    assert found["engine_reason"].startswith("The reference engine runs on cpu, because")
    assert found["cuda_graphs"] is None
    assert found["head_dim"] == 64
    assert found["presets"]["kvarn_k4v2_g128"] == {
        "bytes_per_token_and_head": 57.0,
        "ratio": 256 / 57,
        "header_pages": 11,
        "bytes_per_token": 57.0 * 2 * 2,
        "tokens_per_gib": 4_709_393,
    }


def test_a_gpu_is_served_by_kernels_and_graphs(monkeypatch: Any) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    options = Options(engine="triton")  # as `auto` chooses on most GPUs
    monkeypatch.setattr(config, "Options", lambda: options)
    found = report()
    assert found["engine"] == "triton"
    assert "graphs      decode steps whole, steps with prefills in pieces" in as_text(found)


def test_a_gpu_that_no_kernel_serves_is_named(monkeypatch: Any) -> None:
    monkeypatch.setattr(engine, "_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(dispatch, "triton_installed", lambda: False)
    assert "engine      none for this platform. KVarN: no kernel can serve." in as_text(report())


def test_a_gpu_says_what_the_cuda_engine_would_run(monkeypatch: Any) -> None:
    from vllm.platforms import current_platform

    assert report()["cuda_engine"] is None
    monkeypatch.setattr(type(current_platform), "device_type", "cuda")
    monkeypatch.setattr(engine, "_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(dispatch, "triton_installed", lambda: False)  # asks for no GPU
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 0))
    assert "cuda        The cuda engine cannot run: cuda has compute capability 8.0" in (
        as_text(report())
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(nvrtc, "obstacle", lambda: None)
    monkeypatch.setattr(nvrtc, "driver_obstacle", lambda: None)
    monkeypatch.setattr(dispatch, "triton_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    for exact, form in ((True, "subnormal halves"), (False, "halves with an exponent")):
        monkeypatch.setattr(cuda, "subnormals_are_exact", lambda _, exact=exact: exact)
        text = as_text(report())
        assert "cuda        The cuda engine runs on cuda, as asked for." in text
        assert f"Codes are {form}." in text


def test_a_model_that_cannot_be_served_is_named(
    tiny_model: Any, tmp_path: Path, capsys: Any
) -> None:
    facts = json.loads((tiny_model(64) / "config.json").read_text()) | {"head_dim": 96}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    assert main(["doctor", "--model", str(tmp_path)]) == 2
    assert "KVarN: head_dim 96 is not supported." in capsys.readouterr().err


def test_sizes_of_a_model_are_printed(tiny_model: Any) -> None:
    text = as_text(report(str(tiny_model(64))))
    assert "this model: 228 bytes per token, 4,709,393 tokens per GiB" in text
    assert "this model" not in as_text(report())


def test_the_command_prints_json_only(capsys: Any) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["presets"]["kvarn_k4v2_g128"]["bytes_per_token_and_head"] == 108.0


def test_the_command_prints_text(capsys: Any) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "armed       yes" in printed
    assert "kvarn_k4v2_g128     108.0   4.74x   + 11 pages per request" in printed


def test_a_reason_is_shown() -> None:
    found = {**report(), "armed": False, "reason": "KVarN: because.", "vllm": None}
    assert "armed       no. KVarN: because." in as_text(found)
    assert "not installed" in as_text(found)


def test_vllm_commands_run_with_the_plugin(monkeypatch: Any) -> None:
    import vllm.entrypoints.cli.main as command_line

    seen = []
    monkeypatch.setattr(command_line, "main", lambda: seen.append(list(sys.argv)))
    monkeypatch.setattr(sys, "argv", ["python"])
    assert main(["vllm", "bench", "latency", "--help"]) == 0
    assert seen == [["vllm", "bench", "latency", "--help"]]


def test_the_command_line_starts_on_the_cpu_build(monkeypatch: Any, capsys: Any) -> None:
    """vLLM's own command asks for a distribution that its CPU build does not have."""
    monkeypatch.setattr(sys, "argv", ["python"])
    with pytest.raises(SystemExit) as stopped:
        main(["vllm", "--version"])
    assert stopped.value.code == 0
    assert "0.22.0" in capsys.readouterr().out

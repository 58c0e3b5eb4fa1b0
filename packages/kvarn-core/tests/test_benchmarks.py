"""The benchmark's parts that need no GPU: cases, bytes, calls on the reference, the document."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvarn_core.ops.decode import decode
from kvarn_core.spec import PRESETS

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")
TINY = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "preset": "kvarn_k4v2_g64"}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import a file of the benchmark by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.parametrize("matrix", ["QUICK", "FULL"])
def test_every_case_has_a_name_of_its_own(load, matrix: str) -> None:
    cases = load("cases")
    names = [case.name for case in getattr(cases, matrix)]
    assert len(names) == len(set(names))
    assert {"decode.b32.n16384", "decode.b8.n4096"} <= set(names)  # the gates need them
    assert all("flash-fp16" in case.rivals for case in getattr(cases, matrix))


def test_the_full_matrix_has_every_preset_and_head_dimension(load) -> None:
    full = load("cases").FULL
    assert {case.preset for case in full} == set(PRESETS)
    assert {case.head_dim for case in full} == {64, 128, 256}
    assert {case.num_q_heads // case.num_kv_heads for case in full} >= {1, 4, 5, 8, 16}


def test_calls_take_turns_on_the_sets(load) -> None:
    job = load("cases").Job.over([lambda: 0, lambda: 1, lambda: 2], 5)
    assert [call() for call in job.calls[:7]] == [0, 1, 2, 0, 1, 2, 0]
    assert len(job.calls) == 21


def test_decode_calls_read_distinct_records(load) -> None:
    case = load("cases").Case(2, 300, **TINY)
    query = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0)).half()
    job = load("ours").prepare_decode(case, query, 100_000, "reference")
    first, second = (call()[0].clone() for call in job.calls[:2])
    assert first.isfinite().all()
    assert not torch.equal(first, second)
    assert len(job.calls) >= 20


def test_store_calls_write_what_their_bytes_say(load) -> None:
    case = load("cases").Case(2, 300, **TINY)
    jobs = load("ours").prepare_store(case, 200, CPU, 1, "reference")
    row = 2 * case.layout.row_bytes
    assert jobs["append"].nbytes == 2 * 2 * 128 * row
    tiles = sum(n // 64 - (n - 200) // 64 for n in case.seq_lens)
    assert jobs["seal"].nbytes == tiles * (64 * row + 2 * case.layout.record_bytes)
    cache = jobs["append"].calls[0].args[2]
    for job in jobs.values():
        before = cache.clone()
        job.calls[0]()
        assert not torch.equal(before, cache)


def test_gather_calls_fill_the_workspace(load) -> None:
    case = load("cases").Case(2, 300, **TINY)
    call = load("ours").prepare_gather(case, CPU, 1, "reference").calls[0]
    key, value = call.keywords["out"]
    key.fill_(float("nan"))
    value.fill_(float("nan"))
    call()
    assert key.isfinite().all()
    assert value.isfinite().all()


def test_rotation_calls_keep_the_length_of_rows(load) -> None:
    case = load("cases").Case(1, 300, **TINY)
    job = load("ours").prepare_rotate(case, 16, CPU, "reference")
    rows, out = job.calls[0].args[0], job.calls[0].keywords["out"]
    job.calls[0]()
    torch.testing.assert_close(
        out.float().norm(dim=-1), rows.float().norm(dim=-1), rtol=2e-3, atol=0
    )
    assert job.nbytes == 2 * 2 * rows.numel()


def test_a_wrong_decode_is_not_timed(load, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, case = load("ours"), load("cases").Case(2, 300, **TINY)
    query = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0))
    assert ours.check_decode(case, query, "reference") == 0.0

    def off_by_one_per_cent(*args: Any, engine: str, **more: Any) -> Any:
        out, lse = decode(*args, **more)
        return out * (1.01 if engine == "tested" else 1.0), lse

    monkeypatch.setattr(ours, "decode", off_by_one_per_cent)
    with pytest.raises(RuntimeError, match="decode with engine tested is wrong"):
        ours.check_decode(case, query, "tested")


def test_bytes_of_stock_caches(load) -> None:
    cases, baselines = load("cases"), load("baselines")
    case = cases.Case(1, 1024)
    assert baselines.token_bytes(cases.FLASH16, case) == 8 * 128 * 2 * 2
    assert baselines.token_bytes(cases.FLASH8, case) == 8 * 128 * 2
    with pytest.raises(ValueError, match="is not a baseline"):
        baselines.prepare("int8", case, torch.empty(0), 1)


@pytest.mark.kernel
def test_the_yardstick_reads_everything(load, kernel_device: torch.device) -> None:
    yardstick = load("yardstick")
    source = torch.arange(2 * yardstick.BLOCK, dtype=torch.int32, device=kernel_device)
    sums = torch.zeros(2, dtype=torch.int32, device=kernel_device)
    yardstick.block_sums(source, sums)
    assert sums.tolist() == source.view(2, -1).sum(1).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["flash-fp16", "flash-fp8", "turboquant_4bit_nc"])
def test_stock_caches_run(load, kind: str) -> None:
    pytest.importorskip("vllm")
    case = load("cases").Case(2, 300)
    query = torch.randn(2, 64, 128, device="cuda", dtype=torch.float16)
    job = load("baselines").prepare(kind, case, query, 1 << 20)
    assert job.calls[0]().isfinite().all()


def test_the_document_derives_medians_and_verdicts(load, tmp_path: Path) -> None:
    document = load("document").Document("s", arms={"a": {}, "b": {}, "idle": {}})
    assert document.add("decode", "a", "us", [2.0, 1.0, 4.0], {"batch": 1}) == 2.0
    document.add("decode", "b", "us", [3.0], {})
    document.require_speedup("decode", "a", "b", 1.5)
    document.require_speedup("decode", "a", "b", 1.6)
    document.require_speedup("absent", "a", "b", 1.0)
    document.write(tmp_path / "r.json", ["decode"])
    run = json.loads((tmp_path / "r.json").read_text())
    assert run["measurements"][0]["noise"] == 1.4826
    assert [gate["verdict"] for gate in run["gates"]] == ["pass", "fail"]
    assert list(run["arms"]) == ["a", "b"]


def test_numbers_that_are_none_are_refused(load, tmp_path: Path) -> None:
    document = load("document").Document("s", arms={"a": {}})
    document.add("decode", "a", "us", [float("nan")], {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        document.write(tmp_path / "r.json", [])


def test_a_gpu_is_described_by_the_driver(load) -> None:
    line = "NVIDIA H100 80GB HBM3, 81559, 580.95, 700.00, 1980, [N/A]"
    assert load("document").describe_gpu(line) == {
        "name": "NVIDIA H100 80GB HBM3",
        "memory_mib": 81559,
        "driver": "580.95",
        "power_cap_w": 700,
        "sm_clock_mhz": 1980,
        "memory_clock_mhz": None,
    }


@pytest.mark.parametrize(
    "line",
    ["", "--quick", "--quick --full --out x", "--quick --out x --rounds 2"],
    ids=["nothing", "no-file", "two-sizes", "two-rounds"],
)
def test_wrong_usage_exits_with_2(load, line: str) -> None:
    pytest.importorskip("triton")
    with pytest.raises(SystemExit) as status:
        load("bench_ops").arguments(line.split())
    assert status.value.code == 2

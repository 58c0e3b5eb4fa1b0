from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvarn_eval.bench_serve import Load, decode_speed, load_generator, reduce_load, run_load
from kvarn_eval.prompts import write_requests
from kvarn_eval.server import ServerConfig, serve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvarn_eval.server import Server

HERE = Path(__file__).parent
FAKE_SERVER = (sys.executable, str(HERE / "fake_server.py"))
FAKE_BENCH = (sys.executable, str(HERE / "fake_bench.py"))


def load(folder: Path, *lengths: int) -> Load:
    write_requests(folder / "r.jsonl", [("x" * 100, length) for length in lengths])
    return Load("a", folder / "r.jsonl", len(lengths))


def figures(**more: Any) -> dict[str, Any]:
    found = {
        "duration": 2.0, "output_throughput": 3.0, "errors": ["", ""], "input_lens": [100, 100],
        "output_lens": [3, 3], "start_times": [0.0, 0.0], "ttfts": [1.0, 1.0],
        "itls": [[0.5, 0.5], [0.5, 0.5]],
    }  # fmt: skip
    found |= {f"p{p}_{m}_ms": 1.0 for p in (50, 90, 99) for m in ("ttft", "tpot", "itl", "e2el")}
    return {**found, **more}


def test_a_load_is_reduced(tmp_path: Path) -> None:
    spent = {"preemptions": 2.0, "hits": 30.0, "asked": 120.0}
    found = reduce_load(load(tmp_path, 3, 3), figures(), spent, {"running": 2, "cache_use": 0.5})
    assert found.hit_share == 0.25
    assert found.preemptions == 2
    assert found.itl["p99"] == 0.001
    assert found.decode == 4.0  # four tokens in the second after the first ones


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"errors": ["", "timed out"]}, "1 requests failed, first timed out"),
        ({"output_lens": [3, 2]}, "--max-model-len"),
    ],
)
def test_a_load_that_was_not_answered_in_full_is_an_error(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    spent = {"preemptions": 0.0, "hits": 0.0, "asked": 0.0}
    with pytest.raises(RuntimeError, match=message):
        reduce_load(load(tmp_path, 3, 3), figures(**change), spent, {"running": 0, "cache_use": 0})


def test_decode_counts_only_while_all_generate() -> None:
    late = figures(start_times=[0.0, 0.5])
    assert decode_speed(late) == pytest.approx(4.0)  # of each request one token in half a second
    assert decode_speed(figures(start_times=[0.0, 5.0])) == 0.0


def test_messages_of_several_tokens_count_in_full() -> None:
    assert decode_speed(figures(output_lens=[6, 6])) == pytest.approx(8.0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serve(ServerConfig("model", command=FAKE_SERVER), tmp_path / "server.log") as server:
        yield server


def test_one_child_sends_every_load_and_its_results_are_kept(
    server: Server, tmp_path: Path
) -> None:
    with load_generator(tmp_path / "bench.log", FAKE_BENCH) as generator:
        found = [
            run_load(server, load(tmp_path, *lengths), "tokenizer", tmp_path, generator)
            for lengths in ((4, 4), (3,))
        ]
    assert [one.output_throughput for one in found] == [8.0, 3.0]
    assert [one.requests for one in found] == [2, 1]
    assert (tmp_path / "a.json").exists()
    assert (tmp_path / "a.log").read_text() == "nothing was sent\n"
    assert not list(tmp_path.glob("*.over"))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ((*FAKE_BENCH, "--fail"), "2 requests failed"),
        ((*FAKE_BENCH, "--refuse"), r"Load a failed with ValueError: no\. Its log, .*a\.log, "),
        (
            (sys.executable, "-c", "1 / 0"),
            r"(?s)Load a ended with status 1\. .*bench\.log.*by zero",
        ),
        ((sys.executable, "-c", "import time; time.sleep(99)"), "Load a took too long"),
    ],
)
def test_a_child_or_a_load_that_fails_is_an_error(
    program: tuple[str, ...], message: str, server: Server, tmp_path: Path
) -> None:
    with (
        load_generator(tmp_path / "bench.log", program) as generator,
        pytest.raises(RuntimeError, match=message),
    ):
        run_load(server, load(tmp_path, 4, 4), "tokenizer", tmp_path, generator, seconds=5)


def test_a_server_that_died_is_one_sentence(server: Server, tmp_path: Path) -> None:
    server.process.kill()
    server.process.wait()
    with (
        load_generator(tmp_path / "bench.log", FAKE_BENCH) as generator,
        pytest.raises(RuntimeError, match=r"did not answer /metrics \(ConnectError\)\. Its log"),
    ):
        run_load(server, load(tmp_path, 4), "tokenizer", tmp_path, generator)

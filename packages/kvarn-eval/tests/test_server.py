from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvarn_eval.server import ServerConfig, free_port, parse_metrics, serve, total

FAKE = (sys.executable, str(Path(__file__).with_name("fake_server.py")))


def config(*options: str, ready_seconds: float = 60.0) -> ServerConfig:
    return ServerConfig("model", options, command=FAKE, ready_seconds=ready_seconds)


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def wait_until_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not any(map(is_running, pids)):
            return True
        time.sleep(0.05)
    return False


def test_a_server_answers_and_is_reaped_with_its_workers(tmp_path: Path) -> None:
    pids_file, log = tmp_path / "pids", tmp_path / "server.log"
    with serve(config("--child-pid", str(pids_file)), log) as server:
        pids = [int(pid) for pid in pids_file.read_text(encoding="utf-8").split()]
        assert all(map(is_running, pids))
        assert total(server.metrics(), "vllm:num_preemptions_total") == 0
    assert wait_until_gone(pids)
    assert "loading weights" in log.read_text(encoding="utf-8")


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_an_exception_in_the_block_ends_the_server(
    error: type[BaseException], tmp_path: Path
) -> None:
    pids_file = tmp_path / "pids"
    with (
        pytest.raises(error),
        serve(config("--child-pid", str(pids_file)), tmp_path / "server.log"),
    ):
        raise error
    pids = [int(pid) for pid in pids_file.read_text(encoding="utf-8").split()]
    assert wait_until_gone(pids)


def test_a_server_that_ends_early_is_reported_with_its_last_words(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"status 1 (?s:.*)head_size 96 is not supported"),
        serve(config("--behaviour", "crash"), tmp_path / "server.log"),
    ):
        pytest.fail("a crashed server must not be handed out")


def test_a_server_that_never_gets_ready_is_ended(tmp_path: Path) -> None:
    pids_file, seen = tmp_path / "pids", []
    options = ("--behaviour", "hang", "--child-pid", str(pids_file))
    with (
        pytest.raises(RuntimeError, match="not ready after 3 s"),
        serve(config(*options, ready_seconds=3), tmp_path / "server.log", seen.append),
    ):
        pytest.fail("a hanging server must not be handed out")
    pids = [int(pid) for pid in pids_file.read_text(encoding="utf-8").split()]
    assert wait_until_gone(pids)
    assert seen[0].startswith("starting")


def test_a_refusal_is_passed_on(tmp_path: Path) -> None:
    with (
        serve(config("--behaviour", "refuse"), tmp_path / "server.log") as server,
        pytest.raises(RuntimeError, match="no such model"),
    ):
        server.post("/v1/completions", {})


def test_sigterm_of_the_command_ends_the_server_too(tmp_path: Path) -> None:
    pids_file = tmp_path / "pids"
    program = f"""
import signal, time
from pathlib import Path
from kvarn_eval.terminal import stop_on_signal
from kvarn_eval.server import ServerConfig, serve
signal.signal(signal.SIGTERM, stop_on_signal)
config = ServerConfig("model", ("--child-pid", {str(pids_file)!r}), command={FAKE!r})
with serve(config, Path({str(tmp_path / "server.log")!r})):
    print("ready", flush=True)
    time.sleep(600)
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        assert caller.stdout.readline() == "ready\n"
        pids = [int(pid) for pid in pids_file.read_text(encoding="utf-8").split()]
        os.kill(caller.pid, signal.SIGTERM)
        assert caller.wait(timeout=30) == 128 + signal.SIGTERM
    assert wait_until_gone(pids)


def test_metrics_are_parsed() -> None:
    text = '# HELP a b\na_total{x="1",y="{[, ]}"} 2.5\n\nb 1e3\na_total{x="2"} 1\n'
    metrics = parse_metrics(text)
    assert total(metrics, "a_total") == 3.5
    assert total(metrics, "b") == 1000
    assert metrics[0].labels == {"x": "1", "y": "{[, ]}"}
    with pytest.raises(KeyError, match="c_total"):
        total(metrics, "c_total")


def test_a_free_port_can_be_bound() -> None:
    assert 1024 <= free_port() <= 65535

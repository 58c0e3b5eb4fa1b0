from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvarn_eval import server
from kvarn_eval.server import ServerConfig, end_children, free_port, parse_metrics, serve, total
from kvarn_eval.terminal import stop_on_signals

if TYPE_CHECKING:
    from collections.abc import Iterator

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


@contextmanager
def command(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A command that serves until it is stopped; the ids of the server are in `pids`."""
    program = f"""
import signal, time
from pathlib import Path
from kvarn_eval import server, terminal
server._GRACE_SECONDS = 2
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
terminal.stop_on_signals()
config = server.ServerConfig("model", ("--child-pid", {str(folder / "pids")!r}), command={FAKE!r})
with server.serve(config, Path({str(folder / "server.log")!r})):
    print("ready", flush=True)
    time.sleep(600)
"""
    line = [sys.executable, "-c", program]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        assert caller.stdout.readline() == "ready\n"
        try:
            yield caller
        finally:
            caller.kill()


def pids(folder: Path) -> list[int]:
    return [int(pid) for pid in (folder / "pids").read_text(encoding="utf-8").split()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_command_ends_the_server_too(
    number: signal.Signals, tmp_path: Path
) -> None:
    with command(tmp_path) as caller:
        os.kill(caller.pid, number)
        assert caller.wait(timeout=30) == 128 + number
    assert wait_until_gone(pids(tmp_path))


def test_further_signals_leave_no_server_behind(tmp_path: Path) -> None:
    with command(tmp_path) as caller:
        os.killpg(pids(tmp_path)[0], signal.SIGSTOP)  # it answers to SIGKILL only
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            os.kill(caller.pid, number)
            time.sleep(0.3)
        assert caller.wait(timeout=30) == 128 + signal.SIGHUP
    assert wait_until_gone(pids(tmp_path))


def test_nohup_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    handled: list[int] = []
    monkeypatch.setattr(
        signal, "getsignal", lambda number: signal.SIG_IGN if number == signal.SIGHUP else None
    )
    monkeypatch.setattr(signal, "signal", lambda number, handler: handled.append(number))
    stop_on_signals()
    assert handled == [signal.SIGTERM]


def test_a_server_that_ignores_signals_is_killed_while_a_thread_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_GRACE_SECONDS", 1)
    monkeypatch.setattr(server, "_ended", threading.Event())
    posting = threading.Event()

    def ask() -> None:
        with serve(config(), tmp_path / "server.log") as one:
            os.killpg(one.process.pid, signal.SIGSTOP)
            posting.set()
            one.post("/v1/completions", {})

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        assert posting.wait(30)
        began = time.monotonic()
        end_children()
        with pytest.raises(RuntimeError, match="did not answer"):
            asked.result(timeout=30)
        assert time.monotonic() - began < 10


def test_metrics_are_parsed() -> None:
    text = '# HELP a b\na_total{x="1",y="{[, ]}"} 2.5\n\nb 1e3\na_total{x="2"} 1\n'
    metrics = parse_metrics(text)
    assert total(metrics, "a_total") == 3.5
    assert total(metrics, "b") == 1000
    assert metrics[0].labels == {"x": "1", "y": "{[, ]}"}
    with pytest.raises(RuntimeError, match=r"no metric c_total\. Start it without"):
        total(metrics, "c_total")


def test_a_free_port_can_be_bound() -> None:
    assert 1024 <= free_port() <= 65535

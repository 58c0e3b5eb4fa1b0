"""A running inference server: started on a free loopback port, awaited, and always reaped.

The server is a child process in its own process group, so its workers end with it, whether the
block ends normally, by an exception or by Ctrl-C. Its log is a file that stays. Everything the
product is judged by comes back over HTTP, as for any other user.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

# The module behind `vllm serve`; it also works where the CPU build is installed under another name.
SERVE = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 15.0
_LOG_LINES = 15
_running: set[subprocess.Popen[bytes]] = set()
_starting = threading.Lock()
_ended = threading.Event()


@dataclass(frozen=True)
class ServerConfig:
    """How to start a server.

    Parameters
    ----------
    model : str
        Folder or name of the model.
    options : tuple of str
        Further command-line arguments.
    environment : dict
        Environment variables on top of the inherited ones.
    command : tuple of str
        Program that takes ``--model``, ``--host`` and ``--port``.
    ready_seconds : float
        How long the server may take to become ready.
    """

    model: str
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = SERVE
    ready_seconds: float = 300.0


@dataclass(frozen=True)
class Server:
    """A ready server; `url` is its address without a trailing slash."""

    url: str
    model: str
    log: Path
    process: subprocess.Popen[bytes]

    def post(self, path: str, body: dict[str, Any], seconds: float = 900.0) -> dict[str, Any]:
        """Send JSON and return JSON; raises RuntimeError with the server's words if it refuses."""
        try:
            answer = httpx.post(self.url + path, json=body, timeout=seconds)
        except httpx.HTTPError as error:
            raise RuntimeError(
                f"The server did not answer {path} ({type(error).__name__}). See {self.log}."
            ) from error
        if answer.status_code != 200:
            raise RuntimeError(f"The server refused {path}: {answer.text[:500]}. See {self.log}.")
        result: dict[str, Any] = answer.json()
        return result

    def metrics(self) -> list[Metric]:
        """Current values of the server's Prometheus metrics."""
        return read_metrics(self.url)


@dataclass(frozen=True)
class Metric:
    """One sample of a Prometheus text exposition."""

    name: str
    labels: dict[str, str]
    value: float


def read_metrics(url: str) -> list[Metric]:
    """Current values of the Prometheus metrics of the server at `url`.

    Raises
    ------
    RuntimeError
        If it does not answer.
    """
    try:
        return parse_metrics(httpx.get(url + "/metrics", timeout=30).text)
    except httpx.HTTPError as error:
        raise RuntimeError(
            f"The server at {url} did not answer /metrics ({type(error).__name__}). Its log says "
            "how it ended."
        ) from error


def parse_metrics(text: str) -> list[Metric]:
    """Parse the Prometheus text format; comments and blank lines are skipped."""
    found = []
    for line in text.splitlines():
        match = re.fullmatch(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+\d+)?", line.strip())
        if match is None:
            continue
        labels = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', match[2] or ""))
        found.append(Metric(match[1], labels, float(match[3])))
    return found


def samples(metrics: list[Metric], name: str) -> list[Metric]:
    """All samples called `name`; raises RuntimeError if there is none."""
    found = [metric for metric in metrics if metric.name == name]
    if not found:
        raise RuntimeError(
            f"The server reports no metric {name}. Start it without --disable-log-stats."
        )
    return found


def total(metrics: list[Metric], name: str) -> float:
    """Sum of all samples called `name`; raises RuntimeError if there is none."""
    return sum(metric.value for metric in samples(metrics, name))


def free_port() -> int:
    """A loopback port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serve(
    config: ServerConfig, log: Path, progress: Callable[[str], None] = lambda line: None
) -> Iterator[Server]:
    """Run a server for the length of a ``with`` block.

    Parameters
    ----------
    config : ServerConfig
        What to start.
    log : Path
        File that receives the server's output; replaced.
    progress : callable
        Receives one short line per second of waiting.

    Yields
    ------
    Server
        Ready to answer.

    Raises
    ------
    RuntimeError
        If the server ends or does not become ready in time; the message holds the end of its log.
    """
    port = free_port()
    name = "model"
    address = ["--model", config.model, "--served-model-name", name]
    address += ["--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, **OFFLINE, **config.environment}
    command = [*config.command, *address, *config.options]
    with child(command, log, environment) as process:
        server = Server(f"http://127.0.0.1:{port}", name, log, process)
        _await(server, config.ready_seconds, progress)
        yield server


@contextmanager
def child(
    command: Sequence[str],
    log: Path,
    environment: dict[str, str],
    stdin: int = subprocess.DEVNULL,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for the length of a ``with`` block; nothing of its process group stays.

    Parameters
    ----------
    command : sequence of str
        Program and arguments.
    log : Path
        File that receives what it prints; replaced.
    environment : dict
        Its environment variables.
    stdin : int
        ``subprocess.PIPE`` to write to it; nothing comes in by default.

    Yields
    ------
    subprocess.Popen
        The running program.

    Raises
    ------
    RuntimeError
        After `end_children`.
    """
    with log.open("wb") as output:
        with _starting:
            if _ended.is_set():
                raise RuntimeError("This run is ending and starts nothing more.")
            process = subprocess.Popen(  # noqa: S603
                command,
                env=environment,
                stdin=stdin,
                bufsize=0,  # nothing is left to write once the program has ended
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own, to be ended as a whole
            )
            _running.add(process)
        try:
            yield process
        finally:
            _stop(process)
            _running.discard(process)


def end_children() -> None:
    """End what other threads have started; they see their program end. None starts again."""
    with _starting:
        _ended.set()
        running = tuple(_running)  # threads take theirs away as it ends
    _stop(*running)


def run_child(
    what: str,
    command: Sequence[str],
    log: Path,
    environment: dict[str, str],
    seconds: float,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Run a program to its end.

    Parameters
    ----------
    what : str
        Name of the program in messages.
    command, log, environment
        As in `child`.
    seconds : float
        A program that takes longer is ended.
    progress : callable
        Called about once per second.

    Raises
    ------
    RuntimeError
        If it fails or takes too long; the message holds the end of its log.
    """
    with child(command, log, environment) as process:
        status, deadline = None, time.monotonic() + seconds
        while status is None and time.monotonic() < deadline:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=min(1.0, seconds))
            progress()
    if status != 0:
        how = "took too long" if status is None else f"ended with status {status}"
        raise RuntimeError(f"{what} {how}. Its log, {log}, ends with:\n{tail(log)}")


def _await(server: Server, seconds: float, progress: Callable[[str], None]) -> None:
    began = time.monotonic()
    while (waited := time.monotonic() - began) < seconds:
        if (code := server.process.poll()) is not None:
            raise RuntimeError(
                f"The server ended with status {code} before it was ready. Its log, {server.log}, "
                f"ends with:\n{tail(server.log)}"
            )
        try:
            if httpx.get(server.url + "/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            progress(f"starting, {waited:.0f} s")
        time.sleep(_POLL_SECONDS)
    raise RuntimeError(
        f"The server was not ready after {seconds:.0f} s. Its log, {server.log}, ends with:\n"
        f"{tail(server.log)}"
    )


def tail(log: Path) -> str:
    """The last lines of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_LOG_LINES:])


def _signal_group(process: subprocess.Popen[bytes], number: int) -> bool:
    """Signal the process group; False once the group is empty."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def _stop(*processes: subprocess.Popen[bytes]) -> None:
    """End their groups: politely, then by force; returns when nothing of them is left."""
    left = [process for process in processes if _signal_group(process, signal.SIGTERM)]
    deadline = time.monotonic() + _GRACE_SECONDS
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        for process in left:
            process.poll()  # reap the leader, or its group never becomes empty
        left = [process for process in left if _signal_group(process, 0)]
    for process in left:
        _signal_group(process, signal.SIGKILL)
        process.wait()

"""gunicorn as a child process: started, waited for, spoken to, and never left behind."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import click

from clerkhooks.settings import PROJECT

HOST = "127.0.0.1"
START_WITHIN = 30.0  # seconds
STOP_WITHIN = 0.3  # seconds, before it is killed: its workers end at once
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOG_LINES = 25
Server = subprocess.Popen[bytes]
Handler = Callable[[int, FrameType | None], object] | signal.Handlers

# The guard leads the process group of the server and reads from a pipe that only we can write to.
# The kernel closes the pipe when we die, however we die, and the guard then takes the whole group
# with it.
_GUARD = ("/bin/sh", "-c", "read _; kill -KILL 0")


class ServerFailed(click.ClickException):
    """The server did not start, or ended by itself: status 1, with the end of its log."""

    def __init__(self, what: str, log: Path) -> None:
        lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        super().__init__(
            "\n".join([f"{what} The end of {log}:", "", *(f"  {line}" for line in lines)])
        )


def ask(
    port: int, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b""
) -> str:
    """
    Send a request and return its answer in short: the status, then outcome, reason or name.

    A server that does not answer is an answer, too: it begins with ``no answer``.
    """
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    try:
        connection.request(method, path, body or None, dict(headers or {}))
        response = connection.getresponse()
        answer = json.loads(response.read())
        told = next(
            (str(answer[key]) for key in ("outcome", "reason", "name", "status") if key in answer),
            "",
        )
        return f"{response.status} {told}".strip()
    except (OSError, http.client.HTTPException, ValueError) as error:
        return f"no answer ({type(error).__name__})"
    finally:
        connection.close()


@contextmanager
def signals_as(handler: Handler) -> Iterator[None]:
    """Give every signal that means the end, also of a closed terminal, to *handler*; nohup keeps its meaning."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        # A script's shell starts what runs in its background with SIGINT ignored; whoever sends it
        # here means it.
        if number != signal.SIGHUP or before[number] != signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def running_server(
    listener: socket.socket, environ: Mapping[str, str], log: Path
) -> Iterator[Server]:
    """
    Run gunicorn on *listener* until the block ends; the block begins when it answers.

    Raises:
        ServerFailed: if it ends or stays silent instead.
    """
    port = listener.getsockname()[1]
    guard = subprocess.Popen(_GUARD, stdin=subprocess.PIPE, process_group=0)  # noqa: S603  # a constant
    server = None
    try:
        with log.open("wb") as output:
            server = _start(listener, environ, output.fileno(), guard.pid)
        listener.close()  # from here on only the server holds it: where that is gone, nothing answers
        _wait_until_it_answers(server, port, log)
        yield server
    finally:
        with signals_as(signal.SIG_IGN):  # an impatient second Ctrl-C must not get in between
            _stop(server, guard)


def _start(listener: socket.socket, environ: Mapping[str, str], output: int, group: int) -> Server:
    # The socket is bound by us: a port that is taken shows before anything starts, and nobody can
    # take it in between.
    bind = f"fd://{listener.fileno()}"
    command = [sys.executable, "-m", "gunicorn", "--bind", bind, "wsgi:app"]
    return subprocess.Popen(  # noqa: S603  # constants and a number
        command,
        cwd=PROJECT,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=[listener.fileno()],
        process_group=group,
    )


def _wait_until_it_answers(server: Server, port: int, log: Path) -> None:
    deadline = time.monotonic() + START_WITHIN
    while ask(port, "GET", "/healthz") != "200 ok":
        with suppress(subprocess.TimeoutExpired):
            server.wait(0.02)
            raise ServerFailed(f"The server ended at once, with status {server.returncode}.", log)
        if time.monotonic() > deadline:
            raise ServerFailed(f"The server did not answer within {START_WITHIN:.0f} s.", log)


def _stop(server: Server | None, guard: Server) -> None:
    """Stop quickly, then kill whatever is left of the group."""
    if server is not None:
        server.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            server.wait(STOP_WITHIN)
    with guard:  # not reaped yet, so that the group's number is still ours
        os.killpg(guard.pid, signal.SIGKILL)
    if server is not None:
        server.wait()

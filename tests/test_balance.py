"""Two real workers, without the service and its configuration of gunicorn."""

from __future__ import annotations

import os
import socket
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from clerkhooks.clerk.fake import FakeClerk
from tests.racing import eventually
from tests.server import serving

OPTIONS = ["-c", "python:tests.benchmarks", "-w", "2", "-k", "clerkhooks.web.worker.Worker"]
COMMAND = [sys.executable, "-m", "gunicorn", *OPTIONS, "tests.test_balance:application"]
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def application(_environ: dict[str, Any], start_response: Callable[..., object]) -> list[bytes]:
    """Respond with the worker's process id."""
    body = str(os.getpid()).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


def split(port: int) -> list[int]:
    """Open eight connections together, and return how many of them each worker has accepted."""
    with ExitStack() as stack:
        address = ("127.0.0.1", port)
        opened = [stack.enter_context(socket.create_connection(address, 10)) for _ in range(8)]
        for connection in opened:
            connection.sendall(REQUEST)
        workers = Counter(connection.recv(4096).rpartition(b"\r\n")[2] for connection in opened)
        for connection in opened:
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""  # the worker has closed the connection
    return sorted(workers.values())


def test_balances_connections_that_arrive_together(clerk: FakeClerk, tmp_path: Path) -> None:
    """Each of two workers accepts three to five of eight connections."""
    with serving("", clerk, tmp_path / "log", command=COMMAND) as server:
        eventually(lambda: len(split(server.port)) == 2)  # both workers have started
        splits = [split(server.port) for _ in range(30)]
    assert {(3, 5), (4, 4)} >= {tuple(each) for each in splits}, splits

"""The real server, started with the Procfile's web command, as on a platform."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.settings import PROJECT, VARIABLES
from tests.support import rows


@dataclass(frozen=True)
class Response:
    """An HTTP response whose body has been read."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the parsed body."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    database_url: str
    port: int
    log: Path
    clerk: FakeClerk
    host: str = "127.0.0.1"

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Response:
        """Send one request on a new connection."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=20)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            received = {name.lower(): value for name, value in response.getheaders()}
            return Response(response.status, received, response.read())
        finally:
            connection.close()

    def deliver(self, body: bytes, message_id: str | None = None) -> Response:
        """Post *body* as Svix does."""
        return self.request("POST", "/webhooks/clerk", body, self.clerk.headers(body, message_id))

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Execute *query* on a separate connection and return the rows, if any."""
        return rows(self.database_url, query)

    def lines(self) -> list[dict[str, Any]]:
        """Return the JSON lines that the server has logged so far."""
        written = self.log.read_text().splitlines()
        return [json.loads(line) for line in written if line.startswith("{")]


def environ(**variables: str) -> dict[str, str]:
    """Return this process's environment without any clerkhooks settings except *variables*."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    others = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return others | {"PATH": path} | variables


def web_command() -> list[str]:
    """Return the Procfile's web command, as a platform runs it."""
    lines = dict(line.split(": ", 1) for line in (PROJECT / "Procfile").read_text().splitlines())
    return ["sh", "-c", f"exec {lines['web']}"]


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(
    database_url: str,
    clerk: FakeClerk,
    port: int,
    log: Path,
    *,
    command: Sequence[str] = (),
    host: str = "127.0.0.1",
    **variables: str,
) -> Server:
    """Start the server with two workers that log to *log*; do not wait until it is ready."""
    own = {"DATABASE_URL": database_url, "PORT": str(port), "WEB_CONCURRENCY": "2"}
    with log.open("ab") as out:
        process = subprocess.Popen(
            command or web_command(),
            cwd=PROJECT,
            env=environ(**(clerk.environ | own | variables)),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    return Server(process, database_url, port, log, clerk, host)


@contextmanager
def ended_by(number: signal.Signals, process: subprocess.Popen[str]) -> Iterator[None]:
    """End *process* with a signal after the block. It must then exit with status 0."""
    timer = threading.Timer(20, process.kill)
    timer.start()
    try:
        yield
        process.send_signal(number)
        assert process.wait(10) == 0
    finally:
        timer.cancel()
        process.kill()
        process.communicate()


@contextmanager
def serving(
    database_url: str,
    clerk: FakeClerk,
    log: Path,
    *,
    command: Sequence[str] = (),
    host: str = "127.0.0.1",
    **variables: str,
) -> Iterator[Server]:
    """
    Run the server with two workers until the block ends.

    *command* replaces the Procfile's web command. *host* is the address that clients connect to.
    """
    log.unlink(missing_ok=True)
    options: dict[str, Any] = {"command": command, "host": host, **variables}
    server = start_server(database_url, clerk, free_port(), log, **options)
    process = server.process
    try:
        wait_until_healthy(server)
        yield server
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and its workers."""
    for _ in range(5):
        if process.poll() is None:
            # Faster than SIGTERM, which has its own test. A worker that is still starting misses
            # the signal.
            os.killpg(process.pid, signal.SIGQUIT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(2)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def wait_until_healthy(server: Server, seconds: float = 20) -> None:
    """Poll ``/healthz`` until it returns 200; fail after *seconds* or if the server exits."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert server.process.poll() is None, server.log.read_text()
        with suppress(OSError, http.client.HTTPException):
            if server.request("GET", "/healthz").status == 200:
                return
        time.sleep(0.02)
    raise AssertionError(server.log.read_text())


@contextmanager
def write_lock(database_url: str) -> Iterator[None]:
    """Lock the database tables against writes until the ``with`` block ends."""
    if database_url.startswith("sqlite"):
        path = database_url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path, isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            yield
    else:
        with psycopg.connect(database_url) as connection:
            connection.execute("LOCK TABLE users, webhook_messages IN SHARE MODE")
            yield

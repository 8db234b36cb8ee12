"""The real server, started as its platform does: by the Procfile's web line."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
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
    """An HTTP answer, read whole."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    database_url: str
    port: int
    log: Path
    clerk: FakeClerk

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Response:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
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
        """Read or change the database behind the server's back."""
        return rows(self.database_url, query)

    def lines(self) -> list[dict[str, Any]]:
        """What the server logged as JSON so far."""
        written = self.log.read_text().splitlines()
        return [json.loads(line) for line in written if line.startswith("{")]


def environ(**variables: str) -> dict[str, str]:
    """Return the environment of this process, with *variables* and no other variable of ours."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    others = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return others | {"PATH": path} | variables


def web_command() -> list[str]:
    """The Procfile's web line, as a platform runs it."""
    lines = dict(line.split(": ", 1) for line in (PROJECT / "Procfile").read_text().splitlines())
    return ["sh", "-c", f"exec {lines['web']}"]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(database_url: str, clerk: FakeClerk, log: Path, **variables: str) -> Iterator[Server]:
    """Run the server with two workers until the block ends."""
    port = free_port()
    own = {"DATABASE_URL": database_url, "PORT": str(port), "WEB_CONCURRENCY": "2"}
    variables = clerk.environ | own | variables
    with log.open("wb") as out:
        process = subprocess.Popen(
            web_command(),
            cwd=PROJECT,
            env=environ(**variables),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    server = Server(process, database_url, port, log, clerk)
    try:
        wait_until_healthy(server)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGQUIT)  # at once: a graceful stop has a test of its own
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_healthy(server: Server, seconds: float = 20) -> None:
    """Ask /healthz until it answers."""
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
    """Hold a lock, until the block ends, behind which every write of users waits."""
    if database_url.startswith("sqlite"):
        path = database_url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path, isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            yield
    else:
        with psycopg.connect(database_url) as connection:
            connection.execute("LOCK TABLE users, webhook_messages IN SHARE MODE")
            yield

"""The real server: gunicorn with the production configuration, over HTTP."""

from __future__ import annotations

import base64
import importlib
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest

from clerkhooks.cli.pretend import PretendedClerk, clerk_id
from clerkhooks.models import db
from clerkhooks.settings import PROJECT
from tests.conftest import MakeDatabase, migrate
from tests.issuer import Issuer, jwk
from tests.server import Server, environ, free_port, serving, web_command
from tests.support import Service, user_event


def test_bears_many_writers(server: Server) -> None:
    """32 connections that write at once through two workers: every message is applied, none fails."""
    ids = [clerk_id("user") for _ in range(200)]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda user_id: server.deliver(user_event(user_id)), ids))
    assert Counter((answer.status, answer.json()["outcome"]) for answer in answers) == {(200, "applied"): 200}
    found = ", ".join(f"'{user_id}'" for user_id in ids)
    assert server.rows(f"SELECT count(*) FROM users WHERE id IN ({found})") == [(200,)]
    assert server.rows(f"SELECT count(*) FROM webhook_messages WHERE clerk_user_id IN ({found}) AND outcome = 'applied'") == [(200,)]
    assert not [line for line in server.lines() if line["level"] == "error"]


def test_does_a_message_once_in_two_workers(server: Server) -> None:
    """The same message at the same instant on 16 connections: one does the work, the others answer duplicate."""
    for _ in range(10):
        body, message_id, barrier = user_event(clerk_id("user")), clerk_id("msg"), threading.Barrier(16)

        def deliver(_: int, body: bytes = body, message_id: str = message_id, barrier: threading.Barrier = barrier) -> str:
            barrier.wait()
            return str(server.deliver(body, message_id).json()["outcome"])

        with ThreadPoolExecutor(16) as pool:
            assert Counter(pool.map(deliver, range(16))) == {"applied": 1, "duplicate": 15}
            assert server.rows(f"SELECT outcome, attempts FROM webhook_messages WHERE message_id = '{message_id}'") == [("applied", 1)]


def test_creates_a_user_once_for_many_first_calls(server: Server) -> None:
    """Twenty first calls and the webhook together: all are answered, and the profile is there."""
    user_id, barrier = clerk_id("user"), threading.Barrier(21)
    headers = {"Authorization": f"Bearer {server.clerk.session_token(user_id)}"}

    def call(number: int) -> int:
        barrier.wait()
        return (server.deliver(user_event(user_id)) if number == 0 else server.request("GET", "/api/me", headers=headers)).status

    with ThreadPoolExecutor(21) as pool:
        assert Counter(pool.map(call, range(21))) == {200: 21}
    assert server.rows(f"SELECT name FROM users WHERE id = '{user_id}'") == [("Ada Lovelace",)]


def test_finishes_a_request_when_it_is_told_to_stop(database_url: str, clerk: PretendedClerk, tmp_path: Path) -> None:
    """SIGTERM in the middle of a delivery: it is finished and answered, and the server ends with status 0."""
    with serving(database_url, clerk, tmp_path / "server.log") as server, ThreadPoolExecutor(1) as pool:
        lock = WriteLock(server)
        delivery = pool.submit(server.deliver, user_event(clerk_id("user")))
        lock.wait_for_a_waiter()
        server.process.send_signal(signal.SIGTERM)
        lock.release()
        assert delivery.result().json()["outcome"] == "applied"
        assert server.process.wait(30) == 0
        assert server.rows("SELECT count(*) FROM users") == [(1,)]


ASYNC_VIEW = """
import asyncio

from clerkhooks import create_app, current_user, require_auth
from clerkhooks.models import User, db

app = create_app()


@app.get("/api/slow")
@require_auth
async def slow():
    await asyncio.sleep(0.05)
    return {"id": db.session.get(User, current_user.id).id}
"""


def test_serves_async_views(database_url: str, clerk: PretendedClerk, tmp_path: Path) -> None:
    """Twenty of them at once, each with its own caller and the database, beside deliveries."""
    (tmp_path / "wsgi.py").write_text(ASYNC_VIEW)
    ids = [clerk_id("user") for _ in range(20)]

    def call(user_id: str) -> tuple[int, object]:
        assert server.deliver(user_event(user_id)).status == 200
        answer = server.request("GET", "/api/slow", headers={"Authorization": f"Bearer {clerk.session_token(user_id)}"})
        return answer.status, answer.json().get("id")

    chdir = f"--chdir {tmp_path}"
    with serving(database_url, clerk, tmp_path / "server.log", GUNICORN_CMD_ARGS=chdir) as server, ThreadPoolExecutor(20) as pool:
        assert list(pool.map(call, ids)) == [(200, user_id) for user_id in ids]


def test_fetches_keys(database_url: str, clerk: PretendedClerk, tmp_path: Path) -> None:
    """Before the first call and for many at once, in the server as it runs."""
    with (
        Issuer(jwk(clerk)).open() as issuer,
        serving(database_url, clerk, tmp_path / "server.log", CLERK_JWT_KEY="", CLERK_JWKS_URL=issuer.url) as server,
        ThreadPoolExecutor(20) as pool,
    ):
        headers = {"Authorization": f"Bearer {clerk.session_token(clerk_id('user'))}"}
        assert Counter(pool.map(lambda _: server.request("GET", "/api/me", headers=headers).status, range(40))) == {200: 40}


def test_serves_beside_clients_that_never_finish(make_database: MakeDatabase, clerk: PretendedClerk, tmp_path: Path) -> None:
    """On PostgreSQL, a hundred connections that stop in the middle of a request keep nobody else waiting."""
    url = make_database("postgresql")
    migrate(url, clerk)
    with ExitStack() as stack, serving(url, clerk, tmp_path / "server.log") as server:
        for number in range(100):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            begun = "POST /webhooks/clerk HTTP/1.1\r\nHost: x\r\n" + ("Content-Length: 100\r\n\r\n{" if number % 2 else "")
            connection.sendall(begun.encode())
        answers = [server.deliver(user_event(clerk_id("user"))).status for _ in range(20)]
        assert answers == [200] * 20


def test_brakes_guesses_over_all_workers(database_url: str, clerk: PretendedClerk, tmp_path: Path) -> None:
    """However many workers there are, five passwords of the console may be wrong at once."""
    guess = {"Authorization": f"Basic {base64.b64encode(b'operator:a wrong password').decode()}"}
    with (
        serving(database_url, clerk, tmp_path / "server.log", CONSOLE_PASSWORD="correct horse", WEB_CONCURRENCY="4") as server,
        ThreadPoolExecutor(32) as pool,
    ):
        statuses = list(pool.map(lambda _: server.request("GET", "/console", headers=guess).status, range(64)))
    assert Counter(statuses) == {401: 5, 429: 59}


def test_answers_long_headers_itself(server: Server) -> None:
    """A token of 16 KiB reaches the application, which refuses it in its own words."""
    for length in (16 * 1024, 20 * 1024):
        answer = server.request("GET", "/api/me", headers={"Authorization": "Bearer " + "a" * length})
        assert (answer.status, answer.headers["content-type"]) == (401, "application/problem+json")
    assert answer.json()["reason"] == "token_too_long"


@pytest.mark.parametrize("framing", ["Content-Length: 1073741824", "Transfer-Encoding: chunked"])
def test_reads_no_further_than_it_must(server: Server, framing: str) -> None:
    """A gigabyte is announced: the answer is 413 while most of it is unsent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(f"POST /webhooks/clerk HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n".encode())
        piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        if "chunked" in framing:
            connection.sendall(piece * 17)
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"body_too_large" in answer


@pytest.mark.parametrize(("method", "path", "status"), [("POST", "/webhooks/clerk", 401), ("PUT", "/api/me/presence", 400)])
def test_bears_chunks_that_are_none(server: Server, method: str, path: str, status: int) -> None:
    """A malformed chunk is the sender's mistake, not a failure."""
    token = server.clerk.session_token(clerk_id("user"))
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode() + b"zz\r\nabc\r\n")
        assert connection.recv(65536).startswith(f"HTTP/1.1 {status} ".encode())
    assert not [line for line in server.lines() if line["event"] == "request_failed"]


def test_lists_every_wrong_variable_at_once(tmp_path: Path) -> None:
    """Also one that gunicorn would choke on by itself."""
    variables = environ(WEB_CONCURRENCY="auto", PORT="x", DATABASE_URL=f"sqlite:///{tmp_path}/none/x.db")
    run = subprocess.run(web_command(), cwd=PROJECT, env=variables, capture_output=True, text=True, timeout=30)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    for name in ("CLERK_WEBHOOK_SECRET", "WEB_CONCURRENCY", "PORT", "DATABASE_URL"):
        assert f"  {name} " in run.stderr


def test_does_not_start_without_a_secret(tmp_path: Path) -> None:
    """A missing secret stops the server before anything listens, with one message and no traceback."""
    port = free_port()
    run = subprocess.run(
        web_command(),
        cwd=PROJECT,
        env=environ(PORT=str(port), DATABASE_URL=f"sqlite:///{tmp_path}/x.db"),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert run.returncode != 0
    assert "CLERK_WEBHOOK_SECRET is not set" in run.stderr
    assert "Traceback" not in run.stderr + run.stdout
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_takes_an_empty_variable_for_an_unset_one(database_url: str, clerk: PretendedClerk, tmp_path: Path) -> None:
    """Also where gunicorn itself would choke on it."""
    with serving(database_url, clerk, tmp_path / "server.log", WEB_CONCURRENCY="", CLERK_JWT_KEY="", CLERK_PUBLISHABLE_KEY="") as server:
        assert server.deliver(user_event(clerk_id("user"))).status == 200
        assert [line["event"] for line in server.lines() if line["level"] == "warning"] == ["keys_not_configured"]


def test_ends_commands_with_status_2_when_settings_are_wrong() -> None:
    """A flask command says all that is wrong at once, without a traceback and without the values."""
    variables = environ(CLERK_WEBHOOK_SECRET="whsec_hidden!", CLERK_JWT_KEY="hidden", PORT="99999")
    run = subprocess.run(
        [sys.executable, "-m", "flask", "--app", "wsgi", "db", "upgrade"], cwd=PROJECT, env=variables, capture_output=True, text=True
    )
    assert run.returncode == 2
    for name in ("CLERK_WEBHOOK_SECRET", "CLERK_JWT_KEY", "PORT"):
        assert name in run.stderr
    assert "Traceback" not in run.stderr
    assert "hidden" not in run.stderr


def test_gives_each_worker_connections_of_its_own(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gunicorn's configuration follows the variables, and its hook empties the pool that a worker inherits."""
    variables = {"PORT": "8123", "WEB_CONCURRENCY": "3", "DATABASE_URL": ""}
    for name, value in (service.clerk.environ | variables).items():
        monkeypatch.setenv(name, value)
    serving = importlib.reload(importlib.import_module("clerkhooks.serving"))
    assert (serving.bind, serving.workers, serving.preload_app) == ("0.0.0.0:8123", 3, True)
    service.call(clerk_id("user"))
    with service.app.app_context():
        inherited = db.engine.pool
        serving.post_fork(SimpleNamespace(app=SimpleNamespace(wsgi=lambda: service.app)), None)
        assert db.engine.pool is not inherited
        assert service.call(clerk_id("user")).status_code == 200
        inherited.dispose()


class WriteLock:
    """A lock behind which every write of the service waits."""

    def __init__(self, server: Server) -> None:
        self.server, self.sqlite = server, server.database_url.startswith("sqlite")
        if self.sqlite:
            self.file = sqlite3.connect(server.database_url.removeprefix("sqlite:///"), isolation_level=None)
            self.file.execute("BEGIN IMMEDIATE")
        else:
            self.connection = psycopg.connect(server.database_url)
            self.connection.execute("LOCK TABLE users IN SHARE MODE")

    def wait_for_a_waiter(self) -> None:
        """Return once a request is under way behind the lock."""
        if self.sqlite:  # tells nobody who waits; but a request that was sent before this answer was accepted before it
            assert self.server.request("GET", "/healthz").status == 200
            return
        with psycopg.connect(self.server.database_url, autocommit=True) as other:
            while other.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone() == (0,):
                pass

    def release(self) -> None:
        """Let the writers go on."""
        if self.sqlite:
            self.file.rollback()
        (self.file if self.sqlite else self.connection).close()

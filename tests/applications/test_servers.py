"""One application under each common server, over HTTP."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.settings import PROJECT
from clerkhooks.web.state import disconnect
from tests.applications import bookshop
from tests.server import Server, environ, free_port
from tests.support import ThreadPool, deletion, user_event

pytestmark = pytest.mark.slow
FACTORY = "tests.applications.bookshop:create_app"
GUNICORN = ("gunicorn", "--bind=127.0.0.1:{port}", "--worker-class={kind}", f"{FACTORY}()")
COMMANDS: dict[str, tuple[str, ...]] = {
    "flask": ("flask", "--app", FACTORY, "run", "--port={port}"),
    "flask debug": ("flask", "--app", FACTORY, "--debug", "run", "--port={port}"),
    "waitress": ("waitress", "--listen=127.0.0.1:{port}", "--call", FACTORY),
    "sync": GUNICORN,
    "gthread": (*GUNICORN, "--threads=4"),
    "gevent": GUNICORN,
}


@contextmanager
def serving(kind: str, url: str, clerk: FakeClerk, log: Path) -> Iterator[Server]:
    """Run the bookshop under the server *kind* until the ``with`` block ends."""
    port = free_port()
    command = [part.format(port=port, kind=kind) for part in COMMANDS[kind]]
    uri = url.replace("postgresql://", "postgresql+psycopg://", 1)
    variables = clerk.environ | {"DATABASE_URL": uri, "PYTHONPATH": str(PROJECT)}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=log.parent,
            env=environ(**variables),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    server = Server(process, url, port, log, clerk)
    try:
        wait_until_ready(server)
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def wait_until_ready(server: Server, seconds: float = 30) -> None:
    """Wait until the application returns 404 for an unknown page."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert server.process.poll() is None, server.log.read_text()
        with suppress(OSError, http.client.HTTPException):
            if server.request("GET", "/nowhere").status == 404:
                return
        time.sleep(0.05)
    raise AssertionError(server.log.read_text())


@pytest.fixture
def shop_url(url: str, clerk: FakeClerk, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of a database with the bookshop's tables."""
    uri = url.replace("postgresql://", "postgresql+psycopg://", 1)
    for name, value in {**clerk.environ, "DATABASE_URL": uri}.items():
        monkeypatch.setenv(name, value)
    app = bookshop.create_app()
    with app.app_context():
        bookshop.db.create_all()
    disconnect(app)
    return url


def outcome(server: Server, body: bytes, message_id: str | None = None) -> Any:
    """Deliver *body*, which must be accepted; return the outcome."""
    answer = server.deliver(body, message_id)
    assert answer.status == 200, (answer.body, server.log.read_text())
    return answer.json()["outcome"]


def call(server: Server, user_id: str, path: str = "/api/me", method: str = "GET") -> Any:
    """Call the application as a user; return the status and the body."""
    headers = {"Authorization": f"Bearer {server.clerk.session_token(user_id)}"}
    answer = server.request(method, path, headers=headers)
    return answer.status, answer.json()


@pytest.mark.parametrize(
    ("kind", "url"),
    [
        ("flask", "sqlite"),
        ("flask debug", "sqlite"),
        ("waitress", "sqlite"),
        ("waitress", "postgresql"),
        ("sync", "sqlite"),
        ("gthread", "postgresql"),
        ("gevent", "postgresql"),
    ],
    indirect=["url"],
)
def test_serves_under_every_server(
    kind: str, shop_url: str, clerk: FakeClerk, tmp_path: Path
) -> None:
    """Deliveries and calls succeed, sequentially and concurrently."""
    ada, early = clerk_id("user"), clerk_id("user")
    with serving(kind, shop_url, clerk, tmp_path / "server.log") as server:
        assert outcome(server, user_event(ada), "msg_1") == "applied"
        assert outcome(server, user_event(ada), "msg_1") == "duplicate"
        assert outcome(server, user_event(ada, at=1_700_000_000_000, first_name="X")) == "stale"
        assert call(server, ada)[1]["name"] == "Ada Lovelace"
        assert call(server, early)[1]["name"] == "New User"
        assert outcome(server, user_event(early)) == "applied"
        assert call(server, early)[1]["email"] == "ada@example.org"
        assert call(server, ada, "/orders", "POST") == (
            200,
            {"plan": "free", "orders": ["Notes by the Translator"]},
        )
        too_large = server.deliver(b"x" * (1024 * 1024 + 1))
        assert (too_large.status, too_large.json()["reason"]) == (413, "body_too_large")

        users = [clerk_id("user") for _ in range(24)]
        with ThreadPool(24) as threads:
            answers = threads.map(lambda user: outcome(server, user_event(user)), users, timeout=30)
            assert list(answers) == ["applied"] * 24
            names = threads.map(lambda user: call(server, user)[1]["name"], users, timeout=30)
            assert list(names) == ["Ada Lovelace"] * 24
        assert outcome(server, deletion(ada)) == "applied"
        status, body = call(server, ada)
        assert (status, body["reason"]) == (401, "user_deleted")
    count = "SELECT count(*) FROM users WHERE deleted_at IS NULL AND name = 'Ada Lovelace'"
    assert server.rows(count) == [(25,)]
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("kind", ["waitress", "gthread"])
def test_accepts_a_chunked_body(kind: str, shop_url: str, clerk: FakeClerk, tmp_path: Path) -> None:
    """A chunked body is accepted up to 1 MiB; a longer one is refused."""
    user_id = clerk_id("user")
    with serving(kind, shop_url, clerk, tmp_path / "server.log") as server:
        large = user_event(user_id, public_metadata={"text": "x" * 1024 * 1024})
        for body, expected in ((user_event(user_id), 200), (large, 413)):
            headers = clerk.headers(body)
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
            chunks = (body[at : at + 1000] for at in range(0, len(body), 1000))
            connection.request("POST", "/webhooks/clerk", chunks, headers, encode_chunked=True)
            assert connection.getresponse().status == expected
            connection.close()
    assert server.rows("SELECT name FROM users") == [("Ada Lovelace",)]

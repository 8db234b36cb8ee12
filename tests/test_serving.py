"""The real server: gunicorn with the production configuration, over HTTP."""

from __future__ import annotations

import http.client
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, closing
from email.utils import parsedate_to_datetime
from pathlib import Path

import psycopg
import pytest

from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.settings import PROJECT, VARIABLES
from tests.conftest import SLOW_ON_SQLITE, MakeDatabase
from tests.issuer import Issuer, jwk
from tests.racing import eventually
from tests.server import Server, environ, free_port, serving, web_command, write_lock
from tests.support import ThreadPool, rows, user_event

# What the test proves does not depend on the database.
sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def test_applies_concurrent_deliveries(server: Server) -> None:
    """With two workers and 32 connections that write at once, every message is applied."""
    ids = [clerk_id("user") for _ in range(200)]
    with ThreadPool(32) as pool:
        answers = list(pool.map(lambda user_id: server.deliver(user_event(user_id)), ids))
    assert Counter((answer.status, answer.json()["outcome"]) for answer in answers) == {
        (200, "applied"): 200
    }
    found = ", ".join(f"'{user_id}'" for user_id in ids)
    assert server.rows(f"SELECT count(*) FROM users WHERE id IN ({found})") == [(200,)]
    assert server.rows(
        "SELECT count(*) FROM webhook_messages"
        f" WHERE clerk_user_id IN ({found}) AND outcome = 'applied'"
    ) == [(200,)]
    assert not [line for line in server.lines() if line["level"] == "error"]


def test_applies_a_message_once_in_two_workers(server: Server) -> None:
    """Of 16 simultaneous deliveries of one message, one is applied and 15 are duplicates."""
    for _ in range(10):
        body, message_id, barrier = (
            user_event(clerk_id("user")),
            clerk_id("msg"),
            threading.Barrier(16),
        )

        def deliver(
            _: int,
            body: bytes = body,
            message_id: str = message_id,
            barrier: threading.Barrier = barrier,
        ) -> str:
            barrier.wait(30)
            return str(server.deliver(body, message_id).json()["outcome"])

        with ThreadPool(16) as pool:
            assert Counter(pool.map(deliver, range(16))) == {"applied": 1, "duplicate": 15}
            assert server.rows(
                f"SELECT outcome, attempts FROM webhook_messages WHERE message_id = '{message_id}'"
            ) == [("applied", 1)]


def test_creates_a_user_once_for_many_first_calls(server: Server) -> None:
    """
    A user's first 20 calls and the webhook arrive together.

    All of them return 200, and the row has the profile.
    """
    user_id, barrier = clerk_id("user"), threading.Barrier(21)
    headers = {"Authorization": f"Bearer {server.clerk.session_token(user_id)}"}

    def call(number: int) -> int:
        barrier.wait(30)
        return (
            server.deliver(user_event(user_id))
            if number == 0
            else server.request("GET", "/api/me", headers=headers)
        ).status

    with ThreadPool(21) as pool:
        assert Counter(pool.map(call, range(21))) == {200: 21}
    assert server.rows(f"SELECT name FROM users WHERE id = '{user_id}'") == [("Ada Lovelace",)]


@pytest.mark.slow
def test_finishes_a_request_after_sigterm(
    database_url: str, clerk: FakeClerk, tmp_path: Path
) -> None:
    """A delivery in progress is finished and answered, and the exit status is 0."""
    with (
        serving(database_url, clerk, tmp_path / "server.log") as server,
        ThreadPool(1) as pool,
    ):
        with write_lock(database_url):
            delivery = pool.submit(server.deliver, user_event(clerk_id("user")))
            wait_for_a_waiter(server)
            server.process.send_signal(signal.SIGTERM)
        assert delivery.result(30).json()["outcome"] == "applied"
        assert server.process.wait(30) == 0
        assert server.rows("SELECT count(*) FROM users") == [(1,)]


APPLICATION = """
import asyncio, os

from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from clerkhooks import ClerkHooks, current_user, require_auth

app, db = Flask("guest"), SQLAlchemy()
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"].replace("ql:", "ql+psycopg:")
hooks = ClerkHooks(db)
db.init_app(app)
hooks.init_app(app, routes=("webhooks", "me", "health"))


@app.get("/api/slow")
@require_auth
async def slow():
    await asyncio.sleep(0.05)
    return {"id": db.session.get(hooks.model, current_user.id).id}
"""


@pytest.mark.parametrize(
    ("database_url", "worker"),
    [
        ("postgresql", "gthread --threads 8"),
        pytest.param("sqlite", "gthread --threads 8", marks=pytest.mark.slow),
        pytest.param("sqlite", "sync", marks=pytest.mark.slow),
    ],
    indirect=["database_url"],
)
def test_serves_async_views_of_an_application(
    database_url: str, clerk: FakeClerk, tmp_path: Path, worker: str
) -> None:
    """
    Concurrent async views each see their own caller while webhooks are being delivered.

    The application chooses the worker class.
    """
    (tmp_path / "wsgi.py").write_text(APPLICATION)
    (tmp_path / "empty.py").touch()
    ids = [clerk_id("user") for _ in range(20)]

    def call(user_id: str) -> tuple[int, object]:
        assert server.deliver(user_event(user_id)).status == 200
        headers = {"Authorization": f"Bearer {clerk.session_token(user_id)}"}
        answer = server.request("GET", "/api/slow", headers=headers)
        return answer.status, answer.json().get("id")

    options = f"--chdir {tmp_path} --config {tmp_path}/empty.py --worker-class {worker}"
    with (
        serving(database_url, clerk, tmp_path / "log", GUNICORN_CMD_ARGS=options) as server,
        ThreadPool(20) as pool,
    ):
        assert list(pool.map(call, ids)) == [(200, user_id) for user_id in ids]


@sqlite
@pytest.mark.slow
def test_fetches_keys(database_url: str, clerk: FakeClerk, tmp_path: Path) -> None:
    """Many concurrent first calls succeed while the server fetches the keys."""
    with (
        Issuer(jwk(clerk)).open() as issuer,
        serving(
            database_url,
            clerk,
            tmp_path / "server.log",
            CLERK_JWT_KEY="",
            CLERK_JWKS_URL=issuer.url,
        ) as server,
        ThreadPool(20) as pool,
    ):
        headers = {"Authorization": f"Bearer {clerk.session_token(clerk_id('user'))}"}
        assert Counter(
            pool.map(lambda _: server.request("GET", "/api/me", headers=headers).status, range(40))
        ) == {200: 40}


def test_dates_responses(server: Server) -> None:
    """Each response has the current second in its Date header, also on an old connection."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=20)
    with closing(connection):
        for _ in range(2):
            began_at = int(time.time())
            connection.request("GET", "/healthz")
            with connection.getresponse() as response:
                response.read()
                date = parsedate_to_datetime(response.headers["Date"]).timestamp()
            assert began_at <= date <= time.time()
            time.sleep(1.1)


def test_serves_beside_clients_that_never_finish(server: Server) -> None:
    """A hundred connections with unfinished requests do not delay other requests."""
    with ExitStack() as stack:
        for number in range(100):
            address = ("127.0.0.1", server.port)
            connection = stack.enter_context(socket.create_connection(address, timeout=10))
            head = "POST /webhooks/clerk HTTP/1.1\r\nHost: x\r\n"
            body = "Content-Length: 100\r\n\r\n{" if number % 2 else ""
            connection.sendall((head + body).encode())
        answers = [server.deliver(user_event(clerk_id("user"))).status for _ in range(20)]
        assert answers == [200] * 20


def test_passes_long_headers_to_the_application(server: Server) -> None:
    """A token of 16 KiB or more reaches the application, which refuses it with a reason."""
    for length, reason in ((16 * 1024, "token_malformed"), (20 * 1024, "token_too_long")):
        answer = server.request(
            "GET", "/api/me", headers={"Authorization": "Bearer " + "a" * length}
        )
        assert (answer.status, answer.headers["content-type"]) == (401, "application/problem+json")
        assert answer.json()["reason"] == reason


@pytest.mark.parametrize("framing", ["Content-Length: 1073741824", "Transfer-Encoding: chunked"])
def test_refuses_a_large_body_before_reading_it(server: Server, framing: str) -> None:
    """A body over the limit gets a 413 before it has been sent completely."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(
            f"POST /webhooks/clerk HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n".encode()
        )
        piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        if "chunked" in framing:
            connection.sendall(piece * 17)
        answer = b""
        while not answer.endswith(b"}") and len(answer) < 65536:
            piece = connection.recv(65536)
            assert piece, "the server has closed the connection"
            answer += piece
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"body_too_large" in answer


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", "/webhooks/clerk", 401), ("PUT", "/api/me/presence", 400)],
)
def test_refuses_malformed_chunks(server: Server, method: str, path: str, status: int) -> None:
    """A malformed chunk is the sender's error and is not logged as a failure."""
    token = server.clerk.session_token(clerk_id("user"))
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        head += "Transfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode() + b"zz\r\nabc\r\n")
        assert connection.recv(65536).startswith(f"HTTP/1.1 {status} ".encode())
    assert not [line for line in server.lines() if line["event"] == "request_failed"]


def wait_for_a_waiter(server: Server) -> None:
    """Wait until a request is blocked by a ``write_lock``."""
    if server.database_url.startswith("sqlite"):
        # SQLite cannot list waiters. Once this request is answered, the delivery has arrived.
        assert server.request("GET", "/healthz").status == 200
        return
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    with psycopg.connect(server.database_url, autocommit=True) as other:
        eventually(lambda: other.execute(waiting).fetchone() != (0,))


def run(command: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run *command* in the project until it exits."""
    return subprocess.run(
        command, cwd=PROJECT, env=variables, capture_output=True, text=True, timeout=60
    )


WRONG = {
    "CLERK_WEBHOOK_SECRET": "whsec_hidden!",
    "DATABASE_URL": "mysql://hidden",
    "CLERK_JWT_KEY": "hidden",
    "CLERK_PUBLISHABLE_KEY": "pk_hidden",
    "CLERK_SECRET_KEY": "sk_hidden",
    "CLERK_JWKS_URL": "http://hidden.example",
    "CLERK_ISSUER": "http://hidden.example",
    "CLERK_API_URL": "http://hidden.example",
    "CLERK_JWKS_KEEP_HOURS": "hidden",
    "CLERK_AUTHORIZED_PARTIES": "hidden",
    "CLERK_AUDIENCE": ",",
    "METRICS_TOKEN": "hidden",
    "CHANGES_TOKEN": "hidden",
    "CONSOLE_PASSWORD": "hidden",
    "CLERK_FOLLOW": "hidden",
    "CLERK_TABLES": "hidden",
    "DATABASE_POOL_SIZE": "hidden",
    "DATABASE_POOLER": "hidden",
    "LOG_FORMAT": "hidden",
    "PORT": "hidden",
}


def test_has_an_invalid_value_for_every_variable() -> None:
    """The tests below cover every variable."""
    special = {"CLERK_WEBHOOK_SIGNING_SECRET", "WEB_CONCURRENCY"}
    assert WRONG.keys() == VARIABLES.keys() - special


@pytest.mark.parametrize(
    "variable",
    [
        "DATABASE_URL",
        pytest.param("PORT", marks=pytest.mark.slow),
        pytest.param("LOG_FORMAT", marks=pytest.mark.slow),
    ],
)
def test_refuses_to_start_with_an_invalid_variable(
    clerk: FakeClerk, tmp_path: Path, variable: str
) -> None:
    """
    One message names the variable without its value.

    The exit status is 2, and there is no traceback.
    """
    right = clerk.environ | {"DATABASE_URL": f"sqlite:///{tmp_path}/x.db"}
    ended = run(web_command(), environ(**right | {variable: WRONG[variable]}))
    assert ended.returncode == 2
    shown = ended.stderr + ended.stdout
    assert shown.count("clerkhooks cannot start.") == 1
    assert [name for name in VARIABLES if f"\n  {name} " in shown] == [variable]
    assert "Traceback" not in shown
    assert "hidden" not in shown


def test_lists_every_invalid_variable_at_once() -> None:
    """The first start reports all variables that need to be corrected, without their values."""
    ended = run(web_command(), environ(**WRONG))
    assert ended.returncode == 2
    shown = ended.stderr + ended.stdout
    assert shown.count("clerkhooks cannot start.") == 1
    assert {name for name in VARIABLES if f"\n  {name} " in shown} == WRONG.keys()
    assert "Traceback" not in shown
    assert "hidden" not in shown


@pytest.mark.parametrize(
    "value",
    [
        "auto",
        "0",
        *(pytest.param(value, marks=pytest.mark.slow) for value in ("513", "-1", "", "2.5")),
    ],
)
def test_does_not_serve_with_an_invalid_worker_count(
    clerk: FakeClerk, tmp_path: Path, value: str
) -> None:
    """
    An invalid WEB_CONCURRENCY stops the server before it listens.

    Gunicorn reads the variable before any configuration file, and exits with a traceback if the
    value is not a number. For other invalid values, clerkhooks prints its own message.
    """
    port = free_port()
    right = clerk.environ | {"DATABASE_URL": f"sqlite:///{tmp_path}/x.db", "PORT": str(port)}
    ended = run(web_command(), environ(**right | {"WEB_CONCURRENCY": value}))
    assert ended.returncode != 0
    assert "Listening" not in ended.stderr
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    if value in ("0", "513"):
        assert ended.returncode == 2
        assert "WEB_CONCURRENCY must be a number from 1 to 512" in ended.stderr


@pytest.mark.parametrize(
    ("command", "value"),
    [
        ("clerkhooks log", "auto"),
        pytest.param("flask --app wsgi db upgrade", "2.5", marks=pytest.mark.slow),
    ],
)
def test_reports_an_invalid_worker_count_in_commands(
    clerk: FakeClerk, tmp_path: Path, command: str, value: str
) -> None:
    """The commands validate WEB_CONCURRENCY with the rest of the configuration."""
    right = clerk.environ | {"DATABASE_URL": f"sqlite:///{tmp_path}/x.db"}
    ended = run([sys.executable, "-m", *command.split()], environ(**right, WEB_CONCURRENCY=value))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "WEB_CONCURRENCY must be a number from 1 to 512" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("WEB_CONCURRENCY", []),
        pytest.param("PORT", [], marks=pytest.mark.slow),
        pytest.param("DATABASE_URL", ["--migrate"], marks=pytest.mark.slow),
    ],
)
def test_serve_checks_the_settings_before_gunicorn_does(
    clerk: FakeClerk, tmp_path: Path, name: str, options: list[str]
) -> None:
    """``serve`` prints one message and exits with status 2 instead of starting gunicorn."""
    right = clerk.environ | {"DATABASE_URL": f"sqlite:///{tmp_path}/x.db"}
    command = [sys.executable, "-m", "clerkhooks", "serve", *options]
    ended = run(command, environ(**right | {name: "hidden"}))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert f"\n  {name} " in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "hidden" not in ended.stderr
    assert not (tmp_path / "x.db").exists()


@pytest.mark.parametrize(
    ("value", "workers"), [("", 2), pytest.param("3", 3, marks=pytest.mark.slow)]
)
def test_serve_counts_an_empty_worker_count_as_unset(
    clerk: FakeClerk, tmp_path: Path, value: str, workers: int
) -> None:
    """``serve`` uses the default for an empty variable; gunicorn would exit with a traceback."""
    variables = clerk.environ | {"DATABASE_URL": f"sqlite:///{tmp_path}/x.db"}
    command = [sys.executable, "-m", "clerkhooks", "serve", "--print-config"]
    ended = run(command, environ(**variables | {"WEB_CONCURRENCY": value}))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert re.search(rf"^workers += {workers}$", ended.stdout, re.MULTILINE)


def test_does_not_start_without_a_secret(tmp_path: Path) -> None:
    """If the secret is missing, the server prints one message and exits before it listens."""
    port = free_port()
    variables = environ(PORT=str(port), DATABASE_URL=f"sqlite:///{tmp_path}/x.db")
    ended = run(web_command(), variables)
    assert ended.returncode == 2
    assert "CLERK_WEBHOOK_SECRET is not set" in ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@sqlite
@pytest.mark.slow
def test_counts_an_empty_variable_as_unset(
    database_url: str, clerk: FakeClerk, tmp_path: Path
) -> None:
    """
    A variable that a platform sets to an empty string counts as unset.

    If no session key is set, one warning is logged.
    """
    empty = dict.fromkeys(VARIABLES.keys() - {"WEB_CONCURRENCY", "PORT", "DATABASE_URL"}, "")
    variables = empty | {"CLERK_WEBHOOK_SECRET": clerk.environ["CLERK_WEBHOOK_SECRET"]}
    with serving(database_url, clerk, tmp_path / "server.log", **variables) as server:
        assert server.deliver(user_event(clerk_id("user"))).status == 200
        warnings = [line["event"] for line in server.lines() if line["level"] == "warning"]
        assert warnings == ["keys_not_configured"]


@pytest.mark.parametrize(
    "command",
    [
        ["flask", "--app", "wsgi", "db", "upgrade"],
        pytest.param(["clerkhooks", "users"], marks=pytest.mark.slow),
    ],
)
def test_ends_commands_with_status_2_if_settings_are_invalid(command: list[str]) -> None:
    """A command lists every invalid variable, but prints no values and no traceback."""
    ended = run([sys.executable, "-m", *command], environ(**WRONG))
    assert (ended.returncode, ended.stdout) == (2, "")
    for name in WRONG:
        assert f"\n  {name} " in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "hidden" not in ended.stderr


CONFIGURATION = """
import runpy, sys
found = runpy.run_path("gunicorn.conf.py")
print(found["bind"], found["workers"], found["worker_class"], found["preload_app"])
assert "flask" not in sys.modules
import psycopg.waiting
assert psycopg.waiting.wait is not psycopg.waiting.wait_c  # which would block every greenlet
import gc, wsgi
found["when_ready"](None)
assert not any(each is wsgi.app for each in gc.get_objects())  # workers share its memory
"""


@pytest.mark.parametrize(
    "database",
    [
        pytest.param("sqlite:///{}/x.db", marks=pytest.mark.slow),
        "postgresql://user@localhost/name",
    ],
)
def test_configures_gunicorn(clerk: FakeClerk, tmp_path: Path, database: str) -> None:
    """Workers use gevent with every database, and monkey-patching precedes other imports."""
    variables = {"PORT": "8123", "WEB_CONCURRENCY": "3", "DATABASE_URL": database.format(tmp_path)}
    ended = run([sys.executable, "-c", CONFIGURATION], environ(**clerk.environ | variables))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "0.0.0.0:8123 3 clerkhooks.web.worker.Worker True\n"


FORKS = """
import os
import sqlalchemy as sa
from clerkhooks import create_app

database = create_app(os.environ).extensions["clerkhooks"].store.database
session = "pg_backend_pid()" if database.dialect_name == "postgresql" else "NULL"

def use():
    with database.connect() as connection:
        pid = connection.exec_driver_sql(f"SELECT {session}").scalar()
        return connection.connection.driver_connection, pid, database.engine.pool

inherited, pid, pool = use()
assert use() == (inherited, pid, pool)
child = os.fork()
if child == 0:
    connection, own_pid, own_pool = use()
    assert connection is not inherited
    assert own_pid is None or own_pid != pid
    assert own_pool is not pool
    database.write(sa.text("INSERT INTO notes VALUES (2) RETURNING id"))
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert use() == (inherited, pid, pool)  # the child has not closed it
assert database.execute(sa.text("SELECT id FROM notes")) == [(2,)]
"""


@pytest.mark.parametrize("kind", SLOW_ON_SQLITE)
def test_gives_each_worker_its_own_connections(
    make_database: MakeDatabase, clerk: FakeClerk, kind: str
) -> None:
    """
    A forked process opens new connections and leaves its parent's open.

    Two processes that share a socket would read each other's responses.
    """
    url = make_database(kind)
    rows(url, "CREATE TABLE notes (id INTEGER PRIMARY KEY)")
    ended = run([sys.executable, "-c", FORKS], environ(**clerk.environ, DATABASE_URL=url))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")

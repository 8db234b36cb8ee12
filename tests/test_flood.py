"""The real server with thousands of connections, or with more work than it can do in time."""

from __future__ import annotations

import itertools
import re
import resource
import signal
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import psycopg
import pytest

from clerkhooks.clerk.fake import FakeClerk, clerk_id
from tests.benchmarks.load import webhooks
from tests.flooding import KINDS, Kind, Sender, Sent, allow_descriptors, held, new_clients
from tests.racing import eventually
from tests.server import Server, serving
from tests.support import NOW_MS, ThreadPool, user_event

only_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
only_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def descriptors() -> Iterator[int]:
    """Raise this process's limit on open files to the maximum allowed, and return the limit."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield allow_descriptors()
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def send(server: Server, count: int, *, at_once: int, connections: int) -> Sent:
    """Deliver *count* new messages and return the results."""
    sender = Sender(server.port, at_once=at_once, connections=connections)
    try:
        return sender.send(itertools.islice(webhooks(server.clerk), count))
    finally:
        sender.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@only_postgresql
def test_serves_beside_5000_connections_that_send_little(
    database_url: str, clerk: FakeClerk, tmp_path: Path, descriptors: int, kind: Kind
) -> None:
    """All deliveries and new clients get a 200 despite 5,000 slow or idle connections."""
    count = min(5000, descriptors - 1000)  # fewer on a machine that does not allow 5,000
    with (
        serving(database_url, clerk, tmp_path / "log") as server,
        held(server.port, count, kind) as count_open,
    ):
        with new_clients(server.port) as health:
            sent = send(server, 500, at_once=8, connections=8)
        if kind in ("silent", "idle"):
            assert count_open() == count
    assert sent.statuses == {200: 500}
    assert health.statuses.keys() == {200}


@pytest.mark.slow
@only_postgresql
def test_serves_a_sender_that_opens_more_connections_than_it_needs(
    database_url: str, clerk: FakeClerk, tmp_path: Path, descriptors: int
) -> None:
    """No message times out if a sender has 2,400 connections and sends 500 messages at a time."""
    connections = min(2400, descriptors - 1000)
    with serving(database_url, clerk, tmp_path / "log") as server:
        with new_clients(server.port) as health:
            sent = send(server, 10_000, at_once=500, connections=connections)
        assert server.rows("SELECT count(*) FROM webhook_messages") == [(10_000,)]
    assert sent.statuses == {200: 10_000}
    assert sent.connections == connections
    assert health.statuses.keys() == {200}


@pytest.mark.slow
@only_sqlite
def test_closes_the_longest_idle_connection_for_a_new_one(
    database_url: str, clerk: FakeClerk, tmp_path: Path
) -> None:
    """Near its limit of 20, a worker closes the longest-idle connection if a new one arrives."""
    with (
        serving(
            database_url,
            clerk,
            tmp_path / "log",
            WEB_CONCURRENCY="1",
            GUNICORN_CMD_ARGS="--worker-connections 20",
        ) as server,
        ExitStack() as stack,
    ):
        opened = []
        for _ in range(40):
            opened.append(stack.enter_context(connected(server)))
            assert server.deliver(user_event(clerk_id("user"))).status == 200
        deadline = time.monotonic() + 5
        while [is_open(connection) for connection in opened] != [False] * 23 + [True] * 17:
            assert time.monotonic() < deadline, [is_open(each) for each in opened]


@pytest.mark.slow
@only_sqlite
def test_raises_its_limit_of_descriptors(
    database_url: str, clerk: FakeClerk, tmp_path: Path, descriptors: int
) -> None:
    """A worker that starts with a limit of 256 descriptors raises it to the maximum allowed."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, descriptors))
    with serving(database_url, clerk, tmp_path / "log") as server:
        for worker in psutil.Process(server.process.pid).children():
            limits = Path(f"/proc/{worker.pid}/limits").read_text()
            [(soft, hard)] = re.findall(r"Max open files +(\d+) +(\d+)", limits)
            assert int(soft) == min(int(hard), 65_536)


@pytest.mark.slow
@only_sqlite
def test_gives_up_on_a_request_that_does_not_arrive(
    database_url: str, clerk: FakeClerk, tmp_path: Path
) -> None:
    """
    A request that does not arrive completely within ten seconds is abandoned.

    If the header is incomplete, the connection is closed without a response. If the body is
    incomplete, the request is refused.
    """
    with (
        serving(database_url, clerk, tmp_path / "log", WEB_CONCURRENCY="1") as server,
        connected(server) as head,
        connected(server) as body,
        connected(server) as idle,
    ):
        began = time.monotonic()
        head.sendall(b"POST /webhooks/clerk HTTP/1.1\r\n")
        body.sendall(b"POST /webhooks/clerk HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n\r\n")
        answers: dict[socket.socket, bytes] = {head: b"", body: b""}
        ended: dict[socket.socket, float] = {}
        while len(ended) < 2:
            assert time.monotonic() - began < 15, "the server did not close both connections"
            time.sleep(0.2)
            for connection in answers.keys() - ended.keys():
                received = send_byte(connection)
                answers[connection] += received or b""
                if received == b"":
                    ended[connection] = time.monotonic() - began
        assert is_open(idle)
        assert server.deliver(user_event(clerk_id("user"))).status == 200
    assert all(10 <= seconds < 12 for seconds in ended.values()), ended
    assert answers[head] == b""
    assert answers[body].startswith(b"HTTP/1.1 401 ")


@pytest.mark.slow
@only_sqlite
def test_closes_idle_connections_on_sigterm(
    database_url: str, clerk: FakeClerk, tmp_path: Path
) -> None:
    """A worker with idle connections exits before its graceful timeout of 12 s."""
    with serving(database_url, clerk, tmp_path / "log") as server, ExitStack() as stack:
        opened = [stack.enter_context(connected(server)) for _ in range(20)]
        for connection in opened[:10]:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        eventually(lambda: handle_signals(server))
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert time.monotonic() - began < 11
        assert "graceful timeout" not in server.log.read_text()


def handle_signals(server: Server) -> bool:
    """
    Return whether both workers have installed gunicorn's signal handlers.

    A SIGTERM that arrives earlier, while a worker is starting, is lost. The handler for SIGABRT is
    installed last.
    """
    workers = psutil.Process(server.process.pid).children()
    statuses = [Path(f"/proc/{worker.pid}/status").read_text() for worker in workers]
    caught = [int(status.partition("SigCgt:\t")[2].split()[0], 16) for status in statuses]
    return len(caught) == 2 and all(mask >> (signal.SIGABRT - 1) & 1 for mask in caught)


@only_postgresql
def test_refuses_early_what_it_cannot_process_in_time(
    database_url: str, clerk: FakeClerk, tmp_path: Path
) -> None:
    """
    Of 40 simultaneous deliveries that need locked rows, most get a 503.

    The refusals are counted, and the deliveries succeed when they are retried. Meanwhile,
    deliveries for other users are processed.
    """
    token = "x" * 20
    with (
        serving(
            database_url,
            clerk,
            tmp_path / "log",
            WEB_CONCURRENCY="1",
            DATABASE_POOL_SIZE="4",
            METRICS_TOKEN=token,
        ) as server,
        ThreadPool(40) as pool,
    ):
        ids = [clerk_id("user") for _ in range(40)]
        later = [user_event(user_id, at=NOW_MS + 1) for user_id in ids]
        messages = [clerk_id("msg") for _ in ids]
        created = pool.map(server.deliver, map(user_event, ids), timeout=60)
        assert {answer.status for answer in created} == {200}
        with psycopg.connect(database_url) as other:
            other.execute("SELECT 1 FROM users FOR UPDATE")
            waiting = [
                pool.submit(timed, server, *pair) for pair in zip(later, messages, strict=True)
            ]
            time.sleep(0.3)
            others = [timed(server, user_event(clerk_id("user")), clerk_id("msg"))[:2]]
            answers = [future.result(60) for future in waiting]
            other.rollback()
        refused = [(status, after, took) for status, took, after in answers if status == 503]
        assert {status for status, _, _ in answers} <= {500, 503}
        assert len(refused) >= 30
        assert {after for _, after, _ in refused} == {"1"}
        assert statistics.median(took for _, _, took in refused) < 1.5
        assert max(took for _, _, took in refused) < 3
        assert [status for status, _ in others] == [200]
        assert max(took for _, took in others) < 1
        shown = server.request("GET", "/metrics", headers={"Authorization": f"Bearer {token}"})
        counted = f'clerkhooks_webhook_refusals_total{{reason="overloaded"}} {len(refused)}.0'
        assert counted in shown.body.decode()
        retried = pool.map(server.deliver, later, messages, timeout=60)
        assert {answer.status for answer in retried} == {200}
        levels = [line["level"] for line in server.lines() if line.get("reason") == "overloaded"]
        assert levels == ["warning"] * len(refused)


def timed(server: Server, body: bytes, message_id: str) -> tuple[int, float, str | None]:
    """Deliver *body*; return the status, the duration in seconds, and ``Retry-After``."""
    began = time.monotonic()
    answer = server.deliver(body, message_id)
    return answer.status, time.monotonic() - began, answer.headers.get("retry-after")


@contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    """Hold a connection open until the block ends."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        yield connection


def is_open(connection: socket.socket) -> bool:
    """Return whether *connection*, on which the server sends no data, is still open."""
    connection.settimeout(0.001)
    try:
        return connection.recv(1) != b""
    except TimeoutError:
        return True
    except OSError:
        return False


def send_byte(connection: socket.socket) -> bytes | None:
    """Send a byte. Return the data received, None after a timeout, or b"" if disconnected."""
    connection.settimeout(0.001)
    try:
        connection.sendall(b"x")
        return connection.recv(4096)
    except TimeoutError:
        return None
    except OSError:
        return b""

"""The database stops, freezes or is locked, and recovers. No request hangs or gets lost."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing

import psutil  # type: ignore[import-untyped]
import psycopg
import pytest

from clerkhooks.clerk.fake import FakeClerk, clerk_id
from tests.conftest import migrate
from tests.dedicated_postgresql import DedicatedPostgreSQL, dedicated_postgresql
from tests.server import Server, serving
from tests.support import NOW_MS, ThreadPool, user_event

MAX_SECONDS = 10  # for each request
CONCURRENCY = 16  # concurrent requests to two workers
Delivery = tuple[int, float]  # status and duration in seconds


@pytest.fixture(scope="module")
def postgresql_server() -> Iterator[DedicatedPostgreSQL]:
    """Start a PostgreSQL server for this module."""
    with dedicated_postgresql() as postgresql:
        yield postgresql


@pytest.fixture(scope="module")
def service(
    postgresql_server: DedicatedPostgreSQL,
    clerk: FakeClerk,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """Run the real service with two workers on the dedicated PostgreSQL."""
    url = postgresql_server.make_database("away")
    migrate(url, clerk)
    with serving(url, clerk, tmp_path_factory.mktemp("away") / "server.log") as server:
        yield server


@pytest.fixture
def sqlite_service(clerk: FakeClerk, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run the real service with two workers on a SQLite file."""
    folder = tmp_path_factory.mktemp("sqlite")
    url = f"sqlite:///{folder}/clerkhooks.db"
    migrate(url, clerk)
    with serving(url, clerk, folder / "server.log") as server:
        yield server


def test_answers_500_while_postgresql_is_away(
    postgresql_server: DedicatedPostgreSQL, service: Server
) -> None:
    """Deliveries get a 500 within 10 s. The log has their message ids, but no user data."""
    warm_both_pools(service)
    message_ids = [clerk_id("msg") for _ in range(CONCURRENCY)]
    with postgresql_server.away():
        deliveries = deliver_all(
            service, [(message_id, user_event(clerk_id("user"))) for message_id in message_ids]
        )
        ready, healthy = service.request("GET", "/readyz"), service.request("GET", "/healthz")
    assert {status for status, _ in deliveries} == {500}
    assert max(seconds for _, seconds in deliveries) < MAX_SECONDS
    assert (ready.status, ready.json()["reason"], healthy.status) == (
        503,
        "database_unavailable",
        200,
    )
    failures = [line for line in service.lines() if line["event"] == "request_failed"]
    assert sorted(line["message_id"] for line in failures) == sorted(message_ids)
    assert {line["error"].split()[0] for line in failures} == {"OperationalError"}
    assert not any(secret in service.log.read_text() for secret in ("ada@example.org", "Lovelace"))


@pytest.mark.parametrize("noticed", [True, False], ids=["after a failure", "unnoticed"])
def test_recovers_without_a_restart(
    postgresql_server: DedicatedPostgreSQL, service: Server, noticed: bool
) -> None:
    """After PostgreSQL restarts, stale connections in the pool do not make a delivery fail."""
    warm_both_pools(service)
    with postgresql_server.away():
        if noticed:
            assert service.deliver(user_event(clerk_id("user"))).status == 500
    assert {status for status, _ in deliver_many(service, 2 * CONCURRENCY)} == {200}
    assert service.request("GET", "/readyz").status == 200


def test_gives_up_on_a_locked_row(service: Server) -> None:
    """The delivery gets a 500 and is logged as failed. A retry succeeds once the row is free."""
    user_id, message_id = clerk_id("user"), clerk_id("msg")
    assert service.deliver(user_event(user_id)).status == 200
    later = user_event(user_id, at=NOW_MS + 1, first_name="Augusta")
    with psycopg.connect(service.database_url) as other:
        other.execute("SELECT 1 FROM users WHERE id = %s FOR UPDATE", [user_id])
        [(status, seconds)] = deliver_all(service, [(message_id, later)])
        assert (status, seconds < MAX_SECONDS) == (500, True)
        logged = (
            "SELECT outcome, attempts, error FROM webhook_messages"
            f" WHERE message_id = '{message_id}'"
        )
        assert service.rows(logged) == [("failed", 1, "OperationalError 55P03")]
    assert service.deliver(later, message_id).json()["outcome"] == "applied"
    assert service.rows(logged) == [("applied", 2, None)]
    assert service.rows(f"SELECT name FROM users WHERE id = '{user_id}'") == [("Augusta Lovelace",)]


def test_gives_up_on_a_frozen_postgresql(
    postgresql_server: DedicatedPostgreSQL, service: Server
) -> None:
    """While PostgreSQL is frozen and cannot enforce its timeouts, deliveries still get a 500."""
    warm_both_pools(service)
    with postgresql_server.frozen():
        assert service.request("GET", "/healthz").status == 200
        deliveries = deliver_many(service, CONCURRENCY)
    assert {status for status, _ in deliveries} == {500}
    assert max(seconds for _, seconds in deliveries) < MAX_SECONDS
    assert {status for status, _ in deliver_many(service, CONCURRENCY)} == {200}


@pytest.mark.slow
def test_gives_up_on_a_locked_sqlite_file(sqlite_service: Server) -> None:
    """While another connection holds the write lock, deliveries get a 500. Retries succeed."""
    messages = [(clerk_id("msg"), user_event(clerk_id("user"))) for _ in range(CONCURRENCY)]
    with closing(
        sqlite3.connect(
            sqlite_service.database_url.removeprefix("sqlite:///"), isolation_level=None
        )
    ) as other:
        other.execute("BEGIN IMMEDIATE")
        deliveries = deliver_all(sqlite_service, messages)
        assert sqlite_service.request("GET", "/readyz").status == 200  # readers do not wait
        other.rollback()
    assert {status for status, _ in deliveries} == {500}
    assert max(seconds for _, seconds in deliveries) < MAX_SECONDS
    assert {status for status, _ in deliver_all(sqlite_service, messages)} == {200}
    assert sqlite_service.rows(
        "SELECT outcome, count(*) FROM webhook_messages GROUP BY outcome"
    ) == [("applied", CONCURRENCY)]


def deliver_all(server: Server, messages: list[tuple[str, bytes]]) -> list[Delivery]:
    """Deliver *messages* (id and body) concurrently; return each status and duration."""

    def deliver(message: tuple[str, bytes]) -> Delivery:
        started = time.monotonic()
        return server.deliver(message[1], message[0]).status, time.monotonic() - started

    with ThreadPool(len(messages)) as pool:
        return list(pool.map(deliver, messages, timeout=60))


def deliver_many(server: Server, count: int) -> list[Delivery]:
    """Create *count* users concurrently by delivering events."""
    return deliver_all(
        server, [(clerk_id("msg"), user_event(clerk_id("user"))) for _ in range(count)]
    )


def warm_both_pools(server: Server) -> None:
    """Send deliveries until both workers have a database connection."""
    for _ in range(50):
        assert {status for status, _ in deliver_many(server, 2 * CONCURRENCY)} == {200}
        if all(
            worker.net_connections(kind="unix")
            for worker in psutil.Process(server.process.pid).children()
        ):
            return
    raise AssertionError("only one worker has connections")

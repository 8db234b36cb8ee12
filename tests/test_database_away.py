"""The database goes away, is frozen or locked by somebody else, and comes back: nothing hangs, nothing is lost."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import psutil  # type: ignore[import-untyped]
import psycopg
import pytest

from clerkhooks.clerk.fake import FakeClerk, clerk_id
from tests.conftest import migrate
from tests.dedicated_postgresql import DedicatedPostgreSQL, dedicated_postgresql
from tests.server import Server, serving
from tests.support import NOW_MS, user_event

LIMIT = 10  # seconds that no request may take, whatever becomes of the database
TOGETHER = 16  # requests at once, for two workers
Delivery = tuple[int, float]


@pytest.fixture(scope="module")
def own() -> Iterator[DedicatedPostgreSQL]:
    """A PostgreSQL that no other test uses."""
    with dedicated_postgresql() as postgresql:
        yield postgresql


@pytest.fixture(scope="module")
def away(
    own: DedicatedPostgreSQL, clerk: FakeClerk, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The real server on it, with two workers."""
    url = own.make_database("away")
    migrate(url, clerk)
    with serving(url, clerk, tmp_path_factory.mktemp("away") / "server.log") as server:
        yield server


@pytest.fixture
def on_sqlite(clerk: FakeClerk, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The real server on a SQLite file, with two workers."""
    folder = tmp_path_factory.mktemp("sqlite")
    url = f"sqlite:///{folder}/clerkhooks.db"
    migrate(url, clerk)
    with serving(url, clerk, folder / "server.log") as server:
        yield server


def test_answers_500_while_postgresql_is_away(own: DedicatedPostgreSQL, away: Server) -> None:
    """Each delivery ends soon in 500 and in a line that names the message and tells nothing of the user."""
    warm_both_pools(away)
    message_ids = [clerk_id("msg") for _ in range(TOGETHER)]
    with own.away():
        deliveries = deliver_all(
            away, [(message_id, user_event(clerk_id("user"))) for message_id in message_ids]
        )
        ready, healthy = away.request("GET", "/readyz"), away.request("GET", "/healthz")
    assert {status for status, _ in deliveries} == {500}
    assert max(seconds for _, seconds in deliveries) < LIMIT
    assert (ready.status, ready.json()["reason"], healthy.status) == (
        503,
        "database_unavailable",
        200,
    )
    failures = [line for line in away.lines() if line["event"] == "request_failed"]
    assert sorted(line["message_id"] for line in failures) == sorted(message_ids)
    assert {line["error"].split()[0] for line in failures} == {"OperationalError"}
    assert not any(secret in away.log.read_text() for secret in ("ada@example.org", "Lovelace"))


@pytest.mark.parametrize("noticed", [True, False], ids=["after a failure", "unnoticed"])
def test_recovers_without_a_restart(own: DedicatedPostgreSQL, away: Server, noticed: bool) -> None:
    """PostgreSQL restarts under full pools: no stale connection costs a delivery, whether or not one failed meanwhile."""
    warm_both_pools(away)
    with own.away():
        if noticed:
            assert away.deliver(user_event(clerk_id("user"))).status == 500
    assert {status for status, _ in deliver_many(away, 2 * TOGETHER)} == {200}
    assert away.request("GET", "/readyz").status == 200


def test_gives_up_on_a_row_that_is_locked_for_ever(away: Server) -> None:
    """The delivery ends in 500 and is remembered as failed, while the lock stands; the retry is applied once it is gone."""
    user_id, message_id = clerk_id("user"), clerk_id("msg")
    assert away.deliver(user_event(user_id)).status == 200
    later = user_event(user_id, at=NOW_MS + 1, first_name="Augusta")
    with psycopg.connect(away.database_url) as other:
        other.execute("SELECT 1 FROM users WHERE id = %s FOR UPDATE", [user_id])
        [(status, seconds)] = deliver_all(away, [(message_id, later)])
        assert (status, seconds < LIMIT) == (500, True)
        logged = f"SELECT outcome, attempts, error FROM webhook_messages WHERE message_id = '{message_id}'"
        assert away.rows(logged) == [("failed", 1, "OperationalError 55P03")]
    assert away.deliver(later, message_id).json()["outcome"] == "applied"
    assert away.rows(logged) == [("applied", 2, None)]
    assert away.rows(f"SELECT name FROM users WHERE id = '{user_id}'") == [("Augusta Lovelace",)]


def test_gives_up_on_a_frozen_postgresql(own: DedicatedPostgreSQL, away: Server) -> None:
    """Its sockets are open and it says nothing, so its own timeouts do not help: each delivery ends in 500 all the same."""
    warm_both_pools(away)
    with own.frozen():
        assert away.request("GET", "/healthz").status == 200
        deliveries = deliver_many(away, TOGETHER)
    assert {status for status, _ in deliveries} == {500}
    assert max(seconds for _, seconds in deliveries) < LIMIT
    assert {status for status, _ in deliver_many(away, TOGETHER)} == {200}


def test_gives_up_on_a_sqlite_that_is_locked_for_ever(on_sqlite: Server) -> None:
    """Another process keeps the write lock: all deliveries end in 500 in time, and their retries are applied afterwards."""
    messages = [(clerk_id("msg"), user_event(clerk_id("user"))) for _ in range(TOGETHER)]
    with closing(
        sqlite3.connect(on_sqlite.database_url.removeprefix("sqlite:///"), isolation_level=None)
    ) as other:
        other.execute("BEGIN IMMEDIATE")
        deliveries = deliver_all(on_sqlite, messages)
        assert on_sqlite.request("GET", "/readyz").status == 200  # readers do not wait
        other.rollback()
    assert {status for status, _ in deliveries} == {500}
    assert max(seconds for _, seconds in deliveries) < LIMIT
    assert {status for status, _ in deliver_all(on_sqlite, messages)} == {200}
    assert on_sqlite.rows("SELECT outcome, count(*) FROM webhook_messages GROUP BY outcome") == [
        ("applied", TOGETHER)
    ]


def deliver_all(server: Server, messages: list[tuple[str, bytes]]) -> list[Delivery]:
    """Deliver *messages* (id and body) at once; gives the status and the seconds of each."""

    def deliver(message: tuple[str, bytes]) -> Delivery:
        started = time.monotonic()
        return server.deliver(message[1], message[0]).status, time.monotonic() - started

    with ThreadPoolExecutor(len(messages)) as pool:
        return list(pool.map(deliver, messages))


def deliver_many(server: Server, count: int) -> list[Delivery]:
    """Deliver as many new users at once."""
    return deliver_all(
        server, [(clerk_id("msg"), user_event(clerk_id("user"))) for _ in range(count)]
    )


def warm_both_pools(server: Server) -> None:
    """Deliver until both workers have a connection."""
    for _ in range(50):
        assert {status for status, _ in deliver_many(server, 2 * TOGETHER)} == {200}
        if all(
            worker.net_connections(kind="unix")
            for worker in psutil.Process(server.process.pid).children()
        ):
            return
    raise AssertionError("only one worker has connections")

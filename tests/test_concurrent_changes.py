"""With concurrent writers, a reader sees each change once, those of an object in order."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, cast

import psycopg
import pytest
from sqlalchemy.exc import DBAPIError

from clerkhooks.clerk.fake import clerk_id
from clerkhooks.store import Store
from clerkhooks.store.change_reader import Change, ChangeReader, Cursor
from tests.conftest import MakeService
from tests.support import Service, join
from tests.syncing import store_of

SECONDS, WRITERS, USERS = 3.0, 6, 8


class Writer(threading.Thread):
    """Writes random users in transactions that stay open. Some are rolled back."""

    def __init__(self, store: Store, user_ids: list[str], seed: int, end: float) -> None:
        super().__init__(name=f"writer {seed}")
        self._store, self._user_ids, self._end = store, user_ids, end
        self._rng = random.Random(seed)
        self.pid: int | None = None

    def run(self) -> None:
        """Write until the end."""
        while time.monotonic() < self._end:
            # The connection was killed, or there was a deadlock.
            with suppress(DBAPIError, RollingBack):
                self._write()
            self.pid = None

    def _write(self) -> None:
        statements, rng = self._store.statements, self._rng
        with self._store.database.connect() as connection, statements.transaction(connection):
            if connection.dialect.name == "postgresql":
                self.pid = cast("Any", connection.connection.driver_connection).info.backend_pid
                connection.exec_driver_sql("SELECT pg_current_xact_id()")
            for _ in range(rng.choice((1, 1, 2))):
                time.sleep(rng.choice((0, 0.001, 0.02)))
                chosen = rng.sample(self._user_ids, rng.randint(1, 2))
                rows = statements.encode(map(self._row, sorted(chosen)))
                given = {"rows": rows, "now": datetime.now(UTC), "may_bar": True, "read_at": 0}
                statements.write(connection, statements.merge_snapshots, given)
            time.sleep(rng.choice((0, 0, 0.05)))
            if rng.random() < 0.2:
                raise RollingBack

    def _row(self, user_id: str) -> dict[str, Any]:
        version = time.monotonic_ns()
        return {
            "id": user_id,
            "name": str(version),
            "version_updated_at": version,
            "version_timestamp": 0,
            "version_message_id": "",
        }


class RollingBack(Exception):
    """Rolls a writer's transaction back."""


@pytest.fixture
def feed(make_service: MakeService) -> Service:
    """Create the service with the change feed."""
    return make_service(CLERK_TABLES="changes")


def read_on(reader: ChangeReader, found: list[Change]) -> int:
    """Append the next page to *found*, and return its size."""
    page = reader.read(Cursor.parse(found[-1].cursor) if found else None, 7)
    found += page
    return len(page)


def kill_some(service: Service, writers: list[Writer]) -> None:
    """Kill the connections of writers, at random, while any writer is running."""
    if service.database_url.startswith("sqlite"):
        return
    rng = random.Random(0)
    with psycopg.connect(service.database_url, autocommit=True) as connection:
        while any(writer.is_alive() for writer in writers):
            time.sleep(rng.uniform(0, 0.1))
            if pid := rng.choice(writers).pid:
                connection.execute("SELECT pg_terminate_backend(%s)", [pid])


def test_reads_each_committed_change_once_and_in_order(feed: Service) -> None:
    store, user_ids = store_of(feed), [clerk_id("user") for _ in range(USERS)]
    reader, found = ChangeReader(store), list[Change]()
    end = time.monotonic() + SECONDS
    writers = [Writer(store, user_ids, seed, end) for seed in range(WRITERS)]
    killer = threading.Thread(target=kill_some, args=(feed, writers))
    for thread in (*writers, killer):
        thread.start()
    while any(writer.is_alive() for writer in writers):
        if not read_on(reader, found):
            time.sleep(0.001)
    join(*writers, killer)
    while read_on(reader, found):
        pass
    versions = defaultdict[str, list[int | None]](list)
    for change in found:
        versions[change.object_id].append(change.version)
        assert (change.kind == "created") == (len(versions[change.object_id]) == 1)
    assert all(read == sorted(read, key=lambda at: at or 0) for read in versions.values())
    committed = feed.rows("SELECT object_id, version FROM user_changes")
    assert sorted((change.object_id, change.version) for change in found) == sorted(committed)
    last = dict(feed.rows("SELECT id, version_updated_at FROM users"))
    assert {user_id: read[-1] for user_id, read in versions.items()} == last
    assert len(committed) > 20

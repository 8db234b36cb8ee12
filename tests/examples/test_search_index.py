"""``search_index.py`` keeps an index that is equal to the users table."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.store.change_reader import ChangeReader
from tests.conftest import MakeDatabase, MakeService, migrate
from tests.examples.search_index import SearchIndex
from tests.racing import eventually
from tests.server import Server, serving
from tests.support import NOW_MS, Service, deletion, rows, user_event
from tests.syncing import store_of

TOKEN = "a-token-for-the-index"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
SETTINGS = {"CLERK_TABLES": "changes", "CHANGES_TOKEN": TOKEN}
LIVE = "SELECT id, name FROM users WHERE deleted_at IS NULL ORDER BY id"


def search(path: Path, words: str | None = None) -> list[tuple[str, str]]:
    """Return the ids and names of the users that match, or of all."""
    with closing(sqlite3.connect(path)) as index, suppress(sqlite3.OperationalError):
        where = f"WHERE users MATCH '{words}'" if words else ""
        return index.execute(f"SELECT id, name FROM users {where} ORDER BY id").fetchall()
    return []


@contextmanager
def indexing(server: Server, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the script; kill it when the block ends."""
    url = server.database_url.replace("postgresql://", "postgresql+psycopg://")
    script = Path(__file__).with_name("search_index.py")
    process = subprocess.Popen(
        [sys.executable, str(script), f"http://127.0.0.1:{server.port}", url, str(path)],
        env=os.environ | {"CHANGES_TOKEN": TOKEN},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


def test_ends_with_the_same_users_although_it_is_killed(
    make_database: MakeDatabase, clerk: FakeClerk, tmp_path: Path
) -> None:
    url, path, rng = make_database("postgresql"), tmp_path / "index.db", random.Random(0)
    migrate(url, clerk)
    user_ids = [clerk_id("user") for _ in range(8)]
    with serving(url, clerk, tmp_path / "server.log", **SETTINGS) as server:
        server.deliver(user_event(user_ids[0]))
        for part in range(3):
            with indexing(server, path):
                for number in range(10):
                    at, name = NOW_MS + 10 * part + number, f"Ada{part}{number}"
                    server.deliver(user_event(rng.choice(user_ids), at=at, first_name=name))
                    time.sleep(rng.uniform(0, 0.02))
        server.deliver(deletion(user_ids[0]))
        with indexing(server, path):
            eventually(lambda: search(path) == rows(url, LIVE))
            server.deliver(user_event(user_ids[1], at=NOW_MS + 99, first_name="Augusta"))
            eventually(lambda: search(path, "augusta") == [(user_ids[1], "Augusta Lovelace")])


def test_begins_again_if_changes_were_pruned(make_service: MakeService, tmp_path: Path) -> None:
    service = make_service(**SETTINGS)
    transport = httpx.WSGITransport(app=service.app)
    feed = httpx.Client(transport=transport, base_url="http://localhost", headers=HEADERS)
    url = service.database_url.replace("postgresql://", "postgresql+psycopg://")
    engine = sa.create_engine(url)
    with closing(sqlite3.connect(tmp_path / "index.db")) as file:
        index = SearchIndex(file, engine, feed)
        index.update()
        gone, kept = sign_up(service), sign_up(service)
        index.update()
        service.deliver(deletion(gone))
        list(ChangeReader(store_of(service)).prune(datetime.now(UTC)))
        index.update()
    assert [user_id for user_id, _ in search(tmp_path / "index.db")] == [kept]
    stranger = httpx.Client(transport=transport, base_url="http://localhost")
    with (
        closing(sqlite3.connect(tmp_path / "other.db")) as file,
        pytest.raises(httpx.HTTPStatusError),
    ):
        SearchIndex(file, engine, stranger).update()
    engine.dispose()


def sign_up(service: Service) -> str:
    """Deliver an event for a new user; return the id."""
    user_id = clerk_id("user")
    service.outcome(user_event(user_id))
    return user_id

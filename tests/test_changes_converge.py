"""A reader that applies the changes has the same tables in the end."""

from __future__ import annotations

import time
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from clerkhooks.store.change_reader import ChangeReader, Cursor
from tests.backend import Backend
from tests.conftest import MakeService
from tests.support import Service
from tests.syncing import store_of
from tests.test_follower import RUNS, STEPS, FollowedWorld
from tests.test_reconcile_organizations import METHODS, World

TIMES = frozenset(("created_at", "updated_at", "last_seen", "is_online", "deleted_at"))


class Mirror:
    """A copy of the tables, which is updated only for changes, in batches."""

    def __init__(self, service: Service) -> None:
        store = store_of(service)
        self._database, self._reader = store.database, ChangeReader(store)
        self._tables = {kind.family: each.table for kind, each in store.by_kind.items()}
        self._cursor: Cursor | None = self._reader.find_end()
        self._rows = self.read_all()

    def update(self, limit: int) -> bool:
        """Read up to *limit* changes and the rows that they name; return whether there were any."""
        changes = self._reader.read(self._cursor, limit)
        for change in changes:
            key = (change.object_type, change.object_id)
            self._rows[key] = self._read(change.object_type, change.object_id)[key]
            self._cursor = Cursor.parse(change.cursor)
        return bool(changes)

    def check(self) -> None:
        """Read the rest of the changes, and compare the copy with the tables."""
        while self.update(3):
            pass
        assert self._rows == self.read_all()

    def read_all(self) -> dict[tuple[str, str], Any]:
        """Return all rows."""
        return {key: row for name in self._tables for key, row in self._read(name).items()}

    def _read(self, name: str, object_id: str | None = None) -> dict[tuple[str, str], Any]:
        table = self._tables[name]
        shown = [
            column
            for column in table.c
            if column.name not in TIMES and not column.name.startswith("version_")
        ]
        query = sa.select(*shown, table.c.deleted_at.is_(None).label("is_live"))
        if object_id is not None:
            query = query.where(table.c.id == object_id)
        return {(name, row.id): row for row in self._database.execute(query)}


@pytest.fixture
def feed(make_service: MakeService, backend: Backend) -> Service:
    """Create the service with all optional tables and access to the Backend API."""
    return make_service(CLERK_TABLES="organizations,changes", **backend.environ)


@settings(max_examples=settings().max_examples // 4)
@given(steps=st.lists(st.one_of(STEPS, STEPS, STEPS, RUNS, st.integers(1, 4)), max_size=24))
def test_applies_the_changes_of_users(
    feed: Service, backend: Backend, steps: list[tuple[str, int, int] | int]
) -> None:
    """Webhooks, calls, syncs and followers change users. A step that is a number is a read."""
    backend.users.clear()
    stays = backend.sign_up(at=int(time.time() * 1000) - 3_600_000)
    feed.clerk_service.deliver("user.created", backend.users[stays])
    later = [step for step in steps if not isinstance(step, int)]
    world, mirror = FollowedWorld(feed, backend, later=later), Mirror(feed)
    for step in steps:
        if isinstance(step, int):
            mirror.update(step)
        elif world.later:
            world.perform(world.later.pop(0))
    mirror.check()


@settings(max_examples=settings().max_examples // 4)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from([*METHODS, "read", "read"]), st.integers(0, 20)), max_size=24
    )
)
def test_applies_the_changes_of_organizations_and_memberships(
    feed: Service, backend: Backend, steps: list[tuple[str, int]]
) -> None:
    world, mirror = World(feed, backend), Mirror(feed)
    for method, number in steps:
        if method == "read":
            mirror.update(1 + number % 4)
        else:
            world.perform(method, number)
    mirror.check()

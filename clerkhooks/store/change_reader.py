"""
Reading of the change feed.

A sequence is not commit order: a number that was taken first may be committed last. On PostgreSQL,
rows are therefore read in the order of their transactions' ids, up to the oldest transaction that
is still running. On SQLite, which has one writer at a time, all rows have the transaction id 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from typing import Any, NamedTuple

import sqlalchemy as sa

from clerkhooks.errors import ChangesPruned, ChangesRestored
from clerkhooks.store import Store
from clerkhooks.store.changes import PRUNED
from clerkhooks.store.database import transaction

MAX_LIMIT = 1000
_PATTERN = re.compile(r"([0-9]{1,18})-([0-9]{1,18})")


class Cursor(NamedTuple):
    """A position in the feed: that of the last row that was read."""

    transaction_id: int
    sequence: int

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """
        Parse the text of a cursor.

        Raises:
            ValueError: *text* is malformed.
        """
        found = _PATTERN.fullmatch(text)
        if found is None:
            raise ValueError("The cursor is malformed. Use one from an earlier response, or 'end'.")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.transaction_id}-{self.sequence}"


START = Cursor(0, 0)


@dataclass(frozen=True, slots=True)
class Change:
    """
    A change of a row.

    *kind* is ``created``, ``filled``, ``updated``, ``deleted``, ``barred``, ``restored`` or
    ``revived``. *fields* are the names of the changed columns. *version* is Clerk's time of the
    object in milliseconds, the time of the sync for a tombstone that a sync wrote, or None for an
    object that an event deleted and one that no event has filled.
    """

    cursor: str
    object_type: str
    object_id: str
    kind: str
    fields: list[str]
    version: int | None
    changed_at: datetime


class ChangeReader:
    """Reads and prunes the change feed of *store*, which must have one."""

    def __init__(self, store: Store) -> None:
        if store.changes is None:
            raise RuntimeError("The change feed is off. Set CLERK_TABLES=changes.")
        self._database, self.table = store.database, store.changes
        self._is_postgresql = store.database.dialect_name == "postgresql"
        columns = self.table.c
        self._position = sa.tuple_(columns.transaction_id, columns.sequence)
        self._order = (columns.transaction_id, columns.sequence)
        query = sa.select(*columns).where(self._position > _bound()).order_by(*self._order)
        if self._is_postgresql:
            query = query.where(columns.transaction_id < _snapshot("xmin"))
        self._read = query.limit(sa.bindparam("limit"))

    def read(self, after: Cursor | None, limit: int = MAX_LIMIT) -> list[Change]:
        """
        Return up to *limit* changes after a cursor, by default from the oldest one kept.

        Raises:
            ChangesPruned: changes after the cursor were pruned.
            ChangesRestored: on PostgreSQL, a row or the cursor has a transaction id that the
                cluster has not reached; on SQLite, the cursor is later than the last row. A backup
                was restored, or the database was replaced.
        """
        given = {**(after or START)._asdict(), "limit": limit + (after is None)}
        with self._database.connect() as connection:
            rows = connection.execute(self._read, given).all()
            self._check_cluster(connection, after or START)
        if after is None:
            rows = [row for row in rows if row.kind != PRUNED][:limit]
        elif any(row.kind == PRUNED for row in rows):
            raise ChangesPruned("changes_pruned")
        return [_make_change(row) for row in rows]

    def find_end(self) -> Cursor:
        """
        Return the cursor of the last row that can be read. Later changes come after it.

        A transaction id without a row would not be safe: after a crash, PostgreSQL may reuse the
        ids of transactions that were never written to disk.
        """
        query = sa.select(*self._order).order_by(*(column.desc() for column in self._order))
        if self._is_postgresql:
            query = query.where(self.table.c.transaction_id < _snapshot("xmin"))
        rows = self._database.execute(query.limit(1))
        return Cursor(rows[0].transaction_id, rows[0].sequence) if rows else START

    def find_delay(self) -> float:
        """Return the age in seconds of the oldest change that readers cannot see yet, or 0."""
        if not self._is_postgresql:
            return 0.0
        columns = self.table.c
        oldest = sa.func.min(columns.changed_at, type_=columns.changed_at.type)
        query = sa.select(oldest).where(columns.transaction_id >= _snapshot("xmin"))
        [(at,)] = self._database.execute(query)
        return max(0.0, (datetime.now(UTC) - at).total_seconds()) if at else 0.0

    def prune(self, before: datetime, batch: int = 1000) -> Iterator[int]:
        """
        Delete changes from before a time. Yield the size of each batch.

        The last deleted row becomes a row of the kind ``pruned``, so that a reader with an older
        cursor finds it. Every earlier row is deleted, so no other reader does. Deletion ends at the
        first newer change in the feed, so an old change after it is kept.
        """
        columns, after = self.table.c, START
        query = sa.select(*self._order, columns.kind, columns.changed_at)
        query = query.where(self._position > _bound()).order_by(*self._order).limit(batch)
        marker: int | None = None

        def is_old(row: Any) -> bool:
            return bool(row.changed_at < before)

        with self._database.connect() as connection:
            while rows := list(takewhile(is_old, connection.execute(query, after._asdict()).all())):
                after = Cursor(rows[-1].transaction_id, rows[-1].sequence)
                gone = [row.sequence for row in rows[:-1]]
                with transaction(connection):
                    self._replace(connection, [*gone, marker] if marker else gone, after)
                marker = after.sequence
                if count := sum(row.kind != PRUNED for row in rows):
                    yield count

    def _replace(self, connection: sa.Connection, gone: list[int], last: Cursor) -> None:
        """Delete the rows *gone*, and make the row at *last* the marker."""
        columns = self.table.c
        connection.execute(sa.delete(self.table).where(columns.sequence.in_(gone)))
        values: dict[str, Any] = {
            "object_type": "",
            "object_id": "",
            "kind": PRUNED,
            "fields": [],
            "version": None,
        }
        marker = sa.update(self.table).where(columns.sequence == last.sequence)
        connection.execute(marker.values(values))

    def _check_cluster(self, connection: sa.Connection, after: Cursor) -> None:
        """
        Check that the rows and the cursor can be from this database.

        On PostgreSQL, transaction ids only increase in a cluster. On SQLite, no cursor is later
        than the last row, which ``prune`` keeps as its marker.
        """
        if not self._is_postgresql:
            last = connection.scalar(sa.select(sa.func.max(self.table.c.sequence)))
            if after > Cursor(0, last or 0):
                raise ChangesRestored("changes_restored")
            return
        newest = sa.select(sa.func.max(self.table.c.transaction_id)).scalar_subquery()
        xmax = _snapshot("xmax")
        is_from_other = sa.or_(newest >= xmax, sa.bindparam("transaction_id") > xmax)
        if connection.scalar(sa.select(is_from_other), {"transaction_id": after.transaction_id}):
            raise ChangesRestored("changes_restored")


def _bound() -> sa.ColumnElement[Any]:
    names = ("transaction_id", "sequence")
    return sa.tuple_(*(sa.bindparam(name, type_=sa.BigInteger) for name in names))


def _snapshot(bound: str) -> sa.ColumnElement[int]:
    """Return a bound of the statement's snapshot: ``xmin`` or ``xmax``, a transaction id."""
    found = getattr(sa.func, f"pg_snapshot_{bound}")(sa.func.pg_current_snapshot())
    return sa.cast(sa.cast(found, sa.Text), sa.BigInteger)


def _make_change(row: Any) -> Change:
    cursor = str(Cursor(row.transaction_id, row.sequence))
    about = (row.object_type, row.object_id, row.kind, row.fields, row.version)
    return Change(cursor, *about, row.changed_at)

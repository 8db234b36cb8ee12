"""Reconciliation: brings the users table in line with Clerk's Backend API while events arrive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from multiprocessing.pool import ThreadPool
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa

from clerkhooks.clerk.backend_api import IDS, BackendApi
from clerkhooks.clerk.events import Snapshot, parse_snapshot
from clerkhooks.errors import EventError
from clerkhooks.store import Store
from clerkhooks.store.columns import read_fields, to_json
from clerkhooks.store.database import sqlite_transaction
from clerkhooks.store.messages import is_failed
from clerkhooks.store.models import VERSION_COLUMNS
from clerkhooks.store.queries import is_live, is_unfilled
from clerkhooks.store.statements import profile_columns
from clerkhooks.sync.comparison import Finding, Result, find_drift, judge, lacks_declared
from clerkhooks.sync.connections import check_lock, retry
from clerkhooks.sync.listing import id_of, prefetch, read_all

T = TypeVar("T")
# The Backend API may not know a user yet whose first call has just created the row.
MIN_AGE = timedelta(minutes=10)
# A run that would delete more than 20 users, and more than a tenth, rather has the wrong key.
MAX_DELETED, MAX_DELETED_SHARE = 20, 10
THREADS = 8


class Progress(Protocol):
    """Receives progress updates."""

    def begin(self, label: str, total: int | None) -> object:
        """Begin a part of the run, of *total* users if that is known."""

    def advance(self, count: int) -> object:
        """Add *count* users that are done."""


@dataclass
class Reconciliation:
    """
    One run. With *check* it changes nothing; with *force* it deletes any number of users.

    *connection* is from ``sole_writer()``, or from ``reader()`` for a check. *tell* receives each
    finding: the differences that a check finds, and what failed.
    """

    api: BackendApi
    store: Store
    connection: sa.Connection
    progress: Progress
    tell: Callable[[Finding], object]
    check: bool = False
    force: bool = False
    counts: Counter[Result] = field(default_factory=Counter)
    withheld: int = 0
    drifted: int = 0

    def summary(self) -> dict[str, int]:
        """Return the number of users by result."""
        return {result.value: self.counts[result] for result in Result}

    @property
    def unknown(self) -> int:
        """The number of requested users that are neither here nor at Clerk."""
        return self.counts[Result.UNKNOWN]

    @property
    def well(self) -> bool:
        """Whether the table agrees with Clerk now, or did already in a check."""
        return not (self.counts[Result.FAILED] or self.withheld or self.drifted)

    def sync_all(self) -> None:
        """Sync all users of Clerk, then all users that exist only here."""
        is_trusted = self._knows_instance()
        self.progress.begin("users at Clerk", self.api.count_users())
        for page in prefetch(read_all(self.api)):
            self._apply(page)
            self.progress.advance(len(page))
        self.progress.begin("rows here", self._count_live())
        users = self.store.users
        ids = sa.select(users.c.id).where(
            is_live(users), users.c.created_at < datetime.now(UTC) - MIN_AGE
        )
        chunks = _chunks(self.connection, ids, users.c.id, IDS)
        self._tombstone(self._find_deleted(chunks), is_trusted=is_trusted)

    def sync_some(self, user_ids: Sequence[str]) -> None:
        """Sync these users."""
        chunks = _batched(dict.fromkeys(user_ids), IDS)
        self._sync_chunks(chunks, is_trusted=True, total=len(user_ids))

    def sync_missing(self) -> None:
        """Sync the users that have no profile yet."""
        users = self.store.users
        ids = sa.select(users.c.id).where(is_unfilled(users))
        chunks = _chunks(self.connection, ids, users.c.id, IDS)
        self._sync_chunks(chunks, is_trusted=self._knows_instance())

    def sync_failed(self) -> None:
        """Sync the users of messages that failed and have not succeeded since."""
        messages = self.store.messages
        ids = sa.select(messages.c.clerk_user_id).distinct().where(is_failed(messages))
        chunks = _chunks(self.connection, ids, messages.c.clerk_user_id, IDS)
        self._sync_chunks(chunks, is_trusted=self._knows_instance())

    def _sync_chunks(
        self, chunks: Iterable[Sequence[str]], *, is_trusted: bool, total: int | None = None
    ) -> None:
        self.progress.begin("users", total)
        self._tombstone(self._find_deleted(chunks, apply=True), is_trusted=is_trusted)

    def _knows_instance(self) -> bool:
        """Return whether Clerk knows any of the newest users here: else the key is a wrong one."""
        users = self.store.users
        newest = sa.select(users.c.id).where(is_live(users), sa.not_(is_unfilled(users)))
        ids = self.connection.execute(newest.order_by(users.c.created_at.desc()).limit(IDS))
        return bool(self.api.find_users(list(ids.scalars())))

    def _count_live(self) -> int:
        users = self.store.users
        count = sa.select(sa.func.count()).select_from(users).where(is_live(users))
        return self.connection.scalar(count) or 0

    def _apply(self, users: Sequence[Any]) -> None:
        """Compare the users of a page with their rows, and update the rows that are older."""
        snapshots = self._parse(users)
        if snapshots:
            results = retry(lambda: self._write(snapshots))
            self.counts.update(results.values())

    def _parse(self, users: Iterable[Any]) -> dict[str, Snapshot]:
        """Return the users by id, in order. Report those that are malformed."""
        found = {}
        for data in users:
            try:
                snapshot = parse_snapshot(data)
                found[snapshot.user_id] = snapshot
            except EventError as error:
                self._fail(id_of(data), error.reason)
        return dict(sorted(found.items()))

    def _fail(self, user_id: str | None, reason: str) -> None:
        self.counts[Result.FAILED] += 1
        self.tell(Finding("failed", user_id, reason))

    def _write(self, snapshots: Mapping[str, Snapshot]) -> dict[str, Result]:
        with nullcontext() if self.check else sqlite_transaction(self.connection):
            rows = self._read_states(list(snapshots))
            results, behind, unfilled = {}, [], []
            for user_id, snapshot in snapshots.items():
                row, values = rows.get(user_id), self._values(snapshot)
                results[user_id], is_behind = judge(row, snapshot, values)
                if is_behind:
                    behind.append(snapshot)
                elif row is not None and lacks_declared(row, snapshot, values):
                    results[user_id] = Result.UPDATED
                    unfilled.append(snapshot)
            if self.check:
                self._tell_drift(rows, snapshots, results)
                return results
            # Between reading and writing, a webhook may have brought something newer.
            changed = self._upsert(behind) | self._fill(unfilled)
            missed = {item.user_id for item in (*behind, *unfilled)} - changed
            return results | dict.fromkeys(missed, Result.FRESHER_HERE)

    def _read_states(self, user_ids: Sequence[str]) -> dict[str, Any]:
        users, names = self.store.users, ("id", *self.store.statements.kept, "deleted_at")
        columns = (users.c[name] for name in (*names, *VERSION_COLUMNS))
        states = sa.select(*columns).where(users.c.id.in_(user_ids))
        return {row.id: row for row in self.connection.execute(states)}

    def _values(self, snapshot: Snapshot) -> dict[str, Any]:
        """Return the values of the columns of *snapshot*."""
        declared = read_fields(self.store.fields, snapshot.data, self.store.database.dialect)
        return profile_columns(snapshot.profile) | declared

    def _upsert(self, snapshots: Sequence[Snapshot]) -> set[str]:
        return self._execute(self.store.statements.merge_snapshots, snapshots)

    def _fill(self, snapshots: Sequence[Snapshot]) -> set[str]:
        statement = self.store.statements.fill_declared
        return set() if statement is None else self._execute(statement, snapshots)

    def _execute(self, statement: sa.TextClause, snapshots: Sequence[Snapshot]) -> set[str]:
        if not snapshots:
            return set()
        check_lock(self.connection)
        encode = self.store.statements.encode
        rows = [
            {"id": item.user_id}
            | encode(self._values(item))
            | dict(zip(VERSION_COLUMNS, item.version, strict=True))
            for item in snapshots
        ]
        parameters = {"rows": to_json(rows), "now": datetime.now(UTC)}
        return set(self.connection.execute(statement, parameters).scalars())

    def _tell_drift(
        self,
        rows: Mapping[str, Any],
        snapshots: Mapping[str, Snapshot],
        results: Mapping[str, Result],
    ) -> None:
        for user_id, result in results.items():
            if result in (Result.CREATED, Result.UPDATED):
                self.drifted += 1
                row, snapshot = rows.get(user_id), snapshots[user_id]
                self.tell(find_drift(row, snapshot, self._values(snapshot)))

    def _find_deleted(
        self, chunks: Iterable[Sequence[str]], *, apply: bool = False
    ) -> Iterator[str]:
        """
        Yield the ids that Clerk answers with 404. With *apply*, update the other users.

        Absence from a list is not enough: pages shift while users sign up, and a limit that Clerk
        does not accept gives fewer users.
        """
        with ThreadPool(THREADS) as pool:
            for group in _batched(chunks, THREADS):
                asked = list(group)
                found = pool.map(self.api.find_users, asked)
                if apply:
                    for users in found:
                        self._apply(users)
                known = {id_of(data) for users in found for data in users}
                absent = [user_id for ids in asked for user_id in ids if user_id not in known]
                for ids in _batched(absent, THREADS):  # a few at a time: too many end the run
                    gone = pool.map(self.api.is_gone, ids)
                    yield from (
                        user_id for user_id, is_gone in zip(ids, gone, strict=True) if is_gone
                    )
                self.progress.advance(sum(map(len, asked)))

    def _tombstone(self, gone: Iterable[str], *, is_trusted: bool) -> None:
        """Tombstone users that are deleted at Clerk, unless there are too many of them."""
        most = max(MAX_DELETED, self._count_live() // MAX_DELETED_SHARE) if is_trusted else 0
        found: list[str] = []
        for user_id in gone:
            found.append(user_id)
            if (self.force or self.check) and len(found) == IDS:
                self._tombstone_some(found)
                found.clear()
            elif len(found) > most and not (self.force or self.check):
                self.withheld = len(found)
                return
        for ids in _batched(found, IDS):
            self._tombstone_some(ids)

    def _tombstone_some(self, ids: Sequence[str]) -> None:
        here = {row.id: row.deleted_at is None for row in self._read_states(ids).values()}
        self.counts[Result.UNKNOWN] += len(ids) - len(here)
        live = [user_id for user_id, is_live in here.items() if is_live]
        if self.check:
            self.drifted += len(live)
            for user_id in live:
                self.tell(Finding("gone_at_clerk", user_id))
        elif live:
            self.counts[Result.TOMBSTONED] += retry(lambda: self._write_tombstones(live))

    def _write_tombstones(self, ids: Sequence[str]) -> int:
        now = datetime.now(UTC)
        parameters = {
            "rows": to_json([{"id": user_id} for user_id in ids]),
            "now": now,
            "found_at": int(now.timestamp() * 1000),
            "created_before": now - MIN_AGE,
        }
        check_lock(self.connection)
        with sqlite_transaction(self.connection):
            return len(self.connection.execute(self.store.statements.tombstone, parameters).all())


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _chunks(
    connection: sa.Connection, query: sa.Select[Any], key: sa.ColumnElement[str], size: int
) -> Iterator[Sequence[str]]:
    """Yield the ids of *query*, in the order of *key*, *size* at a time."""
    after = ""
    while ids := list(
        connection.execute(query.where(key > after).order_by(key).limit(size)).scalars()
    ):
        yield ids
        after = ids[-1]

"""Reconcile the users table with Clerk's Backend API, even while events are arriving."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import chain, compress, islice
from multiprocessing.pool import ThreadPool
from time import time
from typing import Any, TypeVar

import sqlalchemy as sa

from clerkhooks.clerk.backend_api import IDS, BackendApi
from clerkhooks.clerk.events import Snapshot, parse_snapshot
from clerkhooks.clerk.kinds import USER
from clerkhooks.errors import EventError
from clerkhooks.handled_writes import HandledWrites
from clerkhooks.store import Store
from clerkhooks.store.columns import read_fields
from clerkhooks.store.database import sqlite_transaction
from clerkhooks.store.messages import is_failed
from clerkhooks.store.queries import is_live, is_unfilled
from clerkhooks.sync.comparison import Comparison, Finding, Result
from clerkhooks.sync.connections import check_lock, retry
from clerkhooks.sync.handlers import write_told
from clerkhooks.sync.listing import IdSet, read_all

T = TypeVar("T")
Advance = Callable[[int], object]
# If a call has just created the row of a new user, the Backend API may not yet return this user.
MIN_AGE = timedelta(minutes=10)
# If a sync would delete more than 20 users and more than a tenth of all users, the secret key is
# probably wrong.
MAX_DELETED, MAX_DELETED_SHARE = 20, 10
THREADS = 8
ROWS = 5000  # ids read from the database at a time


@dataclass
class Reconciliation:
    """
    One sync. With *check*, nothing is changed. *force* permits any number of deletions.

    *connection* is from ``sole_writer()``, or from ``reader()`` for a check. *tell* receives each
    finding: a difference that a check found, or a failure. *begin* is called before each part of
    the sync, with the name of the part and the number of users (None if unknown). *begin* returns a
    function that is called with the number of users processed since the last call. With *handled*,
    handlers are told of changes of the account state.
    """

    api: BackendApi
    store: Store
    connection: sa.Connection
    begin: Callable[[str, int | None], Advance]
    tell: Callable[[Finding], object]
    check: bool = False
    force: bool = False
    handled: HandledWrites | None = None
    counts: Counter[Result] = field(default_factory=Counter)
    withheld: int = 0
    drifted: int = 0

    def summary(self) -> dict[str, int]:
        """Return the number of users by result."""
        return {result.value: self.counts[result] for result in Result}

    @property
    def ok(self) -> bool:
        """Whether the table matches Clerk's data after the sync, or matched it in a check."""
        return not (self.counts[Result.FAILED] or self.withheld or self.drifted)

    def sync_all(self) -> None:
        """Sync all users at Clerk, then tombstone users that exist only in the table."""
        is_trusted = self._knows_instance()
        advance = self.begin("users at Clerk", self.api.count_users())
        seen = IdSet()
        pages, read_at = read_all(self.api, seen), _now()
        while page := next(pages, None):
            self._apply(page, read_at)
            advance(len(page))
            read_at = _now()
        users = self.store.users
        is_old = users.c.created_at < datetime.now(UTC) - MIN_AGE
        ids = self._read_ids(users.c.id, is_live(users), is_old)
        unseen = (user_id for user_id in ids if user_id not in seen)
        advance = self.begin("rows only here", None)
        self._tombstone(self._find_deleted(unseen, advance), is_trusted=is_trusted)

    def sync_some(self, user_ids: Sequence[str]) -> None:
        """Sync the users with these ids."""
        self._sync_ids(dict.fromkeys(user_ids), len(user_ids), is_trusted=True)

    def sync_missing(self) -> None:
        """Sync the users that have no profile yet."""
        users = self.store.users
        ids = self._read_ids(users.c.id, is_unfilled(users))
        self._sync_ids(ids, None, is_trusted=self._knows_instance())

    def sync_failed(self) -> None:
        """Sync the users of failed messages that no retry has processed."""
        messages = self.store.messages
        ids = self._read_ids(messages.c.clerk_user_id, is_failed(messages))
        self._sync_ids(ids, None, is_trusted=self._knows_instance())

    def _sync_ids(self, ids: Iterable[str], total: int | None, *, is_trusted: bool) -> None:
        gone = self._find_deleted(ids, self.begin("users", total), apply=True)
        self._tombstone(gone, is_trusted=is_trusted)

    def _read_ids(self, key: sa.Column[str], *conditions: sa.ColumnElement[bool]) -> Iterator[str]:
        """Yield the ids in the column *key* of rows that meet *conditions*."""
        query = sa.select(key).distinct().where(*conditions).order_by(key).limit(ROWS)
        after = ""
        while ids := self.connection.scalars(query.where(key > after)).all():
            yield from ids
            after = ids[-1]

    def _knows_instance(self) -> bool:
        """Return whether Clerk has any of the newest stored users. If not, the key may be wrong."""
        users = self.store.users
        filled = sa.select(users.c.id).where(is_live(users), ~is_unfilled(users))
        newest = filled.order_by(users.c.created_at.desc()).limit(IDS)
        return bool(self.api.find_users(self.connection.scalars(newest).all()))

    def _count_live(self) -> int:
        users = self.store.users
        count = sa.select(sa.func.count()).select_from(users).where(is_live(users))
        return self.connection.scalar(count) or 0

    def _apply(self, users: Iterable[Any], read_at: int) -> None:
        """Write missing and older rows of *users*. In a check, report the differences instead."""
        snapshots = self._parse(users, read_at)
        if self.check:
            for comparison in self._compare(snapshots):
                self._tell_drift(comparison)
        elif snapshots:
            counts, told = retry(self._write, snapshots)
            self.counts.update(counts)
            if self.handled is not None:
                self.counts.update(write_told(self.handled, self.connection, told, self.tell))

    def _parse(self, users: Iterable[Any], read_at: int) -> dict[str, Snapshot]:
        """Return the parsed users by id. Report malformed users."""
        found = {}
        for data in users:
            try:
                snapshot = parse_snapshot(USER, data, read_at)
                found[snapshot.id] = snapshot
            except EventError as error:
                self.counts[Result.FAILED] += 1
                self.tell(Finding("failed", USER.find_id(data), error.reason))
        return found

    def _compare(self, snapshots: Mapping[str, Snapshot]) -> list[Comparison]:
        """Return the users whose rows are missing, or may differ. In a check, return all users."""
        rows = [
            {"id": each.id, "version_updated_at": None if self.check else each.updated_at}
            | each.state
            for each in snapshots.values()
        ]
        compare = self.store.statements.compare
        parameters = {"rows": self.store.statements.encode(rows), "now": datetime.now(UTC)}
        return [
            Comparison(
                snapshots[row.sought],
                self._values(snapshots[row.sought]),
                row if row.id is not None else None,
            )
            for row in self.connection.execute(compare, parameters).all()
        ]

    def _tell_drift(self, comparison: Comparison) -> None:
        result = comparison.result
        self.counts[result] += 1
        if result in (Result.CREATED, Result.UPDATED) or comparison.is_edited:
            self.drifted += 1
            user_id = comparison.snapshot.id
            self.tell(Finding(comparison.kind, user_id, fields=comparison.fields))

    def _write(self, snapshots: Mapping[str, Snapshot]) -> tuple[Counter[Result], list[Comparison]]:
        """
        Update rows that are older than *snapshots*, in one transaction. Count the results.

        Also return the users of whose changes handlers must be told. Their rows are not written.
        """
        statements, told, rest = self.store.statements, list[Comparison](), list[Comparison]()
        with sqlite_transaction(self.connection):
            compared = self._compare(snapshots)
            for each in compared:
                (told if self._follows and each.changes_access else rest).append(each)
            behind = [each for each in rest if each.is_behind]
            unfilled = [each for each in rest if each.lacks_declared]
            changed = self._execute(statements.merge_snapshots, behind)
            changed |= self._execute(statements.fill_declared, unfilled)
        # A webhook may have written newer data after the rows were read.
        missed = {each.snapshot.id for each in (*behind, *unfilled)} - changed
        counts = Counter(
            Result.NEWER_HERE if each.snapshot.id in missed else each.result for each in rest
        )
        counts[Result.UNCHANGED] += len(snapshots) - len(compared)
        return counts, told

    @property
    def _follows(self) -> bool:
        return self.handled is not None and self.handled.follows_changes

    def _values(self, snapshot: Snapshot) -> dict[str, Any]:
        """Return the column values for *snapshot*."""
        dialect = self.store.database.dialect
        declared = read_fields(self.store.statements.fields, snapshot.data, dialect)
        return snapshot.values | declared

    def _execute(
        self, statement: sa.TextClause | None, comparisons: Sequence[Comparison]
    ) -> set[str]:
        """Write the users of *comparisons*, and return the ids of the changed rows."""
        if statement is None or not comparisons:
            return set()
        check_lock(self.connection)
        rows = self.store.statements.encode(each.new_row for each in comparisons)
        parameters = {"rows": rows, "now": datetime.now(UTC), "may_bar": not self._follows}
        return set(self.connection.execute(statement, parameters).scalars().all())

    def _find_deleted(
        self, ids: Iterable[str], advance: Advance, *, apply: bool = False
    ) -> Iterator[str]:
        """
        Yield the ids that do not exist at Clerk. With *apply*, update the other users.

        A user's absence from a list does not prove a deletion: pages shift while users are signing
        up, and Clerk returns fewer users if it does not accept the limit.
        """
        with ThreadPool(THREADS) as pool:
            for group in _batched(_batched(ids, IDS), THREADS):
                read_at = _now()
                found = list(chain.from_iterable(pool.map(self.api.find_users, group)))
                if apply:
                    self._apply(found, read_at)
                known, asked = set(map(USER.find_id, found)), list(chain.from_iterable(group))
                absent = [user_id for user_id in asked if user_id not in known]
                for some in _batched(absent, THREADS):  # the caller stops if there are too many
                    yield from compress(some, pool.map(self.api.is_gone, some))
                advance(len(asked))

    def _tombstone(self, gone: Iterator[str], *, is_trusted: bool) -> None:
        """Tombstone users that are deleted at Clerk, unless there are too many of them."""
        if not (self.force or self.check):
            share = self._count_live() // MAX_DELETED_SHARE
            most = max(MAX_DELETED, share) if is_trusted else 0
            found = list(islice(gone, most + 1))
            if len(found) > most:
                self.withheld = len(found)
                return
            gone = iter(found)
        for ids in _batched(gone, IDS):
            self._tombstone_some(ids)

    def _tombstone_some(self, ids: Sequence[str]) -> None:
        users = self.store.users
        states = sa.select(users.c.id, is_live(users)).where(users.c.id.in_(ids))
        here = self.connection.execute(states).all()
        self.counts[Result.UNKNOWN] += len(ids) - len(here)
        live = [user_id for user_id, is_here in here if is_here]
        if self.check:
            self.drifted += len(live)
            for user_id in live:
                self.tell(Finding("gone_at_clerk", user_id))
        elif live:
            self.counts[Result.TOMBSTONED] += retry(self._write_tombstones, live)

    def _write_tombstones(self, ids: Sequence[str]) -> int:
        now = datetime.now(UTC)
        parameters = {
            "rows": self.store.statements.encode({"id": user_id} for user_id in ids),
            "now": now,
            "found_at": int(now.timestamp() * 1000),
            "created_before": now - MIN_AGE,
        }
        check_lock(self.connection)
        with sqlite_transaction(self.connection):
            return len(self.connection.execute(self.store.statements.tombstone, parameters).all())


def _now() -> int:
    return int(time() * 1000)


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch

"""The reconciliation of one table with Clerk's Backend API."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, TypeVar

import sqlalchemy as sa

from clerkhooks.clerk.backend_api import IDS
from clerkhooks.clerk.events import Snapshot, parse_snapshot
from clerkhooks.clerk.kinds import MEMBERSHIP
from clerkhooks.errors import EventError, Unconfirmed
from clerkhooks.store.awaited import now_ms
from clerkhooks.store.columns import read_fields
from clerkhooks.store.database import transaction
from clerkhooks.store.queries import is_live
from clerkhooks.sync.comparison import Comparison, Finding, Result
from clerkhooks.sync.connections import check_lock
from clerkhooks.sync.handlers import write_told
from clerkhooks.sync.listing import IdSet
from clerkhooks.sync.run import Advance, Run
from clerkhooks.sync.sources import Source

A = TypeVar("A")
T = TypeVar("T")
# If a call has just created the row of a new user, the Backend API may not yet return this user.
MIN_AGE = timedelta(minutes=10)
# If a sync would delete more than 20 objects and more than a tenth of all, the secret key is
# probably wrong.
MAX_DELETED, MAX_DELETED_SHARE = 20, 10
THREADS = 8
ROWS = 5000  # ids read from the database at a time


@dataclass
class TableSync(ABC):
    """The sync of one table. *source* provides Clerk's objects."""

    run: Run
    source: Source
    counts: Counter[Result] = field(default_factory=Counter)
    withheld: int = 0
    drifted: int = 0

    def __post_init__(self) -> None:
        """Find the table and its statements."""
        self.statements = self.run.store.by_kind[self.source.kind]
        self.table, self.noun = self.statements.table, self.source.noun

    def summary(self) -> dict[str, int]:
        """Return the number of objects by result."""
        return {result.value: self.counts[result] for result in Result}

    @property
    def ok(self) -> bool:
        """Whether the table matches Clerk's data after the sync, or matched it in a check."""
        return not (self.counts[Result.FAILED] or self.withheld or self.drifted)

    def sync_all(self, *, is_trusted: bool) -> None:
        """Sync all objects at Clerk, then tombstone objects that exist only in the table."""
        advance = self.run.begin(f"{self.noun} at Clerk", self.source.count())
        seen = IdSet()
        pages, read_at = self.source.read_all(seen), now_ms()
        while page := next(pages, None):
            self.apply(page, read_at)
            advance(len(page))
            read_at = now_ms()
        is_old = self.table.c.created_at < datetime.now(UTC) - MIN_AGE
        ids = self.read_ids(self.table.c.id, is_live(self.table), is_old)
        unseen = (object_id for object_id in ids if object_id not in seen)
        advance = self.run.begin(f"{self.noun} only here", None)
        self._tombstone_limited(self._find_deleted(unseen, advance), is_trusted=is_trusted)

    def read_ids(self, key: sa.Column[str], *conditions: sa.ColumnElement[bool]) -> Iterator[str]:
        """Yield the ids in the column *key* of rows that meet *conditions*."""
        query = sa.select(key).distinct().where(*conditions).order_by(key).limit(ROWS)
        after = ""
        while ids := self.run.connection.scalars(query.where(key > after)).all():
            yield from ids
            after = ids[-1]

    def _count_live(self) -> int:
        count = sa.select(sa.func.count()).select_from(self.table).where(is_live(self.table))
        return self.run.connection.scalar(count) or 0

    def apply(self, objects: Iterable[Any], read_at: int) -> None:
        """Write missing and older rows of *objects*. In a check, report the differences instead."""
        snapshots = self._parse(objects, read_at)
        if self.run.check:
            for comparison in self._compare(snapshots):
                self._tell_drift(comparison)
        elif snapshots:
            counts, told = self.run.retry(self._write, snapshots)
            self.counts.update(counts)
            if self.run.handled is not None and told:
                results = write_told(self.run.handled, self.run.connection, told, self.run.tell)
                self.counts.update(results)

    def _parse(self, objects: Iterable[Any], read_at: int) -> dict[str, Snapshot]:
        """Return the parsed objects by id. Report malformed objects."""
        found, kind = {}, self.source.kind
        for data in objects:
            try:
                snapshot = parse_snapshot(kind, data, read_at)
                found[snapshot.id] = snapshot
            except EventError as error:
                self.counts[Result.FAILED] += 1
                self._tell("failed", kind.find_id(data), error.reason)
        return found

    def _compare(self, snapshots: Mapping[str, Snapshot]) -> list[Comparison]:
        """Return the objects whose rows are missing, or may differ. In a check, return all."""
        rows = [
            {"id": each.id, "version_updated_at": None if self.run.check else each.updated_at}
            | each.state
            for each in snapshots.values()
        ]
        parameters = {"rows": self.statements.encode(rows), "now": datetime.now(UTC)}
        return [
            Comparison(
                snapshots[row.sought],
                self._values(snapshots[row.sought]),
                row if row.id is not None else None,
            )
            for row in self.run.connection.execute(self.statements.compare, parameters).all()
        ]

    def _tell(
        self, kind: str, object_id: str | None, reason: str | None = None, **more: Any
    ) -> None:
        self.run.tell(Finding(kind, object_id, reason, noun=self.noun.removesuffix("s"), **more))

    def _tell_drift(self, comparison: Comparison) -> None:
        result = comparison.result
        self.counts[result] += 1
        if result in (Result.CREATED, Result.UPDATED) or comparison.is_edited:
            self.drifted += 1
            object_id = comparison.snapshot.id
            self._tell(comparison.kind, object_id, fields=comparison.fields)

    def _write(self, snapshots: Mapping[str, Snapshot]) -> tuple[Counter[Result], list[Comparison]]:
        """
        Update rows that are older than *snapshots*, in one transaction. Count the results.

        Also return the users of whose changes handlers must be told. Their rows are not written.
        """
        with self.statements.transaction(self.run.connection):
            return self._merge(snapshots)

    def _merge(self, snapshots: Mapping[str, Snapshot]) -> tuple[Counter[Result], list[Comparison]]:
        told, rest, compared = list[Comparison](), list[Comparison](), self._compare(snapshots)
        for each in compared:
            (told if self._follows and each.changes_access else rest).append(each)
        behind = [each for each in rest if each.is_behind]
        unfilled = [each for each in rest if each.lacks_declared]
        changed = self._execute(self.statements.merge_snapshots, behind)
        changed |= self._execute(self.statements.fill_declared, unfilled)
        if self.run.written is not None:
            self.run.written += [each for each in behind if each.snapshot.id in changed]
        # A webhook may have written newer data after the rows were read.
        missed = {each.snapshot.id for each in (*behind, *unfilled)} - changed
        counts = Counter(
            Result.NEWER_HERE if each.snapshot.id in missed else each.result for each in rest
        )
        counts[Result.UNCHANGED] += len(snapshots) - len(compared)
        return counts, told

    @property
    def _follows(self) -> bool:
        return self.run.handled is not None and self.run.handled.follows_changes

    def _values(self, snapshot: Snapshot) -> dict[str, Any]:
        """Return the column values for *snapshot*."""
        dialect = self.run.store.database.dialect
        return snapshot.values | read_fields(self.statements.fields, snapshot.data, dialect)

    def _execute(
        self, statement: sa.TextClause | None, comparisons: Sequence[Comparison]
    ) -> set[str]:
        """Write the objects of *comparisons*, and return the ids of the changed rows."""
        if statement is None or not comparisons:
            return set()
        check_lock(self.run.connection)
        rows = self.statements.encode(each.new_row for each in comparisons)
        parameters = {
            "rows": rows,
            "now": datetime.now(UTC),
            "may_bar": not self._follows,
            "read_at": min(each.snapshot.read_at for each in comparisons),
        }
        written = self.statements.write(self.run.connection, statement, parameters)
        return {object_id for object_id, *_ in written}

    def tell_unconfirmed(self, object_id: str, error: Unconfirmed) -> None:
        """Report a row that stays because Clerk's response proves nothing about its object."""
        self.counts[Result.FAILED] += 1
        self._tell("unconfirmed", object_id, error.reason)

    @abstractmethod
    def sync_ids(self, ids: Iterable[str], total: int | None, *, is_trusted: bool) -> None:
        """Sync the objects with these *ids*. *total* is their number if known."""

    @abstractmethod
    def _find_deleted(
        self, ids: Iterable[str], advance: Advance, *, apply: bool = False
    ) -> Iterator[str]:
        """
        Yield the ids for which Clerk confirms that the objects do not exist.

        With *apply*, update the other objects.
        """

    @abstractmethod
    def look_up(self, ids: Sequence[str]) -> Iterator[Callable[[], list[str]]]:
        """Yield functions that each send a request, and return the ids unknown to Clerk."""

    def _tombstone_limited(self, gone: Iterator[str], *, is_trusted: bool) -> None:
        """Tombstone objects that are deleted at Clerk, unless there are too many of them."""
        if not (self.run.force or self.run.check):
            share = self._count_live() // MAX_DELETED_SHARE
            most = max(MAX_DELETED, share) if is_trusted else 0
            found = list(islice(gone, most + 1))
            if len(found) > most:
                self.withheld = len(found)
                return
            gone = iter(found)
        # A deletion locks memberships of the same organization or user until the transaction ends.
        locks = self.run.store.endings is not None and self.source.kind is not MEMBERSHIP
        size = 1 if locks else IDS
        for ids in batched(gone, size):
            self.tombstone(ids)

    def tombstone(self, ids: Sequence[str]) -> None:
        """Tombstone objects that Clerk has confirmed to be deleted. In a check, report them."""
        table = self.table
        states = sa.select(table.c.id, is_live(table)).where(table.c.id.in_(ids))
        here = self.run.connection.execute(states).all()
        self.counts[Result.UNKNOWN] += len(ids) - len(here)
        live = [object_id for object_id, is_here in here if is_here]
        if self.run.check:
            self.drifted += len(live)
            for object_id in live:
                self._tell("gone_at_clerk", object_id)
        elif live:
            self.counts[Result.TOMBSTONED] += self.run.retry(self._write_tombstones, live)

    def _write_tombstones(self, ids: Sequence[str]) -> int:
        now = datetime.now(UTC)
        found_at = int(now.timestamp() * 1000)
        parameters = {
            "rows": self.statements.encode({"id": object_id} for object_id in ids),
            "now": now,
            "found_at": found_at,
            "created_before": now - MIN_AGE,
        }
        connection, endings = self.run.connection, self.run.store.endings
        tombstone = self.statements.tombstone
        check_lock(connection)
        if endings is None or self.source.kind is MEMBERSHIP:
            with self.statements.transaction(connection):
                return len(self.statements.write(connection, tombstone, parameters))
        with transaction(connection):
            endings.lock_deleted(connection, ids)
            written = self.statements.write(connection, tombstone, parameters)
            done = [object_id for object_id, *_ in written]
            endings.end_members(connection, self.source.kind, done, now, found_at)
        return len(done)


def or_unconfirmed(ask: Callable[[A], T]) -> Callable[[A], T | Unconfirmed]:
    """Return a function like *ask* that returns the error Unconfirmed instead of raising it."""

    def ask_and_catch(about: A) -> T | Unconfirmed:
        try:
            return ask(about)
        except Unconfirmed as error:
            return error

    return ask_and_catch


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of up to *size* items."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch

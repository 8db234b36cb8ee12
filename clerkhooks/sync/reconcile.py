"""Reconciliation: brings the table to what Clerk has, through the Backend API, while webhooks and calls keep arriving."""

from __future__ import annotations

import fcntl
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa
import stamina
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from clerkhooks.clerk.backend_api import IDS, BackendApi
from clerkhooks.clerk.events import Snapshot, is_user_id, milliseconds, parse_snapshot
from clerkhooks.errors import ClerkhooksError, EventError, describe
from clerkhooks.store import Store
from clerkhooks.store.columns import read_fields, to_json
from clerkhooks.store.database import sqlite_transaction
from clerkhooks.store.messages import is_failed
from clerkhooks.store.models import VERSION_COLUMNS
from clerkhooks.store.postgresql import TimeoutConnection
from clerkhooks.store.queries import is_live, is_unfilled
from clerkhooks.store.statements import PROFILE, profile_columns

T = TypeVar("T")
YOUNG = timedelta(
    minutes=10
)  # a row that a call has just made may be ahead of what the Backend API answers
FEW_GONE, SHARE_GONE = (
    20,
    10,
)  # more than twenty, and more than one in ten, is rather the wrong key than users who left
THREADS = 8
# A lock was waited for in vain, two writers waited for each other, or SQLite's one writer was
# another.
_BUSY = ("55P03", "40P01", "40001", "SQLITE_BUSY")
_LOCK = 7_233_190_213  # any number, the same in every release, and not that of migrations
_TIMEOUT = 30.0  # seconds, for a statement


class DatabaseBusy(SQLAlchemyError):
    """Other writers were in the way for too long. Its text, which a library logs at each attempt, quotes no row."""


class AlreadyRunning(ClerkhooksError):
    """Another sync is at work on this database."""


class Result(StrEnum):
    """What became of one user."""

    CREATED = "created"
    UPDATED = "updated"
    UNCHANGED = "unchanged"
    FRESHER_HERE = "fresher_here"
    TOMBSTONED = "tombstoned"
    UNKNOWN = "unknown"
    FAILED = "failed"


class Progress(Protocol):
    """Who is told how far a run is."""

    def begin(self, what: str, total: int | None) -> object:
        """A part of the run begins, of some *total* users if that is known."""

    def advance(self, count: int) -> object:
        """*count* more users of the part are done."""


@dataclass(frozen=True, slots=True)
class Finding:
    """
    A user that is other here than at Clerk, or that could not be judged.

    *kind*: ``missing_here``, ``unfilled_here``, ``deleted_here``, ``differs``, ``gone_at_clerk`` or
    ``failed``. *fields* holds what is here and what Clerk has, field by field: profile data, which
    belongs in no log.
    """

    kind: str
    user_id: str | None
    reason: str | None = None
    fields: Mapping[str, tuple[Any, Any]] = field(default_factory=dict, repr=False)


@dataclass
class Reconciliation:
    """
    One run. With *check* it changes nothing; with *force* it deletes however many are gone.

    *connection* is that of ``sole_writer()``. *tell* is called with each finding: of a check what
    is other, else what failed.
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
        """How many users met with each result."""
        return {result.value: self.counts[result] for result in Result}

    @property
    def unknown(self) -> int:
        """How many of those named are neither here nor at Clerk."""
        return self.counts[Result.UNKNOWN]

    @property
    def well(self) -> bool:
        """Whether the table is now, or for a check was already, what Clerk has."""
        return not (self.counts[Result.FAILED] or self.withheld or self.drifted)

    def sync_all(self) -> None:
        """Every user that Clerk has, then every one that only we have."""
        seen = 0
        self.progress.begin("users at Clerk", self.api.count_users())
        with ThreadPool(1) as reader:
            for page in _ahead(reader, read_all(self.api)):
                self._apply(page)
                seen += len(page)
                self.progress.advance(len(page))
        self.progress.begin("rows here", self._count_live())
        users = self.store.users
        ids = sa.select(users.c.id).where(
            is_live(users), _created_before(users, datetime.now(UTC) - YOUNG)
        )
        live = _chunks(self.connection, ids, users.c.id, IDS * THREADS)
        self._bury(
            self._find_gone(ids for chunk in live for ids in _batched(chunk, IDS)),
            clerk_is_empty=not seen,
        )

    def sync_some(self, user_ids: Sequence[str]) -> None:
        """These users, whether they are here, at Clerk or nowhere."""
        self._sync_chunks(_batched(dict.fromkeys(user_ids), IDS), len(user_ids))

    def sync_missing(self) -> None:
        """The users whose rows nothing has filled in yet, of any age: they are asked for by their ids."""
        users = self.store.users
        ids = sa.select(users.c.id).where(is_unfilled(users))
        self._sync_chunks(_chunks(self.connection, ids, users.c.id, IDS))

    def sync_failed(self) -> None:
        """The users of messages that failed and were never retried to success."""
        messages = self.store.messages
        ids = sa.select(messages.c.clerk_user_id).distinct().where(is_failed(messages))
        self._sync_chunks(_chunks(self.connection, ids, messages.c.clerk_user_id, IDS))

    def _sync_chunks(self, chunks: Iterable[Sequence[str]], total: int | None = None) -> None:
        self.progress.begin("users", total)
        self._bury(self._find_gone(chunks, apply=True), clerk_is_empty=False)

    def _count_live(self) -> int:
        users = self.store.users
        count = sa.select(sa.func.count()).select_from(users).where(is_live(users))
        return self.connection.scalar(count) or 0

    def _apply(self, users: Sequence[Any]) -> None:
        """Judge the users of a page, and bring those up that are behind."""
        snapshots = self._parse(users)
        if snapshots:
            results = _patiently(lambda: self._write(snapshots))
            self.counts.update(results.values())

    def _parse(self, users: Iterable[Any]) -> dict[str, Snapshot]:
        """By id, and sorted by it. One that cannot be read is told of, and does not stop the rest."""
        found = {}
        for data in users:
            try:
                snapshot = parse_snapshot(data)
                found[snapshot.user_id] = snapshot
            except EventError as error:
                self._fail(_id_of(data), error.reason)
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
                elif row is not None and _lacks_declared(row, snapshot, values):
                    results[user_id] = Result.UPDATED
                    unfilled.append(snapshot)
            if self.check:
                self._tell_drift(rows, snapshots, results)
                return results
            # Between reading and writing a webhook may have come, which knew better.
            changed = self._upsert(behind) | self._fill(unfilled)
            missed = {item.user_id for item in (*behind, *unfilled)} - changed
            return results | dict.fromkeys(missed, Result.FRESHER_HERE)

    def _read_states(self, user_ids: Sequence[str]) -> dict[str, Any]:
        users, names = self.store.users, ("id", *self.store.statements.kept, "deleted_at")
        columns = (users.c[name] for name in (*names, *VERSION_COLUMNS))
        states = sa.select(*columns).where(users.c.id.in_(user_ids))
        return {row.id: row for row in self.connection.execute(states)}

    def _values(self, snapshot: Snapshot) -> dict[str, Any]:
        """Return what the columns of *snapshot* must hold."""
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

    def _find_gone(self, chunks: Iterable[Sequence[str]], *, apply: bool = False) -> Iterator[str]:
        """
        Yield the ids that Clerk answers with 404; with *apply*, bring the other users up to date.

        Absence from a page proves nothing: pages shift while users sign up, and a limit that is not
        taken gives fewer rows.
        """
        with ThreadPool(THREADS) as pool:
            for group in _batched(chunks, THREADS):
                asked = list(group)
                found = pool.map(self.api.find_users, asked)
                if apply:
                    for users in found:
                        self._apply(users)
                known = {_id_of(data) for users in found for data in users}
                absent = [user_id for ids in asked for user_id in ids if user_id not in known]
                for ids in _batched(absent, THREADS):  # no more at once: too many gone end the run
                    gone = pool.map(self.api.is_gone, ids)
                    yield from (
                        user_id for user_id, is_gone in zip(ids, gone, strict=True) if is_gone
                    )
                self.progress.advance(sum(map(len, asked)))

    def _bury(self, gone: Iterable[str], *, clerk_is_empty: bool) -> None:
        """Make tombstones of users that are gone; of too many only where that is forced."""
        most = 0 if clerk_is_empty else max(FEW_GONE, self._count_live() // SHARE_GONE)
        found: list[str] = []
        for user_id in gone:
            found.append(user_id)
            if (self.force or self.check) and len(found) == IDS:
                self._bury_some(found)
                found.clear()
            elif len(found) > most and not (self.force or self.check):
                self.withheld = len(found)
                return
        for ids in _batched(found, IDS):
            self._bury_some(ids)

    def _bury_some(self, ids: Sequence[str]) -> None:
        here = {row.id: row.deleted_at is None for row in self._read_states(ids).values()}
        self.counts[Result.UNKNOWN] += len(ids) - len(here)
        live = [user_id for user_id, is_live in here.items() if is_live]
        if self.check:
            self.drifted += len(live)
            for user_id in live:
                self.tell(Finding("gone_at_clerk", user_id))
        elif live:
            self.counts[Result.TOMBSTONED] += _patiently(lambda: self._mark_gone(live))

    def _mark_gone(self, ids: Sequence[str]) -> int:
        now = datetime.now(UTC)
        parameters = {
            "rows": to_json([{"id": user_id} for user_id in ids]),
            "now": now,
            "found_at": int(now.timestamp() * 1000),
            "created_before": now - YOUNG,
        }
        with sqlite_transaction(self.connection):
            return len(self.connection.execute(self.store.statements.tombstone, parameters).all())


def judge(row: Any, snapshot: Snapshot, values: Mapping[str, Any]) -> tuple[Result, bool]:
    """
    Return what *snapshot* means for the stored *row*, or for none, and whether it must be written.

    *values* are what the columns of *snapshot* hold.
    """
    if row is None:
        return Result.CREATED, True
    if row.deleted_at is not None:
        is_final = row.version_updated_at is None
        return (Result.FRESHER_HERE, False) if is_final else (Result.UPDATED, True)
    if row.version_updated_at is None:
        return Result.UPDATED, True
    same = not _differing(row, values)
    if tuple(getattr(row, name) for name in VERSION_COLUMNS) >= snapshot.version:
        return Result.UNCHANGED if same else Result.FRESHER_HERE, False
    # The version is written even if nothing else is new: an event between the two must not win
    # later.
    return Result.UNCHANGED if same else Result.UPDATED, True


def _lacks_declared(row: Any, snapshot: Snapshot, values: Mapping[str, Any]) -> bool:
    """Return whether *row* is as new as *snapshot*, but from before a column was declared."""
    if row.deleted_at is not None or row.version_updated_at != snapshot.updated_at:
        return False
    return any(
        value is not None and getattr(row, name) is None
        for name, value in values.items()
        if name not in PROFILE
    )


def find_drift(row: Any, snapshot: Snapshot, values: Mapping[str, Any]) -> Finding:
    """Return how *row* differs from *snapshot*, whose columns hold *values*."""
    if row is None:
        return Finding("missing_here", snapshot.user_id)
    kind = (
        "deleted_here"
        if row.deleted_at is not None
        else "unfilled_here"
        if row.version_updated_at is None
        else "differs"
    )
    return Finding(kind, snapshot.user_id, fields=_differing(row, values))


def _differing(row: Any, values: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    pairs = {name: (getattr(row, name), value) for name, value in values.items()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def read_all(api: BackendApi) -> Iterator[list[Any]]:
    """
    All users of Clerk's, each once, oldest first, page by page.

    The place in the list is the time of creation, not a number: in Clerk's own order, newest first,
    or by an offset, each sign-up or deletion in mid-run would shift all that follows, and one user
    would be read twice or never. Whether the bound itself is included is not documented, so pages
    overlap by a millisecond, and what was seen is left out. An offset counts only among users of
    one and the same millisecond, and goes by half a page, so that as many may be deleted meanwhile.
    The end is a page without anybody: a short one may be a limit that was not taken.
    """
    after, offset = -1, 0
    seen: dict[str, int] = {}
    while page := api.list_users(after - 1 if after > 0 else None, offset):
        times = {_key(data): _created_at(data) for data in page}
        new = [data for data in page if _key(data) not in seen]
        newest = max(times.values())
        if newest > after:
            after, offset = newest, 0
            seen = {key: time for key, time in (seen | times).items() if time >= newest - 1}
        else:
            offset += max(1, len(page) // 2 if new else len(page))
            seen |= times
        if new:
            yield new


def _created_at(data: Any) -> int:
    created_at = milliseconds(data.get("created_at")) if isinstance(data, dict) else None
    return -1 if created_at is None else created_at


def _id_of(data: Any) -> str | None:
    """The id of a user object, if it is one: no other text of the answer gets into a report."""
    user_id = data.get("id") if isinstance(data, dict) else None
    return user_id if is_user_id(user_id) else None


def _key(data: Any) -> str:
    return _id_of(data) or repr(data)


def _ahead(pool: ThreadPool, pages: Iterator[T]) -> Iterator[T]:
    """The same, but the next is fetched while one is written."""
    following = pool.apply_async(next, (pages, None))
    while (page := following.get()) is not None:
        following = pool.apply_async(next, (pages, None))
        yield page


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _created_before(users: sa.Table, moment: datetime) -> sa.ColumnElement[bool]:
    return users.c.created_at < moment


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


def _patiently(write: Callable[[], T]) -> T:
    """The result of *write*, which is done again where another writer was in the way: it is a transaction of its own."""
    for attempt in stamina.retry_context(
        on=DatabaseBusy, attempts=6, wait_initial=0.05, wait_max=2.0
    ):
        with attempt:
            try:
                return write()
            except OperationalError as error:
                if describe(error).endswith(_BUSY):
                    raise DatabaseBusy(describe(error)) from error
                raise
    raise AssertionError("the last attempt raises what it met")


@contextmanager
def sole_writer(store: Store) -> Iterator[sa.Connection]:
    """
    Yield a connection for one run, with longer timeouts than a request, alone over all processes.

    Raises:
        AlreadyRunning: another run is under way.
    """
    with reader(store) as connection:
        if connection.dialect.name == "sqlite":
            with _locked(f"{connection.exec_driver_sql('PRAGMA database_list').all()[0][2]}-sync"):
                yield connection
            return
        # On the connection that writes: a run that loses its lock can write no more.
        if not connection.scalar(sa.select(sa.func.pg_try_advisory_lock(_LOCK))):
            raise AlreadyRunning("already_running")
        try:
            yield connection
        finally:
            with suppress(SQLAlchemyError):  # the server notices a closed connection a little later
                connection.execute(sa.select(sa.func.pg_advisory_unlock(_LOCK)))


@contextmanager
def reader(store: Store) -> Iterator[sa.Connection]:
    """Yield a connection for one run that changes nothing."""
    with store.database.connect() as connection:
        try:
            if connection.dialect.name == "postgresql":
                driver = connection.connection.driver_connection
                if isinstance(driver, TimeoutConnection):
                    driver.answer_timeout = _TIMEOUT + 1
                connection.exec_driver_sql(f"SET statement_timeout = '{_TIMEOUT:.0f}s'")
            yield connection
        finally:
            connection.invalidate()  # neither the lock nor the timeouts are meant for requests


@contextmanager
def _locked(path: str) -> Iterator[None]:
    with Path(path).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning("already_running") from None
        yield

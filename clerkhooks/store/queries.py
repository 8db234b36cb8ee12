"""Read-only queries about users and messages, for operators."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, NamedTuple, TypeVar

import sqlalchemy as sa

from clerkhooks.events import Outcome
from clerkhooks.store import Store
from clerkhooks.store.messages import is_failed

MAX_EXAMINED = 100_000
"""The most rows that one statement reads. More could exceed the statement timeout."""
Conditions = list[sa.ColumnElement[bool]]


def is_live(users: sa.Table) -> sa.ColumnElement[bool]:
    """Return the condition for users that are not deleted."""
    return users.c.deleted_at.is_(None)


def is_barred(users: sa.Table) -> sa.ColumnElement[bool]:
    """
    Return the condition for banned and deprovisioned users, in the form of the partial index.

    Tombstones have no account state.
    """
    return sa.or_(users.c.banned_at.is_not(None), users.c.deprovisioned_at.is_not(None))


def is_unfilled(users: sa.Table) -> sa.ColumnElement[bool]:
    """
    Return the condition for rows that neither an event nor a sync has filled in.

    The partial index has the same condition, but without the version, which every event writes.
    """
    has_no_profile = (users.c.email.is_(None), users.c.image_url.is_(None), is_live(users))
    return sa.and_(users.c.version_updated_at.is_(None), *has_no_profile)


class Cursor(NamedTuple):
    """The position after a page of rows: the time and the key of the page's last row."""

    at: datetime
    key: str

    def __str__(self) -> str:
        return f"{self.at.isoformat()},{self.key}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """
        Parse a cursor from *text*.

        Raises:
            ValueError: *text* is not a valid cursor.
        """
        at, _, key = text.partition(",")
        moment = datetime.fromisoformat(at)
        aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        try:
            return cls(aware.astimezone(UTC), key)
        except OverflowError:
            raise ValueError("The time is out of range.") from None


@dataclass(frozen=True, slots=True)
class UserReport:
    """A row of ``users``. The times of the version are in milliseconds."""

    id: str
    email: str | None
    name: str
    image_url: str | None
    is_online: bool
    last_seen: datetime
    created_at: datetime
    updated_at: datetime
    deleted_at: datetime | None
    banned_at: datetime | None
    deprovisioned_at: datetime | None
    locked_until: datetime | None
    version_updated_at: int | None
    version_timestamp: int | None
    version_message_id: str | None

    @property
    def cursor(self) -> Cursor:
        """The cursor that continues after this row."""
        return Cursor(self.created_at, self.id)

    @property
    def as_of(self) -> datetime | None:
        """The time of the row's version, or None if the version is missing or has no time."""
        if self.version_updated_at is None or self.version_updated_at < 0:
            return None
        return datetime.fromtimestamp(self.version_updated_at / 1000, UTC)

    @property
    def states(self) -> list[str]:
        """The account states that hold now: ``banned``, ``deprovisioned`` and ``locked``."""
        is_locked = self.locked_until is not None and self.locked_until > datetime.now(UTC)
        holds = {
            "banned": self.banned_at is not None,
            "deprovisioned": self.deprovisioned_at is not None,
            "locked": is_locked,
        }
        return [state for state, does_hold in holds.items() if does_hold]

    @property
    def source(self) -> str:
        """The source of the row's content, such as a webhook or a sync."""
        if self.version_updated_at is None:
            return "first call" if self.deleted_at is None else "user.deleted"
        if self.deleted_at is not None:
            return "not found by a sync"
        return "webhook" if self.version_message_id else "sync"


@dataclass(frozen=True, slots=True)
class MessageReport:
    """A row of ``webhook_messages``."""

    message_id: str
    event_type: str
    clerk_user_id: str | None
    clerk_object_id: str | None
    outcome: str
    attempts: int
    occurred_at: datetime | None
    received_at: datetime
    processed_at: datetime | None
    error: str | None

    @property
    def cursor(self) -> Cursor:
        """The cursor that continues after this row."""
        return Cursor(self.received_at, self.message_id)


R = TypeVar("R", bound=Any)  # a dataclass whose fields are columns


class Page(NamedTuple, Generic[R]):
    """
    A page of rows, newest first, and the cursor for the next page.

    If *is_cut* is true, MAX_EXAMINED rows were examined before the page was full.
    """

    rows: list[R]
    next: Cursor | None
    is_cut: bool = False


@dataclass(frozen=True)
class Listing(Generic[R]):
    """
    A query for the rows of a table, newest first.

    ``list_users`` and ``list_messages`` return listings. *conditions* use an index, and *filters*
    do not.
    """

    store: Store
    report: type[R]
    order: tuple[sa.Column[datetime], sa.Column[str]]
    conditions: Conditions
    filters: Conditions

    def find(self, key: str) -> R | None:
        """Return the row whose id is *key*, or None."""
        found = self._read(self._select().where(self.order[1] == key))
        return found[0] if found else None

    def read_page(self, limit: int, before: Cursor | None = None) -> Page[R]:
        """Return a page of up to *limit* rows older than the cursor *before*."""
        at, key = self.order
        query = self._select().where(*self.conditions).order_by(at.desc(), key.desc())
        if before is not None:
            last = sa.literal(before.at, at.type), sa.literal(before.key, key.type)
            query = query.where(sa.tuple_(at, key) < sa.tuple_(*last))
        oldest = self._find_oldest(query) if self.filters else None
        if oldest is not None:
            query = query.where(at >= oldest)
        rows = self._read(query.where(*self.filters).limit(limit + 1))
        if len(rows) > limit:
            return Page(rows[:limit], rows[limit - 1].cursor)
        if oldest is not None:
            return Page(rows, Cursor(oldest, ""), is_cut=True)  # "" sorts before all keys
        return Page(rows, None)

    def read_all(self, limit: int, before: Cursor | None = None) -> list[R]:
        """Return up to *limit* rows older than *before*. Read several pages if necessary."""
        page = self.read_page(limit, before)
        found = page.rows
        while page.next is not None and len(found) < limit:
            page = self.read_page(limit - len(found), page.next)
            found += page.rows
        return found

    def read_new(self, since: datetime, watched: Sequence[str]) -> list[R]:
        """Return rows from *since* or later, and rows with an id in *watched*, oldest first."""
        at, key = self.order
        query = self._select().where(*self.conditions, *self.filters)
        return self._read(query.where(sa.or_(at >= since, key.in_(watched))).order_by(at, key))

    def _select(self) -> sa.Select[Any]:
        table = self.order[0].table
        return sa.select(*(table.c[name] for name in self.report.__dataclass_fields__))

    def _read(self, query: sa.Select[Any]) -> list[R]:
        return [self.report(**row._mapping) for row in self.store.database.execute(query)]

    def _find_oldest(self, query: sa.Select[Any]) -> datetime | None:
        """Return the time of row number MAX_EXAMINED, or None if there are fewer rows."""
        at, _ = self.order
        times = query.with_only_columns(at).order_by(None).order_by(at.desc())
        rows = self.store.database.execute(times.offset(MAX_EXAMINED - 1).limit(1))
        return rows[0][0] if rows else None


def list_users(
    store: Store,
    search: str | None = None,
    *,
    deleted: bool = False,
    unsynced: bool = False,
    barred: bool = False,
) -> Listing[UserReport]:
    """
    Return a query for users.

    *search* is an id, a complete email address, or the beginning of a first or last name. The last
    name is the part of the name after the first space. *deleted* selects tombstones. *unsynced*
    selects rows that neither an event nor a sync has filled in. *barred* selects banned and
    deprovisioned users.
    """
    columns, text = store.users.c, (search or "").strip()
    conditions: Conditions = []
    filters: Conditions = []
    if deleted:
        conditions.append(sa.not_(is_live(store.users)))
    if unsynced:
        conditions.append(is_unfilled(store.users))
    if barred:
        conditions.append(is_barred(store.users))
    if text.startswith("user_"):
        conditions.append(columns.id == text)
    elif "@" in text:
        conditions.append(columns.email.in_((text, text.lower())))
    elif text:
        filters.append(_has_name(store, text))
    order = (columns.created_at, columns.id)
    return Listing(store, UserReport, order, conditions, filters)


def _has_name(store: Store, text: str) -> sa.ColumnElement[bool]:
    """Return the condition that the first name or the last name starts with *text*."""
    name = store.users.c.name
    beginning = sa.func.lower(re.sub(r"([%_/])", r"/\1", text)) + "%"
    find = sa.func.strpos if store.database.dialect_name == "postgresql" else sa.func.instr
    names = (name, sa.func.substr(name, find(name, " ") + 1))
    return sa.or_(*(sa.func.lower(each).like(beginning, escape="/") for each in names))


def list_messages(
    store: Store,
    *,
    since: datetime | None = None,
    outcome: str | None = None,
    user_id: str | None = None,
    event_type: str | None = None,
) -> Listing[MessageReport]:
    """
    Return a query for messages that were received at *since* or later.

    An argument of None is ignored.
    """
    columns = store.messages.c
    conditions: Conditions = []
    filters: Conditions = []
    if since is not None:
        conditions.append(columns.received_at >= since)
    if user_id is not None:
        conditions.append(columns.clerk_user_id == user_id)
    if outcome == Outcome.FAILED:
        conditions.append(is_failed(store.messages))
    elif outcome is not None:
        filters.append(columns.outcome == outcome)
    if event_type is not None:
        filters.append(columns.event_type == event_type)
    order = (columns.received_at, columns.message_id)
    return Listing(store, MessageReport, order, conditions, filters)

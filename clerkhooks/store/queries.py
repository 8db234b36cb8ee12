"""What an operator asks about users and messages; it changes nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypedDict, Unpack, cast

import sqlalchemy as sa

from clerkhooks.events import Outcome
from clerkhooks.store import Store
from clerkhooks.store.messages import is_failed

SEARCHED = 20_000  # messages that one page is looked for among


def is_live(users: sa.Table) -> sa.ColumnElement[bool]:
    """Return the condition of a user who is not deleted."""
    return users.c.deleted_at.is_(None)


def is_unfilled(users: sa.Table) -> sa.ColumnElement[bool]:
    """Return the condition of a row that nothing has filled in."""
    return sa.and_(users.c.version_updated_at.is_(None), is_live(users))


class Cursor(NamedTuple):
    """Where a page ends, newest first: the time and the key of its last row."""

    at: datetime
    key: str

    def __str__(self) -> str:
        return f"{self.at.isoformat()},{self.key}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """
        What was printed with a page.

        Raises:
            ValueError: if it was not.
        """
        at, _, key = text.partition(",")
        moment = datetime.fromisoformat(at)
        try:
            return cls(
                (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC), key
            )
        except OverflowError:
            raise ValueError("a time before the first or after the last") from None


@dataclass(frozen=True, slots=True)
class UserReport:
    """A whole row of ``users``. The version's times are in milliseconds."""

    id: str
    email: str | None
    name: str
    image_url: str | None
    is_online: bool
    last_seen: datetime
    created_at: datetime
    updated_at: datetime
    deleted_at: datetime | None
    version_updated_at: int | None
    version_timestamp: int | None
    version_message_id: str | None

    @property
    def cursor(self) -> Cursor:
        """Where a page that ends with this row ends."""
        return Cursor(self.created_at, self.id)

    @property
    def as_of(self) -> datetime | None:
        """The time of the version that filled it; None where nothing did, or what did it named no time."""
        if self.version_updated_at is None or self.version_updated_at < 0:
            return None
        return datetime.fromtimestamp(self.version_updated_at / 1000, UTC)

    @property
    def source(self) -> str:
        """What made the row as it is."""
        if self.version_updated_at is None:
            return "first call" if self.deleted_at is None else "user.deleted"
        if self.deleted_at is not None:
            return "not found by a sync"
        return "webhook" if self.version_message_id else "sync"


@dataclass(frozen=True, slots=True)
class MessageReport:
    """A whole row of ``webhook_messages``."""

    message_id: str
    event_type: str
    clerk_user_id: str | None
    outcome: str
    attempts: int
    occurred_at: datetime | None
    received_at: datetime
    processed_at: datetime | None
    error: str | None

    @property
    def cursor(self) -> Cursor:
        """Where a page that ends with this row ends."""
        return Cursor(self.received_at, self.message_id)


def find_user(store: Store, user_id: str) -> UserReport | None:
    """The row of a user."""
    rows = _read(store, _select_users(store).where(store.users.c.id == user_id))
    return UserReport(**rows[0]) if rows else None


def find_users(
    store: Store,
    search: str | None = None,
    *,
    deleted: bool = False,
    unsynced: bool = False,
    before: Cursor | None = None,
    limit: int = 50,
) -> list[UserReport]:
    """
    Users, newest first: those after the place *before*, which match *search*.

    That is an id, a whole email, or the beginning of a name or of what follows the first name.
    *deleted*: tombstones only; *unsynced*: only rows that nothing has filled in. A search by name
    reads the whole table.
    """
    users, query = store.users, _select_users(store)
    if search:
        query = query.where(_matches(store, search))
    if deleted:
        query = query.where(sa.not_(is_live(users)))
    if unsynced:
        query = query.where(is_unfilled(users))
    query = _newest_first(query, users.c.created_at, users.c.id, before)
    return [UserReport(**row) for row in _read(store, query.limit(limit))]


class Wanted(TypedDict, total=False):
    """Which messages are asked for; what is None or absent does not matter."""

    outcome: str | None
    user_id: str | None
    event_type: str | None


def find_message(store: Store, message_id: str) -> MessageReport | None:
    """A message."""
    rows = _read(
        store, sa.select(*store.messages.c).where(store.messages.c.message_id == message_id)
    )
    return MessageReport(**rows[0]) if rows else None


class MessagePage(NamedTuple):
    """Messages, newest first, and where the next page begins; one *is_cut* where the search for more was given up for now."""

    messages: list[MessageReport]
    next: Cursor | None
    is_cut: bool = False


def read_message_page(
    store: Store,
    *,
    since: datetime | None = None,
    before: Cursor | None = None,
    limit: int = 50,
    **wanted: Unpack[Wanted],
) -> MessagePage:
    """
    Return a page of messages, newest first: after *before*, received at *since* or later.

    What no index serves is looked for among the next 20,000 messages only, so that a page costs the
    same in any table.
    """
    indexed = {
        name: value
        for name, value in wanted.items()
        if name == "user_id" or value == Outcome.FAILED
    }
    others = {
        name: value for name, value in wanted.items() if name not in indexed and value is not None
    }
    columns = store.messages.c
    selected = _select_messages(store, cast("Wanted", indexed))
    candidates = _newest_first(selected, columns.received_at, columns.message_id, before)
    if since is not None:
        candidates = candidates.where(columns.received_at >= since)
    if not others:
        found = [MessageReport(**row) for row in _read(store, candidates.limit(limit + 1))]
        return MessagePage(found[:limit], found[limit - 1].cursor if len(found) > limit else None)
    found, end = _look_among(store, candidates.limit(SEARCHED).cte("looked_at"), others, limit + 1)
    if len(found) > limit:
        return MessagePage(found[:limit], found[limit - 1].cursor)
    return MessagePage(found, end.cursor if end else None, is_cut=end is not None)


def _look_among(
    store: Store, looked_at: sa.CTE, wanted: Mapping[str, object], limit: int
) -> tuple[list[MessageReport], MessageReport | None]:
    """Those that are *wanted*, and the last that was *looked_at* if there may be more behind it."""
    # In one statement: a moment later newer messages have come, and the last would be another.
    newest_first = _newest_first(
        sa.select(*looked_at.c), looked_at.c.received_at, looked_at.c.message_id, None
    )
    matching = newest_first.where(*_conditions(store, looked_at.c, wanted)).limit(limit).subquery()
    last = newest_first.offset(SEARCHED - 1).subquery()
    both = sa.union_all(
        sa.select(*matching.c, sa.false().label("is_last")), sa.select(*last.c, sa.true())
    ).subquery()
    rows = _read(
        store, _newest_first(sa.select(*both.c), both.c.received_at, both.c.message_id, None)
    )
    reports = [
        (row["is_last"], MessageReport(**{name: row[name] for name in row if name != "is_last"}))
        for row in rows
    ]
    return [report for is_last, report in reports if not is_last], next(
        (report for is_last, report in reports if is_last), None
    )


def find_messages(
    store: Store, *, since: datetime | None = None, limit: int = 50, **wanted: Unpack[Wanted]
) -> list[MessageReport]:
    """The latest messages that are *wanted*, received at *since* or later, however far back they are; newest first."""
    found: list[MessageReport] = []
    cursor = None
    while len(found) < limit:
        page = read_message_page(
            store, since=since, before=cursor, limit=limit - len(found), **wanted
        )
        found += page.messages
        cursor = page.next
        if cursor is None:
            break
    return found


def find_new_messages(
    store: Store, since: datetime, watched: Sequence[str], **wanted: Unpack[Wanted]
) -> list[MessageReport]:
    """Messages that are *wanted*, oldest first: those received at *since* or later, and those of the ids *watched*."""
    columns = store.messages.c
    recent = sa.or_(columns.received_at >= since, columns.message_id.in_(watched))
    query = _select_messages(store, wanted).where(recent)
    query = query.order_by(columns.received_at, columns.message_id)
    return [MessageReport(**row) for row in _read(store, query)]


def _select_users(store: Store) -> sa.Select[Any]:
    return sa.select(*(store.users.c[name] for name in UserReport.__dataclass_fields__))


def _select_messages(store: Store, wanted: Wanted) -> sa.Select[Any]:
    return sa.select(*store.messages.c).where(*_conditions(store, store.messages.c, wanted))


def _conditions(
    store: Store, columns: Any, wanted: Mapping[str, object]
) -> Iterator[sa.ColumnElement[bool]]:
    for name, value in wanted.items():
        if value is not None:
            yield (
                is_failed(store.messages)
                if value == Outcome.FAILED
                else columns["clerk_user_id" if name == "user_id" else name] == value
            )


def _matches(store: Store, search: str) -> sa.ColumnElement[bool]:
    """An id, a whole email, or the beginning of a name, told apart by their form."""
    columns, text = store.users.c, search.strip()
    if text.startswith("user_"):
        return columns.id == text
    if "@" in text:
        return sa.or_(columns.email == text, columns.email == text.lower())
    beginning = sa.func.lower(re.sub(r"([%_/])", r"/\1", text)) + "%"
    find = sa.func.strpos if store.database.dialect_name == "postgresql" else sa.func.instr
    names = (columns.name, sa.func.substr(columns.name, find(columns.name, " ") + 1))
    return sa.or_(*(sa.func.lower(name).like(beginning, escape="/") for name in names))


def _newest_first(
    query: sa.Select[Any],
    at: sa.ColumnElement[datetime],
    key: sa.ColumnElement[str],
    before: Cursor | None,
) -> sa.Select[Any]:
    query = query.order_by(at.desc(), key.desc())
    if before is None:
        return query
    # The first condition says nothing new, but an index on the time alone serves it.
    return query.where(
        at <= before.at,
        sa.tuple_(at, key)
        < sa.tuple_(sa.literal(before.at, at.type), sa.literal(before.key, key.type)),
    )


def _read(store: Store, query: sa.Select[Any]) -> list[dict[str, Any]]:
    return [dict(row._mapping) for row in store.database.execute(query)]

"""What an operator asks about users and messages; it changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypedDict, Unpack, cast

import sqlalchemy as sa

from clerkhooks.models import Outcome, User, WebhookMessage, autocommit

_users = cast("sa.Table", User.__table__)
_messages = cast("sa.Table", WebhookMessage.__table__)
_LIVE = _users.c.deleted_at.is_(None)
_UNFILLED = sa.and_(_users.c.version_updated_at.is_(None), _LIVE)


class Place(NamedTuple):
    """Where a page ends, newest first: the time and the key of its last row."""

    at: datetime
    key: str


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
    def place(self) -> Place:
        """Where a page that ends with this row ends."""
        return Place(self.created_at, self.id)

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
    def place(self) -> Place:
        """Where a page that ends with this row ends."""
        return Place(self.received_at, self.message_id)


def find_user(user_id: str) -> UserReport | None:
    """The row of a user."""
    rows = _read(sa.select(*_users.c).where(_users.c.id == user_id))
    return UserReport(**rows[0]) if rows else None


def find_users(
    search: str | None = None, *, deleted: bool = False, unsynced: bool = False, before: Place | None = None, limit: int = 50
) -> list[UserReport]:
    """
    Users, newest first: those after the place *before*, which match *search*, an id, a whole email or the beginning of a name.

    *deleted*: tombstones only; *unsynced*: only rows that nothing has filled in. Only a search by name reads the whole table.
    """
    query = sa.select(*_users.c)
    if search:
        query = query.where(_matches(search))
    if deleted:
        query = query.where(_users.c.deleted_at.is_not(None))
    if unsynced:
        query = query.where(_UNFILLED)
    query = _newest_first(query, _users.c.created_at, _users.c.id, before)
    return [UserReport(**row) for row in _read(query.limit(limit))]


class Wanted(TypedDict, total=False):
    """Which messages are asked for; what is None or absent does not matter."""

    outcome: str | None
    user_id: str | None
    event_type: str | None


def find_messages(
    *, since: datetime | None = None, before: Place | None = None, limit: int = 50, **wanted: Unpack[Wanted]
) -> list[MessageReport]:
    """Messages that are *wanted*, newest first: those after the place *before*, received at *since* or later."""
    query = _newest_first(_select_messages(wanted), _messages.c.received_at, _messages.c.message_id, before)
    if since is not None:
        query = query.where(_messages.c.received_at >= since)
    return [MessageReport(**row) for row in _read(query.limit(limit))]


def find_new_messages(since: datetime, watched: Sequence[str], **wanted: Unpack[Wanted]) -> list[MessageReport]:
    """Messages that are *wanted*, oldest first: those received at *since* or later, and those of the ids *watched*."""
    query = _select_messages(wanted).where(sa.or_(_messages.c.received_at >= since, _messages.c.message_id.in_(watched)))
    return [MessageReport(**row) for row in _read(query.order_by(_messages.c.received_at, _messages.c.message_id))]


def _select_messages(wanted: Wanted) -> sa.Select[Any]:
    columns = {"outcome": _messages.c.outcome, "user_id": _messages.c.clerk_user_id, "event_type": _messages.c.event_type}
    conditions = (_is(columns[name], str(value)) for name, value in wanted.items() if value is not None)
    return sa.select(*_messages.c).where(*conditions)


def find_last_received() -> datetime | None:
    """When the last verified message came that was new."""
    [row] = _read(sa.select(sa.func.max(_messages.c.received_at, type_=_messages.c.received_at.type).label("last")))
    return cast("datetime | None", row["last"])


def count_failures(since: datetime) -> int:
    """How many messages received at *since* or later failed and were never retried to success."""
    return _count(_messages, _is(_messages.c.outcome, Outcome.FAILED), _messages.c.received_at >= since)


def count_unfilled(older_than: timedelta | None = None) -> int:
    """How many rows nothing has filled in; with *older_than* only those that have been so for as long."""
    old = sa.true() if older_than is None else _users.c.created_at < datetime.now(UTC) - older_than
    return _count(_users, _UNFILLED, old)


def _is(column: sa.ColumnElement[Any], value: str) -> sa.ColumnElement[bool]:
    # The partial index of failures serves only a statement that says so literally.
    return column == sa.literal_column(f"'{Outcome.FAILED}'") if value == Outcome.FAILED else column == value


def _matches(search: str) -> sa.ColumnElement[bool]:
    """An id, a whole email, or the beginning of a name, told apart by their form."""
    text = search.strip()
    if text.startswith("user_"):
        return _users.c.id == text
    if "@" in text:
        return sa.or_(_users.c.email == text, _users.c.email == text.lower())
    return sa.func.lower(_users.c.name).startswith(text.lower(), autoescape=True)


def _newest_first(
    query: sa.Select[Any], at: sa.ColumnElement[datetime], key: sa.ColumnElement[str], before: Place | None
) -> sa.Select[Any]:
    query = query.order_by(at.desc(), key.desc())
    if before is None:
        return query
    # The first condition says nothing new, but an index on the time alone serves it.
    return query.where(at <= before.at, sa.tuple_(at, key) < sa.tuple_(sa.literal(before.at, at.type), sa.literal(before.key, key.type)))


def _count(table: sa.Table, *conditions: sa.ColumnElement[bool]) -> int:
    [row] = _read(sa.select(sa.func.count().label("count")).select_from(table).where(*conditions))
    return int(row["count"])


def _read(query: sa.Select[Any]) -> Sequence[Mapping[str, Any]]:
    with autocommit() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]

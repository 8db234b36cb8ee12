"""Operators' queries about users and messages. They change nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, NamedTuple, TypedDict, TypeVar, Unpack

import sqlalchemy as sa

from clerkhooks.events import Outcome
from clerkhooks.store import Store
from clerkhooks.store.messages import is_failed
from clerkhooks.store.reports import Cursor as Cursor
from clerkhooks.store.reports import MessageReport as MessageReport
from clerkhooks.store.reports import UserReport as UserReport

MAX_EXAMINED = 100_000
"""The most rows that one statement reads. More could exceed the statement timeout."""
Conditions = list[sa.ColumnElement[bool]]


def is_live(users: sa.Table) -> sa.ColumnElement[bool]:
    """Return the condition of a user who is not deleted."""
    return users.c.deleted_at.is_(None)


def is_unfilled(users: sa.Table) -> sa.ColumnElement[bool]:
    """Return the condition of a row that no event and no sync has filled in."""
    return sa.and_(users.c.version_updated_at.is_(None), is_live(users))


R = TypeVar("R", UserReport, MessageReport)


class Page(NamedTuple, Generic[R]):
    """
    Rows, newest first, and the cursor of the next page.

    If *is_cut*, MAX_EXAMINED rows were examined before the page was full.
    """

    rows: list[R]
    next: Cursor | None
    is_cut: bool = False


@dataclass(frozen=True)
class _Listing(Generic[R]):
    """Rows of a table that meet *conditions*, which an index serves, and *filters*, all others."""

    store: Store
    report: type[R]
    order: tuple[sa.Column[datetime], sa.Column[str]]
    conditions: Conditions
    filters: Conditions

    def read_page(self, before: Cursor | None, limit: int) -> Page[R]:
        """Return up to *limit* rows after *before*, newest first."""
        at, key = self.order
        query = self.select().where(*self.conditions).order_by(at.desc(), key.desc())
        if before is not None:
            last = sa.literal(before.at, at.type), sa.literal(before.key, key.type)
            query = query.where(sa.tuple_(at, key) < sa.tuple_(*last))
        oldest = self._find_oldest(query) if self.filters else None
        if oldest is not None:
            query = query.where(at >= oldest)
        rows = self.read(query.where(*self.filters).limit(limit + 1))
        if len(rows) > limit:
            return Page(rows[:limit], rows[limit - 1].cursor)
        if oldest is not None:
            return Page(rows, Cursor(oldest, ""), is_cut=True)  # every key sorts after an empty one
        return Page(rows, None)

    def read_all(self, before: Cursor | None, limit: int) -> list[R]:
        """Return up to *limit* rows after *before*, newest first, from as many pages as needed."""
        page = self.read_page(before, limit)
        found = page.rows
        while page.next is not None and len(found) < limit:
            page = self.read_page(page.next, limit - len(found))
            found += page.rows
        return found

    def select(self) -> sa.Select[Any]:
        """Return a query of the report's columns."""
        table = self.order[0].table
        return sa.select(*(table.c[name] for name in self.report.__dataclass_fields__))

    def read(self, query: sa.Select[Any]) -> list[R]:
        """Return the rows of *query* as reports."""
        return [self.report(**row._mapping) for row in self.store.database.execute(query)]

    def _find_oldest(self, query: sa.Select[Any]) -> datetime | None:
        """Return the time of the last of MAX_EXAMINED rows, or None if there are fewer."""
        at, _ = self.order
        times = query.with_only_columns(at).order_by(None).order_by(at.desc())
        rows = self.store.database.execute(times.offset(MAX_EXAMINED - 1).limit(1))
        return rows[0][0] if rows else None


def find_user(store: Store, user_id: str) -> UserReport | None:
    """Return the row of a user."""
    listing = _list_users(store)
    rows = listing.read(listing.select().where(store.users.c.id == user_id))
    return rows[0] if rows else None


def read_user_page(
    store: Store,
    search: str | None = None,
    *,
    deleted: bool = False,
    unsynced: bool = False,
    before: Cursor | None = None,
    limit: int = 50,
) -> Page[UserReport]:
    """
    Return a page of users, newest first.

    *search* is an id, a whole email, or the beginning of the name or of the part after the first
    name. *deleted* selects tombstones, and *unsynced* rows that no event and no sync has filled in.
    """
    return _list_users(store, search, deleted, unsynced).read_page(before, limit)


def find_users(
    store: Store,
    search: str | None = None,
    *,
    deleted: bool = False,
    unsynced: bool = False,
    before: Cursor | None = None,
    limit: int = 50,
) -> list[UserReport]:
    """Return up to *limit* users, selected as by ``read_user_page``, from the whole table."""
    return _list_users(store, search, deleted, unsynced).read_all(before, limit)


def _list_users(
    store: Store, search: str | None = None, deleted: bool = False, unsynced: bool = False
) -> _Listing[UserReport]:
    columns, text = store.users.c, (search or "").strip()
    conditions: Conditions = []
    filters: Conditions = []
    if deleted:
        conditions.append(sa.not_(is_live(store.users)))
    if unsynced:
        conditions.append(is_unfilled(store.users))
    if text.startswith("user_"):
        conditions.append(columns.id == text)
    elif "@" in text:
        conditions.append(columns.email.in_((text, text.lower())))
    elif text:
        filters.append(_has_name(store, text))
    order = (columns.created_at, columns.id)
    return _Listing(store, UserReport, order, conditions, filters)


def _has_name(store: Store, text: str) -> sa.ColumnElement[bool]:
    """Return the condition that the name, or the part after its first space, begins with *text*."""
    name = store.users.c.name
    beginning = sa.func.lower(re.sub(r"([%_/])", r"/\1", text)) + "%"
    find = sa.func.strpos if store.database.dialect_name == "postgresql" else sa.func.instr
    names = (name, sa.func.substr(name, find(name, " ") + 1))
    return sa.or_(*(sa.func.lower(each).like(beginning, escape="/") for each in names))


class Wanted(TypedDict, total=False):
    """The messages to list. A filter that is None or absent selects every message."""

    outcome: str | None
    user_id: str | None
    event_type: str | None


def find_message(store: Store, message_id: str) -> MessageReport | None:
    """Return a message."""
    listing = _list_messages(store)
    rows = listing.read(listing.select().where(store.messages.c.message_id == message_id))
    return rows[0] if rows else None


def read_message_page(
    store: Store,
    *,
    since: datetime | None = None,
    before: Cursor | None = None,
    limit: int = 50,
    **wanted: Unpack[Wanted],
) -> Page[MessageReport]:
    """Return a page of messages, newest first, received at *since* or later."""
    return _list_messages(store, since, **wanted).read_page(before, limit)


def find_messages(
    store: Store, *, since: datetime | None = None, limit: int = 50, **wanted: Unpack[Wanted]
) -> list[MessageReport]:
    """Return up to *limit* messages, received at *since* or later, from the whole log."""
    return _list_messages(store, since, **wanted).read_all(None, limit)


def find_new_messages(
    store: Store, since: datetime, watched: Sequence[str], **wanted: Unpack[Wanted]
) -> list[MessageReport]:
    """Return messages received at *since* or later, or with an id in *watched*, oldest first."""
    columns, listing = store.messages.c, _list_messages(store, **wanted)
    recent = sa.or_(columns.received_at >= since, columns.message_id.in_(watched))
    query = listing.select().where(recent, *listing.conditions, *listing.filters)
    return listing.read(query.order_by(columns.received_at, columns.message_id))


def _list_messages(
    store: Store,
    since: datetime | None = None,
    outcome: str | None = None,
    user_id: str | None = None,
    event_type: str | None = None,
) -> _Listing[MessageReport]:
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
    return _Listing(store, MessageReport, order, conditions, filters)

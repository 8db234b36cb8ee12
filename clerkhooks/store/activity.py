"""Figures for operators. Each query uses an index and stops counting above MAX_COUNT rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, cast

import sqlalchemy as sa

from clerkhooks.clerk.kinds import MEMBERSHIP, ORGANIZATION, Kind
from clerkhooks.events import Outcome
from clerkhooks.store import Store
from clerkhooks.store.messages import is_failed
from clerkhooks.store.queries import MAX_EXAMINED, is_barred, is_live, is_unfilled

MAX_COUNT = MAX_EXAMINED
"""Counting stops above this number."""
STORED = (Outcome.APPLIED, Outcome.STALE, Outcome.IGNORED, Outcome.FAILED)
LAG_SAMPLE = 1000  # messages


class Lag(NamedTuple):
    """The time from an event to the end of its processing, in seconds."""

    median: float
    p99: float


def find_lag(store: Store, since: datetime) -> Lag | None:
    """Return the lag of the newest messages from *since* or later, or None if unknown."""
    columns = store.messages.c
    query = (
        sa.select(columns.occurred_at, columns.processed_at)
        .where(columns.received_at >= since)
        .where(columns.outcome.in_((Outcome.APPLIED, Outcome.STALE)))
        .order_by(columns.received_at.desc())
        .limit(LAG_SAMPLE)
    )
    times = cast("Sequence[tuple[datetime, datetime]]", store.database.execute(query))
    lags = sorted(max(0.0, (done - at).total_seconds()) for at, done in times if at and done)
    if not lags:
        return None
    return Lag(*(lags[math.ceil(len(lags) * share) - 1] for share in (0.5, 0.99)))


def find_last_received(store: Store) -> datetime | None:
    """Return the time at which the newest message arrived, or None if the log is empty."""
    at = store.messages.c.received_at
    [(last,)] = store.database.execute(sa.select(sa.func.max(at, type_=at.type)))
    return cast("datetime | None", last)


def count_outcomes(store: Store, since: datetime) -> dict[str, int]:
    """
    Return the number of messages with each outcome, received at *since* or later.

    If there are more than MAX_COUNT, only the newest are counted.
    """
    columns = store.messages.c
    newest = (
        sa.select(columns.outcome)
        .where(columns.received_at >= since)
        .order_by(columns.received_at.desc())
        .limit(MAX_COUNT + 1)
        .subquery()
    )
    query = sa.select(newest.c.outcome, sa.func.count()).group_by(newest.c.outcome)
    counts = cast("Sequence[tuple[str, int]]", store.database.execute(query))
    return dict.fromkeys(map(str, STORED), 0) | dict(counts)


def count_failures(store: Store, since: datetime | None = None) -> int:
    """Return the number of failed messages without a successful retry."""
    messages = store.messages
    recent = sa.true() if since is None else messages.c.received_at >= since
    return _count(store, messages, is_failed(messages), recent)


def count_unfilled(store: Store, older_than: timedelta = timedelta()) -> int:
    """Return the number of rows older than *older_than* that still have no profile."""
    users, latest = store.users, datetime.now(UTC) - older_than
    return _count(store, users, is_unfilled(users), users.c.created_at < latest)


def count_users(store: Store) -> int:
    """Return the number of users, including tombstones."""
    return _count(store, store.users)


def count_tombstones(store: Store) -> int:
    """Return the number of tombstones, including users that a sync did not find at Clerk."""
    return _count(store, store.users, sa.not_(is_live(store.users)))


def count_barred(store: Store, state: str | None = None) -> int:
    """Return the number of banned and deprovisioned users, or of one *state*, such as banned."""
    users = store.users
    holds = sa.true() if state is None else users.c[f"{state}_at"].is_not(None)
    return _count(store, users, is_barred(users), holds)


def count_organizations(store: Store) -> int | None:
    """Return the number of organizations that are not deleted, or None without the table."""
    return _count_live(store, ORGANIZATION)


def count_memberships(store: Store) -> int | None:
    """Return the number of memberships that have not ended, or None without the table."""
    return _count_live(store, MEMBERSHIP)


def _count_live(store: Store, kind: Kind) -> int | None:
    if kind not in store.by_kind:
        return None
    table = store.by_kind[kind].table
    return _count(store, table, is_live(table))


def count_new_users(store: Store, since: datetime) -> int:
    """Return the number of users created at *since* or later."""
    return _count(store, store.users, store.users.c.created_at >= since)


def _count(store: Store, table: sa.Table, *conditions: sa.ColumnElement[bool]) -> int:
    one: sa.ColumnElement[int] = sa.literal_column("1")
    rows = sa.select(one).select_from(table).where(*conditions).limit(MAX_COUNT + 1)
    query = sa.select(sa.func.count()).select_from(rows.subquery())
    [(count,)] = store.database.execute(query)
    return int(count)

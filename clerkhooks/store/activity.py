"""How much happens, and whether all is well with it: the figures that one look should take in. On PostgreSQL none reads a whole table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, cast

import sqlalchemy as sa

from clerkhooks.events import Outcome
from clerkhooks.store import Store
from clerkhooks.store.messages import is_failed
from clerkhooks.store.queries import is_live, is_unfilled

COUNTED = (
    10_000  # rows that are counted one by one; of more, PostgreSQL knows about how many there are
)
HOURS = 24
SLICE = timedelta(minutes=10)
GLIMPSE = timedelta(seconds=10)  # of each slice: a first look at how many messages there are
SAMPLE = 20_000  # messages that the hours are counted from, at most
STORED = (Outcome.APPLIED, Outcome.STALE, Outcome.IGNORED, Outcome.FAILED)
LATEST = 1000  # messages that the lag is taken from


class Count(NamedTuple):
    """A number of rows: exact, or else an estimate, or without an estimate a lower bound."""

    value: int
    is_exact: bool = True


class Lag(NamedTuple):
    """From events to the end of their processing, in seconds."""

    median: float
    p99: float


@dataclass(frozen=True)
class Activity:
    """Messages by hour, the oldest first, and outcome. Where not all were counted, *share* of them was, and the rest follows."""

    hours: Sequence[tuple[datetime, dict[str, int]]]
    share: float

    @property
    def total(self) -> int:
        """All of them."""
        return sum(sum(by_outcome.values()) for _, by_outcome in self.hours)


def read_activity(store: Store, now: datetime) -> Activity:
    """
    Return the messages of the last day by hour.

    The last hour also has those stamped by a clock that is ahead.

    Of many only a sample is counted, the same part of each ten minutes; but failures, unless they
    are many as well, are all counted.
    """
    first = now - timedelta(hours=HOURS)
    glimpsed = sum(count for _, _, count in _count_slices(store, first, GLIMPSE))
    share = min(1.0, SAMPLE / (glimpsed * (SLICE / GLIMPSE))) if glimpsed else 1.0
    hours: list[tuple[datetime, dict[str, int]]] = [
        (first + timedelta(hours=hour), dict.fromkeys(STORED, 0)) for hour in range(HOURS)
    ]
    for hour, outcome, count in _count_slices(store, first, SLICE * share):
        hours[hour][1][outcome] = count if share == 1 else round(count / share)
    failed = _find_failures(store, first) if share < 1 else None
    if failed is not None:
        for hour, (_, by_outcome) in enumerate(hours):
            by_outcome[Outcome.FAILED] = failed[hour]
    return Activity(hours, share)


def _find_failures(store: Store, first: datetime) -> Counter[int] | None:
    """The failed messages of each hour since *first*; None if there are more than can be counted quickly."""
    at = store.messages.c.received_at
    query = sa.select(at).where(is_failed(store.messages), at >= first).limit(COUNTED + 1)
    times = cast("Sequence[tuple[datetime]]", store.database.execute(query))
    return (
        None
        if len(times) > COUNTED
        else Counter(min(int((at - first) / timedelta(hours=1)), HOURS - 1) for (at,) in times)
    )


def _count_slices(
    store: Store, first: datetime, length: timedelta
) -> Sequence[tuple[int, str, int]]:
    """Hour, outcome and number of the messages in the first *length* of each slice since *first*."""
    messages = store.messages
    at = messages.c.received_at
    columns = (
        sa.column("hour", sa.Integer),
        sa.column("begins", at.type),
        sa.column("ends", at.type),
    )
    starts = [first + SLICE * number for number in range(int(timedelta(hours=HOURS) / SLICE))]
    rows = [(int((start - first) / timedelta(hours=1)), start, start + length) for start in starts]
    if length == SLICE:
        rows[-1] = (*rows[-1][:2], datetime.max.replace(tzinfo=UTC))
    slices = sa.values(*columns).data(rows).cte("slices")
    inside = sa.and_(at >= slices.c.begins, at < slices.c.ends)
    query = sa.select(slices.c.hour, messages.c.outcome, sa.func.count()).select_from(
        slices.join(messages, inside)
    )
    query = query.group_by(slices.c.hour, messages.c.outcome)
    return cast("Sequence[tuple[int, str, int]]", store.database.execute(query))


def find_lag(store: Store, now: datetime) -> Lag | None:
    """Return the lag of the last thousand processed messages of the last day, or None."""
    messages = store.messages
    times = (
        sa.select(messages.c.occurred_at, messages.c.processed_at)
        .where(
            messages.c.received_at >= now - timedelta(hours=HOURS),
            messages.c.outcome.in_((Outcome.APPLIED, Outcome.STALE)),
        )
        .order_by(messages.c.received_at.desc())
        .limit(LATEST)
    )
    rows = cast("Sequence[tuple[datetime, datetime]]", store.database.execute(times))
    lags = sorted(max(0.0, (done - at).total_seconds()) for at, done in rows if at and done)
    if not lags:
        return None
    return Lag(
        *(lags[min(len(lags) - 1, math.ceil(len(lags) * share) - 1)] for share in (0.5, 0.99))
    )


def find_last_received(store: Store) -> datetime | None:
    """When the last verified message came that was new."""
    at = store.messages.c.received_at
    [(last,)] = store.database.execute(sa.select(sa.func.max(at, type_=at.type)))
    return cast("datetime | None", last)


def count_failures(store: Store, since: datetime | None = None) -> Count:
    """Messages, received at *since* or later, that failed and were never retried to success."""
    messages = store.messages
    recent = sa.true() if since is None else messages.c.received_at >= since
    return _count(store, messages, f"ix_{messages.name}_failed", is_failed(messages), recent)


def count_unfilled(store: Store, older_than: timedelta | None = None) -> Count:
    """Rows that nothing has filled in; with *older_than* only those that have been so for as long."""
    users = store.users
    old = sa.true() if older_than is None else users.c.created_at < datetime.now(UTC) - older_than
    return _count(store, users, f"ix_{users.name}_unfilled", is_unfilled(users), old)


def count_users(store: Store) -> Count:
    """Rows of ``users``, tombstones among them."""
    return _count(store, store.users, f"ix_{store.users.name}_created_at_id")


def count_tombstones(store: Store) -> Count:
    """Rows of users who are deleted, or were not found by a sync."""
    users = store.users
    return _count(store, users, f"ix_{users.name}_deleted", sa.not_(is_live(users)))


def count_new_users(store: Store, since: datetime) -> Count:
    """Rows made at *since* or later."""
    return _count(store, store.users, None, store.users.c.created_at >= since)


def _count(
    store: Store, table: sa.Table, index: str | None, *conditions: sa.ColumnElement[bool]
) -> Count:
    """
    The rows of *table* that hold to *conditions*: counted, or estimated where there are many.

    The estimate is PostgreSQL's own of *index*, whose condition they share. SQLite has none, and
    counts them all.
    """
    counted: sa.Select[Any] = (
        sa.select(sa.literal_column("1")).select_from(table).where(*conditions)
    )
    if store.database.dialect_name != "postgresql":
        return Count(_count_rows(store, counted))
    few = _count_rows(store, counted.limit(COUNTED + 1))
    if few <= COUNTED:
        return Count(few)
    estimate = (
        0 if index is None else int(store.database.execute(_ESTIMATE, {"index": index})[0][0])
    )
    return Count(max(few, estimate), is_exact=False)


_ESTIMATE = sa.text(
    "SELECT coalesce((SELECT reltuples FROM pg_class WHERE oid = to_regclass(:index)), 0)"
)


def _count_rows(store: Store, query: sa.Select[Any]) -> int:
    [(count,)] = store.database.execute(sa.select(sa.func.count()).select_from(query.subquery()))
    return int(count)

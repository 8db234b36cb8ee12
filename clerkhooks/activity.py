"""How much happens, and whether all is well with it: the figures that one look should take in. On PostgreSQL none reads a whole table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, cast

import sqlalchemy as sa

from clerkhooks.models import Outcome, User, WebhookMessage, autocommit, db
from clerkhooks.reports import IS_FAILED, LIVE, UNFILLED

_users = cast("sa.Table", User.__table__)
_messages = cast("sa.Table", WebhookMessage.__table__)
COUNTED = 10_000  # rows that are counted one by one; of more, PostgreSQL knows about how many there are
HOURS = 24
SLICE = timedelta(minutes=10)
GLIMPSE = timedelta(seconds=10)  # of each slice: a first look at how many messages there are
SAMPLE = 20_000  # messages that the hours are counted from, at most
STORED = (Outcome.APPLIED, Outcome.STALE, Outcome.IGNORED, Outcome.FAILED)
LATEST = 1000  # messages that the lag is taken from


class Count(NamedTuple):
    """A number of rows. One that is not exact is an estimate, or where there is none, the least that there are."""

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


def read_activity(now: datetime) -> Activity:
    """
    The messages of the last day, in hours that end now; what a clock that is ahead has stamped is in the last one.

    Of many only a sample is counted, the same part of each ten minutes; but failures, unless they are many as well, are all counted.
    """
    first = now - timedelta(hours=HOURS)
    glimpsed = sum(count for _, _, count in _count_slices(first, GLIMPSE))
    share = min(1.0, SAMPLE / (glimpsed * (SLICE / GLIMPSE))) if glimpsed else 1.0
    hours: list[tuple[datetime, dict[str, int]]] = [(first + timedelta(hours=hour), dict.fromkeys(STORED, 0)) for hour in range(HOURS)]
    for hour, outcome, count in _count_slices(first, SLICE * share):
        hours[hour][1][outcome] = count if share == 1 else round(count / share)
    failed = _find_failures(first) if share < 1 else None
    if failed is not None:
        for hour, (_, by_outcome) in enumerate(hours):
            by_outcome[Outcome.FAILED] = failed[hour]
    return Activity(hours, share)


def _find_failures(first: datetime) -> Counter[int] | None:
    """The failed messages of each hour since *first*; None if there are more than can be counted quickly."""
    query = sa.select(_messages.c.received_at).where(IS_FAILED, _messages.c.received_at >= first).limit(COUNTED + 1)
    times = _read(query)
    return None if len(times) > COUNTED else Counter(min(int((at - first) / timedelta(hours=1)), HOURS - 1) for (at,) in times)


def _count_slices(first: datetime, length: timedelta) -> Sequence[tuple[int, str, int]]:
    """Hour, outcome and number of the messages in the first *length* of each slice since *first*."""
    at = _messages.c.received_at
    columns = (sa.column("hour", sa.Integer), sa.column("begins", at.type), sa.column("ends", at.type))
    starts = [first + SLICE * number for number in range(int(timedelta(hours=HOURS) / SLICE))]
    rows = [(int((start - first) / timedelta(hours=1)), start, start + length) for start in starts]
    if length == SLICE:
        rows[-1] = (*rows[-1][:2], datetime.max.replace(tzinfo=UTC))
    slices = sa.values(*columns).data(rows).cte("slices")
    inside = sa.and_(at >= slices.c.begins, at < slices.c.ends)
    query = sa.select(slices.c.hour, _messages.c.outcome, sa.func.count()).select_from(slices.join(_messages, inside))
    return cast("Sequence[tuple[int, str, int]]", _read(query.group_by(slices.c.hour, _messages.c.outcome)))


def find_lag(now: datetime) -> Lag | None:
    """Of the last thousand messages of the last day that were applied or stale; None if there are none."""
    times = (
        sa.select(_messages.c.occurred_at, _messages.c.processed_at)
        .where(_messages.c.received_at >= now - timedelta(hours=HOURS), _messages.c.outcome.in_((Outcome.APPLIED, Outcome.STALE)))
        .order_by(_messages.c.received_at.desc())
        .limit(LATEST)
    )
    lags = sorted(max(0.0, (done - occurred).total_seconds()) for occurred, done in _read(times) if occurred and done)
    if not lags:
        return None
    return Lag(*(lags[min(len(lags) - 1, math.ceil(len(lags) * share) - 1)] for share in (0.5, 0.99)))


def find_last_received() -> datetime | None:
    """When the last verified message came that was new."""
    [(last,)] = _read(sa.select(sa.func.max(_messages.c.received_at, type_=_messages.c.received_at.type)))
    return cast("datetime | None", last)


def count_failures(since: datetime | None = None) -> Count:
    """Messages, received at *since* or later, that failed and were never retried to success."""
    recent = sa.true() if since is None else _messages.c.received_at >= since
    return _count(_messages, "ix_webhook_messages_failed", IS_FAILED, recent)


def count_unfilled(older_than: timedelta | None = None) -> Count:
    """Rows that nothing has filled in; with *older_than* only those that have been so for as long."""
    old = sa.true() if older_than is None else _users.c.created_at < datetime.now(UTC) - older_than
    return _count(_users, "ix_users_unfilled", UNFILLED, old)


def count_users() -> Count:
    """Rows of ``users``, tombstones among them."""
    return _count(_users, "pk_users")


def count_tombstones() -> Count:
    """Rows of users who are deleted, or were not found by a sync."""
    return _count(_users, "ix_users_deleted", sa.not_(LIVE))


def count_new_users(since: datetime) -> Count:
    """Rows made at *since* or later."""
    return _count(_users, None, _users.c.created_at >= since)


def _count(table: sa.Table, index: str | None, *conditions: sa.ColumnElement[bool]) -> Count:
    """
    The rows of *table* that hold to *conditions*: counted, or estimated where there are many.

    The estimate is PostgreSQL's own of *index*, whose condition they share. SQLite has none, and counts them all.
    """
    counted: sa.Select[Any] = sa.select(sa.literal_column("1")).select_from(table).where(*conditions)
    if db.engine.dialect.name != "postgresql":
        return Count(_count_rows(counted))
    few = _count_rows(counted.limit(COUNTED + 1))
    if few <= COUNTED:
        return Count(few)
    estimate = 0 if index is None else int(_read(_ESTIMATE.bindparams(index=index))[0][0])
    return Count(max(few, estimate), is_exact=False)


_ESTIMATE = sa.text("SELECT coalesce((SELECT reltuples FROM pg_class WHERE oid = to_regclass(:index)), 0)")


def _count_rows(query: sa.Select[Any]) -> int:
    return int(_read(sa.select(sa.func.count()).select_from(query.subquery()))[0][0])


def _read(query: sa.Executable) -> Sequence[Any]:
    with autocommit() as connection:
        return connection.execute(query).all()

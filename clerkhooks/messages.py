"""The log of messages: each is done once, and each failure is remembered until a retry mends it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import cache
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from clerkhooks.clerk.events import Event, UserEvent
from clerkhooks.errors import describe
from clerkhooks.models import Outcome, WebhookMessage, autocommit, db, insert_into

logger = logging.getLogger(__name__)
table = cast("sa.Table", WebhookMessage.__table__)
_now = sa.bindparam("now", type_=table.c.received_at.type)


def is_done(message_id: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    """SQL: whether the message was processed before. One that failed was not."""
    # Counted, for an EXISTS would become a join, which PostgreSQL might well do by reading the whole table.
    return sa.select(sa.func.count()).where(table.c.message_id == message_id, table.c.outcome != Outcome.FAILED).scalar_subquery() > 0


def is_recorded(event: Event) -> bool:
    """Whether the caller's transaction, which must be able to answer, holds *event* as done."""
    return bool(db.session.scalar(_IS_DONE, {"message_id": event.message_id}))


def record_failure(event: Event, error: Exception, now: datetime) -> None:
    """
    Write down that *event* failed, in a transaction of its own. A failure never overwrites a success.

    Where the database is away, or keeps us out for longer than we wait, that is logged: Svix retries all the same.
    """
    if is_unanswered(error):
        logger.warning("failure_not_recorded", extra={"message_id": event.message_id, "error": describe(error)})
        return
    row = {
        "message_id": event.message_id,
        "event_type": event.type,
        "clerk_user_id": event.user_id if isinstance(event, UserEvent) else None,
        "outcome": Outcome.FAILED,
        "occurred_at": event.occurred_at,
        "received_at": now,
        "error": describe(error),
    }
    try:
        with autocommit() as connection:
            connection.execute(_failure_statement(connection.dialect.name), row)
    except SQLAlchemyError as second:
        logger.warning("failure_not_recorded", extra={"message_id": event.message_id, "error": describe(second)})


def is_unanswered(error: Exception) -> bool:
    """
    Whether PostgreSQL did not answer, somebody keeps SQLite's one write lock, or others have all the connections.

    It was none of the message's doing, and to wait as long again would be in vain.
    """
    unanswered = isinstance(error, OperationalError) and describe(error) in ("OperationalError", "OperationalError SQLITE_BUSY")
    return unanswered or isinstance(error, sa.exc.TimeoutError)


def prune(before: datetime, batch: int = 1000) -> Iterator[int]:
    """
    Forget the messages that were received and, if at all, done before *before*, *batch* by batch; gives the size of each.

    Each batch is a transaction of its own and passes over rows that a delivery holds, so that no writer waits long.
    Users are not touched: a message that is delivered again after this is judged by its version.
    """
    parameters = {"before": before, "batch": batch}
    while True:
        with autocommit() as connection:
            pruned = len(connection.execute(_PRUNE, parameters).all())
        if pruned:
            yield pruned
        if pruned < batch:
            return


FAILED_USER_IDS = (
    sa.select(table.c.clerk_user_id)
    .distinct()
    .where(table.c.outcome == Outcome.FAILED, table.c.clerk_user_id > sa.bindparam("after"))
    .where(table.c.received_at < sa.bindparam("created_before", type_=table.c.received_at.type))
    .order_by(table.c.clerk_user_id)
    .limit(sa.bindparam("limit"))
)
"""The users of messages that failed and were never retried to success."""

_IS_DONE = sa.select(is_done(sa.bindparam("message_id", type_=sa.Text)))
_OLD = (
    sa.select(table.c.message_id)
    .where(table.c.received_at < sa.bindparam("before"))
    .where(sa.func.coalesce(table.c.processed_at, table.c.received_at) < sa.bindparam("before"))
    .order_by(table.c.received_at)
    .limit(sa.bindparam("batch"))
    .with_for_update(skip_locked=True)
)
_PRUNE = sa.delete(table).where(table.c.message_id.in_(_OLD)).returning(table.c.message_id)


def record_statement(dialect: str, given: Mapping[str, sa.ColumnElement[Any]]) -> sa.Executable:
    """
    Insert messages that are done, or take over those that failed. Gives the id and the outcome of each, unless it was done before.

    *given*: their columns; those that are not among them are of a message that has just come and is done.
    """
    usual = {"attempts": sa.literal(1), "received_at": _now, "processed_at": _now, "error": sa.null()}
    columns = {name: column for name, column in {**usual, **given}.items() if name in table.c}
    # In one order, so that two writers wait for each other, and never in a circle.
    rows = sa.select(*columns.values()).where(sa.true()).order_by(columns["message_id"])
    insert = insert_into(table, dialect).from_select(list(columns), rows)
    changes = {name: insert.excluded[name] for name in ("outcome", "processed_at", "error")}
    return insert.on_conflict_do_update(
        index_elements=[table.c.message_id],
        set_=changes | {"attempts": table.c.attempts + 1},
        where=table.c.outcome == Outcome.FAILED,
    ).returning(table.c.message_id, table.c.outcome)


@cache
def _failure_statement(dialect: str) -> sa.Executable:
    given = {column.name: sa.bindparam(column.name, type_=column.type) for column in table.c}
    return record_statement(dialect, given | {"attempts": sa.literal(1), "processed_at": sa.null()})

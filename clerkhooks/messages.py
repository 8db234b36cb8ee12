"""The log of messages: each is done once, and each failure is remembered until a retry mends it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import datetime
from functools import cache
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from clerkhooks.clerk.events import Event, UserEvent
from clerkhooks.errors import describe
from clerkhooks.models import Outcome, WebhookMessage, autocommit, db, insert_into

logger = logging.getLogger(__name__)
_messages = cast("sa.Table", WebhookMessage.__table__)


def is_done(message_id: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    """SQL: whether the message was processed before. One that failed was not."""
    return sa.exists().where(_messages.c.message_id == message_id, _messages.c.outcome != Outcome.FAILED)


def done_columns(event: Event, now: datetime) -> dict[str, Any]:
    """The values of a message that is done, but for its outcome."""
    return _columns(event, now) | {"processed_at": now, "error": None}


def is_recorded(event: Event) -> bool:
    """Whether the caller's transaction, which must be able to answer, holds *event* as done."""
    return bool(db.session.scalar(_IS_DONE, {"message_id": event.message_id}))


def record_failure(event: Event, error: Exception, now: datetime) -> None:
    """
    Write down that *event* failed, in a transaction of its own. A failure never overwrites a success.

    Where the database is away, or keeps us out for longer than we wait, that is logged: Svix retries all the same.
    """
    if _is_unanswered(error):
        logger.warning("failure_not_recorded", extra={"message_id": event.message_id, "error": describe(error)})
        return
    row = _columns(event, now) | {"outcome": Outcome.FAILED, "processed_at": None, "error": describe(error)}
    try:
        with autocommit() as connection:
            connection.execute(record_statement(connection.dialect.name), row)
    except SQLAlchemyError as second:
        logger.warning("failure_not_recorded", extra={"message_id": event.message_id, "error": describe(second)})


def _is_unanswered(error: Exception) -> bool:
    """Whether PostgreSQL did not answer, or somebody keeps SQLite's one write lock: to wait as long again would be in vain."""
    return isinstance(error, OperationalError) and describe(error) in ("OperationalError", "OperationalError SQLITE_BUSY")


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
    sa.select(_messages.c.clerk_user_id)
    .distinct()
    .where(_messages.c.outcome == Outcome.FAILED, _messages.c.clerk_user_id > sa.bindparam("after"))
    .where(_messages.c.received_at < sa.bindparam("created_before", type_=_messages.c.received_at.type))
    .order_by(_messages.c.clerk_user_id)
    .limit(sa.bindparam("limit"))
)
"""The users of messages that failed and were never retried to success."""

_IS_DONE = sa.select(is_done(sa.bindparam("message_id", type_=sa.Text)))
_OLD = (
    sa.select(_messages.c.message_id)
    .where(_messages.c.received_at < sa.bindparam("before"))
    .where(sa.func.coalesce(_messages.c.processed_at, _messages.c.received_at) < sa.bindparam("before"))
    .order_by(_messages.c.received_at)
    .limit(sa.bindparam("batch"))
    .with_for_update(skip_locked=True)
)
_PRUNE = sa.delete(_messages).where(_messages.c.message_id.in_(_OLD)).returning(_messages.c.message_id)


@cache
def record_statement(dialect: str, outcome: sa.ColumnElement[str] | None = None) -> sa.Executable:
    """Insert a message with *outcome*, else the parameter, or take over one that failed. Gives the outcome, unless it was done before."""
    values: dict[str, sa.ColumnElement[Any]] = {column.name: sa.bindparam(column.name, type_=column.type) for column in _messages.c}
    values |= {} if outcome is None else {"outcome": outcome}
    insert = insert_into(_messages, dialect).from_select(list(_messages.c), sa.select(*values.values()).where(sa.true()))
    changes = {name: insert.excluded[name] for name in ("outcome", "processed_at", "error")}
    return insert.on_conflict_do_update(
        index_elements=[_messages.c.message_id],
        set_=changes | {"attempts": _messages.c.attempts + 1},
        where=_messages.c.outcome == Outcome.FAILED,
    ).returning(_messages.c.outcome)


def _columns(event: Event, now: datetime) -> dict[str, Any]:
    return {
        "message_id": event.message_id,
        "event_type": event.type,
        "clerk_user_id": event.user_id if isinstance(event, UserEvent) else None,
        "attempts": 1,
        "occurred_at": event.occurred_at,
        "received_at": now,
    }

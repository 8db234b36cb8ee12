"""The message log. Each message is processed once; a failure stays until a retry succeeds."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from clerkhooks.clerk.events import ReceivedEvent
from clerkhooks.errors import describe
from clerkhooks.events import Outcome
from clerkhooks.store import Store

logger = logging.getLogger(__name__)


def record_failure(store: Store, event: ReceivedEvent, error: Exception, now: datetime) -> None:
    """
    Record in a separate transaction that *event* failed.

    A failure never overwrites a success. If the database is unavailable, log a warning instead:
    Svix retries in any case.
    """
    row = {
        "message_id": event.message_id,
        "event_type": event.type,
        "user_id": event.user_id,
        "occurred_at": event.occurred_at,
        "now": now,
        "error": describe(error),
    }
    reason = error
    if not is_unanswered(error):  # otherwise another statement would only time out again
        try:
            store.database.write(store.statements.record_failure, row)
            return
        except SQLAlchemyError as second:
            reason = second
    extra = {"message_id": event.message_id, "error": describe(reason)}
    logger.warning("failure_not_recorded", extra=extra)


def is_unanswered(error: Exception) -> bool:
    """
    Return whether PostgreSQL was silent, SQLite stayed locked, or the pool was exhausted.

    These are not the message's fault; retrying now would only time out again.
    """
    silent = ("OperationalError", "OperationalError SQLITE_BUSY")
    unanswered = isinstance(error, OperationalError) and describe(error) in silent
    return unanswered or isinstance(error, sa.exc.TimeoutError)


def is_locked(error: Exception) -> bool:
    """Return whether PostgreSQL gave up waiting for a lock."""
    return describe(error) == "OperationalError 55P03"


def prune(store: Store, before: datetime, batch: int = 1000) -> Iterator[int]:
    """
    Delete messages received and processed before *before*; yield the size of each batch.

    Each batch is a separate transaction and skips rows that a delivery has locked, so that no
    writer waits long. Users are not changed. If a pruned message is redelivered, its version
    decides whether it is applied.
    """
    table = store.messages
    old = (
        sa.select(table.c.message_id)
        .where(table.c.received_at < before)
        .where(sa.func.coalesce(table.c.processed_at, table.c.received_at) < before)
        .order_by(table.c.received_at)
        .limit(batch)
        .with_for_update(skip_locked=True)
    )
    statement = sa.delete(table).where(table.c.message_id.in_(old)).returning(table.c.message_id)
    pruned = batch
    while pruned == batch:
        pruned = len(store.database.write(statement))
        if pruned:
            yield pruned


def is_failed(table: sa.Table) -> sa.ColumnElement[bool]:
    """Return the condition for failed messages, in the form that the partial index uses."""
    return table.c.outcome == sa.literal_column(f"'{Outcome.FAILED}'")

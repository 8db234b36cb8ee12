"""The message log. Messages are processed once. Failures are kept until a retry succeeds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from time import monotonic, sleep

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from clerkhooks.clerk.events import ReceivedEvent
from clerkhooks.clerk.kinds import USER
from clerkhooks.errors import describe
from clerkhooks.events import Outcome
from clerkhooks.store import Store

logger = logging.getLogger(__name__)


def record_failure(store: Store, event: ReceivedEvent, error: Exception, now: datetime) -> None:
    """
    Record in a separate transaction that *event* failed.

    A failure never overwrites a success. If the database is unavailable, log a warning instead.
    Svix retries in both cases.
    """
    row = {
        "message_id": event.message_id,
        "event_type": event.type,
        "user_id": event.user_id,
        "object_id": None if event.kind is USER else event.id,
        "occurred_at": event.occurred_at,
        "now": now,
        "error": describe(error),
    }
    reason = error
    if not is_unanswered(error):  # after such an error, another statement would also time out
        try:
            store.database.write(store.statements.record_failure, row)
            return
        except SQLAlchemyError as second:
            reason = second
    extra = {"message_id": event.message_id, "error": describe(reason)}
    logger.warning("failure_not_recorded", extra=extra)


def is_processed(
    store: Store, execute: Callable[[sa.Executable], Iterable[object]], message_id: str
) -> bool:
    """Return whether a message is in the log and did not fail."""
    columns = store.messages.c
    query = sa.select(columns.message_id).where(columns.message_id == message_id)
    return any(True for _ in execute(query.where(columns.outcome != Outcome.FAILED)))


def end_processing(store: Store, message_id: str) -> sa.Update:
    """Return a statement that sets the end of a message's processing to the current time."""
    messages = store.messages
    ended = sa.update(messages).where(messages.c.message_id == message_id)
    return ended.values(processed_at=datetime.now(UTC))


def is_unanswered(error: Exception) -> bool:
    """
    Return whether *error* means that the database did not respond in time.

    This includes timeouts of SQLite's write lock and of the pool. The message does not cause such
    errors, and an immediate retry would also fail.
    """
    silent = ("OperationalError", "OperationalError SQLITE_BUSY")
    unanswered = isinstance(error, OperationalError) and describe(error) in silent
    return unanswered or isinstance(error, sa.exc.TimeoutError)


def is_locked(error: Exception) -> bool:
    """Return whether PostgreSQL canceled a statement that was waiting for a lock."""
    return describe(error) == "OperationalError 55P03"


def prune(store: Store, before: datetime, batch: int = 1000) -> Iterator[int]:
    """
    Delete old messages. Yield the size of each batch.

    A message is old if it was received and last processed earlier than *before*. Each batch is a
    separate transaction and skips rows that a delivery has locked, so that no writer waits long.
    After each batch, pause for as long as it took, so that at least half of the database's time is
    left for deliveries. Users are not changed. If a deleted message arrives again, it is applied
    only if its version is newer.
    """
    statement = _make_prune(store, before, batch)
    since, began = datetime.min.replace(tzinfo=UTC), monotonic()
    while pruned := store.database.write(statement, {"since": since}):
        yield len(pruned)
        since = max(at for (at,) in pruned)
        sleep(monotonic() - began)
        began = monotonic()


def _make_prune(store: Store, before: datetime, batch: int) -> sa.Executable:
    """
    Return the statement that deletes a batch, beginning with messages received at ``since``.

    The index entries of deleted rows remain until a VACUUM. Without ``since``, each batch would
    scan the entries of all rows that earlier batches deleted. If the statement contained a join or
    a known value of ``since``, PostgreSQL's planner would also scan these entries, because it would
    look up the lowest value in the index.
    """
    table = store.messages
    received_at = table.c.received_at
    since = sa.select(sa.bindparam("since", type_=received_at.type)).scalar_subquery()
    old = (
        sa.select(table.c.message_id)
        .where(received_at >= since, received_at < before)
        .where(sa.func.coalesce(table.c.processed_at, received_at) < before)
        .order_by(received_at)
        .limit(batch)
        .with_for_update(skip_locked=True)
    )
    is_old: sa.ColumnElement[bool] = table.c.message_id.in_(old)
    if store.database.dialect_name == "postgresql":
        is_old = table.c.message_id == sa.any_(sa.func.array(old.scalar_subquery()))
    return sa.delete(table).where(is_old).returning(received_at)


def is_failed(table: sa.Table) -> sa.ColumnElement[bool]:
    """Return the condition for failed messages, in the form that the partial index needs."""
    return table.c.outcome == sa.literal_column(f"'{Outcome.FAILED}'")

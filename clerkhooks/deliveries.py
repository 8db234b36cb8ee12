"""Application of events: one transaction for each message, or for a batch of messages."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from itertools import compress
from time import monotonic
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, scoped_session

from clerkhooks.clerk.events import ReceivedEvent
from clerkhooks.clerk.kinds import MEMBERSHIP, USER
from clerkhooks.events import Handlers, Outcome
from clerkhooks.handled_writes import HandledWrites
from clerkhooks.store import Store
from clerkhooks.store.batching import Batcher
from clerkhooks.store.columns import read_fields
from clerkhooks.store.database import POOL_TIMEOUT, transaction
from clerkhooks.store.messages import is_locked, is_unanswered, record_failure
from clerkhooks.store.models import VERSION_COLUMNS
from clerkhooks.store.pool import Overloaded, Slots
from clerkhooks.store.postgresql import LOCK_TIMEOUT

MAX_DELIVERIES = 1000  # concurrent deliveries in a process
BATCH_LOCK_TIMEOUT = "50ms"  # after this timeout, each event of the batch is applied separately
SINGLE_LOCK_TIMEOUT = "1ms"  # after this timeout, the event waits in _wait_for_row
TABLE_LOCKED_AFTER = 1.0  # seconds; the two timeouts above do not apply to table locks


class Deliveries:
    """Applies the events of one application. Threads and greenlets may share an instance."""

    def __init__(self, store: Store, handlers: Handlers, session: scoped_session[Session]) -> None:
        self._store, self._handlers, self._database = store, handlers, store.database
        self._endings, self.handled = store.endings, HandledWrites(store, handlers, session)
        self._batchers = {
            kind: Batcher(
                self._apply_all,
                keys=find_keys,
                concerns_all=lambda error: is_unanswered(error) or is_locked(error),
            )
            for kind in store.by_kind
        }
        self._slots = Slots(MAX_DELIVERIES, 0)
        # Callers that wait for locked rows may use at most half of the connection pool.
        self._lock_waits = Slots(max(1, store.database.pool_size // 2), POOL_TIMEOUT)

    def apply(self, event: ReceivedEvent) -> Outcome:
        """
        Apply *event*, unless the database already has a newer version.

        Deliveries may be repeated or arrive out of order; the resulting rows are the same. The
        rows, the message and the handlers' changes are written in one transaction. The order of
        these writes is always the same, so that concurrent deliveries never deadlock.

        Raises:
            Overloaded: the event could not be applied in time. Nothing was changed.
            Exception: any other error. The transaction is rolled back, and the event is recorded as
                failed.
        """
        now = datetime.now(UTC)
        change = None
        began_at = self._slots.begin()
        try:
            if self.handled.is_needed(event):
                outcome, change = self.handled.apply(event, self.write)
            else:
                outcome = (
                    self._batchers[event.kind or USER](event)
                    or self._apply_all([event], SINGLE_LOCK_TIMEOUT)[0]
                    or self._wait_for_row(event)
                )
            if outcome is not Outcome.DUPLICATE:
                self.handled.call_after_commit(event, outcome, change)
        except Overloaded:
            raise
        except Exception as error:
            record_failure(self._store, event, error, now)
            raise
        finally:
            self._slots.end(began_at)
        return outcome

    def _apply_all(
        self, events: Sequence[ReceivedEvent], lock_timeout: str = BATCH_LOCK_TIMEOUT
    ) -> Sequence[Outcome | None]:
        """
        Apply *events* of one kind in one transaction.

        No two may share a message id or an object. If a row is locked, nothing is applied and all
        outcomes are None.
        """
        began_at = monotonic()
        with self._database.connect() as connection:
            try:
                with self._transaction(connection, events):
                    return self.write(connection, events, lock_timeout)
            except OperationalError as error:
                if not is_locked(error) or monotonic() - began_at > TABLE_LOCKED_AFTER:
                    raise
                return [None] * len(events)

    def _wait_for_row(self, event: ReceivedEvent) -> Outcome:
        """Apply *event* on PostgreSQL, waiting until its row is no longer locked."""
        with self._lock_waits.use(), self._database.connect() as connection:
            with self._transaction(connection, [event]):
                [outcome] = self.write(connection, [event])
            return outcome

    def _transaction(
        self, connection: sa.Connection, events: Sequence[ReceivedEvent]
    ) -> AbstractContextManager[None]:
        """Begin a transaction if *events* need several statements."""
        if self._endings is not None and any(map(self._endings.concerns, events)):
            return transaction(connection)
        return self._store.statements.transaction(connection)

    def write(
        self,
        connection: sa.Connection,
        events: Sequence[ReceivedEvent],
        lock_timeout: str = LOCK_TIMEOUT,
        created: Collection[str] = (),
    ) -> list[Outcome]:
        """
        Write objects of one kind and messages. Skip messages that were already processed.

        *created* are the ids of rows that this transaction has just created for these events.
        """
        if self._endings is not None:
            self._endings.lock(connection, events, lock_timeout)
        statements, now = self._store.by_kind[events[0].kind or USER], datetime.now(UTC)
        rows = [self.make_row(event, now) for event in events]
        parameters = {"rows": statements.encode(rows), "now": now, "lock_timeout": lock_timeout}
        if statements.is_atomic:
            done = statements.apply.execute(connection, parameters)
        else:
            written = statements.write(connection, statements.upsert, parameters, created)
            changed = {object_id for object_id, *_ in written}
            for row in rows:
                became = Outcome.APPLIED if row["id"] in changed else Outcome.STALE
                row["outcome"] = row["outcome"] or became
            parameters["rows"] = statements.encode(rows)
            done = connection.execute(statements.record_messages, parameters).all()
        outcomes = {message_id: Outcome(outcome) for message_id, outcome in done}
        found = [outcomes.get(event.message_id, Outcome.DUPLICATE) for event in events]
        if self._endings is not None:
            applied = (outcome is Outcome.APPLIED for outcome in found)
            self._endings.end_after(connection, compress(events, applied), now)
        if statements.changes is not None and Outcome.APPLIED in found:
            statements.changes.prepare_commit(connection)
        return found

    def make_row(self, event: ReceivedEvent, now: datetime) -> dict[str, Any]:
        """Return *event* as a row. If it is of a stored kind, the SQL sets the outcome."""
        row: dict[str, Any] = {
            "id": event.id,
            "message_id": event.message_id,
            "event_type": event.type,
            "outcome": None,
            "occurred_at": event.occurred_at,
        }
        row |= event.values
        if event.kind is None:
            handled = self._handlers.handles(event.type)
            row["outcome"] = Outcome.APPLIED if handled else Outcome.IGNORED
        elif event.is_deletion:
            at = event.occurred_at if event.kind is MEMBERSHIP else None
            row["deleted_at"] = min(at or now, now)
        else:
            fields = self._store.by_kind[event.kind].fields
            row |= read_fields(fields, event.data, self._database.dialect)
            row |= zip(VERSION_COLUMNS, event.version, strict=True)
        return row


def find_keys(event: ReceivedEvent) -> Sequence[Hashable]:
    """Return the keys of *event* that must be unique within a batch."""
    message = ("message", event.message_id)
    return (message,) if event.id is None else (message, ("object", event.id))

"""Writes that handlers share: events, and users whose account state a sync changes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session

from clerkhooks.clerk.account import is_barred
from clerkhooks.clerk.events import ReceivedEvent
from clerkhooks.clerk.kinds import USER
from clerkhooks.errors import describe, frames
from clerkhooks.events import BARRED, RESTORED, Event, Handlers, Outcome
from clerkhooks.handler_transaction import Call, Execute, call_handler, write_with_handlers
from clerkhooks.store import Store
from clerkhooks.store.account import holds_version, lock_account
from clerkhooks.store.messages import end_processing, is_processed

logger = logging.getLogger(__name__)


class Write(Protocol):
    """``Deliveries.write``."""

    def __call__(
        self, connection: sa.Connection, events: Sequence[ReceivedEvent], *, created: Sequence[str]
    ) -> list[Outcome]:
        """Write objects and messages in the transaction of *connection*."""


class HandledWrites:
    """
    Writes in the application's session, in one transaction with an application's handlers.

    A change of the account state is detected while the user's row is locked, so handlers are told
    of each change once: by the event or sync that wrote it.
    """

    def __init__(self, store: Store, handlers: Handlers, session: scoped_session[Session]) -> None:
        self._store, self._handlers, self._session = store, handlers, session

    @property
    def follows_changes(self) -> bool:
        """Whether any handler is registered for changes of the account state."""
        return self._handlers.follows_changes

    def is_needed(self, event: ReceivedEvent) -> bool:
        """Return whether *event* must be applied with ``apply``."""
        return self._may_change(event) or bool(self._handlers.find(event.type, after_commit=False))

    def apply(self, event: ReceivedEvent, write: Write) -> tuple[Outcome, str | None]:
        """
        Apply *event* with *write*, call its handlers, and commit.

        Return the outcome and the type of the account state's change, or None.
        """
        outcome, change = Outcome.DUPLICATE, None

        def write_and_find(connection: sa.Connection) -> Sequence[Call] | None:
            nonlocal outcome, change
            was_barred, created = None, list[str]()
            if event.id is not None and self._may_change(event):
                if is_saved(connection.execute):  # do not wait for the row
                    return None
                was_barred, is_new = lock_account(self._store, connection, event.id)
                created = [event.id] if is_new else []
            [outcome] = write(connection, [event], created=created)
            if outcome is Outcome.DUPLICATE:
                return None
            if outcome is Outcome.APPLIED:
                change = _find_change(was_barred, is_barred(event.values))
            return self._find_calls(_make_event(event, outcome), change, after_commit=False)

        def is_saved(execute: Execute) -> bool:
            return is_processed(self._store, execute, event.message_id)

        def note_end(execute: Execute) -> None:
            execute(end_processing(self._store, event.message_id))

        write_with_handlers(self._session, self._store, write_and_find, is_saved, note_end)
        return outcome, change

    def call_after_commit(self, event: ReceivedEvent, outcome: Outcome, change: str | None) -> None:
        """Call the handlers that run after the commit. Their errors are logged."""
        self._call(self._find_calls(_make_event(event, outcome), change, after_commit=True))

    def store_snapshot(self, event: Event, row: Mapping[str, Any], read_at: int) -> bool:
        """
        Store a *row* that a sync requested at *read_at*, and call the handlers of its change.

        The type of *event* is the change. Return whether the row was written. If a newer event has
        already made the change, the row may be written without a call.

        Raises:
            Exception: a handler or the database raised an error. Everything is rolled back.
        """
        store, user_id, change = self._store, row["id"], None
        rows = store.statements.encode([row])
        parameters = {"rows": rows, "now": datetime.now(UTC), "may_bar": True, "read_at": read_at}
        is_written = False

        def write(connection: sa.Connection) -> Sequence[Call] | None:
            nonlocal change, is_written
            was_barred, is_new = lock_account(store, connection, user_id)
            created, statements = [user_id] if is_new else [], store.statements
            merge = statements.merge_snapshots
            is_written = bool(statements.write(connection, merge, parameters, created))
            change = _find_change(was_barred, event.type == BARRED)
            return self._find_changed(event, change, after_commit=False) if is_written else None

        def is_saved(execute: Execute) -> bool:
            return holds_version(store, execute, user_id, event.version)

        write_with_handlers(self._session, store, write, is_saved)
        if is_written:
            self._call(self._find_changed(event, change, after_commit=True))
        return is_written

    def _may_change(self, event: ReceivedEvent) -> bool:
        return event.kind is USER and not event.is_deletion and self.follows_changes

    def _find_calls(self, event: Event, change: str | None, *, after_commit: bool) -> list[Call]:
        handlers = self._handlers.find(event.type, after_commit=after_commit)
        changed = self._find_changed(event, change, after_commit=after_commit)
        return [(handler, event) for handler in handlers] + changed

    def _find_changed(self, event: Event, change: str | None, *, after_commit: bool) -> list[Call]:
        if change is None:
            return []
        handlers = self._handlers.find_for_change(change, after_commit=after_commit)
        return [(handler, replace(event, type=change)) for handler in handlers]

    def _call(self, calls: Iterable[Call]) -> None:
        for handler, event in calls:
            try:
                call_handler(handler, event)
            except (Exception, SystemExit) as error:  # noqa: BLE001  # the event is already committed
                self._session.rollback()
                told = {"message_id": event.message_id, "error": describe(error)}
                logger.error("handler_failed", extra={**told, "frames": frames(error)})


def _find_change(was_barred: bool | None, is_barred: bool) -> str | None:
    """Return the type of the change, or None if nothing changed or no handler follows it."""
    if was_barred is None or was_barred == is_barred:
        return None
    return BARRED if is_barred else RESTORED


def _make_event(event: ReceivedEvent, outcome: Outcome) -> Event:
    message = (event.type, event.data, event.message_id, event.version, event.occurred_at)
    return Event(*message, outcome)

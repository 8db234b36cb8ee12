"""The users service, which reads and writes users for both webhooks and API calls."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, scoped_session

from clerkhooks.clerk.events import NEW_USER, ReceivedEvent
from clerkhooks.errors import Unauthenticated
from clerkhooks.events import Handlers, Outcome
from clerkhooks.handled_writes import HandledWrites
from clerkhooks.store import Store
from clerkhooks.store.batching import Batcher
from clerkhooks.store.columns import read_fields, to_json
from clerkhooks.store.database import POOL_TIMEOUT, sqlite_transaction
from clerkhooks.store.messages import is_locked, is_unanswered, record_failure
from clerkhooks.store.models import VERSION_COLUMNS, ClerkUser
from clerkhooks.store.pool import Overloaded, Slots
from clerkhooks.store.postgresql import LOCK_TIMEOUT
from clerkhooks.store.statements import DELETED_USER, user_columns

MAX_CALLERS = 1000  # concurrent deliveries in a process; the same limit applies to calls
BATCH_LOCK_TIMEOUT = "50ms"  # after this timeout, each event of the batch is applied separately
SINGLE_LOCK_TIMEOUT = "1ms"  # after this timeout, the event waits in _wait_for_row
TABLE_LOCKED_AFTER = 1.0  # seconds; the two timeouts above do not apply to table locks
LAST_SEEN_INTERVAL = timedelta(minutes=1)
PRESENCE_TIMEOUT = timedelta(minutes=5)


class Users:
    """The users of one application. Threads and greenlets may share an instance."""

    def __init__(self, store: Store, handlers: Handlers, session: scoped_session[Session]) -> None:
        self._store, self._handlers = store, handlers
        self.handled = HandledWrites(store, handlers, session)
        self._database, self._statements = store.database, store.statements
        self._deliver = Batcher(
            self._apply_all,
            keys=_keys,
            concerns_all=lambda error: is_unanswered(error) or is_locked(error),
        )
        self._read = Batcher(self._read_all, concerns_all=is_unanswered)
        self._deliveries, self._calls = Slots(MAX_CALLERS, 0), Slots(MAX_CALLERS, 0)
        # Callers that wait for locked rows may use at most half of the connection pool.
        self._lock_waits = Slots(max(1, store.database.pool_size // 2), POOL_TIMEOUT)

    def apply(self, event: ReceivedEvent) -> Outcome:
        """
        Apply *event*, unless the database already has a newer version.

        Deliveries may be repeated or arrive out of order; the resulting row is the same. The user,
        the message and the handlers' changes are written in one transaction. The order of these
        writes is always the same, so that concurrent deliveries never deadlock.

        Raises:
            Overloaded: the event could not be applied in time. Nothing was changed.
            Exception: any other error. The transaction is rolled back, and the event is recorded as
                failed.
        """
        now = datetime.now(UTC)
        change = None
        began_at = self._deliveries.begin()
        try:
            if self.handled.is_needed(event):
                outcome, change = self.handled.apply(event, self.write)
            else:
                outcome = (
                    self._deliver(event)
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
            self._deliveries.end(began_at)
        return outcome

    def get_authenticated(self, user_id: str, *, impersonated: bool) -> tuple[ClerkUser, bool]:
        """
        Return the user of a verified session token, and whether this call created the row.

        Also update ``last_seen``, at most once a minute. Do not update it if the caller is
        impersonating the user.

        Raises:
            Unauthenticated: ``user_deleted``, ``user_banned`` or ``user_deprovisioned``; a token
                can be valid for a minute after that.
        """
        now = datetime.now(UTC)
        began_at = self._calls.begin()
        try:
            user, created = self._read(user_id), None
            if user is None:
                row = {"id": user_id, "name": NEW_USER, "now": now}
                created = self._write_user(self._statements.create_first_seen, row)
                user = created or self._read(user_id)
            elif not impersonated and _is_seen_long_ago(user, now):
                row = {"id": user_id, "now": now, "before": now - LAST_SEEN_INTERVAL}
                moved = self._write_user(self._statements.move_last_seen, row)
                user = moved or self._read(user_id)
        finally:
            self._calls.end(began_at)
        if user is None:  # rows are never removed, so a lagging replica responded
            raise RuntimeError("A user's row was not found although it exists.")
        reason = _find_refusal(user)
        if reason is not None:
            raise Unauthenticated(reason)
        return user, created is not None

    def set_presence(self, user_id: str, is_online: bool) -> ClerkUser:
        """
        Set whether the user is online.

        The user counts as offline after five minutes without a call.

        Raises:
            Unauthenticated: ``user_deleted``.
        """
        row = {"id": user_id, "is_online": is_online}
        user = self._write_user(self._statements.set_presence, row)
        if user is None:
            raise Unauthenticated("user_deleted")
        return user

    def _write_user(self, statement: sa.Executable, row: dict[str, Any]) -> ClerkUser | None:
        """
        Execute *statement* and return the user, or None if no row was written.

        If calls concurrently create a user or update ``last_seen``, only one writes the row.
        """
        rows = self._database.write(statement, row)
        return self._store.make_snapshot(rows[0]) if rows else None

    def _read_all(self, user_ids: Sequence[str]) -> list[ClerkUser | None]:
        rows = to_json([{"id": user_id} for user_id in dict.fromkeys(user_ids)])
        found = self._database.execute(self._statements.select, {"rows": rows})
        users = {user.id: user for user in map(self._store.make_snapshot, found)}
        return [users.get(user_id) for user_id in user_ids]

    def _apply_all(
        self, events: Sequence[ReceivedEvent], lock_timeout: str = BATCH_LOCK_TIMEOUT
    ) -> Sequence[Outcome | None]:
        """
        Apply *events* in one transaction. No two events may share a message id or a user.

        If a row is locked, nothing is applied and all outcomes are None.
        """
        began_at = monotonic()
        with self._database.connect() as connection, sqlite_transaction(connection):
            try:
                return self.write(connection, events, lock_timeout)
            except OperationalError as error:
                if not is_locked(error) or monotonic() - began_at > TABLE_LOCKED_AFTER:
                    raise
                return [None] * len(events)

    def _wait_for_row(self, event: ReceivedEvent) -> Outcome:
        """Apply *event* on PostgreSQL, waiting until its row is no longer locked."""
        with self._lock_waits.use(), self._database.connect() as connection:
            [outcome] = self.write(connection, [event])
        return outcome

    def write(
        self,
        connection: sa.Connection,
        events: Sequence[ReceivedEvent],
        lock_timeout: str = LOCK_TIMEOUT,
    ) -> list[Outcome]:
        """Write users and messages, skipping messages that have already been processed."""
        statements, now = self._statements, datetime.now(UTC)
        rows = [self._row(event, now) for event in events]
        parameters = {"rows": statements.encode(rows), "now": now}
        if connection.dialect.name == "postgresql":
            parameters["lock_timeout"] = lock_timeout
            done = connection.execute(statements.apply, parameters).all()
        else:
            changed = set(connection.execute(statements.upsert_users, parameters).scalars())
            for row in rows:
                became = Outcome.APPLIED if row["id"] in changed else Outcome.STALE
                row["outcome"] = row["outcome"] or became
            parameters["rows"] = statements.encode(rows)
            done = connection.execute(statements.record_messages, parameters).all()
        outcomes = {message_id: Outcome(outcome) for message_id, outcome in done}
        return [outcomes.get(event.message_id, Outcome.DUPLICATE) for event in events]

    def _row(self, event: ReceivedEvent, now: datetime) -> dict[str, Any]:
        """Return *event* as a row. If it concerns a user, the SQL statements set the outcome."""
        row: dict[str, Any] = {
            "id": event.user_id,
            "message_id": event.message_id,
            "event_type": event.type,
            "outcome": None,
            "occurred_at": event.occurred_at,
        }
        if event.user_id is None:
            handled = self._handlers.handles(event.type)
            row["outcome"] = Outcome.APPLIED if handled else Outcome.IGNORED
        elif event.profile is None:
            row |= user_columns(DELETED_USER, event.account) | {"deleted_at": now}
        else:
            row |= user_columns(event.profile, event.account)
            row |= read_fields(self._store.fields, event.data, self._database.dialect)
            row |= zip(VERSION_COLUMNS, event.version, strict=True)
        return row


def is_present(user: Any) -> bool:
    """Return whether *user* is marked as online and was seen in the last five minutes."""
    return bool(user.is_online) and datetime.now(UTC) - user.last_seen <= PRESENCE_TIMEOUT


def _find_refusal(user: ClerkUser) -> str | None:
    """Return the reason why the user's calls are refused, or None if they are not."""
    if user.deleted_at is not None:
        return "user_deleted"
    if user.banned_at is not None:
        return "user_banned"
    return None if user.deprovisioned_at is None else "user_deprovisioned"


def _is_seen_long_ago(user: ClerkUser, now: datetime) -> bool:
    return _find_refusal(user) is None and user.last_seen <= now - LAST_SEEN_INTERVAL


def _keys(event: ReceivedEvent) -> Sequence[Hashable]:
    """Return the keys of *event* that must be unique within a batch."""
    message = ("message", event.message_id)
    return (message,) if event.user_id is None else (message, ("user", event.user_id))

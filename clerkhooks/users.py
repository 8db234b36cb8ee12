"""The users service: everything that reads or writes users, for webhooks and calls alike."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event as sa_event
from sqlalchemy.orm import Session, scoped_session

from clerkhooks.clerk.events import NEW_USER, ReceivedEvent
from clerkhooks.errors import Unauthenticated, describe, frames
from clerkhooks.events import Event, Handler, Handlers, Outcome
from clerkhooks.store import Store
from clerkhooks.store.batching import Batcher
from clerkhooks.store.columns import to_json
from clerkhooks.store.database import (
    LOCK_TIMEOUT,
    STATEMENT_TIMEOUT,
    begin_immediate,
    is_autocommit,
    transaction,
)
from clerkhooks.store.messages import is_unanswered, record_failure
from clerkhooks.store.models import VERSION_COLUMNS, ClerkUser
from clerkhooks.store.statements import DELETED_USER, profile_columns

logger = logging.getLogger(__name__)
BATCH_LOCK_TIMEOUT = "50ms"  # then the batch fails, and each caller retries alone
LAST_SEEN_STEP = timedelta(minutes=1)
PRESENCE_LASTS = timedelta(minutes=5)


class Users:
    """The users of one application. Threads and greenlets may share it."""

    def __init__(
        self,
        store: Store,
        handlers: Handlers,
        session: scoped_session[Session],
        make_snapshot: Callable[[Sequence[Any]], ClerkUser],
    ) -> None:
        self._store, self._handlers, self._session = store, handlers, session
        self._make_snapshot = make_snapshot
        self._deliver = Batcher(self._apply_all, keys=_keys, concerns_all=is_unanswered)
        self._read = Batcher(self._read_all, concerns_all=is_unanswered)

    def apply(self, event: ReceivedEvent) -> Outcome:
        """
        Apply *event*, unless the database already has a newer version.

        Deliveries repeat and overtake one another; the row ends the same. The user, the message and
        what handlers write are one transaction, always in this order, so that two deliveries may
        wait for each other but never deadlock.

        Raises:
            Exception: any error. The event is rolled back and recorded as failed.
        """
        now = datetime.now(UTC)
        handlers = self._handlers.find(event.type, after_commit=False)
        try:
            if handlers:
                outcome = self._apply_with_handlers(event, now, handlers)
            else:
                outcome = self._deliver(event)
        except Exception as error:
            if handlers:
                self._session.rollback()
            record_failure(self._store, event, error, now)
            raise
        if outcome is not Outcome.DUPLICATE:
            self._call_after_commit(event, outcome)
        return outcome

    def get_authenticated(self, user_id: str, *, impersonated: bool) -> tuple[ClerkUser, bool]:
        """
        Return the user behind a verified session token, and whether this call created the row.

        Moves ``last_seen``, at most once a minute, unless the caller impersonates the user.

        Raises:
            Unauthenticated: ``user_deleted``; a token may outlive its user by a minute.
        """
        now = datetime.now(UTC)
        user, created = self._read(user_id), False
        if user is None:
            row = {"id": user_id, "name": NEW_USER, "now": now}
            statements = self._store.statements
            created = bool(self._store.database.write(statements.create_first_seen, row))
            user = self._read(user_id)
        elif (
            not impersonated and user.deleted_at is None and user.last_seen <= now - LAST_SEEN_STEP
        ):
            user = self._move_last_seen(user_id, now) or self._read(user_id)
        if user is None or user.deleted_at is not None:
            raise Unauthenticated("user_deleted")
        return user, created

    def set_presence(self, user_id: str, is_online: bool) -> ClerkUser:
        """
        Set whether the user is online, for as long as ``last_seen`` is recent.

        Raises:
            Unauthenticated: ``user_deleted``.
        """
        parameters = {"id": user_id, "is_online": is_online}
        rows = self._store.database.write(self._store.statements.set_presence, parameters)
        if not rows:
            raise Unauthenticated("user_deleted")
        return self._make_snapshot(rows[0])

    def _move_last_seen(self, user_id: str, now: datetime) -> ClerkUser | None:
        """Move ``last_seen``. Of concurrent calls one succeeds, and the others return None."""
        parameters = {"id": user_id, "now": now, "before": now - LAST_SEEN_STEP}
        rows = self._store.database.write(self._store.statements.move_last_seen, parameters)
        return self._make_snapshot(rows[0]) if rows else None

    def _read_all(self, user_ids: Sequence[str]) -> list[ClerkUser | None]:
        rows = to_json([{"id": user_id} for user_id in dict.fromkeys(user_ids)])
        found = self._store.database.execute(self._store.statements.select, {"rows": rows})
        users = {user.id: user for user in map(self._make_snapshot, found)}
        return [users.get(user_id) for user_id in user_ids]

    def _apply_all(self, events: Sequence[ReceivedEvent]) -> list[Outcome]:
        """Apply *events* in a transaction of their own; no two are of one message or user."""
        limit = LOCK_TIMEOUT if len(events) == 1 else BATCH_LOCK_TIMEOUT
        with self._store.database.connect() as connection, transaction(connection):
            return self._write(connection, events, datetime.now(UTC), limit)

    def _apply_with_handlers(
        self, event: ReceivedEvent, now: datetime, handlers: Sequence[Handler]
    ) -> Outcome:
        session = self._session()
        connection = self._begin(session)
        with _own_limits(connection):
            [outcome] = self._write(connection, [event], now, LOCK_TIMEOUT)
        if outcome is Outcome.DUPLICATE:
            session.rollback()
            return outcome
        for handler in handlers:
            with _commit_refused(session, connection), _exit_refused():
                _call(handler, event, outcome)
            # After a swallowed error PostgreSQL answers COMMIT with a silent rollback, and after a
            # rollback an empty commit succeeds. Either way the message would be answered 200 and
            # lost.
            if self._session() is not session or not self._is_recorded(session, event):
                raise RuntimeError(_ENDED)
        session.commit()
        # A listener of the application's may have swallowed an error inside the commit.
        if self._read_outcome(self._store.database.execute, event) in _NOT_DONE:
            raise RuntimeError("The message's transaction was rolled back while it was committed.")
        return outcome

    def _begin(self, session: Session) -> sa.Connection:
        """Return the session's connection, in a transaction even if its engine is in AUTOCOMMIT."""
        bind = {"clause": self._store.users}
        connection = session.connection(bind_arguments=bind)
        if not is_autocommit(connection):
            return connection
        session.commit()  # whatever was executed before is committed already
        is_postgresql = connection.dialect.name == "postgresql"
        level = "READ COMMITTED" if is_postgresql else "SERIALIZABLE"  # the pool resets it
        return session.connection(bind_arguments=bind, execution_options={"isolation_level": level})

    def _is_recorded(self, session: Session, event: ReceivedEvent) -> bool:
        connection = session.connection(bind_arguments={"clause": self._store.messages})
        return self._read_outcome(connection.execute, event) not in _NOT_DONE

    def _read_outcome(
        self, execute: Callable[[sa.Executable], Iterable[sa.Row[Any]]], event: ReceivedEvent
    ) -> str | None:
        messages = self._store.messages
        query = sa.select(messages.c.outcome).where(messages.c.message_id == event.message_id)
        return next((str(outcome) for (outcome,) in execute(query)), None)

    def _write(
        self,
        connection: sa.Connection,
        events: Sequence[ReceivedEvent],
        now: datetime,
        lock_timeout: str,
    ) -> list[Outcome]:
        """Write users and messages, except for messages that were processed before."""
        statements = self._store.statements
        rows = [self._row(event, now) for event in events]
        if connection.dialect.name == "postgresql":
            parameters = {"rows": to_json(rows), "now": now, "lock_timeout": lock_timeout}
            done = connection.execute(statements.apply, parameters).all()
        else:
            parameters = {"rows": to_json(rows), "now": now}
            changed = set(connection.execute(statements.upsert_users, parameters).scalars())
            for row in rows:
                became = Outcome.APPLIED if row["id"] in changed else Outcome.STALE
                row["outcome"] = row["outcome"] or became
            parameters["rows"] = to_json(rows)
            done = connection.execute(statements.record_messages, parameters).all()
        outcomes = {message_id: Outcome(outcome) for message_id, outcome in done}
        return [outcomes.get(event.message_id, Outcome.DUPLICATE) for event in events]

    def _row(self, event: ReceivedEvent, now: datetime) -> dict[str, Any]:
        """Return what the statements need of *event*; they decide the outcome of a user's event."""
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
            row |= profile_columns(DELETED_USER) | {"deleted_at": now}
        else:
            row |= profile_columns(event.profile) | self._store.read_fields(event.data)
            row |= zip(VERSION_COLUMNS, event.version, strict=True)
        return self._store.statements.encode(row)

    def _call_after_commit(self, event: ReceivedEvent, outcome: Outcome) -> None:
        for handler in self._handlers.find(event.type, after_commit=True):
            try:
                _call(handler, event, outcome)
            except (Exception, SystemExit) as error:  # noqa: BLE001  # the event is already committed
                self._session.rollback()
                told = {"message_id": event.message_id, "error": describe(error)}
                logger.error("handler_failed", extra={**told, "frames": frames(error)})


@contextmanager
def _exit_refused() -> Iterator[None]:
    """Make SystemExit of a handler an error like any other, which is recorded and answered 500."""
    try:
        yield
    except SystemExit as error:
        raise RuntimeError("A handler raised SystemExit.") from error


_NOT_DONE = (None, Outcome.FAILED)


def is_present(user: Any) -> bool:
    """Return whether *user* is set online and was seen within five minutes."""
    return bool(user.is_online) and datetime.now(UTC) - user.last_seen <= PRESENCE_LASTS


_ENDED = (
    "A handler ended the message's transaction. It must neither commit nor roll back: clerkhooks "
    "commits the message together with everything that handlers write. Use "
    "db.session.begin_nested() around an error of the database that you catch."
)


@contextmanager
def _commit_refused(session: Session, connection: sa.Connection) -> Iterator[None]:
    """Refuse commits while a handler runs: what later handlers write must not be lost."""
    attempts: list[object] = []
    transaction = session.get_transaction()

    def refuse(target: Session | sa.Connection) -> None:
        if target is connection or not session.in_nested_transaction():
            attempts.append(target)
            raise RuntimeError(_ENDED)

    sa_event.listen(session, "before_commit", refuse)
    sa_event.listen(connection, "commit", refuse)  # of db.session.connection().commit()
    try:
        yield
    finally:
        sa_event.remove(session, "before_commit", refuse)
        sa_event.remove(connection, "commit", refuse)
    if attempts or session.get_transaction() is not transaction:
        raise RuntimeError(_ENDED)


@contextmanager
def _own_limits(connection: sa.Connection) -> Iterator[None]:
    """Bound the waits of our statement in the application's transaction, and of no other."""
    if connection.dialect.name != "postgresql":
        begin_immediate(connection)
        yield
        return
    before = connection.execute(
        _EXCHANGE_LIMITS, {"lock": LOCK_TIMEOUT, "statement": STATEMENT_TIMEOUT}
    ).one()
    yield
    connection.execute(_EXCHANGE_LIMITS, {"lock": before[0], "statement": before[1]})


_EXCHANGE_LIMITS = sa.text(
    """
    SELECT lock_before, statement_before,
        set_config('lock_timeout', :lock, true), set_config('statement_timeout', :statement, true)
    FROM (SELECT current_setting('lock_timeout') AS lock_before,
        current_setting('statement_timeout') AS statement_before OFFSET 0) AS before
    """
)


def _call(handler: Handler, event: ReceivedEvent, outcome: Outcome) -> None:
    result = handler(
        Event(
            type=event.type,
            data=event.data,
            message_id=event.message_id,
            version=event.version,
            occurred_at=event.occurred_at,
            outcome=outcome,
        )
    )
    if inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
        raise TypeError("A handler must be a plain function: its result is not awaited.")


def _keys(event: ReceivedEvent) -> Sequence[Hashable]:
    """Return what no two events of a batch may share."""
    message = ("message", event.message_id)
    return (message,) if event.user_id is None else (message, ("user", event.user_id))

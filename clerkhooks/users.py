"""All that reads or writes users, for webhooks and for authenticated calls alike."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from flask import current_app
from sqlalchemy.orm import Session, scoped_session

from clerkhooks import messages, statements
from clerkhooks.clerk.events import NEW_USER, Event, Profile, UserEvent
from clerkhooks.errors import Unauthenticated, describe, frames
from clerkhooks.models import Outcome, autocommit, db, execute_alone, version_columns
from clerkhooks.signals import event_processed, event_processing, user_first_seen
from clerkhooks.statements import UserSnapshot as UserSnapshot

logger = logging.getLogger(__name__)
_LENT = "clerkhooks.lent_to_a_receiver"
LAST_SEEN_STEP = timedelta(minutes=1)
PRESENCE_LASTS = timedelta(minutes=5)


def receive(event: Event) -> Outcome:
    """
    Bring the database up to *event*, or leave it where it already knows better.

    Deliveries repeat and overtake one another; the row ends the same. User, message and what receivers of
    ``event_processing`` write are one transaction, in this order in every one of them, so that two deliveries
    may wait for each other but never in a circle.

    Raises:
        Exception: whatever went wrong; nothing of the event is then written but that it failed.
    """
    now = datetime.now(UTC)
    try:
        if event_processing.has_receivers_for(event.type):
            outcome = _write_with_receivers(event, now)
        elif isinstance(event, UserEvent) and db.engine.dialect.name == "postgresql":
            # One round trip, which is a transaction by itself.
            outcome = _outcome(execute_alone(*statement_of(event, now)))
        else:
            with autocommit() as connection:
                outcome = _write(connection, event, now)
    except Exception as error:
        db.session.rollback()
        messages.record_failure(event, error, now)
        raise
    if outcome is not Outcome.DUPLICATE:
        _tell_receivers(event, outcome)
    return outcome


def get_authenticated(user_id: str, *, impersonated: bool) -> UserSnapshot:
    """
    The user behind a verified session token, created if the call overtook the webhook.

    Moves ``last_seen``, at most once a minute, unless somebody else acts in the user's name.

    Raises:
        Unauthenticated: ``user_deleted``; a token may outlive its user by a minute.
    """
    now = datetime.now(UTC)
    before = now - LAST_SEEN_STEP
    user = _read(user_id)
    if user is None:
        created = {"id": user_id} | statements.new_row(now, Profile(NEW_USER))
        is_new = execute_alone(statements.fallback_statement(db.engine.dialect.name), created) is not None
        user = _read(user_id)
        if is_new:
            _tell_of_first_call(user_id)
    elif not impersonated and user.last_seen <= before and user.deleted_at is None:
        # Of many calls at once the first moves it; the others read what it wrote.
        moved = execute_alone(statements.MOVE_LAST_SEEN, {"user_id": user_id, "now": now, "before": before})
        user = UserSnapshot(*moved) if moved else _read(user_id)
    return _live(user)


def _read(user_id: str) -> UserSnapshot | None:
    row = execute_alone(statements.SELECT, {"user_id": user_id})
    return UserSnapshot(*row) if row else None


def set_presence(user_id: str, is_online: bool) -> UserSnapshot:
    """
    Set whether the user is online, for as long as ``last_seen`` stays fresh.

    Raises:
        Unauthenticated: ``user_deleted``.
    """
    row = execute_alone(statements.SET_PRESENCE, {"user_id": user_id, "online": is_online})
    if row is None:
        raise Unauthenticated("user_deleted")
    return UserSnapshot(*row)


def is_present(user: UserSnapshot) -> bool:
    """Whether *user* said to be online and was seen within five minutes."""
    return user.is_online and datetime.now(UTC) - user.last_seen <= PRESENCE_LASTS


def _let_receivers_write(event: Event, outcome: Outcome) -> None:
    session = db.session()
    transaction = session.get_transaction()
    for receiver in event_processing.receivers_for(event.type):
        session.info[_LENT] = True
        try:
            _call(receiver, event.type, event=event, outcome=outcome)
        finally:
            session.info.pop(_LENT)
        # PostgreSQL answers COMMIT after a swallowed error with a silent rollback, and after a rollback a commit
        # succeeds, too: either way the message would be answered 200 and lost. Asking for it finds both.
        if session.get_transaction() is not transaction or not messages.is_recorded(event):
            raise RuntimeError("A receiver of event_processing ended the transaction. It must neither commit nor roll back.")


def _tell_receivers(event: Event, outcome: Outcome) -> None:
    for receiver in event_processed.receivers_for(event.type):
        with _unheard(message_id=event.message_id):
            _call(receiver, event.type, event=event, outcome=outcome)


def _tell_of_first_call(user_id: str) -> None:
    app = current_app._get_current_object()  # type: ignore[attr-defined]  # as Flask's own signals name their sender
    for receiver in user_first_seen.receivers_for(app):
        with _unheard(user_id=user_id):
            _call(receiver, app, user_id=user_id)


@contextmanager
def _unheard(**ids: str) -> Iterator[None]:
    """Log what a receiver raises: what it was told of is done, whatever it makes of it."""
    try:
        yield
    except (Exception, SystemExit) as error:  # noqa: BLE001
        db.session.rollback()
        logger.error("receiver_failed", extra=ids | {"error": describe(error), "frames": frames(error)})


def _call(receiver: Callable[..., Any], sender: object, **what: object) -> None:
    result = receiver(sender, **what)
    if inspect.isawaitable(result) or inspect.isgenerator(result):
        raise TypeError("A receiver is a plain function: nobody awaits or iterates over what it returns.")


@sa.event.listens_for(db.session, "before_commit")
def _refuse_to_commit(session: Session) -> None:
    """Keep a receiver from committing half of a message: what receivers after it wrote would be lost."""
    if session.info.get(_LENT) and not session.in_nested_transaction():
        raise RuntimeError("A receiver of event_processing must not commit: the message is committed with all that they write.")


def _write_with_receivers(event: Event, now: datetime) -> Outcome:
    outcome = _write(db.session, event, now)
    if outcome is Outcome.DUPLICATE:
        db.session.rollback()
        return outcome
    _let_receivers_write(event, outcome)
    db.session.commit()
    return outcome


def _write(connection: sa.Connection | scoped_session[Any], event: Event, now: datetime) -> Outcome:
    """Write user and message, unless the message was done before. What a repetition writes all the same is what is there."""
    dialect = db.engine.dialect.name
    message = messages.done_columns(event, now)
    if not isinstance(event, UserEvent):
        handled = event_processing.has_receivers_for(event.type) or event_processed.has_receivers_for(event.type)
        became = {"outcome": Outcome.APPLIED if handled else Outcome.IGNORED}
        row = connection.execute(messages.record_statement(dialect), message | became).first()
    elif dialect == "postgresql":
        row = connection.execute(*statement_of(event, now)).first()
    else:
        statement = statements.tombstone_statement(dialect) if event.profile is None else statements.profile_statement(dialect)
        is_applied = connection.execute(statement, _user_columns(event, now)).first() is not None
        became = {"outcome": Outcome.APPLIED if is_applied else Outcome.STALE}
        row = connection.execute(messages.record_statement(dialect), message | became).first()
    return _outcome(row)


def statement_of(event: UserEvent, now: datetime) -> tuple[sa.Executable, dict[str, Any]]:
    """What does all of *event* on PostgreSQL: one statement, which is a transaction by itself, and its parameters."""
    statement = statements.event_statement("postgresql", is_deletion=event.profile is None)
    return statement, messages.done_columns(event, now) | _user_columns(event, now)


def _outcome(row: Sequence[Any] | None) -> Outcome:
    return Outcome(row[0]) if row else Outcome.DUPLICATE


def _user_columns(event: UserEvent, now: datetime) -> dict[str, Any]:
    ids = {"id": event.user_id, "done_message_id": event.message_id}
    if event.profile is None:
        return ids | statements.new_row(now, statements.DELETED_USER) | {"deleted_at": now}
    return ids | statements.new_row(now, event.profile) | version_columns(event.version)


def _live(user: UserSnapshot | None) -> UserSnapshot:
    if user is None or user.deleted_at is not None:
        raise Unauthenticated("user_deleted")
    return user

"""All that reads or writes users, for webhooks and for authenticated calls alike."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import sqlalchemy as sa
from flask import Flask, current_app
from sqlalchemy.orm import Session

from clerkhooks import messages, statements
from clerkhooks.clerk.events import NEW_USER, Event, Profile, UserEvent
from clerkhooks.coalescing import Coalescer
from clerkhooks.errors import Unauthenticated, describe, frames
from clerkhooks.models import Outcome, autocommit, db, execute_alone, version_columns, writers_turn
from clerkhooks.signals import event_processed, event_processing, user_first_seen
from clerkhooks.statements import UserSnapshot as UserSnapshot
from clerkhooks.statements import profile_columns

logger = logging.getLogger(__name__)
_LENT = "clerkhooks.lent_to_a_receiver"
_DELIVERIES, _READS = "clerkhooks.deliveries", "clerkhooks.reads"
Execute = Callable[[sa.Executable, Mapping[str, Any]], Sequence[Any]]
LAST_SEEN_STEP = timedelta(minutes=1)
PRESENCE_LASTS = timedelta(minutes=5)


def init_users(app: Flask) -> None:
    """Let deliveries that arrive together be written together, and users be read together."""
    app.extensions[_DELIVERIES] = Coalescer(_write_alone, keys=_keys, failed_for_all=messages.is_unanswered)
    app.extensions[_READS] = Coalescer(_read_all, keys=lambda user_id: (user_id,), failed_for_all=messages.is_unanswered)


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
        else:
            outcome = current_app.extensions[_DELIVERIES](event)
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
        is_new = bool(execute_alone(statements.fallback_statement(db.engine.dialect.name), created))
        user = _read(user_id)
        if is_new:
            _tell_of_first_call(user_id)
    elif not impersonated and user.last_seen <= before and user.deleted_at is None:
        # Of many calls at once the first moves it; the others read what it wrote.
        moved = execute_alone(statements.MOVE_LAST_SEEN, {"user_id": user_id, "now": now, "before": before})
        user = UserSnapshot(*moved[0]) if moved else _read(user_id)
    return _live(user)


def _read(user_id: str) -> UserSnapshot | None:
    found: list[UserSnapshot] = current_app.extensions[_READS](user_id)
    return found[0] if found else None


def _read_all(user_ids: Sequence[str]) -> list[list[UserSnapshot]]:
    """The row of each user, in a list that is empty where there is none."""
    rows = {"rows": _json([{"id": user_id} for user_id in user_ids])}
    found = {row[0]: UserSnapshot(*row) for row in execute_alone(statements.select_statement(db.engine.dialect.name), rows)}
    return [[found[user_id]] if user_id in found else [] for user_id in user_ids]


def set_presence(user_id: str, is_online: bool) -> UserSnapshot:
    """
    Set whether the user is online, for as long as ``last_seen`` stays fresh.

    Raises:
        Unauthenticated: ``user_deleted``.
    """
    rows = execute_alone(statements.SET_PRESENCE, {"user_id": user_id, "online": is_online})
    if not rows:
        raise Unauthenticated("user_deleted")
    return UserSnapshot(*rows[0])


class Seen(Protocol):
    """A row of ``users``, as far as presence goes."""

    @property
    def is_online(self) -> bool:
        """What the user said."""

    @property
    def last_seen(self) -> datetime:
        """When the user was last here."""


def is_present(user: Seen) -> bool:
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
    [outcome] = _write(lambda statement, parameters: db.session.execute(statement, parameters).all(), [event], now)
    if outcome is Outcome.DUPLICATE:
        db.session.rollback()
        return outcome
    _let_receivers_write(event, outcome)
    db.session.commit()
    return outcome


def _write_alone(events: Sequence[Event]) -> list[Outcome]:
    """Write *events* in a transaction of their own."""
    now = datetime.now(UTC)
    if db.engine.dialect.name == "postgresql":
        return _write(execute_alone, events, now)  # one statement is a transaction by itself
    with writers_turn(), autocommit() as connection:
        return _write(lambda statement, parameters: connection.execute(statement, parameters).all(), events, now)


def _write(execute: Execute, events: Sequence[Event], now: datetime) -> list[Outcome]:
    """
    Write users and messages, but of messages that were done before; gives the outcome of each.

    What a repetition writes all the same is what is there. No two of *events* may be of one message or of one user.
    """
    rows = [_row(event) for event in events]
    if db.engine.dialect.name == "postgresql":
        done = execute(statements.events_statement(), {"rows": _json(rows), "now": now})
    else:
        write_users, write_messages = statements.event_statements_in_turn()
        changed = {row[0] for row in execute(write_users, {"rows": _json(rows), "now": now})}
        became = [{"outcome": Outcome.APPLIED if row.get("id") in changed else Outcome.STALE} | row for row in rows]
        done = execute(write_messages, {"rows": _json(became), "now": now})
    outcomes = {message_id: Outcome(outcome) for message_id, outcome in done}
    return [outcomes.get(event.message_id, Outcome.DUPLICATE) for event in events]


def _row(event: Event) -> dict[str, Any]:
    """What the statements need of *event*."""
    # Without its zone: as SQLite keeps it, and for PostgreSQL, where the session's is UTC.
    occurred_at = event.occurred_at and event.occurred_at.replace(tzinfo=None).isoformat(" ", "microseconds")
    row = {"message_id": event.message_id, "event_type": event.type, "occurred_at": occurred_at}
    if not isinstance(event, UserEvent):
        handled = event_processing.has_receivers_for(event.type) or event_processed.has_receivers_for(event.type)
        return row | {"outcome": Outcome.APPLIED if handled else Outcome.IGNORED}
    if event.profile is None:
        return row | {"id": event.user_id, "is_deletion": True} | profile_columns(statements.DELETED_USER)
    return row | {"id": event.user_id, "is_deletion": False} | profile_columns(event.profile) | version_columns(event.version)


def _json(rows: Sequence[Mapping[str, Any]]) -> str:
    # Not escaped: a database of another encoding than UTF-8 knows no escapes for what is beyond ASCII.
    return json.dumps(rows, ensure_ascii=False)


def _keys(event: Event) -> Sequence[Hashable]:
    """What no two events that are written together may share."""
    return ("message", event.message_id), *((("user", event.user_id),) if isinstance(event, UserEvent) else ())


def _live(user: UserSnapshot | None) -> UserSnapshot:
    if user is None or user.deleted_at is not None:
        raise Unauthenticated("user_deleted")
    return user

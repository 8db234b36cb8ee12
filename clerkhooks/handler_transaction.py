"""The transaction that handlers share with a message, in the application's session."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import sqlalchemy as sa
from sqlalchemy import event as sa_event
from sqlalchemy.orm import Session, scoped_session

from clerkhooks.events import NOT_PLAIN, Event, Handler
from clerkhooks.store import Store
from clerkhooks.store.database import begin_immediate, is_autocommit
from clerkhooks.store.pool import Overloaded
from clerkhooks.store.postgresql import LOCK_TIMEOUT, STATEMENT_TIMEOUT

Call = tuple[Handler, Event]
Execute = Callable[[sa.Executable], Iterable[object]]
_ENDED = (
    "A handler ended the message's transaction. It must neither commit nor roll back: clerkhooks "
    "commits the message together with everything that handlers write. To catch a database error, "
    "wrap the statement in db.session.begin_nested()."
)
_EXCHANGE_LIMITS = sa.text(
    """
    SELECT lock_before, statement_before,
        set_config('lock_timeout', :lock, true), set_config('statement_timeout', :statement, true)
    FROM (SELECT current_setting('lock_timeout') AS lock_before,
        current_setting('statement_timeout') AS statement_before OFFSET 0) AS before
    """
)


def write_with_handlers(
    scoped: scoped_session[Session],
    store: Store,
    write: Callable[[sa.Connection], Sequence[Call] | None],
    is_saved: Callable[[Execute], bool],
    note_end: Callable[[Execute], object] = lambda _execute: None,
) -> None:
    """
    Execute *write*, make the calls that it returns, and commit, in one transaction.

    If *write* returns None, there is nothing to commit. *is_saved* returns whether the data of
    *write* is in the database. *note_end* is called after the last handler, if any.

    Raises:
        Overloaded: the application's pool provided no connection in time.
        RuntimeError: a handler ended the transaction, or the commit did not save the data.
        Exception: a handler or the database raised an error. Everything is rolled back.
    """
    session = scoped()
    try:
        connection = _begin(session, store)
        with _own_limits(connection):
            calls = write(connection)
        if calls is None:
            session.rollback()
            return
        for handler, event in calls:
            with _ending_refused(session, connection):
                call_handler(handler, event)
            # If a handler swallowed a database error, PostgreSQL silently rolls back on COMMIT. If
            # a handler rolled back, the commit succeeds but saves nothing. In both cases, the
            # response would be 200 and the message would be lost.
            execute = session.connection(bind_arguments={"clause": store.messages}).execute
            if scoped() is not session or not is_saved(execute):
                raise RuntimeError(_ENDED)
        if calls:
            note_end(execute)
        session.commit()
    except BaseException:
        scoped.rollback()
        raise
    # One of the application's listeners may have swallowed an error during the commit.
    if not is_saved(store.database.execute):
        raise RuntimeError("The message's transaction was rolled back during the commit.")


def call_handler(handler: Handler, event: Event) -> None:
    """
    Call *handler* with *event*.

    Raises:
        TypeError: *handler* returned a coroutine or a generator, which would never run.
    """
    result = handler(event)
    if inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
        raise TypeError(NOT_PLAIN)


def _begin(session: Session, store: Store) -> sa.Connection:
    """Return the session's connection in a transaction, even if the engine is in AUTOCOMMIT."""
    bind = {"clause": store.users}
    try:
        connection = session.connection(bind_arguments=bind)
        if not is_autocommit(connection):
            return connection
        session.commit()  # in AUTOCOMMIT, earlier statements are already committed
        is_postgresql = connection.dialect.name == "postgresql"
        level = "READ COMMITTED" if is_postgresql else "SERIALIZABLE"  # reset by the pool
        return session.connection(bind_arguments=bind, execution_options={"isolation_level": level})
    except sa.exc.TimeoutError as error:  # the application's pool is exhausted
        raise Overloaded from error


@contextmanager
def _ending_refused(session: Session, connection: sa.Connection) -> Iterator[None]:
    """Raise RuntimeError if a handler tries to end the message's transaction or the process."""
    attempts: list[object] = []
    transaction = session.get_transaction()

    def refuse(target: Session | sa.Connection) -> None:
        if target is connection or not session.in_nested_transaction():
            attempts.append(target)
            raise RuntimeError(_ENDED)

    sa_event.listen(session, "before_commit", refuse)
    sa_event.listen(connection, "commit", refuse)  # detects db.session.connection().commit()
    try:
        yield
    except SystemExit as error:  # converted, to record the failure and return 500
        raise RuntimeError("A handler raised SystemExit.") from error
    finally:
        sa_event.remove(session, "before_commit", refuse)
        sa_event.remove(connection, "commit", refuse)
    if attempts or session.get_transaction() is not transaction:
        raise RuntimeError(_ENDED)


@contextmanager
def _own_limits(connection: sa.Connection) -> Iterator[None]:
    """Set our timeouts in the application's transaction, and restore the previous ones."""
    if connection.dialect.name != "postgresql":
        begin_immediate(connection)
        yield
        return
    before = connection.execute(
        _EXCHANGE_LIMITS, {"lock": LOCK_TIMEOUT, "statement": STATEMENT_TIMEOUT}
    ).one()
    yield
    connection.execute(_EXCHANGE_LIMITS, {"lock": before[0], "statement": before[1]})

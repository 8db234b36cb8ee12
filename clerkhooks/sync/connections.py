"""The lock and the connections of a sync. The timeouts are longer than for requests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import sqlalchemy as sa
import stamina
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from clerkhooks.errors import ClerkhooksError, describe
from clerkhooks.store import Store
from clerkhooks.store.postgresql import allow_longer_statements

# The error codes for lock timeouts, deadlocks, serialization failures, and SQLite's write lock.
_BUSY = ("55P03", "40P01", "40001", "SQLITE_BUSY")
_LOCK = 7_233_190_213  # an arbitrary id of the lock, the same in all releases
_STATEMENT_TIMEOUT = 30.0  # seconds


class AlreadyRunning(ClerkhooksError):
    """Another sync is running on this database."""


@contextmanager
def sole_writer(store: Store) -> Iterator[sa.Connection]:
    """
    Yield a connection for the only sync that may write.

    Raises:
        AlreadyRunning: another sync is running.
    """
    hold_lock = _file_lock if store.database.dialect_name == "sqlite" else _advisory_lock
    with hold_lock(store) as lock, reader(store) as connection:
        connection.info["lock"] = lock
        yield connection


def check_lock(connection: sa.Connection) -> None:
    """Raise SQLAlchemyError if the session that holds the sync's lock has ended."""
    lock = connection.info.get("lock")
    if lock is not None:
        lock.exec_driver_sql("SELECT 1")


@contextmanager
def reader(store: Store) -> Iterator[sa.Connection]:
    """Yield a connection with longer timeouts than those used for requests."""
    with store.database.connect() as connection:
        try:
            if connection.dialect.name == "postgresql":
                allow_longer_statements(connection, _STATEMENT_TIMEOUT)
            yield connection
        finally:
            connection.invalidate()  # requests must not get the longer timeouts


def _is_busy(error: Exception) -> bool:
    return isinstance(error, OperationalError) and describe(error).endswith(_BUSY)


def is_locked(error: Exception) -> bool:
    """Return whether *error* is a lock timeout of PostgreSQL, such as for a row in use."""
    return isinstance(error, OperationalError) and describe(error).endswith("55P03")


# stamina logs errors before it retries. The logged messages contain no row data.
retry = stamina.RetryingCaller(attempts=6, wait_initial=0.05, wait_max=2.0).on(_is_busy)
"""Run a whole transaction, and repeat it after lock timeouts and deadlocks."""
retry_briefly = stamina.RetryingCaller(attempts=2, wait_initial=0.05, wait_max=0.1).on(_is_busy)
"""The same for a holder of a lease, which must renew it within seconds."""


@contextmanager
def _advisory_lock(store: Store) -> Iterator[sa.Connection]:
    """
    Hold a lock in an open transaction of a separate connection.

    Behind a pooler in transaction mode, a session-level lock would leak. The transaction reads and
    writes nothing, so it does not hold back vacuum.
    """
    with store.database.connect() as connection:
        connection.detach()  # otherwise a pool of size one would be exhausted
        connection.exec_driver_sql("BEGIN")
        connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
        try:
            if not connection.scalar(sa.select(sa.func.pg_try_advisory_xact_lock(_LOCK))):
                raise AlreadyRunning("already_running")
            yield connection
        finally:
            with suppress(SQLAlchemyError):  # the server releases the lock on disconnect
                connection.exec_driver_sql("ROLLBACK")


@contextmanager
def _file_lock(store: Store) -> Iterator[None]:
    """Hold a lock on a file beside the database. The kernel releases it on process exit."""
    import fcntl  # does not exist on Windows, where an application may be developed

    file = store.database.execute(sa.text("PRAGMA database_list"))[0].file
    with Path(f"{file}-sync").open("a") as locked:
        try:
            fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning("already_running") from None
        yield

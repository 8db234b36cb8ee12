"""The database connections of a run: one run at a time, with longer timeouts than a request."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import sqlalchemy as sa
import stamina
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from clerkhooks.errors import ClerkhooksError, describe
from clerkhooks.store import Store
from clerkhooks.store.postgresql import allow_longer_statements

T = TypeVar("T")
# A lock timeout, a deadlock, a serialization failure, or SQLite's write lock.
_BUSY = ("55P03", "40P01", "40001", "SQLITE_BUSY")
_LOCK = 7_233_190_213  # any number, the same in every release, and not that of migrations
_STATEMENT_TIMEOUT = 30.0  # seconds


class DatabaseBusy(SQLAlchemyError):
    """Other writers held locks for too long. Its text, which stamina logs, quotes no row."""


class AlreadyRunning(ClerkhooksError):
    """Another run is under way on this database."""


@contextmanager
def sole_writer(store: Store) -> Iterator[sa.Connection]:
    """
    Yield a connection for the only run that may write.

    Raises:
        AlreadyRunning: another run is under way.
    """
    if store.database.dialect_name == "sqlite":
        with reader(store) as connection, _file_lock(connection):
            yield connection
        return
    with _advisory_lock(store) as lock, reader(store) as connection:
        connection.info["lock"] = lock
        yield connection


def check_lock(connection: sa.Connection) -> None:
    """
    Check that the run of *connection* still holds its lock.

    Raises:
        SQLAlchemyError: the session that holds it has ended, for instance in a failover.
    """
    lock = connection.info.get("lock")
    if lock is not None:
        lock.exec_driver_sql("SELECT 1")


@contextmanager
def reader(store: Store) -> Iterator[sa.Connection]:
    """Yield a connection for a run that changes nothing."""
    with store.database.connect() as connection:
        try:
            if connection.dialect.name == "postgresql":
                allow_longer_statements(connection, _STATEMENT_TIMEOUT)
            yield connection
        finally:
            connection.invalidate()  # a request must not get the longer timeouts


def retry(write: Callable[[], T]) -> T:
    """Run *write*, a whole transaction, retrying on lock timeouts and deadlocks."""
    for attempt in stamina.retry_context(
        on=DatabaseBusy, attempts=6, wait_initial=0.05, wait_max=2.0
    ):
        with attempt:
            try:
                return write()
            except OperationalError as error:
                if describe(error).endswith(_BUSY):
                    raise DatabaseBusy(describe(error)) from error
                raise
    raise AssertionError("stamina raises the error of the last attempt")


@contextmanager
def _advisory_lock(store: Store) -> Iterator[sa.Connection]:
    """
    Hold a lock in an open transaction of a separate connection.

    A session's lock would stay behind in a pooler in transaction mode. The transaction reads and
    writes nothing, so it does not hold back vacuum.
    """
    with store.database.connect() as connection:
        connection.detach()  # the pool may have one place only
        connection.exec_driver_sql("BEGIN")
        connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
        try:
            if not connection.scalar(sa.select(sa.func.pg_try_advisory_xact_lock(_LOCK))):
                raise AlreadyRunning("already_running")
            yield connection
        finally:
            with suppress(SQLAlchemyError):  # the server would notice a closed connection later
                connection.exec_driver_sql("ROLLBACK")


@contextmanager
def _file_lock(connection: sa.Connection) -> Iterator[None]:
    file = connection.exec_driver_sql("PRAGMA database_list").all()[0][2]
    with Path(f"{file}-sync").open("a") as locked:
        try:
            fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning("already_running") from None
        yield

"""The private engine: separate connections, on which every statement commits by itself."""

from __future__ import annotations

import os
import random
import select
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any, cast

import psycopg
import sqlalchemy as sa
from psycopg.abc import RV, PQGen
from sqlalchemy import event

from clerkhooks.errors import Fault, SettingsError

LOCK_TIMEOUT, STATEMENT_TIMEOUT = "2s", "3s"
BUSY_TIMEOUT = 4.0  # seconds that a writer waits for SQLite's one write lock
POOL_TIMEOUT = 4.0  # seconds that a request waits for a connection
_LIBPQ = ("psycopg", "psycopg2", "psycopg2cffi")  # drivers whose connect arguments are libpq's
_NOT_LIBPQ = (
    "connection_factory",
    "cursor_factory",
    "async",
    "async_",
    "row_factory",
    "autocommit",
)
_MEMORY = Fault(
    "SQLALCHEMY_DATABASE_URI",
    "keeps SQLite in memory, where each connection would have a database of its own.",
    "Use a file, also in tests: sqlite:////tmp/test.db",
)


class TimeoutConnection(psycopg.Connection[Any]):
    """
    A connection that gives up on a server that does not answer at all.

    A frozen server does not enforce its own timeouts and keeps its sockets open, so TCP notices
    nothing.
    """

    answer_timeout: float | None = 3.5
    """Seconds: longer than STATEMENT_TIMEOUT, so that the server's own error arrives first."""

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        """Wait for an answer, but no longer than ``answer_timeout``."""
        try:
            return super().wait(gen, interval, timeout or self.answer_timeout)
        except psycopg.OperationalError:
            if self.info.transaction_status is psycopg.pq.TransactionStatus.ACTIVE:
                # A late answer must not be read as the answer to the next statement.
                self.close()
            raise


class Database:
    """
    An application's database, through a private engine.

    Every statement commits by itself (AUTOCOMMIT), whatever the application does with its own
    engine. Waits are bounded: 2 s for a lock, 3 s for a statement, about 4 s for a dead or frozen
    server, and 4 s for SQLite's write lock. A forked process gets a new pool.
    """

    def __init__(self, engine: sa.Engine, options: Mapping[str, Any], *, pool_size: int) -> None:
        """
        Derive the private engine from the application's *engine* and its engine *options*.

        Raises:
            SettingsError: the database is SQLite in memory.
        """
        self.dialect_name = engine.dialect.name
        pool = {"pool_size": pool_size, "max_overflow": 0, "pool_timeout": POOL_TIMEOUT}
        echo: Any = engine.echo
        if self.dialect_name == "sqlite":
            _refuse_memory(engine.url)
            arguments = {"timeout": BUSY_TIMEOUT, "check_same_thread": False}
            self.engine = self._create(engine.url, connect_args=arguments, echo=echo, **pool)
            event.listen(self.engine, "connect", _set_up_sqlite)
        elif "creator" in options:  # such as a cloud provider's connector, whose driver is its own
            creator = options["creator"]
            self.engine = self._create(engine.url, creator=creator, echo=echo, **pool)
            event.listen(self.engine, "connect", _set_up_postgresql)
        else:
            url = engine.url.set(drivername="postgresql+psycopg")
            arguments = _postgresql_arguments(engine, options)
            self.engine = self._create(
                url, connect_args=arguments, echo=echo, pool_use_lifo=True, **pool
            )
            event.listen(self.engine, "do_connect", _connect_to_postgresql)
            event.listen(self.engine, "connect", _set_up_postgresql)
            event.listen(self.engine, "checkout", _replace_closed)
        self._pid = os.getpid()

    @staticmethod
    def _create(url: sa.URL, **options: Any) -> sa.Engine:
        return sa.create_engine(
            url,
            isolation_level="AUTOCOMMIT",
            skip_autocommit_rollback=True,
            hide_parameters=True,
            **options,
        )

    @property
    def dialect(self) -> sa.Dialect:
        """The dialect of the private engine."""
        return self.engine.dialect

    def connect(self) -> sa.Connection:
        """Return a connection; leaving its ``with`` block gives it back to the pool."""
        if self._pid != os.getpid():
            # Two processes on one socket would read each other's answers.
            self.engine.dispose(close=False)
            self._pid = os.getpid()
        return self.engine.connect()

    def execute(
        self, statement: sa.Executable, parameters: Mapping[str, Any] | None = None
    ) -> Sequence[sa.Row[Any]]:
        """Return the rows of one statement that only reads, or that writes on PostgreSQL."""
        with self.connect() as connection:
            return connection.execute(statement, parameters).all()

    def write(
        self, statement: sa.Executable, parameters: Mapping[str, Any] | None = None
    ) -> Sequence[sa.Row[Any]]:
        """Return the rows of one statement that writes."""
        with self.connect() as connection, transaction(connection):
            return connection.execute(statement, parameters).all()

    def dispose(self) -> None:
        """Close every idle connection."""
        self.engine.dispose()


@contextmanager
def transaction(connection: sa.Connection) -> Iterator[None]:
    """
    Run the block's statements in one transaction on SQLite.

    On PostgreSQL each of our statements is written to be a whole transaction by itself.
    """
    if connection.dialect.name != "sqlite":
        yield
        return
    begin_immediate(connection)
    try:
        yield
        connection.exec_driver_sql("COMMIT")
    except BaseException:
        try:
            connection.exec_driver_sql("ROLLBACK")
        except sa.exc.SQLAlchemyError:  # never return an open transaction to the pool
            connection.invalidate()
        raise


def is_autocommit(connection: sa.Connection) -> bool:
    """Return whether statements of *connection* commit by themselves. Sends nothing."""
    driver = connection.connection.driver_connection
    if connection.dialect.name == "sqlite" and getattr(driver, "isolation_level", "") is None:
        return True
    return getattr(driver, "autocommit", False) is True


def begin_immediate(connection: sa.Connection, timeout: float = BUSY_TIMEOUT) -> None:
    """
    Begin a transaction on SQLite and take the write lock at once.

    SQLite's busy handler backs off and is unfair: under contention some writers starve. It also
    blocks every greenlet of the process, even the one that holds the lock. So the lock is polled
    here.

    Raises:
        OperationalError: another writer kept the lock for *timeout* seconds.
    """
    driver = cast("sqlite3.Connection", connection.connection.driver_connection)
    if driver.in_transaction:
        return
    [(own_timeout,)] = driver.execute("PRAGMA busy_timeout").fetchall()
    deadline = monotonic() + timeout
    driver.execute("PRAGMA busy_timeout = 0")
    try:
        while True:
            try:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                return
            except sa.exc.OperationalError as error:
                is_busy = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY
                if not is_busy or monotonic() > deadline:
                    raise
            sleep(random.uniform(0.0002, 0.001))  # noqa: S311  # not for cryptography
    finally:
        driver.execute(f"PRAGMA busy_timeout = {own_timeout:d}")


def _refuse_memory(url: sa.URL) -> None:
    name = url.database or ":memory:"
    if url.query.get("mode") == "memory" or ":memory:" in name or "mode=memory" in name:
        raise SettingsError([_MEMORY])


def _set_up_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # FULL: a commit that was answered 200 must survive a power failure. In WAL mode, NORMAL does
    # not sync each commit.
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _postgresql_arguments(engine: sa.Engine, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the application's connect arguments, such as certificates, and our limits."""
    limits: dict[str, Any] = {"connect_timeout": "2", "tcp_user_timeout": "4000"}
    # With UTF-8, the server rather than the driver rejects text that its encoding cannot represent.
    arguments = limits | {"client_encoding": "utf8"}
    if engine.dialect.driver in _LIBPQ:
        given = options.get("connect_args", {})
        arguments |= {name: given[name] for name in given if name not in _NOT_LIBPQ}
    return {name: value for name, value in arguments.items() if name not in engine.url.query}


def _connect_to_postgresql(
    _dialect: object, _record: object, arguments: list[Any], parameters: dict[str, Any]
) -> TimeoutConnection:
    return TimeoutConnection.connect(*arguments, autocommit=True, **parameters)


def _set_up_postgresql(connection: Any, _record: object) -> None:
    # After connecting, since poolers refuse limits among the startup parameters.
    connection.cursor().execute(
        "SELECT set_config(name, value, false) FROM (VALUES"
        f" ('lock_timeout', '{LOCK_TIMEOUT}'), ('statement_timeout', '{STATEMENT_TIMEOUT}'),"
        " ('idle_in_transaction_session_timeout', '15s'), ('timezone', 'UTC'))"
        " AS limits (name, value)"
    )


def _replace_closed(connection: TimeoutConnection, _record: object, _proxy: object) -> None:
    """Have the pool replace a connection that the server has closed, as in a restart."""
    # An idle connection with readable data has been closed by the server. This costs no round trip.
    poll = select.poll()  # select() cannot look at descriptors above 1,024
    poll.register(connection.pgconn.socket, select.POLLIN)
    if poll.poll(0):
        raise sa.exc.DisconnectionError

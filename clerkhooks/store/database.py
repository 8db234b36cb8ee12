"""The private engine: separate connections in AUTOCOMMIT mode."""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from time import monotonic, sleep
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy import event

from clerkhooks.errors import Fault, SettingsError
from clerkhooks.store import postgresql
from clerkhooks.store.pool import OrderedPool
from clerkhooks.store.postgresql import Pooler

BUSY_TIMEOUT = 4.0  # the maximum time in seconds that a writer waits for SQLite's write lock
POOL_TIMEOUT = 2.0  # the maximum time in seconds that a request waits for a connection
_MEMORY = Fault(
    "SQLALCHEMY_DATABASE_URI",
    "is an in-memory SQLite database, which is separate for each connection.",
    "Use a file, also in tests: sqlite:////tmp/test.db",
)


class Database:
    """
    Access to an application's database through a private engine.

    Every statement is committed separately (AUTOCOMMIT), independently of the application's engine.
    Every wait has a timeout: 2 s for a lock, 3 s for a statement, about 4 s for a dead or frozen
    server, and 4 s for SQLite's write lock. A forked process gets a new pool.
    """

    def __init__(
        self,
        engine: sa.Engine,
        options: Mapping[str, Any],
        *,
        pool_size: int,
        pooler: Pooler | None = None,
    ) -> None:
        """
        Derive the private engine from the application's *engine* and its engine *options*.

        *pooler* is the mode of the connection pooler in front of PostgreSQL, if any.

        Raises:
            SettingsError: the database is an in-memory SQLite database.
        """
        self.dialect_name, self.pool_size, self._pid = engine.dialect.name, pool_size, os.getpid()
        create = partial(
            sa.create_engine,
            poolclass=OrderedPool,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=POOL_TIMEOUT,
            isolation_level="AUTOCOMMIT",
            skip_autocommit_rollback=True,
            hide_parameters=True,
            echo=engine.echo,
        )
        if self.dialect_name == "sqlite":
            _refuse_memory(engine.url)
            arguments = {"timeout": BUSY_TIMEOUT, "check_same_thread": False}
            self.engine = create(engine.url, connect_args=arguments)
            event.listen(self.engine, "connect", _set_up_sqlite)
        elif "creator" in options:  # such as a cloud provider's connector, which chooses the driver
            self.engine = create(engine.url, creator=options["creator"])
            postgresql.listen(self.engine)
        else:
            url = engine.url.set(drivername="postgresql+psycopg")
            arguments = postgresql.connect_arguments(engine, options, pooler)
            self.engine = create(url, connect_args=arguments, pool_use_lifo=True)
            postgresql.listen_with_psycopg(self.engine, pooler)
        self.dialect = self.engine.dialect

    def connect(self) -> sa.Connection:
        """Return a connection. Use it in a ``with`` block, which returns it to the pool."""
        if self._pid != os.getpid():
            # Processes that share a socket would read each other's responses.
            self.engine.dispose(close=False)
            self._pid = os.getpid()
        return self.engine.connect()

    def execute(
        self, statement: sa.Executable, parameters: Mapping[str, Any] | None = None
    ) -> Sequence[sa.Row[Any]]:
        """Execute a statement and return its rows. On SQLite, the statement must be read-only."""
        with self.connect() as connection:
            return connection.execute(statement, parameters).all()

    def write(
        self, statement: sa.Executable, parameters: Mapping[str, Any] | None = None
    ) -> Sequence[sa.Row[Any]]:
        """Execute a statement that writes, and return the rows from its RETURNING clause."""
        with self.connect() as connection, sqlite_transaction(connection):
            return connection.execute(statement, parameters).all()


def merge_engine_options(
    db: object, config: Mapping[str, Any], bind_key: str | None
) -> dict[str, Any]:
    """Return the application's engine options, merged as Flask-SQLAlchemy merges them."""
    options = dict(getattr(db, "_engine_options", None) or {})  # from SQLAlchemy(engine_options=…)
    bind = (config.get("SQLALCHEMY_BINDS") or {}).get(bind_key)
    if isinstance(bind, dict):
        options |= bind
    if bind_key is None:
        options |= config.get("SQLALCHEMY_ENGINE_OPTIONS") or {}
    return options


def sqlite_transaction(connection: sa.Connection) -> AbstractContextManager[None]:
    """
    Run the block's statements in one transaction on SQLite.

    On PostgreSQL, do nothing, because each statement is a complete transaction.
    """
    return nullcontext() if connection.dialect.name == "postgresql" else transaction(connection)


@contextmanager
def transaction(connection: sa.Connection) -> Iterator[None]:
    """Run the block's statements in one transaction, although *connection* is in AUTOCOMMIT."""
    if connection.dialect.name == "postgresql":
        # At a higher level, a statement would not see what is committed while it waits for a lock.
        connection.exec_driver_sql("BEGIN ISOLATION LEVEL READ COMMITTED")
    else:
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
    """Return whether *connection* is in autocommit mode. No round trip is needed."""
    driver = connection.connection.driver_connection
    if connection.dialect.name == "sqlite" and getattr(driver, "isolation_level", "") is None:
        return True
    return getattr(driver, "autocommit", False) is True


def begin_immediate(connection: sa.Connection, timeout: float = BUSY_TIMEOUT) -> None:
    """
    Begin a transaction on SQLite and take the write lock immediately.

    SQLite's busy handler backs off and is unfair: under contention, some writers starve. It also
    blocks every greenlet of the process, even the one that holds the lock. Therefore, this function
    polls the lock.

    Raises:
        OperationalError: the lock was not available within *timeout* seconds.
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
    # FULL is needed, because a message must survive a power failure after the endpoint has returned
    # 200. In WAL mode, NORMAL does not sync each commit.
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")

"""The two tables, and the database behind them."""

from __future__ import annotations

import fcntl
import select
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache, cached_property
from pathlib import Path
from time import monotonic, sleep
from typing import IO, TYPE_CHECKING, Any, cast

import psycopg
import sqlalchemy as sa
from flask import Flask
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from psycopg.abc import RV, PQGen
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import psycopg as psycopg_dialect
from sqlalchemy.engine import make_url
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from clerkhooks.clerk.events import Version
from clerkhooks.settings import PROJECT

VERSION_COLUMNS = ("version_updated_at", "version_timestamp", "version_message_id")
THREADS = 8  # of a worker: as many requests at once, each with one connection at most


class Base(DeclarativeBase):
    """Names every constraint, so that migrations can drop what they made on either database."""

    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


db = SQLAlchemy(model_class=Base)
if TYPE_CHECKING:
    Model = Base
else:
    Model = db.Model


class UTCDateTime(sa.types.TypeDecorator[datetime]):
    """A point in time: aware and in UTC on every database, also on SQLite, which knows no time zones."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Refuse a naive time: whose noon it is cannot be known."""
        if value is not None and value.tzinfo is None:
            raise ValueError("a time without a time zone cannot be stored")
        return value and value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Give the time zone back that SQLite drops."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# Where order decides, it is the order of bytes: a linguistic collation would rank ids differently on each server.
Bytewise = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


Insert = postgresql.Insert | sqlite.Insert


def insert_into(table: sa.Table, dialect: str) -> Insert:
    """An INSERT that knows ON CONFLICT, which both databases do, each in its own class."""
    return postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)


class Versioned:
    """
    The columns that make a table of Clerk's objects end the same in every order of events.

    A row is unfilled while they are empty. An application guards its own upserts as ``users`` does::

        insert = insert_into(Team.__table__, db.engine.dialect.name)
        insert = insert.values(id=..., name=..., **version_columns(event.version))
        insert.on_conflict_do_update(index_elements=["id"], set_=..., where=Team.is_older_than(insert.excluded))
    """

    version_updated_at: Mapped[int | None] = mapped_column(sa.BigInteger)
    version_timestamp: Mapped[int | None] = mapped_column(sa.BigInteger)
    version_message_id: Mapped[str | None] = mapped_column(Bytewise)

    @classmethod
    def is_older_than(cls, excluded: Any) -> sa.ColumnElement[bool]:
        """SQL: whether the stored row is unfilled, or of an older version than the one to be inserted."""
        own = sa.tuple_(*(getattr(cls, name) for name in VERSION_COLUMNS))
        new = sa.tuple_(*(excluded[name] for name in VERSION_COLUMNS))
        return sa.or_(cls.version_updated_at.is_(None), own < new)


def version_columns(version: Version | None) -> dict[str, Any]:
    """The values of the version columns for *version*; all empty for a row that no event has filled."""
    return dict(zip(VERSION_COLUMNS, version or (None, None, None), strict=True))


class Outcome(StrEnum):
    """What became of a message. Duplicate is an answer only; it is never stored."""

    APPLIED = "applied"
    STALE = "stale"
    IGNORED = "ignored"
    FAILED = "failed"
    DUPLICATE = "duplicate"


_UNFILLED = sa.text("version_updated_at IS NULL AND deleted_at IS NULL")
_DELETED = sa.text("deleted_at IS NOT NULL")
NAME_SEARCHES = {
    "postgresql": ('lower(name) COLLATE "C"', "lower(substr(name, strpos(name, ' ') + 1)) COLLATE \"C\""),
    "sqlite": ("lower(name)", "lower(substr(name, instr(name, ' ') + 1))"),
}
"""SQL: what a search by name compares, the whole one and what follows the first name. On PostgreSQL migrations make indexes of both."""


class User(Versioned, Model):
    """
    A Clerk user, matched by Clerk's id alone.

    Everything but the times and the presence is a function of what Clerk sent, or answered to a sync.
    The version columns are empty while nothing has filled the row, and again once ``user.deleted`` has come.
    A tombstone that has a version was left by a sync that did not find the user; what Clerk says later revives it.
    """

    __tablename__ = "users"
    __table_args__ = (
        sa.Index(None, "created_at", "id"),
        sa.Index("ix_users_unfilled", "created_at", postgresql_where=_UNFILLED, sqlite_where=_UNFILLED),
        sa.Index("ix_users_deleted", "created_at", "id", postgresql_where=_DELETED, sqlite_where=_DELETED),
    )

    id: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    email: Mapped[str | None] = mapped_column(sa.Text, index=True)
    name: Mapped[str] = mapped_column(sa.Text)
    image_url: Mapped[str | None] = mapped_column(sa.Text)
    is_online: Mapped[bool] = mapped_column(sa.Boolean)
    last_seen: Mapped[datetime] = mapped_column(UTCDateTime)
    created_at: Mapped[datetime] = mapped_column(UTCDateTime)
    updated_at: Mapped[datetime] = mapped_column(UTCDateTime)
    deleted_at: Mapped[datetime | None] = mapped_column(UTCDateTime)


_FAILED = sa.text("outcome = 'failed'")


class WebhookMessage(Model):
    """A message that Clerk sent: what it was about and what became of it; nothing of what it said."""

    __tablename__ = "webhook_messages"
    __table_args__ = (
        sa.Index(None, "received_at"),
        sa.Index(None, "clerk_user_id", "received_at"),
        sa.Index("ix_webhook_messages_failed", "received_at", postgresql_where=_FAILED, sqlite_where=_FAILED),
    )

    message_id: Mapped[str] = mapped_column(Bytewise, primary_key=True)
    event_type: Mapped[str] = mapped_column(sa.Text)
    clerk_user_id: Mapped[str | None] = mapped_column(sa.Text)
    outcome: Mapped[str] = mapped_column(sa.Text)
    attempts: Mapped[int] = mapped_column(sa.Integer)
    occurred_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    received_at: Mapped[datetime] = mapped_column(UTCDateTime)
    processed_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    error: Mapped[str | None] = mapped_column(sa.Text)


def init_database(app: Flask, database_url: str) -> None:
    """Bind ``db`` to *app* and *database_url*, with the project's migrations, and prepare every connection that it will open."""
    app.config.update(SQLALCHEMY_DATABASE_URI=database_url, SQLALCHEMY_ENGINE_OPTIONS=_engine_options(database_url))
    db.init_app(app)
    Migrate(app, db, directory=str(PROJECT / "migrations"), render_as_batch=True, include_name=_is_compared)
    with app.app_context():
        if db.engine.dialect.name == "sqlite":
            event.listen(db.engine, "connect", _prepare_sqlite)
        else:
            event.listen(db.engine, "do_connect", _connect_to_postgresql)
            event.listen(db.engine, "checkout", _refuse_closed)
            event.listen(db.engine, "begin", _begin_on_postgresql)


def _is_compared(name: str | None, kind: str, _parents: object) -> bool:
    """Whether autogenerate looks at something: indexes of expressions, which it cannot compare, are the migrations' own."""
    return kind != "index" or name not in ("ix_users_name", "ix_users_last_name")


def discard_connections(app: Flask) -> None:
    """Forget connections inherited over a fork, without closing the parent's sockets."""
    with app.app_context():
        for engine in db.engines.values():
            engine.dispose(close=False)


@contextmanager
def autocommit() -> Iterator[sa.Connection]:
    """
    A connection of its own, apart from the request's session; what is done on it is committed when the block ends.

    On PostgreSQL each statement is committed at once, which spares the round trips of a transaction.
    """
    with db.engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            yield connection.execution_options(autocommit=True)
        else:
            yield connection
            connection.commit()


@contextmanager
def writers_turn() -> Iterator[None]:
    """
    Wait, on SQLite, until no other process has its turn to write.

    SQLite itself lets whoever finds the lock taken look again after ever longer pauses, so that of many some starve.
    A process that dies gives up its turn. Who gets none in time goes on without, and SQLite's lock decides alone.
    """
    with ExitStack() as stack:
        if db.engine.dialect.name == "sqlite":
            with suppress(OSError):
                _take_turn(stack.enter_context(Path(f"{db.engine.url.database}-turn".removeprefix("file:")).open("w")))
        yield


def _take_turn(file: IO[str]) -> None:
    deadline = monotonic() + 0.5  # seconds, many times what a turn takes
    while monotonic() < deadline:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            sleep(0.0005)


def execute_alone(statement: sa.Executable, parameters: Mapping[str, Any]) -> Sequence[Any]:
    """
    The rows of one statement that is a transaction by itself.

    It is compiled once, and on PostgreSQL handed to the driver as it is: what SQLAlchemy does about each execution
    takes twice as long as the database. Parameters and row must need no conversion there.
    """
    engine = db.engine
    if engine.dialect.name == "sqlite":
        with autocommit() as connection:
            return connection.execute(statement, parameters).all()
    text, constants = compile_for_psycopg(statement)
    pooled = None
    try:
        pooled = engine.raw_connection()
        return cast("PatientConnection", pooled.driver_connection).ask(text, {**constants, **parameters})
    except psycopg.Error as error:
        if pooled is not None and cast("PatientConnection", pooled.driver_connection).closed:
            pooled.invalidate(error)
        raise sa.exc.DBAPIError.instance(None, None, error, psycopg.Error, hide_parameters=True, dialect=engine.dialect) from error
    finally:
        if pooled is not None:
            pooled.close()


@cache
def compile_for_psycopg(statement: sa.Executable) -> tuple[bytes, dict[str, Any]]:
    """The text for psycopg, and the parameters that are constants of the statement."""
    compiled = cast("sa.ClauseElement", statement).compile(dialect=psycopg_dialect.dialect())  # type: ignore[no-untyped-call]
    return str(compiled).encode(), {name: value for name, value in compiled.params.items() if value is not None}


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # FULL: a commit that was answered for must survive a power cut, and WAL alone would not wait for the disk.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


class PatientConnection(psycopg.Connection[Any]):
    """
    A connection that gives up on a server that says nothing at all.

    A frozen one enforces none of its own timeouts and keeps its sockets open, in which TCP sees nothing wrong.
    """

    patience: float | None = 3.5  # seconds: longer than statement_timeout, so that the server's own answer comes first

    @cached_property
    def _cursor(self) -> psycopg.Cursor[Any]:
        return self.cursor()

    def ask(self, text: bytes, parameters: Mapping[str, Any]) -> list[Any]:
        """The rows of a statement, by a cursor that is kept: to make one takes a third of the time."""
        return self._cursor.execute(text, parameters).fetchall()

    def commit(self) -> None:
        """End the transaction, if there is one."""
        if not self._is_idle():
            super().commit()

    def rollback(self) -> None:
        """Undo the transaction, if there is one. The pool asks for it each time, and psycopg takes its time to find none."""
        if not self._is_idle():
            super().rollback()

    def _is_idle(self) -> bool:
        return self.pgconn.transaction_status == psycopg.pq.TransactionStatus.IDLE

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        """Wait for an answer, but no longer than this connection's patience."""
        try:
            return super().wait(gen, interval, timeout or self.patience)
        except psycopg.OperationalError:
            if self.info.transaction_status is psycopg.pq.TransactionStatus.ACTIVE:
                self.close()  # the answer may still come, and must not be taken for that of the next statement
            raise


def _connect_to_postgresql(_dialect: object, _record: object, arguments: list[Any], parameters: dict[str, Any]) -> PatientConnection:
    # Transactions are begun below, where they are wanted: to switch from one mode to the other takes longer than a query.
    return PatientConnection.connect(*arguments, autocommit=True, **parameters)


def _begin_on_postgresql(connection: sa.Connection) -> None:
    if not connection.get_execution_options().get("autocommit"):
        connection.exec_driver_sql("BEGIN")


def _refuse_closed(connection: PatientConnection, _record: object, _proxy: object) -> None:
    """Let the pool replace a connection that the server has closed, as in a restart; that needs no round trip to be seen."""
    # Nobody speaks on an idle connection, unless to say that it is over.
    poll = select.poll()  # select() looks at no more than 1,024 descriptors
    poll.register(connection.pgconn.socket, select.POLLIN)
    if poll.poll(0):
        raise sa.exc.DisconnectionError


_LIMITS = "-c lock_timeout=2s -c statement_timeout=3s -c idle_in_transaction_session_timeout=15s -c client_encoding=UTF8"


def _engine_options(database_url: str) -> dict[str, Any]:
    """
    How to reach *database_url* so that a request, and the record of its failure, are over within 10 s.

    SQLite: a transaction takes the write lock with its first write, not at its first read, so that readers
    never wait and no reader is refused when it turns into a writer; each read sees the newest commit,
    as on PostgreSQL. PostgreSQL: UTC, and waiting for a lock, a statement or a dead peer is bounded; where the database has
    another encoding than UTF-8, a text that does not fit is the server's refusal, and no error of the driver's own.
    """
    pool = {"pool_size": THREADS, "max_overflow": 2, "pool_timeout": 4}
    url = make_url(database_url)
    if url.get_backend_name() == "sqlite":
        return pool | {"connect_args": {"isolation_level": "IMMEDIATE", "timeout": 4}}
    # What the URL asks for comes later and wins, one setting at a time; but times are always given in UTC.
    own = url.query.get("options", ())
    options = " ".join([_LIMITS, *([own] if isinstance(own, str) else own), "-c timezone=UTC"])
    limits = {"connect_timeout": "2", "tcp_user_timeout": "4000"}
    chosen = {key: value for key, value in limits.items() if key not in url.query} | {"options": options}
    return pool | {"connect_args": chosen}

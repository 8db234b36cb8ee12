"""Statements that psycopg executes directly behave as if SQLAlchemy executed them."""

from __future__ import annotations

import enum
import logging
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, timedelta
from datetime import time as clock
from decimal import Decimal
from ipaddress import IPv4Address
from typing import Any

import pytest
import sqlalchemy as sa
from psycopg.types.range import Range
from sqlalchemy.dialects import postgresql

from clerkhooks.errors import describe
from clerkhooks.settings import PROJECT
from clerkhooks.store.database import Database
from clerkhooks.store.direct import DirectStatement
from clerkhooks.store.messages import is_unanswered
from clerkhooks.store.models import UTCDateTime
from clerkhooks.store.postgresql import TimeoutConnection
from tests.conftest import MakeDatabase


class Plan(enum.Enum):
    """A plan that an application sells."""

    FREE = "free"
    PRO = "pro"


class Reversed(sa.types.TypeDecorator[str]):
    """A custom type that converts results."""

    impl = sa.Text
    cache_ok = True

    def process_result_value(self, value: Any, _dialect: sa.Dialect) -> Any:
        """Reverse the text."""
        return None if value is None else value[::-1]


NOW = datetime(2026, 11, 26, 12, 0, 0, 5, UTC)
VALUES: list[tuple[sa.types.TypeEngine[Any], Any]] = [
    (sa.Text(), "Ada"),
    (Reversed(), "Ada"),
    (sa.JSON(), {"a": [1, None]}),
    (postgresql.JSONB(), ["a", {"b": 1.5}]),
    (sa.Enum("free", "pro", name="names"), "pro"),
    (sa.Enum(Plan, name="members"), Plan.PRO),
    (sa.Boolean(), True),
    (sa.SmallInteger(), 7),
    (sa.BigInteger(), 2**40),
    (sa.Float(), 1.5),
    (sa.Float(asdecimal=True), 1.5),
    (sa.REAL(), 0.1),
    (sa.Numeric(6, 2), Decimal("12.30")),
    (sa.Numeric(), Decimal("1e-30")),
    (sa.Numeric(6, 2, asdecimal=False), 12.3),
    (sa.DateTime(timezone=True), NOW),
    (sa.DateTime(), NOW.replace(tzinfo=None)),
    (UTCDateTime(), NOW),
    (sa.Date(), date(2026, 11, 26)),
    (sa.Time(), clock(1, 2, 3)),
    (sa.Interval(), timedelta(days=1, seconds=2)),
    (sa.Uuid(), uuid.UUID(int=7)),
    (sa.Uuid(as_uuid=False), str(uuid.UUID(int=7))),
    (sa.LargeBinary(), b"\0a"),
    (sa.PickleType(), {"a": 1}),
    (postgresql.ARRAY(sa.Integer()), [1, 2]),
    (postgresql.ARRAY(sa.Numeric(asdecimal=False)), [1.5]),
    (postgresql.ARRAY(sa.Enum(Plan, name="members")), [Plan.FREE]),
    (postgresql.INET(), IPv4Address("127.0.0.1")),
    (postgresql.INT4RANGE(), Range(1, 5)),
]


@pytest.fixture
def url(emptied_database: MakeDatabase) -> str:
    """Return the URL of an empty PostgreSQL database."""
    return emptied_database("postgresql")


@pytest.fixture
def database(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """Connect to the database; check that all connections are returned to the pool."""
    # Another test may have listened to all engines, and SQLAlchemy would never reset this.
    monkeypatch.setattr(sa.Engine, "_has_events", False)
    stock = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    found = Database(stock, {}, pool_size=2)
    yield found
    assert found.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    found.engine.dispose()


def run(
    database: Database, text: str, parameters: Mapping[str, Any] | None = None, *, direct: bool
) -> Any:
    """Execute *text*, either directly or with SQLAlchemy."""
    statement = DirectStatement(sa.text(text), database.dialect)
    with database.connect() as connection:
        if direct:
            return statement.execute(connection, parameters or {})
        return connection.execute(statement.statement, parameters or {}).all()


def test_returns_the_same_values(database: Database) -> None:
    """
    Columns of all types have the same values, also NULL.

    The same applies to a column whose type in the database differs from its declaration.
    """
    columns = [sa.Column(f"c{index}", type_) for index, (type_, _) in enumerate(VALUES)]
    table = sa.Table("samples", sa.MetaData(), *columns, sa.Column("different", sa.Numeric()))
    row = {f"c{index}": value for index, (_, value) in enumerate(VALUES)} | {"different": 0.5}
    text = sa.text(f"SELECT {', '.join(table.c.keys())} FROM samples").columns(*table.c)
    statement = DirectStatement(text, database.dialect)
    with database.connect() as connection:
        table.metadata.create_all(connection)
        connection.exec_driver_sql("ALTER TABLE samples ALTER different TYPE double precision")
        for each in (row, dict.fromkeys(row)):
            connection.execute(table.insert(), each)
        found = [statement.execute(connection, {}) for _ in range(2)]
        expected = [list(each) for each in connection.execute(text)]
    assert not any(isinstance(each, sa.Row) for each in found[0])
    # repr() also compares the types of nested values.
    assert [repr(list(map(list, rows))) for rows in found] == [repr(expected)] * 2


FAIL = """
CREATE FUNCTION fail(code text, value text) RETURNS text LANGUAGE plpgsql
AS $$ BEGIN RAISE 'failed' USING ERRCODE = code; END $$
"""


def pids(database: Database) -> set[int]:
    """Return the ids of the server processes behind two pooled connections."""
    with database.connect() as first, database.connect() as second:
        query = "SELECT pg_backend_pid()"
        return {each.exec_driver_sql(query).scalar_one() for each in (first, second)}


@pytest.mark.parametrize("code", ["22012", "23505", "55P03", "40P01", "57014", "25006"])
def test_raises_the_same_errors(database: Database, code: str) -> None:
    """
    Errors have the same type and text, and hide the parameters.

    Only 25006, the error of a demoted server, makes the pool replace all connections.
    """
    with database.connect() as connection:
        connection.exec_driver_sql(FAIL)
    parameters = {"code": code, "value": "ada@example.org"}
    errors: list[dict[str, Any]] = []
    for direct in (True, False):
        before = pids(database)
        with pytest.raises(sa.exc.DBAPIError) as raised:
            run(database, "SELECT fail(:code, :value)", parameters, direct=direct)
        assert len(before - pids(database)) == (2 if code == "25006" else 0)
        names = ("statement", "params", "hide_parameters", "connection_invalidated")
        errors.append({name: getattr(raised.value, name) for name in names})
        errors[-1] |= {"text": str(raised.value), "described": describe(raised.value)}
    assert errors[0] == errors[1]
    assert errors[0]["described"].endswith(code)
    assert "ada@example.org" not in errors[0]["text"]


@pytest.mark.parametrize("direct", [True, False])
def test_replaces_a_connection_that_is_closed_during_a_statement(
    database: Database, direct: bool
) -> None:
    """If the server closes the connection, the statement fails, and the next one succeeds."""
    with pytest.raises(sa.exc.OperationalError) as raised:
        run(database, "SELECT pg_terminate_backend(pg_backend_pid())", direct=direct)
    assert raised.value.connection_invalidated
    assert [tuple(row) for row in run(database, "SELECT 1", direct=direct)] == [(1,)]


@pytest.mark.parametrize("direct", [True, False])
def test_gives_up_on_a_silent_server(
    database: Database, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After ``answer_timeout``, the connection is closed, so no late response is read."""
    monkeypatch.setattr(TimeoutConnection, "answer_timeout", 0.2)
    with pytest.raises(sa.exc.OperationalError) as raised:
        run(database, "SELECT 'late' FROM pg_sleep(1)", direct=direct)
    assert is_unanswered(raised.value)
    assert raised.value.connection_invalidated
    assert [tuple(row) for row in run(database, "SELECT 1", direct=direct)] == [(1,)]


@pytest.mark.parametrize("direct", [True, False])
def test_fails_at_most_once_after_a_column_has_changed(database: Database, direct: bool) -> None:
    """
    After a migration changed a column's type, PostgreSQL rejects the prepared statement.

    The pool replaces all connections, also under a load that leaves none of them idle.
    """
    statement = DirectStatement(sa.text("SELECT c FROM changing"), database.dialect)

    def read() -> None:
        with database.connect() as first, database.connect() as second:
            for connection in (first, second) * 6:  # psycopg prepares it after 5 executions
                if direct:
                    statement.execute(connection, {})
                else:
                    connection.execute(statement.statement)

    with database.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE changing (c integer)")
    read()
    with database.connect() as connection:
        connection.exec_driver_sql("ALTER TABLE changing ALTER c TYPE bigint")
    with pytest.raises(sa.exc.NotSupportedError, match="cached plan"):
        read()
    read()


def test_raises_other_exceptions_unchanged(database: Database) -> None:
    """A value that psycopg cannot send raises psycopg's exception."""
    for direct in (True, False):
        with pytest.raises(UnicodeEncodeError):
            run(database, "SELECT CAST(:text AS text)", {"text": "\ud800"}, direct=direct)


INTERRUPTED = """
import gevent.monkey; gevent.monkey.patch_all()
import sys
import gevent
import sqlalchemy as sa
from clerkhooks.store.database import Database
from clerkhooks.store.direct import DirectStatement

url = sys.argv[1].replace("postgresql://", "postgresql+psycopg://")
database = Database(sa.create_engine(url), {}, pool_size=1)

def run(text):
    with database.connect() as connection:
        return DirectStatement(sa.text(text), database.dialect).execute(connection, {})

run("SELECT 1")
reader = gevent.spawn(run, "SELECT 'late' FROM pg_sleep(1)")
gevent.sleep(0.3)
reader.kill({"GreenletExit": gevent.GreenletExit, "Timeout": gevent.Timeout,
             "ValueError": ValueError}[sys.argv[2]])
print(run("SELECT 'next'"), database.engine.pool.checkedout())
"""


@pytest.mark.parametrize("exception", ["GreenletExit", "Timeout", "ValueError"])
def test_does_not_reuse_a_connection_after_an_interruption(url: str, exception: str) -> None:
    """If an exception is raised in a waiting greenlet, its connection is closed."""
    command = [sys.executable, "-c", INTERRUPTED, url, exception]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[('next',)] 0\n", done.stderr


def test_shows_statements_to_a_log(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """With ``echo`` or a log level, SQLAlchemy executes statements, and logs them."""
    run(database, "SELECT 'not shown'", direct=True)
    with caplog.at_level(logging.INFO, "sqlalchemy.engine"):
        assert isinstance(run(database, "SELECT 'shown'", direct=True)[0], sa.Row)
    assert "SELECT 'shown'" in caplog.text
    assert "not shown" not in caplog.text


@pytest.mark.parametrize("name", ["before_cursor_execute", "after_execute", "do_execute"])
@pytest.mark.parametrize("is_class", [True, False])
def test_shows_statements_to_listeners(database: Database, name: str, is_class: bool) -> None:
    """Listeners for one engine or for all get the statements, also if they are added later."""
    run(database, "SELECT 1", direct=True)
    target: Any = sa.Engine if is_class else database.engine
    seen: list[Any] = []

    def listener(*arguments: Any) -> None:
        seen.append(arguments)

    sa.event.listen(target, name, listener)
    try:
        run(database, "SELECT 1", direct=True)
    finally:
        sa.event.remove(target, name, listener)
    assert len(seen) == 1


def test_leaves_connections_of_the_application_to_sqlalchemy(url: str, database: Database) -> None:
    """On an engine of the application, the statement begins a transaction."""
    statement = DirectStatement(sa.text("SELECT 1"), database.dialect)
    stock = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with stock.connect() as connection:
        assert isinstance(statement.execute(connection, {})[0], sa.Row)
        assert connection.in_transaction()
    stock.dispose()

"""The private engine is independent of the application's engine and sessions."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.exc import DBAPIError

from clerkhooks import Event, SettingsError, create_app
from clerkhooks.clerk.fake import FakeClerk, clerk_id, event_body
from clerkhooks.errors import describe
from clerkhooks.store import database
from clerkhooks.store.database import Database, sqlite_transaction
from tests.application import Application, MakeApplication
from tests.conftest import MakeDatabase, MakeService
from tests.racing import TIMEOUT, eventually, on_statement
from tests.support import NOW_MS, Service, ThreadPool, user_event

pytest_plugins = ["tests.application"]
postgresql = pytest.mark.parametrize("empty_database", ["postgresql"], indirect=True)
sqlite = pytest.mark.parametrize("empty_database", ["sqlite"], indirect=True)
OPTIONS = (
    "options=-csearch_path%3Dpublic&options=-c%20lock_timeout%3D9s%20-c%20timezone%3DAsia/Tokyo"
)


def database_of(service: Service) -> Database:
    """Return the private engine of the service."""
    found: Database = service.app.extensions["clerkhooks"].store.database
    return found


def show(database: Database, *names: str) -> list[Any]:
    """Return the values of the PostgreSQL settings *names* in one session."""
    with database.connect() as connection:
        return [connection.exec_driver_sql(f"SHOW {name}").scalar() for name in names]


@pytest.mark.parametrize(
    ("options", "expected"),
    [("", ["2s", "3s", "UTC", '"$user", public']), (OPTIONS, ["2s", "3s", "UTC", "public"])],
)
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_combines_url_options_with_its_own_limits(
    make_database: MakeDatabase, make_service: MakeService, options: str, expected: list[str]
) -> None:
    """Options in DATABASE_URL apply, except for the timeouts and the time zone."""
    url = make_database("postgresql")
    service = make_service(DATABASE_URL=f"{url}{'&' if '?' in url else '?'}{options}")
    names = ("lock_timeout", "statement_timeout", "timezone", "search_path")
    assert show(database_of(service), *names) == expected


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_raises_sqlalchemy_errors(service: Service) -> None:
    """An error has SQLAlchemy's type and an SQLSTATE, and does not quote parameters."""
    database = database_of(service)
    statement = sa.text("SELECT 1 / CAST(:divisor AS integer), CAST(:email AS text)")
    with pytest.raises(DBAPIError) as raised:
        database.execute(statement, {"divisor": 0, "email": "ada@example.org"})
    assert describe(raised.value) == "DataError 22012"
    assert "ada@example.org" not in str(raised.value)
    assert [tuple(row) for row in database.execute(statement, {"divisor": 1, "email": ""})] == [
        (1, "")
    ]
    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_replaces_a_connection_that_the_server_has_closed(service: Service) -> None:
    """A connection that the server has closed is replaced before use, so no request fails."""
    user_id = clerk_id("user")
    pid = backend_pid(database_of(service))
    with psycopg.connect(service.database_url, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s)", [pid])
        alive = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s"
        eventually(lambda: other.execute(alive, [pid]).fetchone() == (0,))
    assert service.call(user_id).status_code == 200
    assert service.outcome(user_event(user_id)) == "applied"


def backend_pid(database: Database) -> int:
    """Return the id of the server process behind a pooled connection."""
    [(pid,)] = database.execute(sa.text("SELECT pg_backend_pid()"))
    return int(pid)


@pytest.mark.parametrize("handled", [False, True], ids=["no handler", "a handler"])
@pytest.mark.parametrize("level", ["SERIALIZABLE", "AUTOCOMMIT"])
def test_loses_nothing_to_isolation_levels_of_views(
    application: Application, level: str, handled: bool
) -> None:
    """Isolation levels that views set for their own session do not affect deliveries."""

    @application.app.get("/report")
    def report() -> str:
        options = {"isolation_level": level}
        connection = application.db.session.connection(execution_options=options)
        return str(connection.scalar(sa.text("SELECT count(*) FROM users")))

    if handled:
        application.hooks.on("user.*")(lambda _: None)
    for _ in range(20):
        user_id = clerk_id("user")
        assert application.http.get("/report").status_code == 200
        assert application.outcome(user_event(user_id)) == "applied"
        assert application.user(user_id, ["name"]) == ("Ada Lovelace",)
    log = "SELECT outcome, count(*) FROM webhook_messages GROUP BY outcome"
    assert application.rows(log) == [("applied", 20)]


@pytest.mark.parametrize("level", ["SERIALIZABLE", "AUTOCOMMIT"])
def test_loses_nothing_to_the_isolation_level_of_the_engine(
    make_application: MakeApplication, empty_database: str, level: str
) -> None:
    """The isolation level of the application's engine does not affect deliveries."""
    options = {"isolation_level": level}
    application = make_application(empty_database, SQLALCHEMY_ENGINE_OPTIONS=options)
    user_id = clerk_id("user")
    for number in range(20):
        body = user_event(user_id, at=NOW_MS + number, first_name=f"N{number}")
        assert application.outcome(body) == "applied"
        assert application.user(user_id, ["name"]) == (f"N{number} Lovelace",)
    assert application.call(user_id).status_code == 200


def test_commits_apart_from_the_applications_transaction(application: Application) -> None:
    """If the application's transaction rolls back, the row that authentication added is kept."""
    user_id = clerk_id("user")

    @application.app.before_request
    def write() -> None:
        # On SQLite, an open write transaction would block the private engine.
        if application.database_url.startswith("postgresql"):
            statement = "UPDATE users SET name = 'never committed'"
            application.db.session.execute(sa.text(statement))

    assert application.call(user_id).status_code == 200
    assert application.outcome(user_event(clerk_id("user"))) == "applied"
    assert application.user(user_id, ["name"]) == ("New User",)


@postgresql
def test_limits_its_own_statements_only(application: Application) -> None:
    """The 3 s statement timeout applies to the private engine, not to ``db.session``."""

    @application.app.get("/slow")
    def slow() -> str:
        application.db.session.execute(sa.text("SELECT pg_sleep(4)"))
        return "done"

    with ThreadPool(1) as pool:
        answer = pool.submit(application.app.test_client().get, "/slow")
        started = time.monotonic()
        with pytest.raises(DBAPIError) as raised:
            application.database.execute(sa.text("SELECT pg_sleep(20)"))
        assert describe(raised.value) == "OperationalError 57014"
        assert 2.5 < time.monotonic() - started < 5
        assert answer.result(TIMEOUT).text == "done"
    assert show(application.database, "lock_timeout", "statement_timeout") == ["2s", "3s"]


@postgresql
@pytest.mark.parametrize("handled", [False, True], ids=["no handler", "a handler"])
@pytest.mark.parametrize("where", ["database", "session", "engine"])
def test_stores_times_in_utc(
    make_application: MakeApplication, empty_database: str, where: str, handled: bool
) -> None:
    """Times are stored in UTC, even if the database or a session has another time zone."""
    options: dict[str, Any] = {}
    if where == "database":
        with psycopg.connect(empty_database, autocommit=True) as connection:
            name = connection.info.dbname
            connection.execute(f"ALTER DATABASE {name} SET timezone = 'Asia/Tokyo'".encode())
    elif where == "engine":
        options = {"connect_args": {"options": "-c timezone=Asia/Tokyo"}}
    application = make_application(empty_database, SQLALCHEMY_ENGINE_OPTIONS=options)
    seen: list[datetime] = []

    @application.app.before_request
    def set_zone() -> None:
        if where == "session":
            application.db.session.execute(sa.text("SET TIME ZONE 'America/St_Johns'"))

    if handled:

        @application.hooks.on("*")
        def look(event: Event) -> None:
            row = application.db.session.get_one(application.model, event.data["id"])
            seen.append(row.updated_at)

    user_id, before = clerk_id("user"), datetime.now(UTC)
    assert application.outcome(user_event(user_id, at=NOW_MS), "msg_1") == "applied"
    answer = application.call(user_id).get_json()
    after = datetime.now(UTC)
    assert before <= datetime.fromisoformat(answer["lastSeen"]).replace(microsecond=999999)
    assert datetime.fromisoformat(answer["lastSeen"]) <= after
    times = "extract(epoch FROM occurred_at), extract(epoch FROM received_at)"
    [(occurred, received)] = application.rows(f"SELECT {times} FROM webhook_messages")
    assert round(float(occurred) * 1000) == NOW_MS
    assert before.timestamp() <= float(received) <= after.timestamp()
    assert all(one.utcoffset() is not None and before <= one <= after for one in seen)
    assert len(seen) == handled


def test_shows_its_statements_to_listeners(application: Application) -> None:
    """A tracing tool can observe every statement through the engine's events."""
    seen: list[str] = []

    def listen(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        seen.append(statement)

    sa.event.listen(application.database.engine, "before_cursor_execute", listen)
    user_id = clerk_id("user")
    assert application.outcome(user_event(user_id)) == "applied"
    assert any("INSERT INTO users" in statement for statement in seen)
    assert any("INSERT INTO webhook_messages" in statement for statement in seen)
    seen.clear()
    assert application.call(user_id).status_code == 200
    assert any(statement.lstrip().startswith("SELECT") for statement in seen)


MEMORY = [
    "sqlite://",
    "sqlite:///:memory:",
    "sqlite:///file::memory:?cache=shared&uri=true",
    "sqlite:///file:shared?mode=memory&cache=shared&uri=true",
]


@pytest.mark.filterwarnings("ignore:Selection of the:sqlalchemy.exc.SADeprecationWarning")
@pytest.mark.parametrize("url", MEMORY)
def test_refuses_sqlite_in_memory(clerk: FakeClerk, url: str) -> None:
    """
    An in-memory SQLite database is refused. The error recommends a file.

    Each connection would open its own in-memory database.
    """
    with pytest.raises(SettingsError) as raised:
        Application(clerk, url)
    assert "SQLALCHEMY_DATABASE_URI is an in-memory SQLite database" in str(raised.value)
    assert "Use a file, also in tests: sqlite:////tmp/test.db" in str(raised.value)
    with pytest.raises(SettingsError, match="DATABASE_URL"):
        create_app(clerk.environ | {"DATABASE_URL": url})


def test_limits_its_pool_to_the_configured_size(
    make_application: MakeApplication, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If all connections are in use, a caller fails after the pool's timeout."""
    monkeypatch.setattr(database, "POOL_TIMEOUT", 0.2)
    application = make_application(empty_database, DATABASE_POOL_SIZE=2)
    with application.database.connect(), application.database.connect():
        with pytest.raises(sa.exc.TimeoutError):
            application.database.connect()
        assert application.deliver(user_event(clerk_id("user")), "msg_1").status_code >= 500
        with application.app.app_context():  # db.session uses another pool
            assert application.db.session.scalar(sa.text("SELECT 1")) == 1
    assert application.outcome(user_event(clerk_id("user")), "msg_1") == "applied"


def test_answers_more_callers_than_it_has_connections(
    make_application: MakeApplication, empty_database: str
) -> None:
    """Many concurrent deliveries and calls can share two connections without an error."""
    application = make_application(empty_database, DATABASE_POOL_SIZE=2)

    def act(number: int) -> int:
        own = Service(application.app, application.clerk, application.database_url)
        user_id = clerk_id("user")
        if number % 2:
            return own.call(user_id).status_code
        return own.deliver(user_event(user_id)).status_code

    with ThreadPool(24) as pool:
        assert set(pool.map(act, range(96))) == {200}


@postgresql
def test_uses_the_applications_connect_arguments(
    make_application: MakeApplication, empty_database: str
) -> None:
    """The application's connect arguments, such as certificates, apply to the private engine."""
    options = {"connect_args": {"application_name": "bookshop", "options": "-c work_mem=7MB"}}
    application = make_application(empty_database, SQLALCHEMY_ENGINE_OPTIONS=options)
    names = ("application_name", "work_mem", "statement_timeout")
    assert show(application.database, *names) == ["bookshop", "7MB", "3s"]


@postgresql
def test_uses_the_applications_creator(
    make_application: MakeApplication, empty_database: str
) -> None:
    """The private engine uses the application's ``creator`` function to open connections."""
    made: list[object] = []

    def create() -> Any:
        connection = psycopg.connect(empty_database)
        made.append(connection)
        return connection

    application = make_application(empty_database, SQLALCHEMY_ENGINE_OPTIONS={"creator": create})
    before = len(made)
    user_id = clerk_id("user")
    assert application.outcome(user_event(user_id)) == "applied"
    assert len(made) == before + 1
    assert application.user(user_id, ["name"]) == ("Ada Lovelace",)
    assert show(application.database, "lock_timeout", "timezone") == ["2s", "UTC"]


@sqlite
def test_syncs_every_commit_to_the_disk(application: Application) -> None:
    """
    A message survives a power failure once its response is 200.

    The application's own connections keep their settings.
    """
    with application.database.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
    with sa.create_engine(application.database_url, poolclass=sa.NullPool).connect() as stock:
        expected = stock.exec_driver_sql("PRAGMA foreign_keys").scalar()
    with application.app.app_context():
        own = application.db.session.connection().exec_driver_sql("PRAGMA foreign_keys").scalar()
    assert own == expected


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_rolls_back_a_failed_transaction_on_sqlite(
    make_application: MakeApplication, make_database: MakeDatabase, error: type[BaseException]
) -> None:
    """An exception or a signal rolls back the transaction and releases the write lock."""
    application = make_application(make_database("sqlite"))
    application.rows("CREATE TABLE notes (id INTEGER PRIMARY KEY)")
    with application.database.connect() as connection:
        with suppress(error), sqlite_transaction(connection):
            connection.execute(sa.text("INSERT INTO notes VALUES (1)"))
            raise error
        assert application.rows("SELECT * FROM notes") == []
        application.rows("INSERT INTO notes VALUES (2)")  # the write lock is free


@sqlite
@pytest.mark.parametrize("handled", [False, True], ids=["no handler", "a handler"])
def test_gives_up_on_a_write_lock_in_time(application: Application, handled: bool) -> None:
    """
    If another process holds SQLite's write lock, the response is 500 after four seconds.

    A later retry is applied.
    """
    if handled:
        application.hooks.on("*")(lambda _: None)
    body = user_event(clerk_id("user"))
    with sa.create_engine(application.database_url, poolclass=sa.NullPool).connect() as other:
        other.exec_driver_sql("BEGIN IMMEDIATE")
        started = time.monotonic()
        assert application.deliver(body, "msg_1").status_code == 500
        assert time.monotonic() - started < 8
        other.rollback()
    assert application.outcome(body, "msg_1") == "applied"


@sqlite
def test_starves_no_writer_on_sqlite(application: Application) -> None:
    """All concurrent deliveries succeed, with and without handlers."""
    application.hooks.on("session.*")(lambda _: time.sleep(0.002))
    began = threading.Barrier(16)

    def write(number: int) -> list[str]:
        own = Service(application.app, application.clerk, application.database_url)
        began.wait(TIMEOUT)
        if number % 2:
            bodies = [event_body("session.created", {}, NOW_MS) for _ in range(12)]
        else:
            bodies = [user_event(clerk_id("user")) for _ in range(12)]
        return [own.outcome(body) for body in bodies]

    with ThreadPool(16) as pool:
        assert {one for found in pool.map(write, range(16)) for one in found} == {"applied"}
    assert application.rows("SELECT count(*) FROM webhook_messages") == [(192,)]


def test_uses_few_statements(service: Service) -> None:
    """A delivery executes one statement on PostgreSQL or four on SQLite; a call executes one."""
    user_id = clerk_id("user")
    service.outcome(user_event(user_id))
    seen: list[None] = []
    with on_statement(service, "", lambda: seen.append(None)):
        service.outcome(user_event(user_id, at=NOW_MS + 1))
        delivered = len(seen)
        service.call(user_id)
    is_postgresql = service.database_url.startswith("postgresql")
    assert (delivered, len(seen) - delivered) == (1 if is_postgresql else 4, 1)


def test_disposes_of_one_engine_only(application: Application) -> None:
    """Two applications have separate engines, so disposing of one leaves the other usable."""
    second = Flask("second")
    second.config.update(application.app.config)
    application.db.init_app(second)
    application.hooks.init_app(second)
    other: Database = second.extensions["clerkhooks"].store.database
    other.engine.dispose()
    assert other.engine is not application.database.engine
    assert application.outcome(user_event(clerk_id("user"))) == "applied"

"""The service's migrations: upgrade, downgrade, and agreement with the models."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from flask_migrate import downgrade, upgrade
from sqlalchemy.engine import make_url

from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.doctor import diagnose
from clerkhooks.doctor.database import check_database
from clerkhooks.service import db
from clerkhooks.settings import PROJECT
from tests.conftest import SLOW_ON_SQLITE, TABLES, MakeDatabase, MakeService
from tests.server import environ
from tests.support import Service, pending_schema_changes, rows, user_event


@pytest.fixture
def kind(database_url: str) -> str:
    """Return the kind of database. The test runs once for each kind."""
    return make_url(database_url).get_backend_name()


def test_agree_with_the_models(organizations: Service) -> None:
    """Autogenerate finds no difference in columns, types, indexes or nullability."""
    with organizations.app.app_context():
        assert pending_schema_changes("organizations", "organization_memberships") == []


def test_name_every_constraint_and_index(service: Service) -> None:
    """Names are the same on both databases, so a later migration can drop objects by name."""
    with service.app.app_context():
        inspector = sa.inspect(db.engine)
        names = {table: inspector.get_pk_constraint(table)["name"] for table in TABLES}
        indexes = {index["name"] for table in names for index in inspector.get_indexes(table)}
    if service.database_url.startswith("sqlite"):  # a key with AUTOINCREMENT has no name there
        assert names.pop("user_changes") is None
    assert names == {table: f"pk_{table}" for table in names}
    assert indexes == {
        "ix_users_email",
        "ix_users_created_at",
        "ix_users_without_profile",
        "ix_users_deleted",
        "ix_users_barred",
        "ix_organizations_created_at",
        "ix_organizations_live",
        "ix_organization_memberships_live",
        "ix_organization_memberships_organization_id",
        "ix_organization_memberships_user_id",
        "ix_webhook_messages_received_at",
        "ix_webhook_messages_clerk_user_id",
        "ix_webhook_messages_failed",
        "ix_user_changes_object_id",
        "ix_user_changes_transaction_id_sequence",
    }


def test_order_by_bytes(service: Service) -> None:
    """Ids used for ordering are compared by bytes, independently of the server's collation."""
    with service.app.app_context():
        columns = {
            (table, column["name"]): getattr(column["type"], "collation", None)
            for table in ("users", "webhook_messages")
            for column in sa.inspect(db.engine).get_columns(table)
        }
        expected = "C" if db.engine.dialect.name == "postgresql" else None
    assert columns[("users", "version_message_id")] == expected
    assert columns[("webhook_messages", "message_id")] == expected


WRITTEN_BY_EVENTS = """
UPDATE users SET name = 'Ada King', is_online = true, last_seen = now(), updated_at = now(),
    version_updated_at = 2, version_timestamp = 2, version_message_id = 'msg_2';
"""


def test_leave_the_indexes_alone_in_an_update(service: Service) -> None:
    """An update that keeps email and image is a HOT update: no index gets another entry."""
    if service.database_url.startswith("sqlite"):
        pytest.skip("SQLite has no HOT updates")
    service.outcome(user_event(clerk_id("user")))
    with psycopg.connect(service.database_url) as connection:
        connection.execute(WRITTEN_BY_EVENTS)
        query = "SELECT n_tup_hot_upd FROM pg_stat_xact_user_tables WHERE relname = 'users'"
        assert connection.execute(query).fetchall() == [(1,)]


IMPORTED = """
INSERT INTO users (id, name, is_online, last_seen, created_at, updated_at)
SELECT 'user_' || n, 'Ada Lovelace', false, now(), now(), now() FROM generate_series(1, 1000) AS n
"""


def test_leave_space_for_updates_after_an_import(service: Service) -> None:
    """Users who were imported together can be updated with HOT updates."""
    if service.database_url.startswith("sqlite"):
        pytest.skip("SQLite has no HOT updates")
    with psycopg.connect(service.database_url) as connection:
        connection.execute(IMPORTED)
        update = "UPDATE users SET last_seen = now() WHERE right(id, 2) = '50'"
        assert connection.execute(update).rowcount == 10
        query = "SELECT n_tup_hot_upd FROM pg_stat_xact_user_tables WHERE relname = 'users'"
        assert connection.execute(query).fetchall() == [(10,)]


def test_upgrade_and_downgrade(
    make_database: MakeDatabase, make_service: MakeService, kind: str
) -> None:
    """A downgrade to base leaves only the version table, and a second upgrade succeeds."""
    service = make_service(DATABASE_URL=make_database(kind))
    with service.app.app_context():
        upgrade()
        downgrade(revision="base")
        assert sa.inspect(db.engine).get_table_names() == ["clerkhooks_version"]
        upgrade()
    assert service.http.get("/readyz").status_code == 200


@pytest.mark.parametrize("database_url", SLOW_ON_SQLITE, indirect=True)
def test_wait_for_each_other(make_database: MakeDatabase, clerk: FakeClerk, kind: str) -> None:
    """Of two simultaneous upgrades, one migrates and the other finds nothing to do."""
    # Two processes, because alembic keeps the current migration in a module variable.
    environ = os.environ | clerk.environ | {"DATABASE_URL": make_database(kind)}
    command = [sys.executable, "-m", "flask", "--app", "wsgi", "db", "upgrade"]
    runs = [
        subprocess.Popen(
            command,
            cwd=PROJECT,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        outputs = [run.communicate(timeout=60)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], outputs


@pytest.mark.slow
def test_wait_for_a_long_transaction(make_database: MakeDatabase, clerk: FakeClerk) -> None:
    """On SQLite, a migration waits for a transaction that takes 15 seconds."""
    url = make_database("sqlite")
    command = [sys.executable, "-m", "flask", "--app", "wsgi", "db", "upgrade"]
    with sqlite3.connect(make_url(url).database or "", isolation_level=None) as other:
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("BEGIN IMMEDIATE")
        variables = environ(**clerk.environ, DATABASE_URL=url)
        with subprocess.Popen(command, cwd=PROJECT, env=variables) as migration:
            with pytest.raises(subprocess.TimeoutExpired):
                migration.wait(15)
            other.execute("ROLLBACK")
            assert migration.wait(30) == 0
    other.close()


def test_leave_the_tables_of_others_alone(
    make_database: MakeDatabase, make_service: MakeService, kind: str
) -> None:
    """Another program's tables and migration version in the same database are not changed."""
    service = make_service(DATABASE_URL=make_database(kind))
    with service.app.app_context(), db.engine.connect() as connection:
        for statement in (
            "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)",
            "INSERT INTO alembic_version VALUES ('theirs')",
            "CREATE TABLE orders (id INTEGER PRIMARY KEY)",
        ):
            connection.execute(sa.text(statement))
        connection.commit()
        upgrade()
        context = MigrationContext.configure(
            connection, opts=service.app.extensions["migrate"].configure_args
        )
        assert compare_metadata(context, db.metadata) == []
        connection.rollback()
        downgrade(revision="base")
        names = set(sa.inspect(db.engine).get_table_names())
        assert names == {"alembic_version", "orders", "clerkhooks_version"}
        version = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
    assert version == "theirs"


UPGRADE = ["-m", "flask", "--app", "wsgi", "db", "upgrade"]
MIGRATE = ["-m", "clerkhooks", "serve", "--migrate"]
LATER_COLUMNS = ", ".join(f"later_{number} TEXT" for number in range(12))
THEIRS = [
    ("users", "TABLE users (id INTEGER PRIMARY KEY, nickname TEXT)", "columns id, nickname."),
    ("users", f"TABLE users (id TEXT, {LATER_COLUMNS})", "later_9, later_10, …."),
    ("users", "VIEW users AS SELECT 1 AS id", "columns id."),
    ("webhook_messages", "TABLE webhook_messages (body TEXT)", "columns body."),
]


def run(
    clerk: FakeClerk, url: str, command: list[str], **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of the service on the database at *url*."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=PROJECT,
        env=environ(**clerk.environ, DATABASE_URL=url, **variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


FlaskDb = Callable[..., tuple[int, str]]


@pytest.fixture
def flask_db(make_service: MakeService, caplog: pytest.LogCaptureFixture) -> FlaskDb:
    """Run ``flask db …`` in this process; return the exit status and the error, if any."""

    def run_here(url: str, *arguments: str, **variables: str) -> tuple[int, str]:
        app = make_service(DATABASE_URL=url, **variables).app
        caplog.clear()
        status = app.test_cli_runner().invoke(args=["db", *arguments]).exit_code
        errors = [record for record in caplog.records if record.levelname == "ERROR"]
        return status, "\n".join(record.getMessage() for record in errors)

    return run_here


@pytest.mark.parametrize(("name", "definition", "columns"), THEIRS)
def test_refuse_a_table_of_others(
    make_database: MakeDatabase,
    flask_db: FlaskDb,
    clerk: FakeClerk,
    kind: str,
    name: str,
    definition: str,
    columns: str,
) -> None:
    """One message describes the table and says what to do. Nothing in the database changes."""
    url = make_database(kind)
    rows(url, f"CREATE {definition}")
    before = _content(url)
    place = " in the schema public" if kind == "postgresql" else ""
    what = f"has a table {name}{place} that clerkhooks did not create, with the "
    refusals = [flask_db(url, "upgrade")]
    if definition == THEIRS[0][1]:
        started = run(clerk, url, MIGRATE)
        assert started.stdout == ""
        refusals.append((started.returncode, started.stderr))
    for status, error in refusals:
        assert status == 1
        first, remedy = error.splitlines()
        assert first.startswith(f"Error: The database {what}")
        assert first.endswith(f"{columns} Nothing was changed.")
        assert "sqlite:////path" in remedy if kind == "sqlite" else "CREATE SCHEMA" in remedy
    assert _content(url) == before
    values = clerk.environ | {"DATABASE_URL": url}
    [finding] = diagnose(values, checks=[check_database])
    assert (finding.code, finding.remedy) == ("database_of_others", remedy)
    assert what in finding.what


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("organizations", "organizations"),
        ("organization_memberships", "organizations"),
        ("user_changes", "changes"),
    ],
)
def test_leave_optional_tables_of_others_alone(
    make_database: MakeDatabase,
    make_service: MakeService,
    flask_db: FlaskDb,
    clerk: FakeClerk,
    kind: str,
    name: str,
    tables: str,
) -> None:
    """
    A table of that name is another program's unless CLERK_TABLES is set.

    Then the migration refuses it, and the doctor describes it.
    """
    url = make_database(kind)
    rows(url, f"CREATE TABLE {name} (id INTEGER PRIMARY KEY, nickname TEXT)")
    status, error = flask_db(url, "upgrade", CLERK_TABLES=tables)
    what = f"has a table {name}"
    assert status == 1
    assert what in error
    assert flask_db(url, "upgrade") == (0, "")
    service = make_service(DATABASE_URL=url)
    assert service.http.get("/readyz").status_code == 200
    assert make_service(DATABASE_URL=url, CLERK_TABLES=tables).http.get("/readyz").get_json()[
        "reason"
    ] == ("schema_behind")
    values = clerk.environ | {"DATABASE_URL": url, "CLERK_TABLES": tables}
    [finding] = diagnose(values, checks=[check_database])
    assert finding.code == "database_of_others"
    assert what in finding.what
    with service.app.app_context():
        downgrade(revision="base")
        assert set(sa.inspect(db.engine).get_table_names()) == {name, "clerkhooks_version"}


def _content(url: str) -> object:
    """Return everything that a migration could change."""
    if url.startswith("sqlite"):
        return Path(url.removeprefix("sqlite:///")).read_bytes()
    query = "SELECT table_schema, table_name, column_name FROM information_schema.columns"
    return sorted(rows(url, query))


def test_record_tables_that_were_copied(
    make_database: MakeDatabase, flask_db: FlaskDb, kind: str
) -> None:
    """Tables copied without their migration version are recognized and can be stamped."""
    url = make_database(kind)
    assert flask_db(url, "upgrade") == (0, "")
    rows(url, "DROP TABLE clerkhooks_version")
    _, error = flask_db(url, "upgrade")
    assert "If it is a copy of clerkhooks' table, run: flask --app wsgi db stamp" in error
    assert flask_db(url, "stamp", "head") == (0, "")
    assert flask_db(url, "upgrade") == (0, "")


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("path", ["clerkhooks", "clerkhooks,public"])
def test_use_a_schema_of_their_own(
    make_database: MakeDatabase, make_service: MakeService, flask_db: FlaskDb, path: str
) -> None:
    """If ``options`` in the URL names a schema, all tables are created in it."""
    url = make_database("postgresql")
    rows(url, "CREATE TABLE users (id INTEGER PRIMARY KEY, nickname TEXT)")
    own = make_url(url).update_query_dict({"options": f"-csearch_path={path}"})
    own_url = own.render_as_string(hide_password=False)
    rows(url, "CREATE SCHEMA clerkhooks")
    assert flask_db(own_url, "upgrade") == (0, "")
    service = make_service(DATABASE_URL=own_url)
    assert service.http.get("/readyz").status_code == 200
    assert service.outcome(user_event(clerk_id("user"))) == "applied"
    query = "SELECT table_schema, table_name FROM information_schema.tables WHERE table_name IN "
    found = set(rows(url, f"{query} ('users', 'webhook_messages', 'clerkhooks_version')"))
    assert found == {
        ("public", "users"),
        *(("clerkhooks", name) for name in ("users", "webhook_messages", "clerkhooks_version")),
    }
    assert rows(url, "SELECT count(*) FROM clerkhooks.users") == [(1,)]


def test_explain_a_schema_that_does_not_exist(
    make_database: MakeDatabase, clerk: FakeClerk
) -> None:
    """The message shows a statement that creates the schema."""
    url = make_url(make_database("postgresql"))
    url = url.update_query_dict({"options": "-csearch_path=nowhere"})
    result = run(clerk, url.render_as_string(hide_password=False), UPGRADE)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        "Error: No schema in the search_path exists.",
        "Create one first, such as: CREATE SCHEMA clerkhooks",
    ]


def test_explain_a_database_that_is_away(clerk: FakeClerk) -> None:
    """The message is the driver's, without a traceback or the password."""
    result = run(clerk, "postgresql://user:hidden@127.0.0.1:1/app", UPGRADE)
    assert (result.returncode, result.stdout) == (2, "")
    first, *_, last = result.stderr.splitlines()
    assert first.startswith("Error: Database error (OperationalError): connection failed: ")
    assert last == "Migrations are applied together or not at all. Run the command again."
    assert "hidden" not in result.stderr
    assert "Traceback" not in result.stderr

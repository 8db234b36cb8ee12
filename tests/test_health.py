"""The health checks ``/healthz`` and ``/readyz``, as platforms use them."""

from __future__ import annotations

import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from flask_migrate import downgrade

from clerkhooks.web.state import disconnect
from tests.conftest import KINDS, MakeDatabase, MakeService, MigratedUrl
from tests.support import Service


def reason(service: Service) -> str | None:
    """Return the reason why the service is not ready, or None if it is ready."""
    response = service.http.get("/readyz")
    if response.status_code == 200:
        assert response.get_json() == {"status": "ok"}
        return None
    assert (response.status_code, response.content_type) == (503, "application/problem+json")
    return str(response.get_json()["reason"])


def test_is_healthy_without_a_database(unreachable: Service) -> None:
    """``/healthz`` does not query the database: a restart would not fix a database outage."""
    assert unreachable.http.get("/healthz").get_json() == {"status": "ok"}


def test_is_not_ready_without_a_database(unreachable: Service) -> None:
    """An unavailable database is reported as ``database_unavailable``."""
    assert reason(unreachable) == "database_unavailable"


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/healthz/", "/readyz/"])
def test_accepts_a_trailing_slash(service: Service, path: str) -> None:
    """A trailing slash does not cause a redirect, because a redirect fails a health check."""
    assert service.http.get(path).get_json() == {"status": "ok"}


def test_is_ready_at_the_newest_migration(service: Service) -> None:
    """The service is ready if every table and column that this release needs exists."""
    assert reason(service) is None


def test_is_ready_after_a_later_migration(service: Service) -> None:
    """After a later release has migrated the database, this release is still ready."""
    [(revision,)] = service.rows("SELECT version_num FROM clerkhooks_version")
    service.rows("UPDATE clerkhooks_version SET version_num = 'ffff'")
    service.rows("ALTER TABLE users ADD COLUMN added_later TEXT")
    try:
        assert reason(service) is None
    finally:
        service.rows("ALTER TABLE users DROP COLUMN added_later")
        service.rows(f"UPDATE clerkhooks_version SET version_num = '{revision}'")


@pytest.mark.parametrize("table", ["users", "webhook_messages"])
def test_is_not_ready_without_a_column(service: Service, table: str) -> None:
    """A release gets no traffic until every column that it needs exists."""
    column = {"users": "image_url", "webhook_messages": "error"}[table]
    service.rows(f"ALTER TABLE {table} RENAME COLUMN {column} TO old")
    try:
        assert reason(service) == "schema_behind"
    finally:
        service.rows(f"ALTER TABLE {table} RENAME COLUMN old TO {column}")
    assert reason(service) is None


@pytest.mark.parametrize("kind", KINDS)
def test_is_not_ready_before_the_first_migration(
    make_database: MakeDatabase, make_service: MakeService, kind: str
) -> None:
    """``schema_behind`` is reported before the first upgrade and after a downgrade to base."""
    service = make_service(DATABASE_URL=make_database(kind))
    assert reason(service) == "schema_behind"
    with service.app.app_context():
        runner = service.app.test_cli_runner()
        runner.invoke(args=["db", "upgrade"], catch_exceptions=False)
        assert reason(service) is None
        downgrade(revision="base")
    assert reason(service) == "schema_behind"


def test_is_not_ready_while_postgresql_refuses_writes(service: Service) -> None:
    """After a failover, open sessions may be read-only; the process is then not ready."""
    if service.database_url.startswith("sqlite"):
        pytest.skip("a file has no standby")
    name = service.database_url.partition("?")[0].rpartition("/")[2]
    alter = f"ALTER DATABASE {name}"
    disconnect(service.app)
    service.rows(f"{alter} SET default_transaction_read_only = on")
    try:
        assert reason(service) == "database_read_only"
    finally:
        with psycopg.connect(service.database_url, autocommit=True) as connection:
            connection.execute("SET default_transaction_read_only = off")
            connection.execute(f"{alter} RESET default_transaction_read_only".encode())
    disconnect(service.app)
    assert reason(service) is None


def test_is_not_ready_while_a_file_refuses_writes(
    migrated_url: MigratedUrl, make_service: MakeService, tmp_path: Path
) -> None:
    """A SQLite file on a read-only disk can be read, so only a write shows the problem."""
    file = tmp_path / "file.db"
    shutil.copy(migrated_url("sqlite").removeprefix("sqlite:///"), file)
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    service = make_service(DATABASE_URL=f"sqlite:///file:{file}?mode=ro&uri=true")
    assert reason(service) == "database_read_only"
    assert reason(make_service(DATABASE_URL=f"sqlite:///{file}")) is None


def test_is_ready_while_another_process_writes(
    migrated_url: MigratedUrl, make_service: MakeService, tmp_path: Path
) -> None:
    """If another process holds SQLite's write lock, the database is still counted as writable."""
    file = tmp_path / "file.db"
    shutil.copy(migrated_url("sqlite").removeprefix("sqlite:///"), file)
    service = make_service(DATABASE_URL=f"sqlite:///{file}")
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        assert reason(service) is None
        assert time.monotonic() - began < 3  # BUSY_TIMEOUT would be too long for a health check
        other.rollback()

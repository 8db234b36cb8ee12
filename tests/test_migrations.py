"""The service's migrations: upgrade, downgrade, and agreement with the models."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from flask_migrate import downgrade, upgrade

from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.service import db
from clerkhooks.settings import PROJECT
from tests.conftest import KINDS, MakeDatabase, MakeService
from tests.support import Service, pending_schema_changes


def test_agree_with_the_models(service: Service) -> None:
    """Autogenerate finds no difference in columns, types, indexes or nullability."""
    with service.app.app_context():
        assert pending_schema_changes() == []


def test_name_every_constraint_and_index(service: Service) -> None:
    """Names are the same on both databases, so that a later migration can drop them."""
    with service.app.app_context():
        inspector = sa.inspect(db.engine)
        names = {
            table: inspector.get_pk_constraint(table)["name"]
            for table in ("users", "webhook_messages")
        }
        indexes = {index["name"] for table in names for index in inspector.get_indexes(table)}
    assert names == {"users": "pk_users", "webhook_messages": "pk_webhook_messages"}
    assert indexes == {
        "ix_users_email",
        "ix_users_created_at",
        "ix_users_unfilled",
        "ix_users_deleted",
        "ix_webhook_messages_received_at",
        "ix_webhook_messages_clerk_user_id_received_at",
        "ix_webhook_messages_failed",
    }


def test_order_by_bytes(service: Service) -> None:
    """Ids that decide an order are compared by bytes, whatever the server's collation is."""
    with service.app.app_context():
        columns = {
            (table, column["name"]): getattr(column["type"], "collation", None)
            for table in ("users", "webhook_messages")
            for column in sa.inspect(db.engine).get_columns(table)
        }
        expected = "C" if db.engine.dialect.name == "postgresql" else None
    assert columns[("users", "version_message_id")] == expected
    assert columns[("webhook_messages", "message_id")] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_upgrade_and_downgrade(
    make_database: MakeDatabase, make_service: MakeService, kind: str
) -> None:
    """A downgrade to base removes every table, and a second upgrade succeeds."""
    service = make_service(DATABASE_URL=make_database(kind))
    with service.app.app_context():
        upgrade()
        downgrade(revision="base")
        assert sa.inspect(db.engine).get_table_names() == ["clerkhooks_version"]
        upgrade()
    assert service.http.get("/readyz").status_code == 200


@pytest.mark.parametrize("kind", KINDS)
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
    outputs = [run.communicate(timeout=60)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs


@pytest.mark.parametrize("kind", KINDS)
def test_leave_the_tables_of_others_alone(
    make_database: MakeDatabase, make_service: MakeService, kind: str
) -> None:
    """Another program's tables and version in the same database are not changed."""
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

"""Runs migrations on the application's own database: each run is one transaction, and one run at a time."""

from __future__ import annotations

from typing import cast

import sqlalchemy as sa
from alembic import context
from flask import current_app

from clerkhooks.models import PatientConnection

LOCK = 7_233_190_212  # any number, the same in every release

migrate = current_app.extensions["migrate"]


def begin_alone(connection: sa.Connection) -> None:
    """Make a second release wait until the first has migrated, and let a long migration take its time."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        return
    cast("PatientConnection", connection.connection.dbapi_connection).patience = None
    connection.exec_driver_sql("SET statement_timeout = 0")
    connection.exec_driver_sql("SET lock_timeout = 0")
    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
    # From here on a migration that has to wait gives up soon: behind its lock every request would queue.
    connection.exec_driver_sql("SET lock_timeout = '4s'")


def run_migrations() -> None:
    """Migrate, or print the statements with --sql."""
    if context.is_offline_mode():
        url = migrate.db.engine.url.render_as_string(hide_password=False)
        context.configure(url=url, target_metadata=migrate.db.metadata, literal_binds=True, **migrate.configure_args)
        with context.begin_transaction():
            context.run_migrations()
        return
    with migrate.db.engine.connect() as connection:
        begin_alone(connection)
        context.configure(connection=connection, target_metadata=migrate.db.metadata, **migrate.configure_args)
        with context.begin_transaction():
            context.run_migrations()
        connection.commit()
        connection.invalidate()  # the timeouts set here are not for requests


run_migrations()

"""Run migrations on the service's database in one transaction; concurrent runs wait."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context
from alembic.util import CommandError
from flask import current_app

from clerkhooks.cli.options import CannotDo
from clerkhooks.errors import describe
from clerkhooks.settings import VERSION_TABLE
from clerkhooks.store.foreign import find_table

LOCK = 7_233_190_212  # arbitrary, but the same in every release

migrate = current_app.extensions["migrate"]


def begin_alone(connection: sa.Connection) -> None:
    """
    Begin a transaction. A second run waits until the first one ends.

    On SQLite, it waits for up to a minute.
    """
    if connection.dialect.name == "sqlite":
        # The file stores this setting. With a write-ahead log, readers never wait for the writer.
        if not is_of_others(connection):
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
        connection.exec_driver_sql("PRAGMA busy_timeout = 60000")
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        return
    if connection.exec_driver_sql("SELECT current_schema()").scalar() is None:
        remedy = "Create one first, such as: CREATE SCHEMA clerkhooks"
        raise CommandError(f"No schema in the search_path exists.\n{remedy}")
    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
    # While a migration waits for a lock, requests queue behind it, so the migration soon gives up.
    connection.exec_driver_sql("SET LOCAL lock_timeout = '4s'")


def is_of_others(connection: sa.Connection) -> bool:
    """Return whether the tables exist but no migration is recorded."""
    # Look for the version table last: another process may be creating all tables.
    is_found = find_table(connection) is not None
    return is_found and not sa.inspect(connection).has_table(VERSION_TABLE)


def run_migrations() -> None:
    """Run the migrations, or print their statements if ``--sql`` is given."""
    metadata, options = migrate.db.metadata, migrate.configure_args
    if context.is_offline_mode():
        url = migrate.db.engine.url.render_as_string(hide_password=False)
        context.configure(url=url, target_metadata=metadata, literal_binds=True, **options)
        with context.begin_transaction():
            context.run_migrations()
        return
    try:
        with migrate.db.engine.connect() as connection:
            begin_alone(connection)
            context.configure(connection=connection, target_metadata=metadata, **options)
            with context.begin_transaction():
                context.run_migrations()
            connection.commit()
    except sa.exc.OperationalError as error:  # such as a refused connection, or a lock timeout
        problem = f"Database error ({describe(error)}): {str(error.orig).strip()}"
        # Whether a COMMIT without a response succeeded is unknown.
        remedy = "Migrations are applied together or not at all. Run the command again."
        raise CannotDo(f"{problem}\n{remedy}") from None


run_migrations()

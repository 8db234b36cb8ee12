"""The example's migration makes the table that the example models."""

from __future__ import annotations

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from flask import Flask

from clerkhooks.models import db


def test_migrates_what_it_models(clerkhooks_app: Flask) -> None:
    """Nothing is left to migrate of the notes, and of the tables that they refer to."""
    with clerkhooks_app.app_context(), db.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "include_object": _is_known})
        assert compare_metadata(context, db.metadata) == []


def _is_known(_: object, name: str, kind: str, *__: object) -> bool:
    # Whole test runs import other examples, whose tables are in the metadata too.
    return kind != "table" or name in ("notes", "users", "webhook_messages")

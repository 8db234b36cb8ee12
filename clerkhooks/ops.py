"""Whether the process serves, and whether it can do its work."""

from __future__ import annotations

from functools import cache

import sqlalchemy as sa
from alembic.script import ScriptDirectory
from flask import Blueprint, Response, current_app
from sqlalchemy.exc import SQLAlchemyError

from clerkhooks import logs
from clerkhooks.errors import describe
from clerkhooks.models import autocommit
from clerkhooks.problems import problem

blueprint = Blueprint("ops", __name__)


@blueprint.get("/healthz")
def healthz() -> dict[str, str]:
    """The process serves. The database is not touched: restarting this process would not mend it."""
    return {"status": "ok"}


@blueprint.get("/readyz")
def readyz() -> dict[str, str] | Response:
    """The database answers, and its schema is at our newest migration or at a later one."""
    try:
        with autocommit() as connection:
            current = _current_revisions(connection)
    except SQLAlchemyError as error:
        logs.annotate(error=describe(error))
        return problem(503, "database_unavailable")
    heads, known = _own_revisions(current_app.extensions["migrate"].directory)
    # A revision that we do not know is a later release's, which migrates before this process stops.
    if current >= heads or current - known:
        return {"status": "ok"}
    return problem(503, "schema_behind")


@cache
def _own_revisions(directory: str) -> tuple[frozenset[str], frozenset[str]]:
    """The newest migrations of this checkout, and all of them."""
    scripts = ScriptDirectory(directory)
    return frozenset(scripts.get_heads()), frozenset(script.revision for script in scripts.walk_revisions())


def _current_revisions(connection: sa.Connection) -> set[str]:
    if not sa.inspect(connection).has_table("alembic_version"):
        return set()
    return set(connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalars())

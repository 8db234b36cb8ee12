"""Whether the process serves, and whether it can do its work."""

from __future__ import annotations

import hmac
from functools import cache

import sqlalchemy as sa
from alembic.script import ScriptDirectory
from flask import Blueprint, Flask, Response, abort, current_app, request
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import MethodNotAllowed
from werkzeug.routing import Rule

from clerkhooks import logs
from clerkhooks.errors import describe
from clerkhooks.models import autocommit
from clerkhooks.problems import problem
from clerkhooks.settings import Settings

blueprint = Blueprint("ops", __name__)


def init_ops(app: Flask, settings: Settings) -> None:
    """Register the routes on *app*, and let it count what it does where ``METRICS_TOKEN`` is set."""
    app.register_blueprint(blueprint)
    if settings.metrics_token is not None:
        from clerkhooks.metrics import init_metrics  # nobody else pays for loading it

        init_metrics(app)
        # For every method there is: a 405 would tell a stranger that there is something.
        app.url_map.add(Rule("/metrics", endpoint="metrics"))
        app.endpoint("metrics")(metrics)


def metrics() -> Response:
    """What was counted, for whoever has the token; for all others there is nothing here."""
    token: str = current_app.extensions["clerkhooks.settings"].metrics_token
    scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(sent.encode("utf-8", "replace"), token.encode()):
        abort(404)
    if request.method not in ("GET", "HEAD"):
        raise MethodNotAllowed(("GET", "HEAD"))
    from clerkhooks.metrics import exposition

    return Response(exposition(current_app), content_type="text/plain; version=0.0.4; charset=utf-8", headers={"Cache-Control": "no-store"})


@blueprint.get("/healthz")
def healthz() -> dict[str, str]:
    """The process serves. The database is not touched: restarting this process would not mend it."""
    return {"status": "ok"}


@blueprint.get("/readyz")
def readyz() -> dict[str, str] | Response:
    """The database answers, and its schema is at our newest migration or at a later one."""
    try:
        with autocommit() as connection:
            current = current_revisions(connection)
    except SQLAlchemyError as error:
        logs.annotate(error=describe(error))
        return problem(503, "database_unavailable")
    heads, known = own_revisions(current_app.extensions["migrate"].directory)
    # A revision that we do not know is a later release's, which migrates before this process stops.
    if current >= heads or current - known:
        return {"status": "ok"}
    return problem(503, "schema_behind")


@cache
def own_revisions(directory: str) -> tuple[frozenset[str], frozenset[str]]:
    """The newest migrations of this checkout, and all of them."""
    scripts = ScriptDirectory(directory)
    return frozenset(scripts.get_heads()), frozenset(script.revision for script in scripts.walk_revisions())


def current_revisions(connection: sa.Connection) -> set[str]:
    """The migrations that the database is at; none where it was never migrated."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return set()
    return set(connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalars())

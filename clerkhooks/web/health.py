"""``/healthz``, ``/readyz`` and ``/metrics``."""

from __future__ import annotations

import hmac

import sqlalchemy as sa
from flask import Blueprint, Response, abort, request
from flask.sansio.blueprints import BlueprintSetupState
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import MethodNotAllowed
from werkzeug.routing import Rule

from clerkhooks.errors import describe
from clerkhooks.store import Store
from clerkhooks.store.database import begin_immediate
from clerkhooks.web.problems import answered, json_response, problem
from clerkhooks.web.state import annotate, current_state

_READ_ONLY = "SQLITE_READONLY"
_BUSY = "SQLITE_BUSY"  # another writer holds the lock, so the database accepts writes


def add_routes(blueprint: Blueprint) -> None:
    """Add ``/healthz`` and ``/readyz``."""
    blueprint.add_url_rule("/healthz", view_func=healthz, strict_slashes=False)
    blueprint.add_url_rule("/readyz", view_func=readyz, strict_slashes=False)


def add_metrics(blueprint: Blueprint) -> None:
    """Add ``/metrics`` for every method: a 405 would reveal that the route exists."""

    def add(setup: BlueprintSetupState) -> None:
        # A rule with a list of methods would not match unknown methods.
        path = f"{(setup.url_prefix or '').rstrip('/')}/metrics"
        endpoint = f"{setup.name_prefix}.{setup.name}.metrics".lstrip(".")
        setup.app.url_map.add(Rule(path, endpoint=endpoint, strict_slashes=False))
        setup.app.view_functions[endpoint] = metrics

    blueprint.record(add)


def has_token(token: str) -> bool:
    """Return whether the request has the bearer *token*, comparing in constant time."""
    scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
    is_right = hmac.compare_digest(sent.encode("utf-8", "replace"), token.encode())
    return is_right and scheme.lower() == "bearer"


def healthz() -> Response:
    """
    Report that the process is serving.

    The database is not queried: a platform restarts processes that fail this check, and a restart
    would not repair a database.
    """
    return json_response({"status": "ok"})


@answered
def readyz() -> Response:
    """Report whether the database responds, accepts writes and has all tables and columns."""
    try:
        found = find_fault(current_state().store)
    except SQLAlchemyError as error:
        annotate(error=describe(error))
        return problem(503, "database_unavailable")
    return json_response({"status": "ok"}) if found is None else problem(503, found)


def find_fault(store: Store) -> str | None:
    """
    Return the reason why the database cannot be used, or None if it can.

    Raises:
        SQLAlchemyError: the database does not respond.
    """
    with store.database.connect() as connection:
        if _is_read_only(connection):
            connection.invalidate()  # after a failover, a new connection may reach the new primary
            return "database_read_only"
        for table in store.tables:
            try:
                connection.execute(sa.select(table).limit(0))
            except (sa.exc.ProgrammingError, sa.exc.OperationalError) as error:
                if _is_missing(error):
                    return "schema_behind"
                raise
    return None


def _is_read_only(connection: sa.Connection) -> bool:
    if connection.dialect.name == "postgresql":
        # The value is "on" for a standby, and for a server or role with
        # default_transaction_read_only.
        return connection.exec_driver_sql("SHOW transaction_read_only").scalar() == "on"
    try:
        begin_immediate(connection, timeout=0)
        try:
            # Locking succeeds even if the file is read-only, so only a write shows the problem.
            version = connection.exec_driver_sql("PRAGMA user_version").scalar()
            connection.exec_driver_sql(f"PRAGMA user_version = {version}")
        finally:
            connection.exec_driver_sql("ROLLBACK")
    except sa.exc.OperationalError as error:
        if _READ_ONLY in describe(error):
            return True
        if _BUSY not in describe(error):
            raise
    return False


def _is_missing(error: sa.exc.DBAPIError) -> bool:
    """Return whether *error* means that a table, a column or a schema does not exist."""
    sqlstate = getattr(error.orig, "sqlstate", None)
    return sqlstate in ("42P01", "42703", "3F000") or "no such " in str(error.orig)


@answered
def metrics() -> Response:
    """Return the metrics if the request has the correct token, otherwise a 404."""
    state = current_state()
    token = state.settings.metrics_token
    if not has_token(token or "") or token is None or state.metrics is None:
        abort(404)
    if request.method not in ("GET", "HEAD"):
        raise MethodNotAllowed(("GET", "HEAD"))
    from prometheus_client import generate_latest  # loaded only if metrics are enabled

    text = generate_latest(state.metrics)
    response = Response(text, content_type="text/plain; version=0.0.4; charset=utf-8")
    response.headers["Cache-Control"] = "no-store"
    return response

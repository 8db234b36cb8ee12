"""Checks of the database, its schema, and the messages and users that it contains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import sqlalchemy as sa
from flask import Flask
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapper

from clerkhooks.doctor.change_feed import judge_changes
from clerkhooks.doctor.findings import (
    SERVICE,
    Case,
    Finding,
    Level,
    Program,
    count,
    run_with_timeout,
)
from clerkhooks.doctor.following import judge_following
from clerkhooks.errors import describe
from clerkhooks.settings import (
    EPHEMERAL_PLATFORMS,
    VARIABLES,
    VERSION_TABLE,
    ServiceSettings,
    Settings,
)
from clerkhooks.store import OrganizationTables, Store, activity, make_own_tables
from clerkhooks.store.changes import make_changes_table
from clerkhooks.store.database import Database
from clerkhooks.store.foreign import FoundTable, find_changes_table, find_optional_table, find_table
from clerkhooks.store.models import (
    VERSION_COLUMNS,
    ClerkMembership,
    ClerkOrganization,
    ClerkUser,
    complete_table,
)
from clerkhooks.web.health import find_fault

DATABASE_TIMEOUT = 15.0  # seconds for all queries together; each query has a shorter timeout
MAX_SILENCE = timedelta(days=7)
MAX_UNFILLED = timedelta(hours=1)
OWN_MARKS = (*VERSION_COLUMNS, "transaction_id")  # columns that no other program's table has


def check_database_url(case: Case) -> Iterator[Finding]:
    """Check that the service's database survives a restart of the service."""
    if not isinstance(case.settings, ServiceSettings):
        return
    if "DATABASE_URL" in case.invalid:
        what = "Skipped: DATABASE_URL is invalid."
        yield Finding("database_skipped", Level.SKIPPED, "database", what)
        return
    is_sqlite = _is_sqlite(make_url(case.settings.database_url))
    if is_sqlite and any(map(case.text, EPHEMERAL_PLATFORMS)):
        what = "The SQLite file is on this platform's disk, which does not survive a restart."
        remedy = "Attach a PostgreSQL database. Most platforms then set DATABASE_URL."
        yield Finding("sqlite_on_platform", Level.ERROR, "database", what, remedy)


def check_database(case: Case) -> Iterator[Finding]:
    """Check the service's database through a separate connection."""
    if not isinstance(case.settings, ServiceSettings) or "DATABASE_URL" in case.invalid:
        return
    url, where = _resolve(make_url(case.settings.database_url)), _name_database(case)
    is_named = _is_sqlite(url) or case.settings.pooler == "transaction"
    # Opening a SQLite database would create its file.
    if _is_sqlite(url) and not Path(str(url.database).removeprefix("file:")).exists():
        what = f"{where} does not exist yet."
        remedy = f"Create the database: {case.program.upgrade}"
        yield Finding("database_not_migrated", Level.ERROR, "database", what, remedy)
        return

    def judge() -> list[Finding]:
        store = plain_store(url, case.settings.tables)
        try:
            found = judge_database(store, case.settings, case.program, where)
            return found + ([] if is_named else _find_pooler(store.database))
        finally:
            store.database.engine.dispose()

    try:
        yield from run_with_timeout(DATABASE_TIMEOUT, judge)
    except (SQLAlchemyError, TimeoutError) as error:
        yield _describe_unreachable(where, error, case.program)


def _find_pooler(database: Database) -> list[Finding]:
    """Report a pooler that lets two open connections share one server session."""
    query = "SELECT pg_backend_pid()"
    with database.connect() as first, database.connect() as second:
        if first.exec_driver_sql(query).scalar() != second.exec_driver_sql(query).scalar():
            return []
    what = "A pooler in transaction mode is in front of PostgreSQL: requests fail at random."
    remedy = "Set DATABASE_POOLER=transaction, or use the pooler's session mode."
    return [Finding("database_pooler_unnamed", Level.ERROR, "database", what, remedy)]


def plain_store(url: sa.URL, optional: Sequence[str] = ()) -> Store:
    """
    Return a store with the service's tables in the database at *url*.

    *optional* are the names in CLERK_TABLES. The store connects when it is first used. The
    connections work through any pooler, and do not change session settings.
    """

    class Plain(DeclarativeBase):
        """A declarative base with separate metadata."""

    class User(ClerkUser, Plain):
        """The plain table of users."""

    class Organization(ClerkOrganization, Plain):
        """The plain table of organizations."""

    class Membership(ClerkMembership, Plain):
        """The table of memberships."""

    mapper: Mapper[Any] = sa.inspect(User)
    users = cast("sa.Table", mapper.local_table)
    complete_table(users)
    own = make_own_tables(users.metadata, users.schema)
    database = Database(sa.create_engine(url), {}, pool_size=2, pooler="transaction")
    tables = OrganizationTables(
        cast("sa.Table", Organization.__table__), cast("sa.Table", Membership.__table__), {}
    )
    if "changes" in optional:
        own = own._replace(changes=make_changes_table(users.metadata, None))
    return Store(database, mapper, own, {}, tables if "organizations" in optional else None)


def _is_sqlite(url: sa.URL) -> bool:
    return url.get_backend_name() == "sqlite"


def _resolve(url: sa.URL) -> sa.URL:
    """Resolve a relative SQLite path as Flask-SQLAlchemy does: in the instance folder."""
    if not _is_sqlite(url) or not url.database:
        return url
    path = url.database.removeprefix("file:")
    scheme = url.database[: len(url.database) - len(path)]
    return url.set(database=f"{scheme}{Path(Flask('clerkhooks').instance_path, path)}")


def _name_database(case: Case) -> str:
    """Return the kind, host and name of the service's database, without credentials."""
    url = make_url(cast("ServiceSettings", case.settings).database_url)
    if _is_sqlite(url):
        return f"SQLite in {(url.database or '').partition('?')[0]}"
    # If a password contains an unescaped @, part of it looks like the host.
    if case.text("DATABASE_URL").count("@") > 1:
        return "PostgreSQL (its URL has more than one @; in a password, write %40)"
    host = url.host or url.query.get("host") or "the local socket"
    host = host if isinstance(host, str) else ",".join(host)
    return f"PostgreSQL on {host}, {url.database or 'its default database'},"


def judge_database(
    store: Store,
    settings: Settings,
    program: Program = SERVICE,
    where: str = "The database",
    durable: Iterable[str] = (),
) -> list[Finding]:
    """
    Check the database of *store*. The returned findings refer to the database as *where*.

    *durable* are the names of the application's durable handlers.

    The first finding says whether the database can be used. If the database cannot be used, there
    are no further findings.
    """
    try:
        readiness = _judge_readiness(store, program, where)
        if readiness.level is Level.ERROR:
            return [readiness]
        return [
            readiness,
            _judge_failures(store, program),
            _judge_last_webhook(store, program),
            _judge_unfilled(store, program),
            *judge_following(store, settings, program),
            *judge_changes(store, durable),
        ]
    except SQLAlchemyError as error:
        return [_describe_unreachable(where, error, program)]


def _describe_unreachable(where: str, error: Exception, program: Program) -> Finding:
    what = f"{where} does not respond ({describe(error)})."
    remedy = "Check that it is running, and reachable from here with this user and password."
    if program is SERVICE:
        remedy = f"{remedy} {VARIABLES['DATABASE_URL']}"
    return Finding("database_unreachable", Level.ERROR, "database", what, remedy)


def _judge_readiness(store: Store, program: Program, where: str) -> Finding:
    fault, subject = find_fault(store), "database"
    if fault is None:
        what = f"{where} responds, and has every table and column."
        return Finding("database_ready", Level.OK, subject, what)
    if fault == "database_read_only":
        what = f"{where} is read-only."
        remedy = "Connect to the primary, as a user with write permission."
        return Finding("database_read_only", Level.ERROR, subject, what, remedy)
    return _judge_schema(store, program, where)


def _judge_schema(store: Store, program: Program, where: str) -> Finding:
    """Describe a database that lacks tables or columns."""
    with store.database.connect() as connection:
        inspector = sa.inspect(connection)
        present = [table for table in store.tables if inspector.has_table(table.name, table.schema)]
        found = _find_foreign(store, connection) if program is SERVICE else None
        is_recorded = inspector.has_table(VERSION_TABLE)
    subject, remedy = "database", f"Migrate: {program.upgrade}"
    if found and not (is_recorded and found.missing.isdisjoint(OWN_MARKS)):
        what = f"{where} {found.describe()}"
        remedy = found.remedy(connection.engine.url)
        return Finding("database_of_others", Level.ERROR, subject, what, remedy)
    fault = "lacks tables or columns that this release needs" if present else "is not migrated"
    what = f"{where} responds, but {fault}."
    return Finding("database_not_migrated", Level.ERROR, subject, what, remedy)


def _find_foreign(store: Store, connection: sa.Connection) -> FoundTable | None:
    """Return a table whose name clerkhooks uses. Prefer a table that lacks columns."""
    found = find_table(connection)
    optional = [
        find_optional_table(connection) if store.endings is not None else None,
        find_changes_table(connection) if store.changes is not None else None,
    ]
    return next((one for one in optional if one is not None and one.missing), found)


def _judge_failures(store: Store, program: Program) -> Finding:
    failed = activity.count_failures(store, datetime.now(UTC) - timedelta(days=1))
    if not failed:
        what = "Every message from the last 24 hours has been processed."
        return Finding("messages_processed", Level.OK, "webhooks", what)
    messages = count(failed, "message")
    what = f"{messages} from the last 24 hours failed, and no retry has succeeded."
    remedy = (
        f"List the errors: {program.command} log --failed. "
        f"Then repair: {program.command} sync --failed"
    )
    return Finding("messages_failed", Level.ERROR, "webhooks", what, remedy)


def _judge_last_webhook(store: Store, program: Program) -> Finding:
    last, subject = activity.find_last_received(store), "webhooks"
    if last is None:
        remedy = (
            f"Try it without Clerk: {program.command} send user.created. "
            "Then see Clerk Dashboard → Webhooks → your endpoint."
        )
        what = "No verified webhook has ever arrived."
        return Finding("webhook_never_received", Level.WARNING, subject, what, remedy)
    age = datetime.now(UTC) - last
    hours = age / timedelta(hours=1)
    since = "less than an hour" if hours < 1 else f"{hours:,.1f} hours"
    what = f"The last verified webhook arrived {since} ago."
    if age > MAX_SILENCE:
        remedy = (
            "If you expected more, see the attempts in Clerk Dashboard → Webhooks → your endpoint. "
            "Svix disables an endpoint that keeps failing."
        )
        return Finding("webhooks_silent", Level.WARNING, subject, what, remedy)
    return Finding("webhook_received", Level.OK, subject, what)


def _judge_unfilled(store: Store, program: Program) -> Finding:
    unfilled = activity.count_unfilled(store, MAX_UNFILLED)
    if not unfilled:
        what = "No user has been without a profile for over an hour."
        return Finding("users_filled", Level.OK, "users", what)
    users = count(unfilled, "user")
    what = f"{users} without a profile for over an hour: no webhook has delivered the profile."
    remedy = (
        "Check that the endpoint is subscribed to user.created and user.updated. "
        f"Then repair: {program.command} sync --missing"
    )
    return Finding("users_unfilled", Level.ERROR, "users", what, remedy)

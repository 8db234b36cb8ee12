"""Whether the database answers, is migrated, and holds what Clerk sent."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flask import Flask
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from clerkhooks import activity
from clerkhooks.diagnosis.findings import Case, Finding, Level, within
from clerkhooks.errors import describe
from clerkhooks.models import autocommit, db, init_database
from clerkhooks.ops import current_revisions, own_revisions
from clerkhooks.settings import PROJECT, VARIABLES

DATABASE_SECONDS = 15.0  # for all questions to the database, each of which has its own limit
SILENCE = timedelta(days=7)
UPGRADE = "flask --app wsgi db upgrade"


def check_database_url(case: Case) -> Iterator[Finding]:
    """The database is one that lasts."""
    if "DATABASE_URL" in case.wrong:
        yield Finding("database_skipped", Level.SKIPPED, "database", "Not asked, for DATABASE_URL is wrong.")
    elif make_url(case.settings.database_url).get_backend_name() == "sqlite" and case.text("DYNO"):
        what = "SQLite lies on this platform's disk, which is thrown away with every restart."
        yield Finding("sqlite_on_platform", Level.WRONG, "database", what, "Attach a PostgreSQL, whose URL comes as DATABASE_URL.")


def check_database(case: Case) -> Iterator[Finding]:
    """The database answers, is migrated, and its users and messages are well."""
    if "DATABASE_URL" in case.wrong:
        return
    url = make_url(case.settings.database_url)
    where = _name_database(case)
    # To open SQLite makes the file, and this changes nothing.
    if (
        url.get_backend_name() == "sqlite"
        and not (url.database or "").startswith("file:")
        and not Path(Flask("clerkhooks").instance_path, url.database or "").exists()
    ):
        yield Finding("database_not_migrated", Level.WRONG, "database", f"{where} is not there yet.", f"Make it: {UPGRADE}")
        return
    try:
        yield from within(DATABASE_SECONDS, lambda: _look_into_database(case.settings.database_url, where))
    except (SQLAlchemyError, TimeoutError) as error:
        yield _describe_silence(where, error)


def _describe_silence(where: str, error: Exception) -> Finding:
    remedy = f"Is it running, and reachable from here, with this user and password? {VARIABLES['DATABASE_URL']}"
    return Finding("database_unreachable", Level.WRONG, "database", f"{where} does not answer ({describe(error)}).", remedy)


def _name_database(case: Case) -> str:
    """Kind, host and name, without user and password."""
    url = make_url(case.settings.database_url)
    if url.get_backend_name() == "sqlite":
        return f"SQLite in {(url.database or '').partition('?')[0]}"
    # With an @ that nobody escaped, a part of the password is taken for the host or the name.
    if case.text("DATABASE_URL").count("@") > 1:
        return "PostgreSQL (its URL has more than one @; in a password write %40)"
    host = url.host or url.query.get("host") or "the local socket"
    return f"PostgreSQL on {host if isinstance(host, str) else ','.join(host)}, {url.database or 'its default database'},"


def _look_into_database(database_url: str, where: str) -> list[Finding]:
    app = Flask("clerkhooks")
    init_database(app, database_url)
    with app.app_context():
        try:
            return judge_database(where)
        finally:
            db.session.remove()
            db.engine.dispose()


def judge_database(where: str = "The database") -> list[Finding]:
    """Whether the current application's database, called *where*, answers, is migrated, and its users and messages are well."""
    try:
        with autocommit() as connection:
            current = current_revisions(connection)
        newest, known = own_revisions(str(PROJECT / "migrations"))
        schema = _judge_schema(current, newest, known, where)
        if schema.level is Level.WRONG:
            return [schema]
        return [schema, _judge_failures(), _judge_last_webhook(), _judge_unfilled()]
    except SQLAlchemyError as error:
        return [_describe_silence(where, error)]


def _judge_schema(current: set[str], newest: frozenset[str], known: frozenset[str], where: str) -> Finding:
    if current - known:
        remedy = "Deploy that release here as well, or expect it to be rolled out now."
        return Finding("schema_newer", Level.WARNING, "database", f"{where} is at a migration of a later release.", remedy)
    if not current >= newest:
        what = f"{where} answers, and is {'at an older migration' if current else 'not migrated'}."
        return Finding("database_not_migrated", Level.WRONG, "database", what, f"Migrate: {UPGRADE}")
    return Finding("database_ready", Level.OK, "database", f"{where} answers and is at the newest migration.")


def _judge_failures() -> Finding:
    failed = activity.count_failures(datetime.now(UTC) - timedelta(days=1)).value
    if not failed:
        return Finding("messages_well", Level.OK, "webhooks", "No message of the last day is left failed.")
    remedy = "See why: flask --app wsgi webhooks log --failed. Then: flask --app wsgi users sync --failed"
    return Finding(
        "messages_failed", Level.WRONG, "webhooks", f"Of the last day's messages {failed:,} failed, and no retry has succeeded.", remedy
    )


def _judge_last_webhook() -> Finding:
    last = activity.find_last_received()
    if last is None:
        remedy = "Try it without Clerk: flask --app wsgi webhooks send user.created. Then look at Clerk Dashboard, Webhooks, your endpoint."
        return Finding("webhook_never_received", Level.WARNING, "webhooks", "No verified webhook has ever come.", remedy)
    age = datetime.now(UTC) - last
    hours = age / timedelta(hours=1)
    what = f"The last verified webhook came {'less than an hour' if hours < 1 else f'{hours:,.1f} hours'} ago."
    if age > SILENCE:
        remedy = (
            "If that is odd, look at the attempts in Clerk Dashboard, Webhooks, your endpoint; Svix switches off one that keeps failing."
        )
        return Finding("webhooks_silent", Level.WARNING, "webhooks", what, remedy)
    return Finding("webhook_received", Level.OK, "webhooks", what)


def _judge_unfilled() -> Finding:
    unfilled = activity.count_unfilled(timedelta(hours=1)).value
    if not unfilled:
        return Finding("users_filled", Level.OK, "users", "No row has waited for its webhook for more than an hour.")
    what = f"Users without a profile after an hour, for no webhook has filled them in: {unfilled:,}."
    remedy = "Is the endpoint subscribed to user.created and user.updated? Then: flask --app wsgi users sync --missing"
    return Finding("users_unfilled", Level.WRONG, "users", what, remedy)

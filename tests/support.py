"""Helpers for tests: signed deliveries, database access, log capture and bounded waits."""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from socketserver import BaseServer
from threading import Event, Thread
from typing import Any, Protocol

import psycopg
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from flask import Flask, current_app
from werkzeug.test import TestResponse

from clerkhooks.clerk.fake import FakeClerk, event_body, user_data
from clerkhooks.service import db
from clerkhooks.testing import ClerkService
from clerkhooks.web.logs import logger

DATA = Path(__file__).parent / "data"
NOW_MS = int(time.time() * 1000)
TABLES = ("users", "webhook_messages", "clerk_leases", "clerk_awaited_webhooks")
JOIN_TIMEOUT = 60  # seconds


def load(name: str) -> Any:
    """Return the parsed content of a JSON file in tests/data."""
    return json.loads((DATA / name).read_text())


def join(*threads: Thread, seconds: float = JOIN_TIMEOUT) -> None:
    """Wait until *threads* have ended; fail if that takes longer than *seconds*."""
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    running = [thread.name for thread in threads if thread.is_alive()]
    assert not running, f"still running after {seconds} s: {running}"


@contextmanager
def serving_in_thread(server: BaseServer, released: Event) -> Iterator[None]:
    """Run *server* until the block ends, then set *released* so that pending responses end."""
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield
    finally:
        released.set()
        server.shutdown()
        join(thread)
        server.server_close()


class ThreadPool(ThreadPoolExecutor):
    """A thread pool that fails if a thread is still running a minute after the block ends."""

    def __exit__(self, *_: object) -> None:
        self.shutdown(wait=False)
        join(*self._threads)


def rows(database_url: str, query: str) -> list[tuple[Any, ...]]:
    """Execute *query* on a separate connection and return the rows, if any."""
    if database_url.startswith("sqlite:///"):
        with (
            closing(sqlite3.connect(database_url.removeprefix("sqlite:///"), timeout=30)) as file,
            file,
        ):
            return file.execute(query).fetchall()
    with psycopg.connect(database_url) as connection:
        cursor = connection.execute(query.encode())
        return cursor.fetchall() if cursor.description else []


def pending_schema_changes(*own: str) -> list[Any]:
    """
    Return the changes that ``flask db migrate`` would make for the current application.

    Only clerkhooks' tables and the tables named in *own* are compared. A run of the whole suite
    also imports the examples, which add their tables to the same metadata.
    """

    def is_known(_: object, name: str, kind: str, *__: object) -> bool:
        return kind != "table" or name in (*TABLES, *own)

    options = current_app.extensions["migrate"].configure_args | {"include_object": is_known}
    with db.engine.connect() as connection:
        return list(
            compare_metadata(MigrationContext.configure(connection, opts=options), db.metadata)
        )


@contextmanager
def captured_lines(formatter: logging.Formatter) -> Iterator[list[str]]:
    """Yield a list that receives the formatted log lines until the block ends."""
    written: list[str] = []

    class Handler(logging.Handler):
        """Formats each record when it is logged, as a handler that writes to a file does."""

        def emit(self, record: logging.LogRecord) -> None:
            written.append(formatter.format(record))

    handler = Handler()
    logger.addHandler(handler)
    try:
        yield written
    finally:
        logger.removeHandler(handler)


def user_event(
    user_id: str, event_type: str = "user.updated", *, at: int = NOW_MS, **data: Any
) -> bytes:
    """Return a user event with the time *at* (milliseconds). *data* replaces user fields."""
    whole = user_data(
        user_id, email="ada@example.org", first_name="Ada", last_name="Lovelace", updated_at=at
    )
    return event_body(event_type, whole | data, at)


def deletion(user_id: str, at: int = NOW_MS) -> bytes:
    """Return a deletion event for a user."""
    return event_body("user.deleted", {"deleted": True, "id": user_id, "object": "user"}, at)


def organization_data(organization_id: str, *, updated_at: int) -> dict[str, Any]:
    """Return the ``data`` of an event about an organization. *updated_at* is in milliseconds."""
    return {
        "created_at": updated_at,
        "id": organization_id,
        "image_url": f"https://img.clerk.com/{organization_id}",
        "name": "Acme",
        "object": "organization",
        "public_metadata": {},
        "slug": "acme",
        "updated_at": updated_at,
    }


def membership_data(
    membership_id: str, organization_id: str, user_id: str, *, updated_at: int
) -> dict[str, Any]:
    """Return the ``data`` of an event about a membership. *updated_at* is in milliseconds."""
    return {
        "created_at": updated_at,
        "id": membership_id,
        "object": "organization_membership",
        "organization": organization_data(organization_id, updated_at=updated_at),
        "public_user_data": {"user_id": user_id},
        "role": "org:member",
        "updated_at": updated_at,
    }


def organization_event(
    organization_id: str, verb: str = "created", *, at: int = NOW_MS, **data: Any
) -> bytes:
    """Return an event about an organization. *data* replaces fields."""
    if verb == "deleted":
        whole = {"deleted": True, "id": organization_id, "object": "organization"}
    else:
        whole = organization_data(organization_id, updated_at=at)
    return event_body(f"organization.{verb}", whole | data, at)


def membership_event(
    ids: tuple[str, str, str], verb: str = "created", *, at: int = NOW_MS, **data: Any
) -> bytes:
    """Return an event about a membership. *ids*: membership, organization and user."""
    whole = membership_data(*ids, updated_at=at)
    return event_body(f"organizationMembership.{verb}", whole | data, at)


class Service:
    """The service in this process, and the fake Clerk whose keys it trusts."""

    def __init__(self, app: Flask, clerk: FakeClerk, database_url: str) -> None:
        self.app, self.clerk, self.database_url = app, clerk, database_url
        self.clerk_service = ClerkService(app, clerk)
        self.http = self.clerk_service.http

    def deliver(
        self, body: bytes, message_id: str | None = None, timestamp: int | None = None
    ) -> TestResponse:
        """Post *body* as Svix does."""
        return self.clerk_service.deliver_body(body, message_id, timestamp)

    def outcome(
        self, body: bytes, message_id: str | None = None, timestamp: int | None = None
    ) -> str:
        """Deliver *body*, check that the status is 200, and return the outcome."""
        response = self.deliver(body, message_id, timestamp)
        assert response.status_code == 200, response.text
        return str(response.get_json()["outcome"])

    def call(
        self,
        user_id: str,
        method: str = "GET",
        path: str = "/api/me",
        *,
        body: object = None,
        **claims: Any,
    ) -> TestResponse:
        """Call the API as a signed-in user."""
        return self.clerk_service.client(user_id, **claims).open(path, method=method, json=body)

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Execute *query* on a separate connection and return the rows, if any."""
        return rows(self.database_url, query)

    def user(
        self, user_id: str, columns: Sequence[str] = ("email", "name", "image_url")
    ) -> tuple[Any, ...] | None:
        """Return *columns* of the user's row, or None if there is no row."""
        found = self.rows(f"SELECT {', '.join(columns)} FROM users WHERE id = '{user_id}'")
        return found[0] if found else None


class HasTables(Protocol):
    """A service with a database, either in this process or as a real server."""

    @property
    def database_url(self) -> str:
        """The URL of the database."""

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Execute *query* on a separate connection and return the rows, if any."""


@contextmanager
def broken_users(service: HasTables) -> Iterator[None]:
    """Make every write to the users table fail with an error that quotes the row."""
    if service.database_url.startswith("sqlite"):
        break_ = (
            "CREATE TRIGGER broken BEFORE INSERT ON users"
            " BEGIN SELECT RAISE(ABORT, 'Failing row contains (ada@example.org)'); END"
        )
        repair = "DROP TRIGGER broken"
    else:
        break_ = "ALTER TABLE users ADD CONSTRAINT broken CHECK (email IS NULL) NOT VALID"
        repair = "ALTER TABLE users DROP CONSTRAINT broken"
    service.rows(break_)
    yield
    service.rows(repair)

"""What the tests share: a client that signs for real, and a look into the tables behind the service's back."""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
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


def load(name: str) -> Any:
    """A file of tests/data."""
    return json.loads((DATA / name).read_text())


def rows(database_url: str, query: str) -> list[tuple[Any, ...]]:
    """Read or change the database behind the service's back."""
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
    """What ``flask db migrate`` would change in the current application's database: in its own tables, and in those named."""

    def is_known(_: object, name: str, kind: str, *__: object) -> bool:
        # Whole test runs import examples, whose tables are in the metadata too.
        return kind != "table" or name in ("users", "webhook_messages", *own)

    options = current_app.extensions["migrate"].configure_args | {"include_object": is_known}
    with db.engine.connect() as connection:
        return list(
            compare_metadata(MigrationContext.configure(connection, opts=options), db.metadata)
        )


@contextmanager
def captured_lines(formatter: logging.Formatter) -> Iterator[list[str]]:
    """What is logged until the block ends."""
    written: list[str] = []

    class Handler(logging.Handler):
        """Formats at once, as one that writes does."""

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
    """A user event as of *at* (milliseconds); *data* replaces fields."""
    whole = user_data(
        user_id, email="ada@example.org", first_name="Ada", last_name="Lovelace", updated_at=at
    )
    return event_body(event_type, whole | data, at)


def deletion(user_id: str, at: int = NOW_MS) -> bytes:
    """The event of a user's end."""
    return event_body("user.deleted", {"deleted": True, "id": user_id, "object": "user"}, at)


class Service:
    """The service in this process, with the keys that it trusts."""

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
        """Deliver *body*, which must be taken, and say what became of it."""
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
        """Read or change the tables behind the service's back."""
        return rows(self.database_url, query)

    def user(
        self, user_id: str, columns: Sequence[str] = ("email", "name", "image_url")
    ) -> tuple[Any, ...] | None:
        """Some columns of a user's row."""
        found = self.rows(f"SELECT {', '.join(columns)} FROM users WHERE id = '{user_id}'")
        return found[0] if found else None


class HasTables(Protocol):
    """Whatever knows a database: the service in this process, or the real server."""

    @property
    def database_url(self) -> str:
        """Where it is."""

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Read or change the tables behind the service's back."""


@contextmanager
def broken_users(service: HasTables) -> Iterator[None]:
    """Make every write of a user fail for its content, with an error that quotes the row."""
    if service.database_url.startswith("sqlite"):
        broken = "CREATE TRIGGER broken BEFORE INSERT ON users BEGIN SELECT RAISE(ABORT, 'Failing row contains (ada@example.org)'); END"
        mended = "DROP TRIGGER broken"
    else:
        broken = "ALTER TABLE users ADD CONSTRAINT broken CHECK (email IS NULL) NOT VALID"
        mended = "ALTER TABLE users DROP CONSTRAINT broken"
    service.rows(broken)
    yield
    service.rows(mended)

"""
A minimal WSGI application that does the same work as the service.

It verifies the same signatures and tokens and executes the same statements in the same batches,
under the same gunicorn. It uses neither Flask nor SQLAlchemy during a request, has no pool and no
log, and does not handle invalid requests. The difference from the service is the cost of these
features.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg

from clerkhooks import create_app, deliveries
from clerkhooks.clerk.events import ReceivedEvent, parse_event
from clerkhooks.clerk.signatures import verify_signature
from clerkhooks.store.batching import Batcher
from clerkhooks.store.columns import to_json
from clerkhooks.store.postgresql import LOCK_TIMEOUT
from clerkhooks.web.state import State
from tests.benchmarks.sqlite_statements import connect, write_message

STATE: State = create_app().extensions["clerkhooks"]
STORE, VERIFIER = STATE.store, STATE.authenticator.verifier
IS_SQLITE = STORE.database.dialect_name == "sqlite"
HEADERS = ("svix-id", "svix-timestamp", "svix-signature")
LOCAL = threading.local()


SELECT, APPLY = STORE.statements.select.text, STORE.statements.apply.text


def app(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    """Answer a valid request."""
    answers = {"/api/me": get_me, "/webhooks/clerk": receive}
    answer = answers.get(environ["PATH_INFO"], lambda _environ: {})(environ)
    body = json.dumps(answer).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    start_response("200 OK", headers)
    return [body]


def receive(environ: dict[str, Any]) -> dict[str, str]:
    """Process one delivery."""
    body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
    headers = {name: environ["HTTP_" + name.upper().replace("-", "_")] for name in HEADERS}
    event = parse_event(verify_signature(headers, body, STATE.secrets, time.time()))
    outcome = write_to_sqlite(event) if IS_SQLITE else DELIVERIES(event)
    return {"outcome": outcome, "messageId": event.message_id}


def write_to_postgresql(events: Sequence[ReceivedEvent]) -> list[str]:
    """Write users and messages in one statement."""
    now = datetime.now(UTC)
    rows = STORE.statements.encode(STATE.deliveries.make_row(event, now) for event in events)
    parameters = {"rows": rows, "now": now, "lock_timeout": LOCK_TIMEOUT}
    outcomes = dict(execute(APPLY, parameters).fetchall())
    return [str(outcomes.get(event.message_id, "duplicate")) for event in events]


def read(user_ids: Sequence[str]) -> list[Any]:
    """Read users in one statement."""
    rows = to_json([{"id": user_id} for user_id in dict.fromkeys(user_ids)])
    found = {row[0]: row for row in execute(SELECT, {"rows": rows}).fetchall()}
    return [found[user_id] for user_id in user_ids]


DELIVERIES = Batcher(write_to_postgresql, keys=deliveries.find_keys, concerns_all=bool)
READS = Batcher(read, concerns_all=bool)


def write_to_sqlite(event: ReceivedEvent) -> str:
    """Write a user and a message in one transaction."""
    assert event.user_id is not None
    if not hasattr(LOCAL, "connection"):
        LOCAL.connection = connect(Path(str(STORE.database.engine.url.database)))
    write_message(LOCAL.connection, event.user_id, event.message_id)
    return "applied"


def get_me(environ: dict[str, Any]) -> dict[str, Any]:
    """Answer one call."""
    token = environ["HTTP_AUTHORIZATION"].removeprefix("Bearer ")
    row = READS(VERIFIER.verify(token, time.time()).user_id)
    names = ("id", "email", "name", "imageUrl", "isOnline", "lastSeen")
    return dict(zip(names, map(str, row), strict=False))


def execute(statement: str, parameters: dict[str, Any]) -> psycopg.Cursor[Any]:
    """Execute a statement on the greenlet's own connection."""
    if not hasattr(LOCAL, "connection"):
        LOCAL.connection = psycopg.connect(os.environ["DATABASE_URL"], autocommit=True)
    connection: psycopg.Connection[Any] = LOCAL.connection
    return connection.execute(statement.encode(), parameters)

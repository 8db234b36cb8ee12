"""
The leanest WSGI function that keeps the promises: the same verification and statements, coalesced, under the same gunicorn, and no more.

No Flask, no SQLAlchemy at run time, no pool, no log, no answers to what is wrong. What the service costs beyond it is the price of those.
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

from clerkhooks import statements, users
from clerkhooks.auth import find_keys
from clerkhooks.clerk.events import Event, UserEvent, parse_event
from clerkhooks.clerk.session_tokens import SessionVerifier, TokenRules
from clerkhooks.clerk.signatures import SigningSecret, verify_signature
from clerkhooks.coalescing import Coalescer
from clerkhooks.models import compile_for_psycopg
from clerkhooks.settings import load_settings
from tests.benchmarks.bare_sqlite import connect, write_message

SETTINGS = load_settings()
SECRETS = tuple(SigningSecret(raw) for raw in SETTINGS.webhook_secrets)
VERIFIER = SessionVerifier(find_keys(SETTINGS), TokenRules(SETTINGS.issuer, frozenset(SETTINGS.authorized_parties), frozenset()))
SQLITE = SETTINGS.database_url.startswith("sqlite")
LOCAL = threading.local()


def app(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    """Answer what is well."""
    answer = {"/api/me": get_me, "/webhooks/clerk": receive}.get(environ["PATH_INFO"], lambda _environ: {})(environ)
    body = json.dumps(answer).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


def receive(environ: dict[str, Any]) -> dict[str, str]:
    """One delivery."""
    body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
    headers = {name: environ["HTTP_" + name.upper().replace("-", "_")] for name in ("svix-id", "svix-timestamp", "svix-signature")}
    event = parse_event(verify_signature(headers, body, SECRETS, time.time()))
    outcome = write_to_sqlite(event) if SQLITE else DELIVERIES(event)
    return {"outcome": outcome, "messageId": event.message_id}


def write_to_postgresql(events: Sequence[Event]) -> list[str]:
    """Users and messages in one statement."""
    rows = json.dumps([users._row(event) for event in events])
    outcomes = dict(execute(statements.events_statement(), {"rows": rows, "now": datetime.now(UTC)}).fetchall())
    return [str(outcomes.get(event.message_id, "duplicate")) for event in events]


def read(user_ids: Sequence[str]) -> list[Any]:
    """Users in one statement."""
    rows = json.dumps([{"id": user_id} for user_id in user_ids])
    found = {row[0]: row for row in execute(statements.select_statement("postgresql"), {"rows": rows}).fetchall()}
    return [found[user_id] for user_id in user_ids]


DELIVERIES = Coalescer(write_to_postgresql, keys=users._keys, failed_for_all=bool)
READS = Coalescer(read, keys=lambda user_id: (user_id,), failed_for_all=bool)


def write_to_sqlite(event: Event) -> str:
    """User and message in one transaction."""
    assert isinstance(event, UserEvent)
    if not hasattr(LOCAL, "connection"):
        LOCAL.connection = connect(Path(SETTINGS.database_url.removeprefix("sqlite:///")))
    write_message(LOCAL.connection, event.user_id, event.message_id)
    return "applied"


def get_me(environ: dict[str, Any]) -> dict[str, Any]:
    """One call."""
    session = VERIFIER.verify(environ["HTTP_AUTHORIZATION"].removeprefix("Bearer "), time.time())
    row = READS(session.user_id)
    return dict(zip(("id", "email", "name", "imageUrl", "isOnline", "lastSeen"), map(str, row), strict=False))


def execute(statement: Any, parameters: dict[str, Any]) -> psycopg.Cursor[Any]:
    """Hand a statement to the driver, on the thread's own connection."""
    if not hasattr(LOCAL, "connection"):
        LOCAL.connection = psycopg.connect(os.environ["DATABASE_URL"], autocommit=True)
    text, constants = compile_for_psycopg(statement)
    connection: psycopg.Connection[Any] = LOCAL.connection
    return connection.execute(text, constants | parameters)

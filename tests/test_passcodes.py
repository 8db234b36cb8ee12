"""One-time passcodes in events for emails and text messages are never logged or stored."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import abort, current_app

from clerkhooks import Event
from clerkhooks.clerk.fake import event_body
from clerkhooks.clerk.fake_messages import CODE
from clerkhooks.service import create_app
from clerkhooks.testing import ClerkService
from clerkhooks.web.state import disconnect
from tests.application import Application
from tests.conftest import SLOW_ON_SQLITE
from tests.racing import eventually
from tests.server import Server
from tests.support import NOW_MS

pytest_plugins = ["tests.application"]
PASSCODE = "one-time-8fK2qX"  # unlike CODE, it cannot occur in a time or a number by chance


def with_passcode(service: ClerkService, event_type: str) -> dict[str, Any]:
    """Return the data of an email or a text message that contains PASSCODE several times."""
    text = json.dumps(service.event_data(event_type))
    assert text.count(CODE) >= 2
    data: dict[str, Any] = json.loads(text.replace(CODE, PASSCODE))
    return data


def dump(application: Application) -> str:
    """Return the rows of all tables and, on SQLite, the bytes of the database's files."""
    found: list[object] = []
    with application.app.app_context():
        names = sa.inspect(application.db.engine).get_table_names()
    assert "webhook_messages" in names
    for name in names:
        found += application.rows(f'SELECT * FROM "{name}"')
    if application.database_url.startswith("sqlite"):
        path = Path(application.database_url.removeprefix("sqlite:///"))
        found += [file.read_bytes() for file in path.parent.glob(f"{path.name}*")]
    return str(found)


def raise_value_error(event: Event) -> None:
    """Quote the data in the error, and in the error that caused it."""
    try:
        raise KeyError(str(event.data))
    except KeyError as error:
        error.add_note(str(event.data))
        raise ValueError(str(event.data)) from error


def raise_http_error(event: Event) -> None:
    """Quote the data in an HTTP error."""
    abort(404, str(event.data))


def raise_database_error(event: Event) -> None:
    """Cause a database error that quotes the statement and its parameters."""
    store = current_app.extensions["sqlalchemy"].session
    store.execute(sa.text("SELECT :data FROM missing_table"), {"data": str(event.data)})


@pytest.mark.parametrize("empty_database", SLOW_ON_SQLITE, indirect=True)
@pytest.mark.parametrize("event_type", ["email.created", "sms.created"])
@pytest.mark.parametrize("after_commit", [False, True], ids=["inside", "after"])
@pytest.mark.parametrize(
    "handler", [raise_value_error, raise_http_error, raise_database_error, None]
)
def test_never_logs_or_stores_a_one_time_passcode(
    application: Application,
    caplog: pytest.LogCaptureFixture,
    event_type: str,
    after_commit: bool,
    handler: Callable[[Event], None] | None,
) -> None:
    """No log line, row or response contains it, even if a handler's error quotes the data."""
    received = []

    @application.hooks.on(event_type, after_commit=after_commit)
    def receive(event: Event) -> None:
        received.append(str(event.data))
        if handler is not None:
            handler(event)

    service = application.clerk_service
    data = with_passcode(service, event_type)
    if handler is raise_database_error:  # SQLAlchemy would log the handler's own statement
        caplog.set_level(logging.WARNING, "sqlalchemy")
    with caplog.at_level(logging.DEBUG):
        response = service.deliver(event_type, data)
    assert PASSCODE in received[0]
    is_error = handler is not None and not after_commit
    assert response.status_code == (500 if is_error else 200)
    assert len(application.rows("SELECT * FROM webhook_messages")) == 1
    assert caplog.records
    assert PASSCODE not in caplog.text
    assert not any(PASSCODE in str(vars(record)) for record in caplog.records)
    assert PASSCODE not in response.text + str(response.headers) + dump(application)


@pytest.mark.parametrize("event_type", ["email.created", "sms.created"])
def test_never_logs_the_passcode_of_a_malformed_event(
    application: Application, caplog: pytest.LogCaptureFixture, event_type: str
) -> None:
    """If a signed body is truncated or has no type, the refusal does not quote it."""
    service = application.clerk_service
    body = event_body(event_type, with_passcode(service, event_type), NOW_MS)
    with caplog.at_level(logging.DEBUG):
        for wrong in (body[:-1], body.replace(b'"type"', b'"kind"'), b"[" + body + b"]"):
            response = service.deliver_body(wrong)
            assert (response.status_code, PASSCODE in response.text) == (400, False)
    assert PASSCODE not in caplog.text
    assert not any(PASSCODE in str(vars(record)) for record in caplog.records)
    assert PASSCODE not in dump(application)


@pytest.mark.slow
@pytest.mark.parametrize("server", ["sqlite"], indirect=True, scope="module")
def test_never_prints_a_one_time_passcode(server: Server) -> None:
    """The lines that the server prints, and its table of messages, do not contain it."""
    app = create_app(
        server.clerk.environ | {"DATABASE_URL": server.database_url, "PORT": str(server.port)}
    )
    for event_type in ("email.created", "sms.created"):
        changes = ["--set", f"data.data.otp_code={PASSCODE}"]
        result = app.test_cli_runner().invoke(args=["clerk", "send", event_type, *changes])
        assert (result.exit_code, PASSCODE in result.output) == (0, True), result.output
    disconnect(app)
    eventually(lambda: len(server.lines()) >= 2)
    assert PASSCODE not in server.log.read_text()
    assert PASSCODE not in str(server.rows("SELECT * FROM webhook_messages"))

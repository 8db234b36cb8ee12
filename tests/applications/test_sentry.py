"""An application that uses Sentry's SDK for errors and tracing."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import sentry_sdk
from flask import Flask
from sentry_sdk.envelope import Envelope
from sentry_sdk.integrations.dedupe import DedupeIntegration
from sentry_sdk.integrations.flask import FlaskIntegration
from sentry_sdk.integrations.logging import LoggingIntegration
from sentry_sdk.integrations.sqlalchemy import SqlalchemyIntegration
from sentry_sdk.transport import Transport

from clerkhooks import ClerkHooks, Event
from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.testing import ClerkService
from tests.applications.support import check_users_stay_correct, configuration, make_db, tables


class Captured(Transport):
    """A Sentry transport that stores events instead of sending them."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        """Store an event or a transaction."""
        for item in envelope.items:
            if item.type in ("event", "transaction") and item.payload.json is not None:
                self.events.append(dict(item.payload.json))

    def reports(self) -> list[dict[str, Any]]:
        """Return the errors that were reported."""
        return [event for event in self.events if event.get("type") != "transaction"]

    def statements(self) -> list[str]:
        """Return the SQL statements of the single traced transaction."""
        [transaction] = [event for event in self.events if event.get("type") == "transaction"]
        return [span["description"] for span in transaction["spans"] if span["op"] == "db"]


@pytest.fixture
def captured() -> Iterator[Captured]:
    """Set up Sentry with a transport that stores events."""
    transport = Captured()
    sentry_sdk.init(
        dsn="https://public@sentry.example.com/1",
        transport=transport,
        traces_sample_rate=1.0,
        default_integrations=False,  # default integrations would patch this process permanently
        integrations=[
            FlaskIntegration(),
            SqlalchemyIntegration(),
            LoggingIntegration(),
            DedupeIntegration(),
        ],
        auto_enabling_integrations=False,
    )
    yield transport
    sentry_sdk.get_client().close()
    sentry_sdk.init()


def test_reports_errors_and_traces_statements(
    clerk: FakeClerk, url: str, captured: Captured, caplog: pytest.LogCaptureFixture
) -> None:
    """Each exception is reported once, and clerkhooks' SQL statements become spans."""
    app, db = Flask(__name__), make_db()
    app.config.update(configuration(clerk, url))
    db.init_app(app)
    hooks = ClerkHooks(db)
    hooks.init_app(app)

    @hooks.on("organization.created")
    def fail(event: Event) -> None:
        raise LookupError(event.data["name"])

    @app.get("/bug")
    def bug() -> str:
        raise LookupError("a bug of the application")

    @app.get("/caught")
    def caught() -> str:
        try:
            raise LookupError("caught")
        except LookupError:
            app.logger.exception("it went wrong")
        return "sorry"

    with tables(app):
        check_users_stay_correct(app, clerk)
        assert captured.reports() == []  # refused calls are not reported
        assert app.test_client().get("/bug").status_code == 500
        [reported] = captured.reports()
        [exception] = reported["exception"]["values"]
        assert exception["value"] == "a bug of the application"
        assert exception["stacktrace"]["frames"][-1]["function"] == "bug"
        captured.events.clear()
        with caplog.at_level(logging.ERROR):
            app.test_client().get("/caught")
        assert "LookupError: caught" in caplog.text
        assert "Traceback (most recent call last)" in caplog.text
        [reported] = captured.reports()
        assert reported["exception"]["values"][0]["value"] == "caught"
        captured.events.clear()

        data = {"id": "org_1", "name": "Secret Ltd", "updated_at": 1_700_000_000_000}
        assert ClerkService(app, clerk).deliver("organization.created", data).status_code == 500
        [reported] = captured.reports()
        assert "exception" not in reported
        assert reported["logentry"]["message"] == "request_failed"
        assert reported["extra"]["error"] == "LookupError"
        assert reported["transaction"] == "clerkhooks.receive_webhook"
        assert "Secret Ltd" not in json.dumps(reported)
        captured.events.clear()
        ClerkService(app, clerk).sign_up()
        statements = captured.statements()
        assert any("INSERT INTO users" in text for text in statements), statements
        assert any("INSERT INTO webhook_messages" in text for text in statements), statements
        captured.events.clear()
        ClerkService(app, clerk).client("user_1").get("/api/me")
        statements = captured.statements()
        selects = [text for text in statements if text.strip().startswith("SELECT")]
        assert any("users AS t" in text for text in selects), statements
        assert any("INSERT INTO users" in text for text in statements), statements
        assert "ada@example.org" not in json.dumps(captured.events)

"""An application factory that is called twice in one process, with two configurations."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from flask import Flask, url_for

from clerkhooks import ClerkHooks, Event, SettingsError, create_app
from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.testing import ClerkService
from tests.applications.support import (
    check_users_stay_correct,
    configuration,
    make_db,
    name_of,
    tables,
)
from tests.conftest import MakeDatabase


def make_application(clerk: FakeClerk, url: str, **more: Any) -> tuple[Flask, list[Event]]:
    """Create an application; return it with the list of events that its handler receives."""
    app, db = Flask(__name__), make_db()
    received: list[Event] = []
    app.config.update(configuration(clerk, url, **more))
    db.init_app(app)
    hooks = ClerkHooks(db)
    hooks.on("*")(received.append)
    hooks.init_app(app, routes=("webhooks", "me", "metrics"))
    return app, received


def test_shares_nothing(make_database: MakeDatabase) -> None:
    """Each application has separate secrets, keys, users, handlers and metrics."""
    one, two = FakeClerk(), FakeClerk()
    first, first_received = make_application(
        one, make_database("sqlite"), METRICS_TOKEN="t" * 16, CLERK_AUDIENCE="one"
    )
    second, second_received = make_application(two, make_database("postgresql"))
    with tables(first), tables(second):
        check_users_stay_correct(first, one)
        check_users_stay_correct(second, two)
        first_received.clear()
        second_received.clear()
        user_id = ClerkService(first, one).sign_up()
        assert [event.type for event in first_received] == ["user.created"]
        assert second_received == []
        assert name_of(ClerkService(second, two), user_id) == "New User"
        assert ClerkService(second, one).deliver("user.created", {}).status_code == 401
        assert ClerkService(second, one).client(user_id).get("/api/me").status_code == 401
        headers = {"Authorization": f"Bearer {'t' * 16}"}
        figures = first.test_client().get("/metrics", headers=headers).text
        assert 'clerkhooks_webhooks_total{outcome="applied",type="user.created"}' in figures
        assert second.test_client().get("/metrics", headers=headers).status_code == 404


def test_shares_extension_objects_between_applications(
    clerk: FakeClerk, make_database: MakeDatabase
) -> None:
    """With shared extension objects, each application still has its own database."""
    db = make_db()
    hooks = ClerkHooks(db)
    apps = []
    for _ in range(2):
        app = Flask(__name__)
        app.config.update(configuration(clerk, make_database("sqlite")))
        db.init_app(app)
        hooks.init_app(app, url_prefix="/clerk")
        apps.append(app)
    with tables(apps[0]), tables(apps[1]):
        for app in apps:
            check_users_stay_correct(app, clerk, "/clerk/api/me")
        user_id = ClerkService(apps[0], clerk).sign_up(first_name="Ada", last_name="Lovelace")
        response = ClerkService(apps[1], clerk).client(user_id).get("/clerk/api/me")
        assert response.get_json()["name"] == "New User"
        with apps[0].test_request_context():
            assert url_for("clerkhooks.receive_webhook") == "/clerk/webhooks/clerk"


def test_reports_all_configuration_errors_at_once(clerk: FakeClerk, sqlite_url: str) -> None:
    """One exception lists the errors of all settings."""
    app, db = Flask(__name__), make_db()
    wrong = {
        "CLERK_WEBHOOK_SECRET": "sk_test_1",
        "CLERK_ISSUER": ["ftp://x"],
        "DATABASE_POOL_SIZE": 0,
    }
    app.config.update(configuration(clerk, sqlite_url) | wrong)
    db.init_app(app)
    with pytest.raises(SettingsError) as refused:
        ClerkHooks(db).init_app(app)
    assert {fault.variable for fault in refused.value.faults} == set(wrong)


def test_logs_only_to_the_applications_handlers(
    clerk: FakeClerk,
    make_database: MakeDatabase,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each delivery logs one line, and a service in the same process does not print it."""
    url = make_database("sqlite")
    service = create_app(clerk.environ | {"DATABASE_URL": url, "LOG_FORMAT": "json"})
    app, _ = make_application(clerk, make_database("sqlite"))
    with tables(service), tables(app):
        capsys.readouterr()
        with caplog.at_level(logging.INFO, "clerkhooks"):
            ClerkService(app, clerk).sign_up()
        assert [record.getMessage() for record in caplog.records] == ["webhook_delivered"]
        assert vars(caplog.records[0])["outcome"] == "applied"
        assert "webhook" not in capsys.readouterr().out

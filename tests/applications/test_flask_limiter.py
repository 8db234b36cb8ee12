"""An application with Flask-Limiter's rate limits."""

from __future__ import annotations

from typing import cast

from flask import Blueprint, Flask
from flask_limiter import Limiter
from flask_limiter.util import get_remote_address

from clerkhooks import ClerkHooks, current_user, require_auth
from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.testing import ClerkService
from tests.applications.support import check_users_stay_correct, configuration, make_db, tables
from tests.support import rows, user_event


def test_limits_the_applications_routes_and_exempts_clerkhooks(
    clerk: FakeClerk, sqlite_url: str
) -> None:
    """A limit applies to protected views, and clerkhooks' blueprint can be exempted."""
    app, db = Flask(__name__), make_db()
    app.config.update(configuration(clerk, sqlite_url))
    db.init_app(app)
    ClerkHooks(db).init_app(app)
    limiter = Limiter(
        get_remote_address, app=app, default_limits=["3 per minute"], storage_uri="memory://"
    )
    limiter.exempt(cast("Blueprint", app.blueprints["clerkhooks"]))

    @app.get("/costly")
    @require_auth
    def costly() -> str:
        return "done"

    with tables(app):
        check_users_stay_correct(app, clerk)
        service = ClerkService(app, clerk)
        ada = service.client(service.sign_up())
        assert [ada.get("/costly").status_code for _ in range(5)] == [200, 200, 200, 429, 429]
        for _ in range(5):
            service.sign_up()


def test_limits_each_user_behind_require_auth(clerk: FakeClerk, sqlite_url: str) -> None:
    """A limit below ``require_auth`` runs after authentication, so it can count per user."""
    app, db = Flask(__name__), make_db()
    app.config.update(configuration(clerk, sqlite_url))
    db.init_app(app)
    limiter = Limiter(get_remote_address, app=app, storage_uri="memory://")
    ClerkHooks(db).init_app(app)

    @app.get("/costly")
    @require_auth
    @limiter.limit("2 per minute", key_func=lambda: current_user.id)
    def costly() -> str:
        return "done"

    with tables(app):
        service = ClerkService(app, clerk)
        for _ in range(2):
            client = service.client(service.sign_up())
            assert [client.get("/costly").status_code for _ in range(3)] == [200, 200, 429]
        assert service.http.get("/costly").status_code == 401


def test_limits_routes_that_are_not_exempted(clerk: FakeClerk, sqlite_url: str) -> None:
    """The application's limit applies to deliveries; a refused delivery changes nothing."""
    app, db = Flask(__name__), make_db()
    app.config.update(configuration(clerk, sqlite_url))
    db.init_app(app)
    ClerkHooks(db).init_app(app)
    Limiter(get_remote_address, app=app, default_limits=["2 per minute"], storage_uri="memory://")
    app.register_error_handler(429, lambda error: ("Slowly, please.", 429))
    with tables(app):
        service = ClerkService(app, clerk)
        bodies = [user_event(f"user_{number}") for number in range(3)]
        answers = [service.deliver_body(body) for body in bodies]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert answers[2].text == "Slowly, please."
        assert rows(sqlite_url, "SELECT count(*) FROM webhook_messages") == [(2,)]

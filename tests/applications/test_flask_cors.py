"""An application that allows every origin, with flask-cors."""

from __future__ import annotations

import pytest
from flask import Flask
from flask_cors import CORS

from clerkhooks import ClerkHooks, require_auth
from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.testing import ClerkService
from tests.applications.support import check_users_stay_correct, configuration, make_db, tables

EVIL = "https://evil.example.com"


def create_app(clerk: FakeClerk, url: str, *, first: bool) -> Flask:
    """Create the application; set up CORS before clerkhooks if *first*, otherwise after it."""
    app, db = Flask(__name__), make_db()
    app.config.update(configuration(clerk, url))
    db.init_app(app)
    if first:
        CORS(app)
    ClerkHooks(db).init_app(app)
    if not first:
        CORS(app)
    app.add_url_rule("/open", view_func=lambda: "open", endpoint="open")
    return app


@pytest.mark.parametrize("first", [True, False])
def test_sends_one_cors_header(clerk: FakeClerk, sqlite_url: str, first: bool) -> None:
    """Only authorized parties may call clerkhooks' routes; other routes allow every origin."""
    app = create_app(clerk, sqlite_url, first=first)
    with tables(app):
        check_users_stay_correct(app, clerk)
        service = ClerkService(app, clerk)
        ada = service.client(service.sign_up())
        for method, path in (("GET", "/api/me"), ("PUT", "/api/me/presence")):
            preflight = {
                "Origin": clerk.authorized_party,
                "Access-Control-Request-Method": method,
                "Access-Control-Request-Headers": "authorization",
            }
            for response in (
                ada.open(path, method=method, headers={"Origin": clerk.authorized_party}),
                service.http.options(path, headers=preflight),
            ):
                allowed = response.headers.getlist("Access-Control-Allow-Origin")
                assert allowed == [clerk.authorized_party], (path, response.status)
            assert preflight_headers(service, path, preflight) == "authorization"
            for origin in (EVIL, "null"):
                headers = ada.open(path, method=method, headers={"Origin": origin}).headers
                assert headers.getlist("Access-Control-Allow-Origin") == []
        plain = Flask(__name__)
        CORS(plain)
        plain.add_url_rule("/open", view_func=lambda: "open", endpoint="open")
        for method in ("GET", "OPTIONS", "POST"):
            asked = {"Origin": EVIL, "Access-Control-Request-Method": "GET"}
            answers = [
                one.test_client().open("/open", method=method, headers=asked)
                for one in (app, plain)
            ]
            assert [*answers[0].headers] == [*answers[1].headers]
            assert answers[0].headers.getlist("Access-Control-Allow-Origin") in (["*"], [EVIL])


def preflight_headers(service: ClerkService, path: str, preflight: dict[str, str]) -> str:
    """Return the headers that a preflight allows."""
    response = service.http.options(path, headers=preflight)
    return response.headers["Access-Control-Allow-Headers"]


def test_sends_the_applications_cors_headers_for_protected_views(
    clerk: FakeClerk, sqlite_url: str
) -> None:
    """All responses of a protected view, even to preflights, have the application's headers."""
    app = create_app(clerk, sqlite_url, first=False)

    @app.get("/notes")
    @require_auth
    def notes() -> str:
        return "notes"

    with tables(app):
        service = ClerkService(app, clerk)
        origin = {"Origin": "https://pages.example.com"}
        asked = origin | {"Access-Control-Request-Method": "GET"}
        client = service.client(service.sign_up())
        for response, status in (
            (client.get("/notes", headers=origin), 200),
            (service.http.get("/notes", headers=origin), 401),
            (service.http.options("/notes", headers=asked), 200),
        ):
            assert response.status_code == status
            assert len(response.headers.getlist("Access-Control-Allow-Origin")) == 1


def test_has_no_cors_without_authorized_parties(clerk: FakeClerk, sqlite_url: str) -> None:
    """Without authorized parties, clerkhooks' routes send no CORS headers."""
    app, db = Flask(__name__), make_db()
    app.config.update(configuration(clerk, sqlite_url), CLERK_AUTHORIZED_PARTIES="")
    db.init_app(app)
    ClerkHooks(db).init_app(app)
    with tables(app):
        response = ClerkService(app, clerk).http.get("/api/me", headers={"Origin": EVIL})
        assert not any(name.startswith("Access-Control") for name, _ in response.headers)

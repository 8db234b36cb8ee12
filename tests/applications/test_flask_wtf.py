"""An application with CSRF protection by Flask-WTF."""

from __future__ import annotations

import pytest
from flask import Flask, render_template_string
from flask_wtf.csrf import CSRFProtect

from clerkhooks import ClerkHooks
from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.testing import ClerkService
from tests.applications.support import check_users_stay_correct, configuration, make_db, tables
from tests.support import user_event


def create_app(clerk: FakeClerk, url: str, *, is_exempt: bool) -> Flask:
    """Create an application with a form."""
    app, db, csrf = Flask(__name__), make_db(), CSRFProtect()
    app.config.update(configuration(clerk, url))
    db.init_app(app)
    csrf.init_app(app)
    ClerkHooks(db).init_app(app)
    if is_exempt:
        csrf.exempt(app.blueprints["clerkhooks"])
    app.add_url_rule("/form", "form", lambda: render_template_string("{{ csrf_token() }}"))
    app.add_url_rule("/form", "save", lambda: "saved", methods=["POST"])
    return app


def test_works_exempt_from_csrf_protection(clerk: FakeClerk, sqlite_url: str) -> None:
    """The blueprint can be exempted, and the application's forms stay protected."""
    app = create_app(clerk, sqlite_url, is_exempt=True)
    with tables(app):
        check_users_stay_correct(app, clerk)
        service = ClerkService(app, clerk)
        ada = service.client(service.sign_up())
        assert ada.put("/api/me/presence", json={"isOnline": True}).status_code == 200
        browser = app.test_client()
        token = browser.get("/form").text
        assert browser.post("/form").status_code == 400
        assert browser.post("/form", data={"csrf_token": token}).text == "saved"


@pytest.mark.parametrize("testing", [True, False])
def test_writes_nothing_if_the_application_refuses(
    clerk: FakeClerk, sqlite_url: str, testing: bool
) -> None:
    """Without the exemption, the application refuses a delivery with its own response."""
    app = create_app(clerk, sqlite_url, is_exempt=False)
    app.testing = testing
    with tables(app):
        service = ClerkService(app, clerk)
        response = service.deliver_body(user_event("user_1"), "msg_1")
        assert (response.status_code, response.mimetype) == (400, "text/html")
        assert "CSRF token is missing" in response.text
        assert service.client("user_1").get("/api/me").get_json()["name"] == "New User"

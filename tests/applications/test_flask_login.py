"""An application whose pages require a Flask-Login account, separate from Clerk's users."""

from __future__ import annotations

from flask import Flask, redirect, request
from flask.typing import ResponseReturnValue
from flask_login import LoginManager, UserMixin, current_user, login_user

from clerkhooks import ClerkHooks, require_auth
from clerkhooks import current_user as clerk_user
from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.testing import ClerkService
from tests.applications.support import check_users_stay_correct, configuration, make_db, tables


class Admin(UserMixin):  # type: ignore[misc]  # untyped
    """A user of the back office."""

    def __init__(self, name: str) -> None:
        self.id = name


def create_app(clerk: FakeClerk, url: str) -> Flask:
    """Create a back office with an API for Clerk's users."""
    app, db = Flask(__name__), make_db()
    app.config.update(configuration(clerk, url))
    db.init_app(app)
    ClerkHooks(db).init_app(app)
    manager = LoginManager(app)
    manager.user_loader(Admin)

    @app.before_request
    def require_login() -> ResponseReturnValue | None:
        is_clerks = request.blueprint == "clerkhooks" or request.path.startswith("/app/")
        if is_clerks or request.endpoint == "login" or current_user.is_authenticated:
            return None
        return redirect("/login")

    @app.get("/login")
    def login() -> str:
        login_user(Admin("root"))
        return "welcome"

    @app.get("/office")
    def office() -> str:
        return str(current_user.id)

    @app.get("/app/both")
    @require_auth
    def both() -> list[object]:
        return [clerk_user.name, current_user.is_authenticated]

    return app


def test_keeps_both_kinds_of_login_separate(clerk: FakeClerk, sqlite_url: str) -> None:
    """Each login protects its own pages and gives no access to the pages of the other login."""
    app = create_app(clerk, sqlite_url)
    with tables(app):
        check_users_stay_correct(app, clerk)
        browser = app.test_client()
        assert browser.get("/office").headers["Location"] == "/login"
        service = ClerkService(app, clerk)
        user_id = service.sign_up(first_name="Ada", last_name="Lovelace")
        assert service.client(user_id).get("/app/both").get_json() == ["Ada Lovelace", False]
        assert service.client(user_id).get("/office").status_code == 302
        browser.get("/login")
        assert browser.get("/office").text == "root"
        assert browser.get("/app/both").status_code == 401

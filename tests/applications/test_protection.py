"""Applications that use ``require_auth`` in correct and incorrect places."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar

import pytest
from flask import Blueprint, Flask, Response, request
from flask.typing import ResponseReturnValue
from flask.views import MethodView

from clerkhooks import ClerkHooks, require_auth
from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.testing import ClerkService
from tests.applications.support import configuration, make_db, tables
from tests.conftest import MakeDatabase


def shout(view: Callable[..., str]) -> Callable[..., str]:
    """Decorate a view. This is an example of an application's own decorator."""

    @wraps(view)
    def shouted(*args: Any, **kwargs: Any) -> str:
        return view(*args, **kwargs).upper()

    return shouted


def above_a_route(app: Flask) -> None:
    """Apply ``require_auth`` above ``app.get``, which has already registered the view."""

    @require_auth
    @app.get("/secret")
    def secret() -> str:
        return "secret"


def above_a_blueprints_route(app: Flask) -> None:
    """Apply ``require_auth`` above a blueprint's route, with a condition."""
    blueprint = Blueprint("secrets", __name__)

    @require_auth(role="org:admin")
    @blueprint.route("/secret")
    def secret() -> str:
        return "secret"

    app.register_blueprint(blueprint)


def above_another_decorator(app: Flask) -> None:
    """Apply ``require_auth`` above the route, with another decorator in between."""

    @require_auth
    @shout
    @app.route("/secret")
    def secret() -> str:
        return "secret"


def between_two_routes(app: Flask) -> None:
    """Apply ``require_auth`` between two routes, so that only the upper one is protected."""

    @app.get("/protected", endpoint="protected")
    @require_auth
    @app.get("/secret")
    def secret() -> str:
        return "secret"


WRONG = [above_a_route, above_a_blueprints_route, above_another_decorator, between_two_routes]


@pytest.mark.parametrize("register", WRONG)
def test_never_serves_a_view_protected_too_late(
    clerk: FakeClerk, sqlite_url: str, register: Callable[[Flask], None]
) -> None:
    """Every request fails with an error that explains the fix."""
    app, db = Flask(__name__), make_db()
    app.config.update(configuration(clerk, sqlite_url, PROPAGATE_EXCEPTIONS=False))
    db.init_app(app)
    ClerkHooks(db).init_app(app)
    register(app)
    with tables(app):
        for _ in range(3):
            response = app.test_client().get("/secret")
            assert response.status_code == 500
            assert "secret" not in response.text.lower()
        app.config["PROPAGATE_EXCEPTIONS"] = True
        with pytest.raises(RuntimeError, match="is above the route"):
            app.test_client().get("/secret")


@pytest.mark.parametrize("register", WRONG)
def test_refuses_to_start_with_a_view_protected_too_late(
    clerk: FakeClerk, sqlite_url: str, register: Callable[[Flask], None]
) -> None:
    """``init_app`` raises an error if a view was registered before it was protected."""
    app, db = Flask(__name__), make_db()
    app.config.update(configuration(clerk, sqlite_url))
    db.init_app(app)
    register(app)
    with pytest.raises(RuntimeError, match="secret' is public"):
        ClerkHooks(db).init_app(app)


def test_serves_every_valid_use(clerk: FakeClerk, sqlite_url: str) -> None:
    """``require_auth`` works on functions, MethodViews and blueprints, even if applied twice."""
    app, db = Flask(__name__), make_db()
    app.config.update(configuration(clerk, sqlite_url))
    db.init_app(app)
    ClerkHooks(db).init_app(app)
    guarded = Blueprint("guarded", __name__)
    guarded.before_request(require_auth())
    guarded.add_url_rule("/guarded", view_func=lambda: "ok", endpoint="guarded")
    app.register_blueprint(guarded)

    @app.get("/below")
    @shout
    @require_auth
    @shout
    def below() -> str:
        return "ok"

    @app.get("/twice")
    @require_auth
    @require_auth(optional=True)
    def twice() -> str:
        return "ok"

    class Whole(MethodView):
        decorators: ClassVar = [require_auth]

        def get(self) -> str:
            return "ok"

    class Part(MethodView):
        @require_auth
        def get(self) -> str:
            return "ok"

        def post(self) -> str:
            return "public"

    def both() -> str:
        return "ok"

    def shouted() -> str:
        return "ok"

    app.add_url_rule("/whole", view_func=Whole.as_view("whole"))
    app.add_url_rule("/part", view_func=Part.as_view("part"))
    app.add_url_rule("/private", "private", require_auth(both))
    app.add_url_rule("/shouted", "shouted", shout(require_auth(shouted)))
    with tables(app):
        service = ClerkService(app, clerk)
        ada = service.client(service.sign_up())
        for path in ("/guarded", "/below", "/twice", "/whole", "/part", "/private", "/shouted"):
            assert service.http.get(path).status_code == 401, path
            assert ada.get(path).text.lower() == "ok", path
        assert service.http.post("/part").text == "public"


def page() -> str:
    """Return a response."""
    return "ok"


def test_serves_a_factorys_views_each_time(clerk: FakeClerk, make_database: MakeDatabase) -> None:
    """Two applications can each protect and serve a view from a module that they share."""
    apps = []
    for _ in range(2):
        app, db = Flask(__name__), make_db()
        app.config.update(configuration(clerk, make_database("sqlite")))
        db.init_app(app)
        ClerkHooks(db).init_app(app)
        app.add_url_rule("/private", "private", require_auth(page))
        app.add_url_rule("/open", "open", lambda: "ok")
        apps.append(app)
    for app in apps:
        with tables(app):
            assert app.test_client().get("/open").text == "ok"
            assert app.test_client().get("/private").status_code == 401


@pytest.mark.parametrize("setting", ["TESTING", "DEBUG"])
def test_raises_in_development(clerk: FakeClerk, sqlite_url: str, setting: str) -> None:
    """In testing and debug mode, the mistake raises an exception that explains the fix."""
    app, db = Flask(__name__), make_db()
    app.config.update(configuration(clerk, sqlite_url, **{setting: True}))
    db.init_app(app)
    ClerkHooks(db).init_app(app)
    above_a_route(app)
    with tables(app), pytest.raises(RuntimeError, match="Put it below"):
        app.test_client().get("/secret")


def test_fails_closed_despite_the_applications_error_handlers(
    clerk: FakeClerk, sqlite_url: str
) -> None:
    """The view is not served, even if the application handles every exception."""
    app, db = Flask(__name__), make_db()
    app.config.update(configuration(clerk, sqlite_url))
    db.init_app(app)
    ClerkHooks(db).init_app(app)
    above_a_route(app)
    app.register_error_handler(Exception, lambda error: ("sorry", 200))
    with tables(app):
        for _ in range(2):
            assert app.test_client().get("/secret").text == "sorry"


def test_refuses_a_class(clerk: FakeClerk) -> None:
    """A MethodView is protected through ``decorators``; decorating the class raises an error."""
    with pytest.raises(TypeError, match="MethodView"):
        require_auth(MethodView)


def test_does_not_pass_the_user_to_another_application(make_database: MakeDatabase) -> None:
    """A request that is forwarded to another application is anonymous there."""
    ours, theirs = FakeClerk(), FakeClerk()
    apps = []
    for clerk in (ours, theirs):
        app, db = Flask(__name__), make_db()
        app.config.update(configuration(clerk, make_database("sqlite")))
        db.init_app(app)
        ClerkHooks(db).init_app(app)
        apps.append(app)
    first, second = apps

    @first.get("/forwarded")
    @require_auth
    def forward() -> ResponseReturnValue:
        environ = request.environ | {"PATH_INFO": "/api/me"}
        return Response.from_app(second, environ)

    with tables(first), tables(second):
        service = ClerkService(first, ours)
        response = service.client(service.sign_up()).get("/forwarded")
        assert response.status_code == 401

"""Applications with Flask settings that affect how routes match and responses look."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from typing import Any

import pytest
from flask import Blueprint, Flask, g, jsonify, request, session
from flask.json.provider import DefaultJSONProvider
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.test import Client
from werkzeug.wrappers import Response

from clerkhooks import ClerkHooks, current_user, require_auth
from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.testing import ClerkService
from tests.applications.support import check_users_stay_correct, configuration, make_db, tables
from tests.support import rows, user_event


class Provider(DefaultJSONProvider):
    """A JSON provider with its own date format and unsorted keys."""

    sort_keys = False
    compact = False

    @staticmethod
    def default(o: Any) -> Any:
        """Return a serializable value for *o*."""
        return f"{o:%d.%m.%Y}" if isinstance(o, date) else DefaultJSONProvider.default(o)


def sort_keys(app: Flask) -> None:
    """Sort JSON keys, as Flask does by default."""
    app.json.sort_keys = True  # type: ignore[attr-defined]


def use_provider(app: Flask) -> None:
    """Use a custom JSON provider."""
    app.json_provider_class = Provider
    app.json = Provider(app)


def match_strictly(app: Flask) -> None:
    """Match trailing slashes strictly."""
    app.url_map.strict_slashes = True
    app.url_map.merge_slashes = False


def match_leniently(app: Flask) -> None:
    """Match paths with and without a trailing slash."""
    app.url_map.strict_slashes = False


def never_redirect(app: Flask) -> None:
    """Disable redirects to a route's default URL, and trap HTTP exceptions."""
    app.url_map.redirect_defaults = False
    app.config["TRAP_HTTP_EXCEPTIONS"] = True
    app.config["TRAP_BAD_REQUEST_ERRORS"] = True


def set_server_name(app: Flask) -> None:
    """Set the application's host name and URL scheme."""
    app.config.update(SERVER_NAME="shop.example.com", PREFERRED_URL_SCHEME="https")


SETUPS: list[Callable[[Flask], None]] = [
    sort_keys, use_provider, match_strictly, match_leniently, never_redirect, set_server_name,
]  # fmt: skip


def create_app(
    clerk: FakeClerk, url: str, set_up: Callable[[Flask], None], *, with_us: bool
) -> Flask:
    """Create an application with several kinds of routes, with or without clerkhooks."""
    app, db = Flask(__name__), make_db()
    set_up(app)
    app.config.update(configuration(clerk, url))
    db.init_app(app)
    if with_us:
        ClerkHooks(db).init_app(app)

    @app.get("/folder/")
    def folder() -> Any:
        return jsonify({"b": 1, "a": date(2026, 1, 31)})

    @app.get("/file")
    def file() -> dict[str, int]:
        session["seen"] = 1
        return {"b": 1, "a": 2}

    @app.post("/echo")
    def echo() -> Any:
        return request.get_json()

    return app


def answers(app: Flask) -> list[tuple[int, str, str | None, list[str]]]:
    """Return the responses of the application's own routes."""
    client, found = app.test_client(), []
    for method, path, data in (
        ("GET", "/folder", None),
        ("GET", "/folder/", None),
        ("GET", "//folder/", None),
        ("GET", "/file", None),
        ("GET", "/file/", None),
        ("OPTIONS", "/file", None),
        ("DELETE", "/file", None),
        ("HEAD", "/file", None),
        ("POST", "/echo", b'{"b": 1, "a": 2}'),
        ("GET", "/nowhere", None),
    ):
        response = client.open(path, method=method, data=data, content_type="application/json")
        location = response.headers.get("Location")
        found.append(
            (response.status_code, response.text, location, sorted(response.headers.keys()))
        )
    return found


@pytest.mark.parametrize("set_up", SETUPS)
def test_leaves_every_setting_unchanged(
    clerk: FakeClerk, sqlite_url: str, set_up: Callable[[Flask], None]
) -> None:
    """The application's settings and the bytes of its responses are unchanged."""
    app = create_app(clerk, sqlite_url, set_up, with_us=True)
    without = create_app(clerk, sqlite_url, set_up, with_us=False)
    with tables(app):
        assert answers(app) == answers(without)
        for name in ("strict_slashes", "merge_slashes", "redirect_defaults", "host_matching"):
            assert getattr(app.url_map, name) == getattr(without.url_map, name)
        assert vars(app.json).keys() == vars(without.json).keys()
        assert type(app.json) is type(without.json)
        assert app.config.keys() == without.config.keys()
        assert app.extensions.keys() - without.extensions.keys() == {"clerkhooks"}
        for hook in ("before_request_funcs", "teardown_request_funcs", "url_value_preprocessors",
                     "template_context_processors", "teardown_appcontext_funcs"):  # fmt: skip
            ours, theirs = getattr(app, hook), getattr(without, hook)
            assert len(ours.get(None, ()) if isinstance(ours, dict) else ours) == len(
                theirs.get(None, ()) if isinstance(theirs, dict) else theirs
            )
        assert not app.after_request_funcs.get(None)
        assert app.jinja_env.globals.keys() == without.jinja_env.globals.keys()
        assert app.logger.handlers == without.logger.handlers
    with without.app_context():
        without.extensions["sqlalchemy"].engine.dispose()


@pytest.mark.parametrize("set_up", SETUPS)
def test_answers_the_same_under_every_setting(
    clerk: FakeClerk, sqlite_url: str, set_up: Callable[[Flask], None]
) -> None:
    """All routes accept trailing slashes, never redirect and do not sort JSON keys."""
    app = create_app(clerk, sqlite_url, set_up, with_us=True)
    with tables(app):
        check_users_stay_correct(app, clerk)
        service = ClerkService(app, clerk)
        body = user_event("user_1")
        response = service.http.post("/webhooks/clerk/", data=body, headers=clerk.headers(body))
        assert (response.status_code, list(response.get_json())) == (200, ["outcome", "messageId"])
        shape = ["id", "email", "name", "imageUrl", "isOnline", "lastSeen"]
        for path in ("/api/me", "/api/me/"):
            assert list(service.client("user_1").get(path).get_json()) == shape
        problem = service.http.get("/api/me")
        assert list(problem.get_json()) == ["type", "title", "status", "reason"]


def test_moves_under_a_prefix(clerk: FakeClerk, url: str) -> None:
    """With ``url_prefix``, the default paths are free for the application's own routes."""
    app, db = Flask(__name__), make_db()
    app.config.update(configuration(clerk, url, METRICS_TOKEN="t" * 16))
    db.init_app(app)
    routes = ("webhooks", "me", "health", "metrics")
    ClerkHooks(db).init_app(app, url_prefix="/auth/v1", routes=routes)
    app.add_url_rule("/api/me", "own", lambda: "the application's own")
    with tables(app):
        check_users_stay_correct(app, clerk, "/auth/v1/api/me")
        client = app.test_client()
        assert client.get("/api/me").text == "the application's own"
        assert client.get("/auth/v1/readyz").get_json() == {"status": "ok"}
        headers = {"Authorization": f"Bearer {'t' * 16}"}
        assert "clerkhooks_webhooks_total" in client.get("/auth/v1/metrics", headers=headers).text
        for path in ("/webhooks/clerk", "/healthz", "/readyz", "/metrics"):
            assert client.post(path).status_code == client.get(path).status_code == 404


def test_serves_the_named_routes_only(clerk: FakeClerk, sqlite_url: str) -> None:
    """An application may serve only webhooks and still authenticate its own views."""
    app, db = Flask(__name__), make_db()
    app.config.update(configuration(clerk, sqlite_url))
    db.init_app(app)
    ClerkHooks(db).init_app(app, routes=("webhooks",))

    @app.get("/me")
    @require_auth
    def me() -> dict[str, str]:
        return {"name": current_user.name}

    with tables(app):
        check_users_stay_correct(app, clerk, "/me")
        ours = [rule.rule for rule in app.url_map.iter_rules() if "clerkhooks" in rule.endpoint]
        assert ours == ["/webhooks/clerk"]
        assert app.test_client().get("/api/me").status_code == 404


def test_works_behind_middleware(clerk: FakeClerk, sqlite_url: str) -> None:
    """Deliveries work at a mount point, behind a proxy, and after hooks that read the body."""
    app, db = Flask(__name__), make_db()
    app.config.update(configuration(clerk, sqlite_url, APPLICATION_ROOT="/shop"))
    db.init_app(app)
    ClerkHooks(db).init_app(app)
    bodies: list[bytes] = []

    @app.before_request
    def log_bodies() -> None:
        g.started = True
        bodies.append(request.get_data())
        request.values.get("page")
        request.get_json(silent=True)

    @app.after_request
    def add_header(response: Response) -> Response:
        response.headers["X-Frame-Options"] = "DENY"
        return response

    with tables(app):
        check_users_stay_correct(app, clerk)
        assert any(b"Lovelace" in body for body in bodies)
        mounted = DispatcherMiddleware(Response("nothing", 404), {"/shop": ProxyFix(app, x_for=1)})
        body, client = user_event("user_1"), Client(mounted)
        response = client.post("/shop/webhooks/clerk", data=body, headers=clerk.headers(body))
        assert response.status_code == 200
        assert response.headers["X-Frame-Options"] == "DENY"
        assert client.post("/webhooks/clerk", data=body).status_code == 404
        assert rows(sqlite_url, "SELECT name FROM users WHERE id = 'user_1'") == [("Ada Lovelace",)]


def test_matches_hosts_and_subdomains(clerk: FakeClerk, sqlite_url: str) -> None:
    """In an application with subdomains, clerkhooks' routes are on the main domain."""
    app, db = Flask(__name__, subdomain_matching=True), make_db()
    app.config.update(configuration(clerk, sqlite_url, SERVER_NAME="example.com"))
    db.init_app(app)
    ClerkHooks(db).init_app(app)
    tenants = Blueprint("tenants", __name__, subdomain="<tenant>")
    tenants.before_request(require_auth())
    tenants.add_url_rule(
        "/hello", view_func=lambda tenant: f"{tenant} {current_user.name}", endpoint="hello"
    )
    app.register_blueprint(tenants)
    with tables(app):
        check_users_stay_correct(app, clerk)
        service = ClerkService(app, clerk)
        ada = service.client(service.sign_up())
        assert ada.get("/hello", base_url="http://acme.example.com").text == "acme Ada Lovelace"
        assert service.http.get("/hello", base_url="http://acme.example.com").status_code == 401

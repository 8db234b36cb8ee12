"""An application under development: its exceptions, error handlers and templates."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Blueprint, Flask, Response, abort, render_template, request
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import HTTPException, InternalServerError

from clerkhooks import ClerkHooks, require_auth
from clerkhooks.clerk.fake import FakeClerk, event_body
from clerkhooks.testing import ClerkService
from clerkhooks.web.state import disconnect
from tests.applications.support import check_users_stay_correct, configuration, make_db, tables


class Odd(HTTPException):
    """An error with a non-standard status."""

    code = 460
    description = "odd"


def create_app(clerk: FakeClerk, url: str, *, problems: bool = False, **more: Any) -> Flask:
    """Create an application with views that fail in several ways."""
    app, db = Flask(__name__), make_db()
    app.config.update(configuration(clerk, url, **more))
    db.init_app(app)
    hooks = ClerkHooks(db)
    hooks.init_app(app, problems=problems)

    @app.get("/bug")
    def bug() -> str:
        raise LookupError("a bug")

    @app.get("/missing")
    def missing() -> str:
        abort(404, "no such page here")

    @app.get("/odd")
    def odd() -> str:
        raise Odd

    @app.get("/private")
    @require_auth
    def private() -> str:
        return "private"

    @hooks.on("organization.created")
    def fail(_event: object) -> None:
        raise LookupError("a bug of a handler")

    return app


@pytest.mark.parametrize("setting", ["TESTING", "DEBUG", "PROPAGATE_EXCEPTIONS"])
def test_raises_the_applications_bugs(clerk: FakeClerk, sqlite_url: str, setting: str) -> None:
    """An exception in a view reaches the test or debugger with its original traceback."""
    app = create_app(clerk, sqlite_url, **{setting: True})
    with tables(app):
        check_users_stay_correct(app, clerk)
        with pytest.raises(LookupError, match=r"^a bug$"):
            app.test_client().get("/bug")


def test_logs_the_applications_bugs_with_their_traceback(
    clerk: FakeClerk, sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In production, Flask logs an exception and returns Flask's 500 page."""
    app = create_app(clerk, sqlite_url)
    with tables(app), caplog.at_level(logging.ERROR):
        response = app.test_client().get("/bug")
    assert (response.status_code, response.mimetype) == (500, "text/html")
    assert "LookupError: a bug" in caplog.text


def test_leaves_the_applications_answers_alone(clerk: FakeClerk, sqlite_url: str) -> None:
    """The application's responses are unchanged, and clerkhooks' 405 is also an HTML page."""
    app = create_app(clerk, sqlite_url)
    with tables(app):
        client = app.test_client()
        assert "no such page here" in client.get("/missing").text
        assert client.get("/odd").status_code == 460
        response = client.get("/webhooks/clerk")
        assert (response.status_code, response.headers["Allow"]) == (405, "POST")
        assert response.mimetype == "text/html"


def test_answers_problems_on_request(clerk: FakeClerk, sqlite_url: str) -> None:
    """With ``problems=True``, all errors become problem details; ``abort`` sets the detail."""
    app = create_app(clerk, sqlite_url, problems=True)
    with tables(app):
        client = app.test_client()
        answers = [client.get(path).get_json() for path in ("/missing", "/odd", "/bug", "/nowhere")]
    assert [answer["status"] for answer in answers] == [404, 460, 500, 404]
    assert [answer.get("detail") for answer in answers] == ["no such page here", "odd", None, None]
    assert answers[2]["reason"] == "internal_error"
    assert answers[3]["reason"] == "not_found"


def test_answers_problems_despite_the_applications_error_handlers(
    clerk: FakeClerk, sqlite_url: str
) -> None:
    """The application's error handlers do not receive clerkhooks' errors."""
    app = create_app(clerk, sqlite_url)

    def answer(error: Exception) -> ResponseReturnValue:
        return f"handled {type(error).__name__}", 299

    for kind in (401, 404, 413, 500, HTTPException, Exception):
        app.register_error_handler(kind, answer)
    with tables(app):
        check_users_stay_correct(app, clerk)
        service = ClerkService(app, clerk)
        assert service.http.get("/bug").text == "handled LookupError"
        assert service.http.get("/missing").text == "handled NotFound"
        for response, status, reason in (
            (service.http.post("/webhooks/clerk"), 401, "signature_headers_missing"),
            (service.deliver_body(b"x" * 1_100_000), 413, "body_too_large"),
            (service.deliver("organization.created", {"id": "org_1"}), 500, "internal_error"),
            (service.http.get("/private"), 401, "token_missing"),
            (service.http.get("/api/me"), 401, "token_missing"),
        ):
            assert response.mimetype == "application/problem+json"
            assert (response.status_code, response.get_json()["reason"]) == (status, reason)


def test_logs_a_failed_delivery_once_with_its_frames(
    clerk: FakeClerk, sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler's exception gives a 500 and one log line with its frames but no message."""
    app = create_app(clerk, sqlite_url, TESTING=True)
    with tables(app), caplog.at_level(logging.INFO, "clerkhooks"):
        body = event_body("organization.created", {"id": "org_1"}, 1_700_000_000_000)
        assert ClerkService(app, clerk).deliver_body(body, "msg_1").status_code == 500
    [failure] = [record for record in caplog.records if record.levelno == logging.ERROR]
    fields = vars(failure)
    assert (fields["message_id"], fields["error"]) == ("msg_1", "LookupError")
    assert "fail" in fields["frames"][-1]
    assert "a bug of a handler" not in caplog.text


def test_finds_the_applications_templates(
    clerk: FakeClerk, tmp_path: Path, sqlite_url: str
) -> None:
    """Flask finds templates in the ``templates/`` folder next to the application's module."""
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "page.html").write_text("Hello {{ name }}")
    app, db = Flask("wsgi", root_path=str(tmp_path)), make_db()
    app.config.update(configuration(clerk, sqlite_url, CONSOLE_PASSWORD="p" * 16))
    db.init_app(app)
    ClerkHooks(db).init_app(app, routes=("webhooks", "me", "console"))
    app.add_url_rule(
        "/", view_func=lambda: render_template("page.html", name="Ada"), endpoint="page"
    )
    with tables(app):
        assert app.test_client().get("/").text == "Hello Ada"


def register_handlers(app: Flask) -> None:
    """Add a blueprint with error handlers, and routes that fail in several ways."""
    blueprint = Blueprint("shop", __name__, url_prefix="/shop")

    @blueprint.errorhandler(404)
    def shop_not_found(error: HTTPException) -> ResponseReturnValue:
        return f"shop: {error.description}", 404

    @blueprint.errorhandler(ZeroDivisionError)
    def shop_bug(error: Exception) -> ResponseReturnValue:
        return "shop: a bug", 500

    blueprint.add_url_rule("/bug", "bug", lambda: str(1 // 0))
    blueprint.add_url_rule("/missing", "missing", lambda: abort(404, "sold out"))
    app.register_blueprint(blueprint)

    def odd_page() -> str:
        raise Odd

    app.add_url_rule("/teapot", "teapot", lambda: abort(418))
    app.add_url_rule("/response", "response", lambda: abort(Response("own", 409)))
    app.add_url_rule("/key", "key", lambda: str(request.form["absent"]))
    app.add_url_rule("/zero", "zero", lambda: str(1 // 0))
    app.add_url_rule("/odd", "odd", odd_page)
    app.add_url_rule("/large", "large", lambda: abort(413))


def some_pages(app: Flask) -> None:
    """Register pages for some errors."""
    app.register_error_handler(404, lambda error: (f"page: {error.description}", 404))
    app.register_error_handler(413, lambda error: ("page: too large", 413))
    app.register_error_handler(Odd, lambda error: ("page: odd", 460))


def one_page(app: Flask) -> None:
    """Register a single page for all HTTP errors."""
    app.register_error_handler(HTTPException, lambda error: (f"page: {error.code}", error.code))


def one_page_for_all(app: Flask) -> None:
    """Register a single page for all exceptions."""
    app.register_error_handler(Exception, lambda error: (f"page: {type(error).__name__}", 500))


def internal_page(app: Flask) -> None:
    """Register a page for status 500 that shows the original exception."""
    app.register_error_handler(
        InternalServerError, lambda error: (f"page: {error.original_exception!r}", 500)
    )


def nothing(app: Flask) -> None:
    """Register nothing."""


PATHS = "/shop/bug /shop/missing /shop/nowhere /teapot /response /key /zero /odd /large /nowhere"


CONFIGS: list[dict[str, Any]] = [
    {}, {"TESTING": True}, {"DEBUG": True}, {"TRAP_HTTP_EXCEPTIONS": True},
]  # fmt: skip


@pytest.mark.parametrize("set_up", [nothing, some_pages, one_page, one_page_for_all, internal_page])
@pytest.mark.parametrize("handlers_first", [True, False])
def test_handles_errors_as_plain_flask_does(
    clerk: FakeClerk, sqlite_url: str, set_up: Callable[[Flask], None], handlers_first: bool
) -> None:
    """Errors in the application's routes give the same result as without clerkhooks."""
    for config in CONFIGS:
        plain, app, db = Flask(__name__), Flask(__name__), make_db()
        app.config.update(configuration(clerk, sqlite_url), **config)
        plain.config.update(app.config)
        db.init_app(app)
        steps: list[Callable[[Flask], None]] = [set_up, ClerkHooks(db).init_app]
        for step in steps if handlers_first else reversed(steps):
            step(app)
        set_up(plain)
        for one in (app, plain):
            register_handlers(one)
        for path in PATHS.split():
            assert describe_answer(app, path) == describe_answer(plain, path), (config, path)
        disconnect(app)


def describe_answer(app: Flask, path: str) -> tuple[object, ...]:
    """Return the response to a request for *path*, or the exception that it raises."""
    try:
        response = app.test_client().get(path)
    except Exception as error:  # noqa: BLE001  # any exception that Flask propagates
        return type(error), str(error)
    return response.status_code, response.text, sorted(response.headers.keys())


def test_logs_each_line_once(
    clerk: FakeClerk, sqlite_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each line reaches the application's log handler once, and clerkhooks adds no handler."""
    root, handler = logging.getLogger(), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(name)s %(message)s"))
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        app = create_app(clerk, sqlite_url)
        with tables(app):
            ClerkService(app, clerk).sign_up()
            app.logger.error("a line of the application")
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
    written = capsys.readouterr()
    assert written.err.splitlines() == [
        "clerkhooks webhook_delivered",
        f"{app.name} a line of the application",
    ]
    assert written.out == ""
    assert not [
        one
        for one in logging.getLogger("clerkhooks").handlers
        if isinstance(one, logging.StreamHandler)
    ]

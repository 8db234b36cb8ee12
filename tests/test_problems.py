"""Errors: their responses and log lines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Response, abort, make_response, redirect
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from werkzeug.exceptions import HTTPException, ServiceUnavailable
from werkzeug.wrappers import Response as BaseResponse

from clerkhooks import require_auth
from clerkhooks.clerk.fake import clerk_id
from clerkhooks.errors import ClerkhooksError, describe
from clerkhooks.service import db
from clerkhooks.web.logs import JsonFormatter
from tests.application import Application
from tests.support import Service, broken_users, captured_lines, user_event

pytest_plugins = ["tests.application"]

SECRET = "ada@example.org"
PROBLEM = "application/problem+json"


@pytest.fixture
def written() -> Iterator[list[str]]:
    """Collect the logged lines, as JSON."""
    with captured_lines(JsonFormatter()) as written:
        yield written


def shown(written: list[str]) -> list[dict[str, Any]]:
    """Return the logged lines, parsed as JSON."""
    return [json.loads(line) for line in written]


def test_logs_one_line_per_request(service: Service, written: list[str]) -> None:
    """A delivery's line contains the fields that an operator needs, and no profile data."""
    user_id = clerk_id("user")
    service.deliver(user_event(user_id, private_metadata={"iban": "DE00"}), "msg_1")
    [line] = shown(written)
    assert line.pop("time")
    assert line.pop("duration_ms")
    assert line.pop("request_id")
    assert "lag_s" in line
    del line["lag_s"]
    assert line == {
        "level": "info",
        "event": "request",
        "method": "POST",
        "path": "/webhooks/clerk",
        "status": 200,
        "message_id": "msg_1",
        "event_type": "user.updated",
        "user_id": user_id,
        "outcome": "applied",
    }


def test_logs_the_caller(service: Service, written: list[str]) -> None:
    """
    A call's line contains the user's id.

    A refused call's line contains the reason, but not the token.
    """
    user_id = clerk_id("user")
    service.call(user_id)
    service.call(user_id, exp=1)
    first, second = shown(written)
    assert first["user_id"] == user_id
    assert (second["level"], second["reason"]) == ("warning", "token_expired")
    assert "ey" not in json.dumps(second)


def test_answers_a_failure_without_its_text(service: Service, written: list[str]) -> None:
    """
    The response, log line and record of a failure do not quote the database's error text.

    The error text may contain the row. A retry of the message is processed.
    """
    user_id = clerk_id("user")
    body = user_event(user_id)
    with broken_users(service):
        response = service.deliver(body, "msg_1")
    assert response.status_code == 500
    assert response.get_json() == {
        "type": "about:blank",
        "title": "Internal Server Error",
        "status": 500,
        "reason": "internal_error",
    }
    failure, request = shown(written)
    assert (failure["event"], failure["level"]) == ("request_failed", "error")
    assert (failure["message_id"], request["status"]) == ("msg_1", 500)
    assert any("deliveries.py" in frame for frame in failure["frames"])
    [(outcome, attempts, error)] = service.rows(
        "SELECT outcome, attempts, error FROM webhook_messages"
    )
    assert (outcome, attempts, error) == ("failed", 1, failure["error"])
    stored = service.rows("SELECT * FROM webhook_messages")
    assert SECRET not in "".join(written) + response.text + str(stored)
    assert service.user(user_id) is None
    assert service.outcome(body, "msg_1") == "applied"
    stored = service.rows("SELECT outcome, attempts, error FROM webhook_messages")
    assert stored == [("applied", 2, None)]


def fail_twice() -> None:
    """Raise an error with a cause, both with profile data in their messages."""
    try:
        raise KeyError(SECRET)
    except KeyError as error:
        raise RuntimeError(f"Failing row contains ({SECRET})") from error


def test_logs_frames_without_the_text_of_an_error(
    application: Application, written: list[str]
) -> None:
    """Each frame has a file, line and function; error messages are omitted."""
    application.hooks.on("user.*")(lambda event: fail_twice())
    response = application.deliver(user_event(clerk_id("user")), "msg_1")
    assert (response.status_code, response.get_json()["reason"]) == (500, "internal_error")
    [failure] = shown(written)
    assert (failure["event"], failure["error"]) == ("request_failed", "RuntimeError")
    frames = failure["frames"]
    assert all(re.fullmatch(r"[^/]+/[^/]+:\d+ \S+", frame) for frame in frames), frames
    assert re.fullmatch(r"tests/test_problems\.py:\d+ fail_twice", frames[-1])
    assert failure["message_id"] == "msg_1"
    for kept in (
        "".join(written),
        response.text,
        str(application.rows("SELECT * FROM webhook_messages")),
    ):
        assert SECRET not in kept
        assert "Failing row" not in kept


def test_counts_the_attempts_of_a_failure(service: Service) -> None:
    """Each failed attempt increments ``attempts``."""
    body = user_event(clerk_id("user"))
    with broken_users(service):
        for _ in range(3):
            assert service.deliver(body, "msg_1").status_code == 500
    stored = service.rows("SELECT outcome, attempts FROM webhook_messages")
    assert stored == [("failed", 3)]


def test_answers_500_if_the_failure_cannot_be_recorded(
    unreachable: Service, written: list[str]
) -> None:
    """Without a database, the failure is logged, and so is the failure to record it."""
    assert unreachable.deliver(user_event(clerk_id("user")), "msg_1").status_code == 500
    not_recorded, failure, _ = shown(written)
    assert not_recorded["event"] == "failure_not_recorded"
    assert not_recorded["message_id"] == "msg_1"
    assert (failure["event"], failure["message_id"]) == ("request_failed", "msg_1")


def add_failing_views(service: Service) -> None:
    """Add a view for each kind of error that Flask handles."""

    def raise_own() -> str:
        raise ClerkhooksError("never_translated")

    def raise_other() -> str:
        raise RuntimeError(SECRET)

    def raise_busy() -> str:
        raise ServiceUnavailable("Come back later.", retry_after=7)

    def moved() -> BaseResponse:
        return redirect("/elsewhere")

    views: dict[str, Callable[[], Any]] = {
        "own": raise_own,
        "other": raise_other,
        "busy": raise_busy,
        "moved": moved,
        "teapot": lambda: abort(418),
        "text": lambda: abort(404, "There is no such note."),
        "unknown": lambda: abort(make_response("as it is", 460)),
        "response": lambda: abort(Response("mine", 403, content_type="text/plain")),
    }
    for name, view in views.items():
        service.app.add_url_rule(f"/{name}", name, view)


@pytest.mark.parametrize(("path", "status", "reason"), [
    ("/nowhere", 404, "not_found"),
    ("/own", 500, "internal_error"),
    ("/other", 500, "internal_error"),
    ("/busy", 503, "service_unavailable"),
    ("/teapot", 418, "i_m_a_teapot"),
    ("/text", 404, "not_found"),
])  # fmt: skip
def test_answers_every_error_of_the_service_as_a_problem(
    service: Service, path: str, status: int, reason: str
) -> None:
    """All errors share one format, which omits an exception's text."""
    add_failing_views(service)
    response = service.http.get(path)
    problem = response.get_json()
    assert (response.status_code, response.content_type) == (status, PROBLEM)
    assert (problem["type"], problem["status"], problem["reason"]) == (
        "about:blank",
        status,
        reason,
    )
    assert problem["title"]
    assert SECRET not in response.text


def test_keeps_the_description_of_an_error(service: Service) -> None:
    """
    The text passed to ``abort`` becomes the detail, and headers are kept.

    Werkzeug's default descriptions are omitted.
    """
    add_failing_views(service)
    assert service.http.get("/text").get_json()["detail"] == "There is no such note."
    busy = service.http.get("/busy")
    assert (busy.get_json()["detail"], busy.headers["Retry-After"]) == ("Come back later.", "7")
    assert "detail" not in service.http.get("/nowhere").get_json()
    refused = service.http.post("/healthz")
    assert (refused.status_code, refused.get_json()["reason"]) == (405, "method_not_allowed")
    assert set(refused.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}


def test_leaves_responses_as_they_are(service: Service) -> None:
    """A redirect, or a response passed to ``abort``, is returned unchanged."""
    add_failing_views(service)
    assert service.http.get("/moved").headers["Location"] == "/elsewhere"
    for path, status, body in (("/response", 403, "mine"), ("/unknown", 460, "as it is")):
        response = service.http.get(path)
        assert (response.status_code, response.text) == (status, body)


class ClientClosed(HTTPException):
    """An error with a status code that ``http.HTTPStatus`` does not define."""

    code = 460
    description = "The client went away."


@pytest.mark.parametrize("detail", [None, "It waited for 9 s."])
def test_answers_a_status_without_a_name(service: Service, detail: str | None) -> None:
    """A non-standard status code also gets a title, a reason and a detail."""

    def raise_closed() -> str:
        raise ClientClosed(detail)

    service.app.add_url_rule("/closed", view_func=raise_closed)
    response = service.http.get("/closed")
    assert (response.status_code, response.content_type) == (460, PROBLEM)
    problem = response.get_json()
    assert (problem["title"], problem["reason"]) == ("Unknown Error", "unknown_error")
    assert problem["detail"] == (detail or "The client went away.")


def test_leaves_the_errors_of_an_application_alone(application: Application) -> None:
    """Without ``problems=True``, only clerkhooks' own errors become problem details."""
    app, http = application.app, application.http
    add_failing_views(application)
    app.add_url_rule("/notes", view_func=require_auth(lambda: "notes"))
    for path in ("/nowhere", "/text", "/teapot"):
        assert http.get(path).content_type == "text/html; charset=utf-8", path
    refused = http.get("/webhooks/clerk")
    assert (refused.status_code, refused.headers["Allow"]) == (405, "POST")
    assert refused.content_type == "text/html; charset=utf-8"
    app.testing = True
    with pytest.raises(RuntimeError):
        http.get("/other")
    app.testing = False
    for response in (http.get("/notes"), http.get("/api/me"), http.post("/webhooks/clerk")):
        assert (response.status_code, response.content_type) == (401, PROBLEM)


def test_leaves_the_error_handlers_of_an_application_alone(application: Application) -> None:
    """An application's error handlers, even for Exception, do not affect clerkhooks' routes."""

    def answer(error: Exception) -> tuple[str, int]:
        return f"mine: {type(error).__name__}", 599

    application.app.register_error_handler(Exception, answer)
    add_failing_views(application)
    assert application.http.get("/other").text == "mine: RuntimeError"
    assert application.http.get("/nowhere").text == "mine: NotFound"
    with broken_users(application):
        failed = application.deliver(user_event(clerk_id("user")))
    for response, status in (
        (failed, 500),
        (application.http.post("/webhooks/clerk"), 401),
        (application.http.get("/api/me"), 401),
    ):
        assert (response.status_code, response.content_type) == (status, PROBLEM)


def test_describes_errors_by_class_and_state_only(service: Service) -> None:
    """``describe`` returns only an exception's class and the database's error code."""
    with service.app.app_context(), pytest.raises(DBAPIError) as caught:
        db.session.execute(text(f"SELECT '{SECRET}' FROM nowhere"))
    expected = ("OperationalError SQLITE_ERROR", "ProgrammingError 42P01")
    assert describe(caught.value) in expected
    assert describe(ValueError(SECRET)) == "ValueError"

"""Errors as responses, and what the log says of them."""

from __future__ import annotations

import json
import logging

import pytest
from flask import redirect
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from werkzeug.wrappers import Response as BaseResponse

from clerkhooks import logs
from clerkhooks.cli.pretend import clerk_id
from clerkhooks.errors import ClerkhooksError, describe
from clerkhooks.models import db
from tests.support import Service, broken_users, user_event

SECRET = "ada@example.org"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log records of the service."""
    caplog.set_level(logging.INFO, logger="clerkhooks")
    return caplog


def shown(lines: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    """What the records look like in the log."""
    return [json.loads(logs.JsonFormatter().format(record)) for record in lines.records]


def test_logs_a_line_a_request(service: Service, lines: pytest.LogCaptureFixture) -> None:
    """A delivery's line holds what an operator looks for, and nothing of the profile."""
    user_id = clerk_id("user")
    service.deliver(user_event(user_id, private_metadata={"iban": "DE00"}), "msg_1")
    [line] = shown(lines)
    assert line.pop("time")
    assert line.pop("duration_ms")
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


def test_logs_who_called(service: Service, lines: pytest.LogCaptureFixture) -> None:
    """A call's line names the user by id; a refused one says why, without the token."""
    user_id = clerk_id("user")
    service.call(user_id)
    service.call(user_id, exp=1)
    first, second = shown(lines)
    assert first["user_id"] == user_id
    assert (second["level"], second["reason"]) == ("warning", "token_expired")
    assert "ey" not in json.dumps(second)


def test_answers_a_failure_without_its_text(service: Service, lines: pytest.LogCaptureFixture) -> None:
    """A database's message quotes the row; neither answer, log nor table repeats it, and the retry is processed."""
    user_id = clerk_id("user")
    body = user_event(user_id)
    with broken_users(service):
        response = service.deliver(body, "msg_1")
    assert response.status_code == 500
    assert response.get_json() == {"type": "about:blank", "title": "Internal Server Error", "status": 500, "reason": "internal_error"}
    failure, request = shown(lines)
    assert (failure["event"], failure["message_id"], request["status"]) == ("request_failed", "msg_1", 500)
    assert any("users.py" in str(frame) for frame in failure["frames"])  # type: ignore[attr-defined]
    [(outcome, attempts, error)] = service.rows("SELECT outcome, attempts, error FROM webhook_messages")
    assert (outcome, attempts, error) == ("failed", 1, failure["error"])
    assert SECRET not in json.dumps(shown(lines)) + str(service.rows("SELECT * FROM webhook_messages"))
    assert service.user(user_id) is None
    assert service.outcome(body, "msg_1") == "applied"
    assert service.rows("SELECT outcome, attempts, error FROM webhook_messages") == [("applied", 2, None)]


def test_counts_the_attempts_of_a_failure(service: Service) -> None:
    """Each failed attempt is counted."""
    body = user_event(clerk_id("user"))
    with broken_users(service):
        for _ in range(3):
            assert service.deliver(body, "msg_1").status_code == 500
    assert service.rows("SELECT outcome, attempts FROM webhook_messages") == [("failed", 3)]


def test_answers_500_when_not_even_the_failure_can_be_written(unreachable: Service, lines: pytest.LogCaptureFixture) -> None:
    """With the database away the answer is 500 all the same, and the log has message, cause and that it was not recorded."""
    assert unreachable.deliver(user_event(clerk_id("user")), "msg_1").status_code == 500
    second, failure, _ = shown(lines)
    assert (second["event"], second["message_id"]) == ("failure_not_recorded", "msg_1")
    assert (failure["event"], failure["message_id"]) == ("request_failed", "msg_1")


def test_answers_every_error_as_a_problem(service: Service) -> None:
    """Not found, a redirect, an own error that nobody translated and an HTTP error each have one shape."""

    @service.app.get("/moved")
    def moved() -> BaseResponse:
        return redirect("/elsewhere")

    @service.app.get("/own")
    def own() -> str:
        raise ClerkhooksError("never_translated")

    assert service.http.get("/nowhere").get_json()["reason"] == "not_found"
    assert service.http.get("/moved").headers["Location"] == "/elsewhere"
    assert (service.http.get("/own").status_code, service.http.get("/own").get_json()["reason"]) == (500, "internal_error")
    for path in ("/nowhere", "/own"):
        assert service.http.get(path).content_type == "application/problem+json"


def test_describes_errors_by_class_and_state_only(service: Service) -> None:
    """What may be stored of an exception: its class, and the database's code for it."""
    with service.app.app_context(), pytest.raises(DBAPIError) as caught:
        db.session.execute(text(f"SELECT '{SECRET}' FROM nowhere"))
    assert describe(caught.value) in ("OperationalError SQLITE_ERROR", "ProgrammingError 42P01")
    assert describe(ValueError(SECRET)) == "ValueError"

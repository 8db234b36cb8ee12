"""The log: one line a request, with an id that the answer carries, too."""

from __future__ import annotations

import json
import logging
import os
import pty
import re

import pytest
from flask import Blueprint, abort
from hypothesis import given
from hypothesis import strategies as st

from clerkhooks import logs
from clerkhooks.cli.pretend import clerk_id
from clerkhooks.signals import event_processed, user_first_seen
from tests.support import Service, broken_users, lines, user_event


@pytest.mark.parametrize("path", ["/healthz", "/nowhere", "/api/me"])
@pytest.mark.parametrize("method", ["GET", "OPTIONS", "POST"])
def test_names_each_request(service: Service, method: str, path: str) -> None:
    """Every answer has an id, the line has the same, and the next request another."""
    with lines(logs.JsonFormatter()) as written:
        ids = [service.http.open(path, method=method).headers["X-Request-ID"] for _ in range(2)]
    assert [json.loads(line)["request_id"] for line in written] == ids
    assert ids[0] != ids[1]
    assert all(re.fullmatch("[0-9a-f]{32}", request_id) for request_id in ids)


def test_names_a_request_that_ends_before_it_began(service: Service) -> None:
    """An application's own preprocessor may abort before anything else of the request has run."""
    tenants = Blueprint("tenants", __name__)
    tenants.url_value_preprocessor(lambda _endpoint, _values: abort(404))
    tenants.add_url_rule("/tenants", view_func=str)
    service.app.register_blueprint(tenants)
    with lines(logs.JsonFormatter()) as written:
        response = service.http.get("/tenants")
    [line] = map(json.loads, written)
    assert (response.status_code, line["status"], line["request_id"]) == (404, 404, response.headers["X-Request-ID"])
    assert line["duration_ms"] >= 0


def test_names_every_line_of_a_request(service: Service) -> None:
    """Also those of a failure, of a receiver and of a log that could not be written."""

    def fail(_sender: str, **_: object) -> None:
        raise RuntimeError("receiver")

    headers = {"X-Request-ID": "of-the-proxy"}
    body = user_event(clerk_id("user"))
    with lines(logs.JsonFormatter()) as written, broken_users(service):
        service.http.post("/webhooks/clerk", data=body, headers=service.clerk.headers(body) | headers)
    with lines(logs.JsonFormatter()) as more, event_processed.connected_to(fail):
        service.http.post("/webhooks/clerk", data=body, headers=service.clerk.headers(body) | headers)
    said = [(json.loads(line)["event"], json.loads(line)["request_id"]) for line in (*written, *more)]
    assert said == [(event, "of-the-proxy") for event in ("request_failed", "request", "receiver_failed", "request")]
    assert json.loads(written[0])["user_id"]


@pytest.mark.parametrize("sent", ["a", "A.b_c:/+=-9" * 11, "x" * 128])
def test_keeps_an_id_that_came_in(service: Service, sent: str) -> None:
    """So that a line is found by what the platform's router says."""
    assert service.http.get("/healthz", headers={"X-Request-ID": sent}).headers["X-Request-ID"] == sent


@given(
    sent=st.one_of(st.just(""), st.just("x" * 129), st.text("ab \t{}\"'<>\\;\x7f\xe9", min_size=1).filter(lambda text: not text.isalpha()))
)
def test_replaces_an_id_that_is_none(service: Service, sent: str) -> None:
    """Whatever a stranger writes into the header, the line and the answer hold a harmless one."""
    answered = service.http.get("/healthz", headers={"X-Request-ID": sent}).headers["X-Request-ID"]
    assert re.fullmatch("[0-9a-f]{32}|[ab]+", answered)


def test_is_readable_on_a_terminal(service: Service) -> None:
    """A request is a line, and what it holds besides follows; what moves a cursor is escaped."""
    with lines(logs.TextFormatter()) as written:
        service.http.get("/api/me")
        service.http.get("/%1b[31m%0a%e2%80%ae")
        logs.logger.warning("keys_not_configured", extra={"remedy": "Set CLERK_JWT_KEY"})
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d\.\d{3} WARNING GET /api/me 401 [\d.]+ ms  reason=token_missing  request_id=[0-9a-f]{32}", written[0]
    )
    assert r" GET /\x1b[31m\n\u202e 404 " in written[1]
    assert written[2].endswith(" WARNING keys_not_configured  remedy=Set CLERK_JWT_KEY")


@pytest.mark.parametrize(
    ("is_terminal", "log_format", "expected"),
    [
        (True, None, logs.TextFormatter),
        (False, None, logs.JsonFormatter),
        (True, "json", logs.JsonFormatter),
        (False, "text", logs.TextFormatter),
    ],
)
def test_chooses_by_what_stdout_is(
    monkeypatch: pytest.MonkeyPatch, service: Service, is_terminal: bool, log_format: str | None, expected: type[logging.Formatter]
) -> None:
    """And as it is told, where it is told."""
    monkeypatch.setattr(logs.logger, "handlers", [])
    master, terminal = pty.openpty()
    with os.fdopen(terminal if is_terminal else os.dup(terminal), "w") as stdout:
        if not is_terminal:
            monkeypatch.setattr(stdout, "isatty", lambda: False, raising=False)
        monkeypatch.setattr("sys.stdout", stdout)
        app = type(service.app)("another")
        logs.init_logs(app, log_format)
    os.close(master)
    assert [type(handler.formatter) for handler in logs.logger.handlers] == [expected]


def test_colours_only_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not where NO_COLOR says so."""
    record = logging.makeLogRecord({"levelname": "ERROR", "msg": "request_failed"})
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert "\x1b[31mERROR" in logs.TextFormatter().format(record)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in logs.TextFormatter().format(record)


def test_tells_once_of_a_first_call(service: Service) -> None:
    """The signal names the user; what a receiver raises is logged and breaks nothing."""
    told: list[object] = []

    def receive(_app: object, user_id: str) -> None:
        told.append(user_id)
        raise RuntimeError("receiver")

    user_id = clerk_id("user")
    with lines(logs.JsonFormatter()) as written, user_first_seen.connected_to(receive, service.app):
        assert [service.call(user_id).status_code for _ in range(2)] == [200, 200]
    assert told == [user_id]
    assert [json.loads(line)["user_id"] for line in written if "receiver_failed" in line] == [user_id]

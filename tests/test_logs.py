"""The log: one line per request, with the same request id as in the response."""

from __future__ import annotations

import functools
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from flask import Blueprint, abort
from hypothesis import given
from hypothesis import strategies as st

from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.settings import PROJECT
from clerkhooks.web.logs import JsonFormatter, ServiceHandler, TextFormatter, logger
from clerkhooks.web.state import RequestLog
from tests.application import Application
from tests.server import environ
from tests.support import Service, broken_users, captured_lines, user_event

pytest_plugins = ["tests.application"]

REQUEST_ID = "[0-9a-f]{32}"


@pytest.mark.parametrize("path", ["/healthz", "/nowhere", "/api/me"])
@pytest.mark.parametrize("method", ["GET", "OPTIONS", "POST"])
def test_gives_each_request_an_id(service: Service, method: str, path: str) -> None:
    """Each response has a unique id, and its log line has the same id."""
    with captured_lines(JsonFormatter()) as written:
        answers = [service.http.open(path, method=method) for _ in range(2)]
    ids = [answer.headers["X-Request-ID"] for answer in answers]
    assert [json.loads(line)["request_id"] for line in written] == ids
    assert ids[0] != ids[1]
    assert all(re.fullmatch(REQUEST_ID, request_id) for request_id in ids)


def test_gives_an_aborted_request_an_id(service: Service) -> None:
    """Requests have an id even if a URL value preprocessor aborts them before other hooks run."""
    tenants = Blueprint("tenants", __name__)
    tenants.url_value_preprocessor(lambda _endpoint, _values: abort(404))
    tenants.add_url_rule("/tenants", view_func=str)
    service.app.register_blueprint(tenants)
    with captured_lines(JsonFormatter()) as written:
        response = service.http.get("/tenants")
    [line] = map(json.loads, written)
    assert (response.status_code, line["status"]) == (404, 404)
    assert line["request_id"] == response.headers["X-Request-ID"]
    assert line["duration_ms"] >= 0


def test_measures_the_whole_request(service: Service) -> None:
    """The logged duration of a request includes the time spent in its view."""

    def slow() -> str:
        time.sleep(0.05)
        return ""

    service.app.add_url_rule("/slow", view_func=slow)
    with captured_lines(JsonFormatter()) as written:
        service.http.get("/slow")
    [line] = map(json.loads, written)
    assert line["duration_ms"] >= 50


def test_adds_the_id_to_every_line_of_a_request(service: Service) -> None:
    """The log lines of a failure also have the request's id."""
    body = user_event(clerk_id("user"))
    headers = service.clerk.headers(body) | {"X-Request-ID": "of-the-proxy"}
    with captured_lines(JsonFormatter()) as written, broken_users(service):
        service.http.post("/webhooks/clerk", data=body, headers=headers)
    logged = [json.loads(line) for line in written]
    assert [line["event"] for line in logged] == ["request_failed", "request"]
    assert {line["request_id"] for line in logged} == {"of-the-proxy"}
    assert logged[0]["user_id"]


def test_adds_the_id_to_the_line_of_a_failing_handler(application: Application) -> None:
    """A failure after the commit is logged with the id that the platform's router also logs."""

    @application.hooks.on("user.updated", after_commit=True)
    def fail(_event: object) -> None:
        raise RuntimeError("handler")

    body = user_event(clerk_id("user"))
    headers = application.clerk.headers(body) | {"X-Request-ID": "of-the-proxy"}
    with captured_lines(JsonFormatter()) as written:
        response = application.http.post("/webhooks/clerk", data=body, headers=headers)
    assert response.status_code == 200
    logged = [json.loads(line) for line in written]
    assert [line["event"] for line in logged] == ["handler_failed", "webhook_delivered"]
    assert {line["request_id"] for line in logged} == {"of-the-proxy"}


@pytest.mark.parametrize("sent", ["a", "A.b_c:/+=-9" * 11, "x" * 128])
def test_keeps_an_incoming_id(service: Service, sent: str) -> None:
    """An incoming id is kept, because it links a log line to the log of the platform's router."""
    answer = service.http.get("/healthz", headers={"X-Request-ID": sent})
    assert answer.headers["X-Request-ID"] == sent


malformed = st.text("ab \t{}\"'<>\\;\x7f\xe9", min_size=1).filter(lambda text: not text.isalpha())


@given(sent=st.just("") | st.just("x" * 129) | malformed)
def test_replaces_a_malformed_id(service: Service, sent: str) -> None:
    """An unsafe incoming id is replaced in the log line and in the response."""
    answer = service.http.get("/healthz", headers={"X-Request-ID": sent})
    assert re.fullmatch(f"{REQUEST_ID}|[ab]+", answer.headers["X-Request-ID"])


def test_is_readable_on_a_terminal(service: Service) -> None:
    """A line shows the request and then its fields, with control characters escaped."""
    with captured_lines(TextFormatter()) as written:
        service.http.get("/api/me")
        service.http.get("/%1b[31m%0a%e2%80%ae")
        logger.warning("keys_not_configured", extra={"remedy": "Set CLERK_JWT_KEY"})
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d\.\d{3} WARNING GET /api/me 401 [\d.]+ ms"
        rf"  reason=token_missing  request_id={REQUEST_ID}",
        written[0],
    )
    assert r" GET /\x1b[31m\n\u202e 404 " in written[1]
    assert written[2].endswith(" WARNING keys_not_configured  remedy=Set CLERK_JWT_KEY")


def test_colours_only_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Colours are used only on a terminal, and never with NO_COLOR."""
    record = logging.makeLogRecord({"levelname": "ERROR", "msg": "request_failed"})
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    assert "\x1b" not in TextFormatter().format(record)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert "\x1b[31mERROR" in TextFormatter().format(record)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in TextFormatter().format(record)


def test_logs_one_line_per_delivery_in_an_application(application: Application) -> None:
    """In an application, only deliveries are logged, and responses have no request id."""
    user_id = clerk_id("user")
    with captured_lines(JsonFormatter()) as written:
        assert application.outcome(user_event(user_id), "msg_1") == "applied"
        calls = [application.call(user_id), application.http.get("/api/me")]
        application.http.post("/webhooks/clerk", data=b"{}")
        calls.append(application.http.get("/nowhere"))
    applied, refused = map(json.loads, written)
    assert (applied["event"], applied["level"]) == ("webhook_delivered", "info")
    assert {name: applied[name] for name in ("message_id", "event_type", "user_id", "outcome")} == {
        "message_id": "msg_1",
        "event_type": "user.updated",
        "user_id": user_id,
        "outcome": "applied",
    }
    assert (refused["event"], refused["level"]) == ("webhook_delivered", "warning")
    assert refused["reason"] == "signature_headers_missing"
    assert not any("X-Request-ID" in answer.headers for answer in calls)


def run_script(code: str, clerk: FakeClerk, folder: Path, *, stdout: Any = subprocess.PIPE) -> str:
    """
    Run *code* in a separate process, and return its output.

    In *code*, CLERK is the dict ``clerk.environ``, and DATABASE is the URL of a SQLite file.
    """
    code = f"CLERK = {clerk.environ!r}\nDATABASE = 'sqlite:///{folder}/logs.db'\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        env=environ(),
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return f"{done.stdout or ''}{done.stderr}"


def redirect_log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Let only the service's handler print the log, to the returned stream."""
    ours, stream = ServiceHandler(), io.StringIO()
    ours.setStream(stream)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logger, "handlers", [ours])
    return stream


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_prints_the_same_line_with_and_without_a_record(
    service: Service, monkeypatch: pytest.MonkeyPatch, log_format: RequestLog
) -> None:
    """The service's handler prints a request itself if no other handler needs a record of it."""
    service.app.extensions["clerkhooks"].log_format = log_format
    stream = redirect_log(monkeypatch)
    [ours] = logger.handlers
    for handlers in ([ours], [ours, logging.NullHandler()]):
        monkeypatch.setattr(logger, "handlers", handlers)
        service.http.post("/webhooks/clerk", headers={"X-Request-ID": "same"})
    times = r"\d\d:\d\d:\d\d.\d\d\d|\d+\.\d+(?=, | ms)"
    printed = [re.sub(times, "", line) for line in stream.getvalue().splitlines()]
    assert len(printed) == 2
    assert printed[0] == printed[1]
    assert "same" in printed[0]


def is_no_health_check(record: logging.LogRecord) -> bool:
    """Return whether to keep a line. An application may drop those of health checks."""
    return getattr(record, "path", "") != "/healthz"


@pytest.mark.parametrize("target", ["logger", "handler", "level"])
def test_applies_the_filters_of_an_application(
    service: Service, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """A filter or a level on the logger or on the handler of the service drops lines."""
    stream = redirect_log(monkeypatch)
    if target == "level":
        logger.handlers[0].setLevel(logging.WARNING)
    else:
        filtered = logger if target == "logger" else logger.handlers[0]
        monkeypatch.setattr(filtered, "filters", [is_no_health_check])
    for path in ("/healthz", "/api/me"):
        service.http.get(path)
    assert [json.loads(line)["path"] for line in stream.getvalue().splitlines()] == ["/api/me"]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (logging, "_logRecordFactory"),  # as logging.setLogRecordFactory does
        (logging.Logger, "makeRecord"),
        (logging.Logger, "handle"),
        (logging.Logger, "callHandlers"),
    ],
)
def test_shows_requests_to_tracing_tools(
    service: Service, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    """A tool that replaces a part of ``logging``, as Sentry does, gets the record of a request."""
    redirect_log(monkeypatch)
    seen, original = [], getattr(owner, name)

    @functools.wraps(original, updated=())
    def replaced(*args: Any, **kwargs: Any) -> Any:
        seen.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, replaced)
    service.http.get("/healthz")
    assert len(seen) == 1


@pytest.mark.parametrize("error", [BlockingIOError, RuntimeError, UnicodeError])
def test_prints_a_line_once_although_the_stream_fails(
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: type[Exception],
) -> None:
    """Whatever the stream raises, the request succeeds, and the line is not written again."""

    def fail() -> None:
        raise error

    stream = redirect_log(monkeypatch)
    monkeypatch.setattr(stream, "flush", fail)
    assert service.http.get("/healthz").status_code == 200
    assert len(stream.getvalue().splitlines()) == 1
    assert error.__name__ in capsys.readouterr().err


def test_serves_although_the_log_cannot_be_written(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the log's reader is gone, requests are served, and logging reports the problem."""
    reader, writer = os.pipe()
    os.close(reader)
    ours = ServiceHandler()
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logger, "handlers", [ours])
    with suppress(BrokenPipeError), open(writer, "w") as stream:  # noqa: PTH123  # a descriptor
        ours.setStream(stream)
        assert service.http.get("/healthz").status_code == 200
    assert "BrokenPipeError" in capsys.readouterr().err


TWO_SERVICES = """
from clerkhooks import create_app
CLERK["DATABASE_URL"] = DATABASE
apps = [create_app(CLERK | {"LOG_FORMAT": form}) for form in ("json", "text")]
for app in (*apps, *apps):
    app.test_client().get("/healthz")
"""


def test_prints_each_service_in_its_own_format(clerk: FakeClerk, tmp_path: Path) -> None:
    """Two services in one process share the logger without duplicating each other's lines."""
    printed = run_script(TWO_SERVICES, clerk, tmp_path).splitlines()
    assert [line.startswith("{") for line in printed] == [True, False, True, False]
    assert all("/healthz" in line for line in printed)


def test_logs_requests_of_an_application_on_request(clerk: FakeClerk, tmp_path: Path) -> None:
    """``request_log="text"`` logs every request, including those to the application's routes."""
    code = """
import sys
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from clerkhooks import ClerkHooks
db = SQLAlchemy()
app = Flask("application")
app.config["SQLALCHEMY_DATABASE_URI"] = sys.argv[1]
db.init_app(app)
ClerkHooks(db).init_app(app, request_log="text")
app.add_url_rule("/", view_func=lambda: "hello")
app.test_client().get("/")
"""
    command = [sys.executable, "-c", code, f"sqlite:///{tmp_path}/test.db"]
    environment = os.environ | clerk.environ
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"INFO +GET / 200 [0-9.]+ ms +request_id=", ran.stdout)


@pytest.mark.parametrize(
    ("is_terminal", "log_format", "is_json"),
    [
        (True, "", False),
        pytest.param(False, "", True, marks=pytest.mark.slow),
        pytest.param(True, "json", True, marks=pytest.mark.slow),
        pytest.param(False, "text", False, marks=pytest.mark.slow),
    ],
)
def test_chooses_the_format_by_stdout(
    clerk: FakeClerk, tmp_path: Path, is_terminal: bool, log_format: str, is_json: bool
) -> None:
    """The log is text on a terminal and JSON elsewhere, unless LOG_FORMAT is set."""
    code = f"""
from clerkhooks import create_app
app = create_app(CLERK | {{"DATABASE_URL": DATABASE, "LOG_FORMAT": {log_format!r}}})
app.test_client().get("/healthz")
"""
    master, terminal = pty.openpty()
    stdout = terminal if is_terminal else subprocess.PIPE
    printed = run_script(code, clerk, tmp_path, stdout=stdout)
    os.close(terminal)
    if is_terminal:
        printed += os.read(master, 65536).decode()
    os.close(master)
    assert (printed.startswith("{"), "GET" in printed) == (is_json, True)


ROOT_LOGGER = """
import logging
from clerkhooks import create_app
if {before}:
    logging.basicConfig(format="root %(message)s")
app = create_app(CLERK | {{"DATABASE_URL": DATABASE}})
if not {before}:
    logging.basicConfig(format="root %(message)s")
app.test_client().get("/healthz")
app.test_client().get("/api/me")
"""


@pytest.mark.parametrize("before", [pytest.param(True, marks=pytest.mark.slow), False])
def test_prints_each_line_once_beside_a_root_logger(
    clerk: FakeClerk, tmp_path: Path, before: bool
) -> None:
    """Only the root handler prints the lines, no matter when ``basicConfig`` is called."""
    printed = run_script(ROOT_LOGGER.format(before=before), clerk, tmp_path)
    assert printed.splitlines() == ["root request"] * 2


APPLICATION_BESIDE_A_SERVICE = """
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from clerkhooks import ClerkHooks, create_app

service = create_app(CLERK | {"DATABASE_URL": DATABASE})
db = SQLAlchemy()
app = Flask("mine")
app.config |= CLERK | {"SQLALCHEMY_DATABASE_URI": DATABASE}
db.init_app(app)
ClerkHooks(db).init_app(app)
app.add_url_rule("/mine", view_func=lambda: "mine")
for one in (app, service, app):
    one.test_client().get("/mine")
    one.test_client().post("/webhooks/clerk")
"""


def test_prints_nothing_for_an_application(clerk: FakeClerk, tmp_path: Path) -> None:
    """
    The service's handler prints only the service's lines.

    An application without log handlers prints no warnings through ``logging.lastResort``.
    """
    printed = run_script(APPLICATION_BESIDE_A_SERVICE, clerk, tmp_path).splitlines()
    paths = [json.loads(line)["path"] for line in printed if line.startswith("{")]
    assert paths == ["/mine", "/webhooks/clerk"]


def test_describes_an_exception_that_flask_logs(service: Service) -> None:
    """A view's exception is logged with its class and frames, but without its text."""

    def fail() -> str:
        raise RuntimeError("Failing row contains (ada@example.org)")

    service.app.add_url_rule("/fails", view_func=fail)
    with captured_lines(JsonFormatter()) as written:
        assert service.http.get("/fails").status_code == 500
    first, second = map(json.loads, written)
    assert (first["error"], second["status"]) == ("RuntimeError", 500)
    assert first["frames"][-1].endswith(" fail")
    assert "ada@example.org" not in "".join(written)

"""The console in this process: access control, page content and read-only behaviour."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from flask import Flask, request
from flask_sqlalchemy import SQLAlchemy
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError
from werkzeug.test import TestResponse

from clerkhooks import ClerkHooks, create_app
from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.console import pages, texts
from clerkhooks.console.access import set_headers
from clerkhooks.doctor import APPLICATION, Finding, Level, Program, diagnose
from clerkhooks.store import Store, activity, queries
from clerkhooks.web.logs import JsonFormatter, TextFormatter
from clerkhooks.web.state import State, disconnect
from tests.backend import Backend
from tests.conftest import MakeDatabase, MakeService, migrate
from tests.issuer import Issuer, jwk, wait_for_fetches
from tests.support import NOW_MS, Service, broken_users, captured_lines, deletion, user_event

PASSWORD = "correct-horse-battery-staple"
FINE = (Finding("settings_valid", Level.OK, "settings", "Every variable is valid."),)
PAGES = (
    "/console",
    "/console/",
    "/console/checks",
    "/console/messages",
    "/console/messages/msg_1",
    "/console/users",
    "/console/users/user_1",
)


class Console:
    """A client that sends the password."""

    def __init__(self, service: Service, password: str = PASSWORD) -> None:
        self.service, self.http, self.password = service, service.app.test_client(), password

    def get(self, path: str, **options: Any) -> TestResponse:
        """Request a page."""
        return self.http.get(path, auth=("operator", self.password), **options)

    def read(self, path: str, **options: Any) -> str:
        """Check that a page exists, and return its text."""
        answer = self.get(path, **options)
        assert answer.status_code == 200, answer.text
        return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", answer.text.replace("<dd", " <dd")))

    def search(self, text: str, after: str = "") -> TestResponse:
        """Submit a search and follow any redirect."""
        return self.http.post(
            "/console/users",
            data={"search": text, "after": after},
            auth=("operator", self.password),
            follow_redirects=True,
        )


def find_store(service: Service) -> Store:
    """Return the service's store."""
    state: State = service.app.extensions["clerkhooks"]
    return state.store


@pytest.fixture(autouse=True)
def doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the doctor with a fake that sends no requests and finds no problems."""
    monkeypatch.setattr(pages, "diagnose", lambda *_, **__: iter(FINE))


@pytest.fixture
def service(make_service: MakeService) -> Service:
    """Create a service with a console."""
    return make_service(CONSOLE_PASSWORD=PASSWORD)


@pytest.fixture
def console(service: Service) -> Console:
    """Create a client that sends the password."""
    return Console(service)


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
def test_does_not_exist_without_a_configured_password(
    make_service: MakeService, method: str
) -> None:
    """Without CONSOLE_PASSWORD, every path of the console returns the usual 404."""
    service = make_service()
    for path in PAGES:
        answer = service.http.open(path, method=method, auth=("operator", ""))
        assert (answer.status_code, answer.get_json()["reason"]) == (404, "not_found")


@pytest.mark.parametrize(
    "sent",
    [
        None,
        "",
        "Basic",
        "Basic ",
        "Basic !!!!",
        "Basic Og==",
        "Basic YTpi",
        "Basic /////w==",
        "Basic AA==" * 2000,
        "Bearer x",
        "Basic \xe9",
        "Basic YWJj\xff",
        "basic  \x80",
        "Digest \xe9",
        "\xff",
    ],
)
def test_refuses_requests_without_the_password(service: Service, sent: str | None) -> None:
    """Without the password, every page and file returns 401 with strict headers."""
    headers = {} if sent is None else {"Authorization": sent}
    for method, path in (
        ("GET", "/console"),
        ("HEAD", "/console/"),
        ("OPTIONS", "/console/users"),
        ("POST", "/console/users"),
        ("GET", "/console/users/nobody"),
        ("GET", "/console/messages/a/b"),
        ("GET", "/console/static/console.css"),
        ("GET", "/console/static/nothing.css"),
    ):
        answer = service.http.open(path, method=method, headers=headers)
        assert (answer.status_code, answer.content_type) == (401, "application/problem+json")
        assert (
            answer.headers["WWW-Authenticate"]
            == 'Basic realm="clerkhooks console", charset="UTF-8"'
        )
        assert_strict(answer)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/console/nowhere", 404),
        ("PUT", "/console/nowhere", 404),
        ("GET", "/console//x", 404),
        ("GET", "/console///", 404),
        ("GET", "/console/users//", 404),
        ("GET", "/console/messages//msg_1", 404),
        ("GET", "/console/%0a", 404),
        ("GET", "/console/static/nothing.css", 404),
        ("GET", "/console/users/nobody", 404),
        ("POST", "/console/messages", 405),
        ("PUT", "/console/users/", 405),
        ("TRACE", "/console", 405),
        ("UNKNOWN", "/console", 405),
    ],
)
def test_refuses_other_paths_and_methods(
    console: Console, method: str, path: str, status: int
) -> None:
    """Unknown paths and methods return problem details."""
    answer = console.http.open(path, method=method, auth=("operator", PASSWORD))
    assert (answer.status_code, answer.content_type) == (status, "application/problem+json")
    assert ("Allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize("path", ["/console/users/nobody", "/console/static/nothing.css"])
def test_answers_404_with_strict_headers(console: Console, path: str) -> None:
    """A 404 response of the console also has the strict headers."""
    answer = console.get(path)
    assert (answer.status_code, answer.content_type) == (404, "application/problem+json")
    assert_strict(answer)


@pytest.mark.parametrize("prefix", [None, "/ops"])
def test_is_a_guest_in_an_application(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clerk: FakeClerk, prefix: str | None
) -> None:
    """The application's error handlers and Jinja options do not affect the console's pages."""
    variables = {"PORT": "x", "DATABASE_URL": "mysql://", "LOG_FORMAT": "xml", "DYNO": "web.1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pages, "diagnose", partial(diagnose_configuration, diagnose))
    app = Flask("notes", template_folder=str(tmp_path))
    (tmp_path / "clerkhooks").mkdir()
    (tmp_path / "clerkhooks" / "base.html").write_text("not ours")
    app.jinja_options = {"block_start_string": "<%", "block_end_string": "%>"}
    app.config |= clerk.environ
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path}/notes.db"
    app.config["CONSOLE_PASSWORD"] = PASSWORD
    app.config["CLERK_AUDIENCE"] = ["api", "web"]
    app.config["CLERK_ISSUER"] = ["https://clerk.example.com", "https://clerk.example.org"]

    @app.errorhandler(Exception)
    def answer_error(_error: Exception) -> tuple[str, int]:
        return "the application's own", 418

    @app.context_processor
    def offer_names() -> dict[str, str]:
        return {"url_for": "", "number": "", "now": ""}

    db = SQLAlchemy()
    hooks = ClerkHooks(db)
    db.init_app(app)
    hooks.init_app(app, routes=("console",), url_prefix=prefix)
    root = f"{prefix or ''}/console"
    auth, http = ("operator", PASSWORD), app.test_client()
    try:
        before = http.get(root, auth=auth)
        assert "Migrate: flask db migrate &amp;&amp; flask db upgrade" in before.text
        unavailable = http.get(f"{root}/users", auth=auth)
        assert (unavailable.status_code, unavailable.get_json()["reason"]) == (
            503,
            "database_unavailable",
        )
        with app.app_context():
            db.create_all()
        checks = http.get(f"{root}/checks", auth=auth).text
        assert "Every variable is valid." in checks
        assert "2 issuers are accepted" in checks
        for name in variables:
            assert name not in checks
        page = http.get(f"{root}/", auth=auth).text
        assert "flask clerk send user.created" in page
        links = set(re.findall(r'(?:href|action)="(/[^"]*)"', page))
        assert len(links) > 5
        for link in links:
            assert link.startswith(root)
            with http.get(link.replace("&amp;", "&"), auth=auth) as answer:
                assert answer.status_code == 200
            assert http.get(link.replace("&amp;", "&")).status_code == 401
        answer = http.get(f"{root}/users/nobody", auth=auth)
        assert (answer.status_code, answer.get_json()["reason"]) == (404, "not_found")
        user_id = clerk_id("user")
        found = http.post(f"{root}/users", data={"search": user_id}, auth=auth)
        assert found.location == f"{root}/users/{user_id}"
        assert "Content-Security-Policy" not in http.get("/nowhere").headers
    finally:
        disconnect(app)


def diagnose_configuration(
    diagnose: Any, values: Mapping[str, Any], *, checks: Any, program: Program
) -> Any:
    """Run only the checks that send no requests."""
    assert program is APPLICATION
    own = [check for check in checks if check.__module__ != "clerkhooks.doctor.instance"]
    return diagnose(values, checks=own, program=program)


def test_keeps_two_applications_apart(make_service: MakeService) -> None:
    """Two applications in one process have separate console passwords."""
    passwords = PASSWORD, "other" * 4
    services = [make_service(CONSOLE_PASSWORD=password) for password in passwords]
    for service in services:
        statuses = [
            Console(service, password).get("/console").status_code for password in passwords
        ]
        assert statuses == [
            200 if service.app.config["CONSOLE_PASSWORD"] == password else 401
            for password in passwords
        ]


def test_adds_neither_hooks_nor_extensions(service: Service) -> None:
    """The console adds a blueprint to the application, and no hooks outside that blueprint."""
    app = service.app
    assert app.before_request_funcs.keys() == {None, "clerkhooks.console"}
    [of_all_requests] = app.before_request_funcs[None]
    assert of_all_requests.__module__ == "clerkhooks.web.logs"
    assert set_headers not in app.after_request_funcs[None]
    assert {name for name in app.extensions if "console" in name} == set()
    with app.test_client() as http:
        http.get("/console", auth=("operator", PASSWORD))
        own = {name for name in request.environ if "clerkhooks" in name or "console" in name}
    assert own == {"clerkhooks"}


def test_answers_unexpected_errors_as_problems(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unexpected error returns 500 without details, and the log contains only its class."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("hidden")

    monkeypatch.setattr(queries, "list_users", fail)
    with captured_lines(JsonFormatter()) as written:
        answer = console.get("/console/users")
    assert (answer.status_code, answer.get_json()["reason"]) == (500, "internal_error")
    assert_strict(answer)
    assert json.loads(written[0])["error"] == "RuntimeError"
    assert "hidden" not in answer.text + "".join(written)


def test_works_below_a_mount_point(console: Console) -> None:
    """Links begin with the SCRIPT_NAME of the WSGI server."""
    answer = console.get("/console", base_url="http://localhost/mounted")
    assert 'href="/mounted/console/users"' in answer.text


@pytest.mark.parametrize("password", [PASSWORD, "with:colon:inside", "'quotes\"and%&<>+"])
def test_admits_requests_with_the_password(make_service: MakeService, password: str) -> None:
    """Any user name works. The password can contain any printable ASCII characters."""
    service = make_service(CONSOLE_PASSWORD=password)
    for path in PAGES:
        answer = Console(service, password).get(path)
        assert answer.status_code == 200
        assert_strict(answer)


def assert_strict(answer: TestResponse) -> None:
    """Check that headers forbid scripts, framing, MIME sniffing, referrers and caching."""
    policy = dict(
        part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; ")
    )
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["style-src"] == policy["img-src"] == policy["form-action"] == "'self'"
    assert policy.keys() == {
        "default-src",
        "base-uri",
        "frame-ancestors",
        "style-src",
        "img-src",
        "form-action",
    }
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert answer.headers["Referrer-Policy"] == "no-referrer"


def test_leaves_other_responses_alone(service: Service) -> None:
    """Responses from outside the console do not have the console's headers."""
    for path in ("/healthz", "/api/me", "/consoles"):
        assert "Content-Security-Policy" not in service.http.get(path).headers


def test_changes_nothing(console: Console) -> None:
    """Reading all pages does not change any rows."""
    user_id = clerk_id("user")
    console.service.deliver(user_event(user_id), "msg_1")
    tables = ("SELECT * FROM users", "SELECT * FROM webhook_messages")
    before = [console.service.rows(query) for query in tables]
    for path in (
        *PAGES,
        f"/console/users/{user_id}",
        "/console/messages?outcome=failed&since=24h",
        "/console/users?show=deleted",
    ):
        assert console.get(path).status_code == 200
    assert console.search("ada").status_code == 200
    assert [console.service.rows(query) for query in tables] == before
    for method in ("PUT", "PATCH", "DELETE"):
        assert (
            console.http.open(
                "/console/users", method=method, auth=("operator", PASSWORD)
            ).status_code
            == 405
        )


def test_reports_that_everything_is_ok(console: Console) -> None:
    """If no message has failed, the overview shows the figures and no problems."""
    console.service.deliver(user_event(clerk_id("user")))
    gone = clerk_id("user")
    for _ in range(2):
        console.service.deliver(deletion(gone), "msg_repeated")
    words = console.read("/console")
    assert "Webhooks and database are OK" in words
    for figure in (
        "Unresolved failures 0",
        "Total users 2",
        "New today (UTC) 2",
        "Without a profile for over an hour 0",
        "Tombstones 1",
    ):
        assert figure in words
    assert "Messages in the last 24 hours: 2 " in words
    assert "applied 2 stale 0 ignored 0 failed 0" in words
    assert "The total includes tombstones, which are the rows of deleted users." in words
    assert "A message that is delivered repeatedly counts once." in words
    assert "newest" not in words
    assert "Session keys 1 key configured" in words
    assert "Last webhook just now" in words or "s ago" in words


def test_reports_errors_and_warnings(console: Console) -> None:
    """The overview shows the database's problems and their remedies, most severe first."""
    assert "OK, with 1 warning warning webhooks No verified webhook" in console.read("/console")
    body = user_event(clerk_id("user"))
    with broken_users(console.service):
        console.service.deliver(body, "msg_1")
    words = console.read("/console")
    assert re.search("1 error error webhooks 1 message from the last 24 hours failed.* ok ", words)
    assert "Then repair: clerkhooks sync --failed" in words
    assert "Unresolved failures 1" in words
    assert "applied 0 stale 0 ignored 0 failed 1" in words
    console.service.deliver(body, "msg_1")
    assert "Webhooks and database are OK" in console.read("/console")


def test_runs_all_checks(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page shows the doctor's findings and the database's problems, most severe first."""
    findings = (*FINE, Finding("b", Level.WARNING, "keys", "Old.", "Look."))
    monkeypatch.setattr(pages, "diagnose", lambda *_, **__: iter(findings))
    console.service.deliver(user_event(clerk_id("user")))
    words = console.read("/console/checks")
    assert re.search("warning keys Old. Look. ok settings Every variable is valid. ok ", words)
    assert "The database responds, and has every table and column." in words


def test_reports_that_the_database_is_away(make_unreachable: MakeService) -> None:
    """Without a database, the overview still works and shows a remedy. Other pages return 503."""
    console = Console(make_unreachable(CONSOLE_PASSWORD=PASSWORD))
    for path in ("/console", "/console/checks"):
        words = console.read(path)
        assert "error database The database does not respond (OperationalError" in words
        assert "Check that it is running, and reachable from here" in words
    answer = console.get("/console/users")
    assert (answer.status_code, answer.get_json()["reason"]) == (503, "database_unavailable")
    assert_strict(answer)


def test_reports_that_the_database_is_not_migrated(
    make_database: MakeDatabase, make_service: MakeService, database_url: str
) -> None:
    """If the database is not migrated, the overview shows the command that migrates it."""
    kind = make_url(database_url).get_backend_name()
    console = Console(make_service(DATABASE_URL=make_database(kind), CONSOLE_PASSWORD=PASSWORD))
    words = console.read("/console")
    assert (
        "1 error The figures appear once the database responds, accepts writes and is migrated. "
        "error database The database responds, but is not migrated. "
        "Migrate: flask --app wsgi db upgrade" in words
    )


def test_reports_that_the_figures_cannot_be_read(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a query times out, the overview still shows the findings. The error is logged."""

    def find_lag(_store: object, _now: datetime) -> None:
        raise OperationalError(
            "SELECT", {}, Exception("canceling statement due to statement timeout")
        )

    monkeypatch.setattr(activity, "find_lag", find_lag)
    console.service.deliver(user_event(clerk_id("user")))
    with captured_lines(JsonFormatter()) as written:
        words = console.read("/console")
    assert "The figures are currently unavailable" in words
    assert "A query failed or took too long. See the log for the error." in words
    assert [json.loads(line).get("error") for line in written] == ["OperationalError"]
    assert "Every message from the last 24 hours has been processed." in words


def test_reports_the_state_of_the_session_keys(make_service: MakeService) -> None:
    """The overview shows whether session keys are configured, fetched, pending or missing."""
    none = make_service(CONSOLE_PASSWORD=PASSWORD, CLERK_JWT_KEY=None, CLERK_PUBLISHABLE_KEY=None)
    assert "Session keys missing: protected routes return 503" in Console(none).read("/console")
    with Issuer(jwk(none.clerk)).open() as issuer:
        fetched = make_service(
            CONSOLE_PASSWORD=PASSWORD, CLERK_JWT_KEY=None, CLERK_JWKS_URL=issuer.url
        )
        assert "Session keys not fetched yet" in Console(fetched).read("/console")
        fetched.call(clerk_id("user"))
        assert "Session keys fetched just now" in Console(fetched).read("/console")
        wait_for_fetches()


def test_filters_messages(console: Console) -> None:
    """Filters by outcome, type, user and time can be combined. Messages link to their users."""
    ada, grace = clerk_id("user"), clerk_id("user")
    console.service.deliver(user_event(ada, at=NOW_MS), "msg_new")
    console.service.deliver(user_event(ada, at=NOW_MS - 5000), "msg_old")
    console.service.deliver(user_event(grace, "user.created"), "msg_grace")
    with broken_users(console.service):
        console.service.deliver(user_event(clerk_id("user")), "msg_failed")

    def shown(query: str) -> set[str]:
        return set(
            re.findall(r"/console/messages/(\w+)", console.get(f"/console/messages?{query}").text)
        )

    assert shown("") == {"msg_new", "msg_old", "msg_grace", "msg_failed"}
    assert shown("outcome=stale") == {"msg_old"}
    assert shown("outcome=failed&since=1h") == {"msg_failed"}
    assert shown("type=user.created") == {"msg_grace"}
    assert shown(f"user={ada}&outcome=applied&type=user.updated&since=24h") == {"msg_new"}
    assert shown("type=nothing") == shown("user=user_nobody") == set()
    console.service.rows(
        "UPDATE webhook_messages SET received_at = '2020-01-01 00:00:00' "
        "WHERE message_id = 'msg_new'"
    )
    assert "msg_new" not in shown("since=30d")
    assert f"/console/users/{grace}" in console.get("/console/messages").text


def test_links_a_failed_message_to_its_user(console: Console) -> None:
    """The message's page shows the error and the attempts. The user's page shows the row."""
    user_id = clerk_id("user")
    with broken_users(console.service):
        for _ in range(2):
            console.service.deliver(user_event(user_id), "msg_1")
    words = console.read("/console/messages/msg_1")
    assert "failed It failed, and no retry has succeeded yet." in words
    assert "Attempts 2" in words
    assert re.search(r"Error IntegrityError \w+", words)
    assert "Processed not yet" in words
    assert f"No row for {user_id}" in console.read(f"/console/users/{user_id}")
    console.service.deliver(user_event(user_id), "msg_1")
    assert "applied It was processed and changed the tables." in console.read(
        "/console/messages/msg_1"
    )
    assert "Ada Lovelace" in console.read(f"/console/users/{user_id}")
    assert "There is no such message." in console.read("/console/messages/msg_2")


def test_explains_the_source_of_a_row(console: Console, syncing: Service, backend: Backend) -> None:
    """A user's page names the event, call or sync that wrote the current row."""
    seen, filled, gone, synced = (clerk_id("user") for _ in range(4))
    console.service.call(seen)
    console.service.deliver(user_event(filled, at=NOW_MS), "msg_winner")
    console.service.deliver(user_event(filled, at=NOW_MS - 1000), "msg_loser")
    console.service.deliver(deletion(gone))
    words = console.read(f"/console/users/{filled}")
    assert re.search(
        r"The user\.updated event of \d\d \w+ \d{4}, [\d:]+ .*, message msg_winner\. No event with "
        r"newer data has arrived\.",
        words,
    )
    assert "The user's first call created the row" in console.read(f"/console/users/{seen}")
    assert "Presence offline, last seen" in console.read(f"/console/users/{seen}")
    console.service.call(seen, "PUT", "/api/me/presence", body={"isOnline": True})
    assert "Presence online, last seen" in console.read(f"/console/users/{seen}")
    assert "This is final" in console.read(f"/console/users/{gone}")
    console.service.rows("DELETE FROM webhook_messages WHERE message_id = 'msg_winner'")
    assert "The message msg_winner, which has been pruned from the log" in console.read(
        f"/console/users/{filled}"
    )
    backend.sign_up(synced)
    assert syncing.app.test_cli_runner().invoke(args=["clerk", "sync", synced]).exit_code == 0
    assert "A sync with Clerk's Backend API." in console.read(f"/console/users/{synced}")
    backend.delete(synced)
    console.service.rows("UPDATE users SET created_at = '2020-01-01 00:00:00'")
    assert syncing.app.test_cli_runner().invoke(args=["clerk", "sync", synced]).exit_code == 0
    assert "A sync did not find the user at Clerk." in console.read(f"/console/users/{synced}")


def test_searches_users(console: Console) -> None:
    """A search matches ids, emails and beginnings of names. A single match is opened."""
    ada, grace, other = (clerk_id("user") for _ in range(3))
    console.service.deliver(user_event(ada))
    changed: dict[str, Any] = {
        "first_name": "Grace",
        "last_name": "Brewster Hopper",
        "email_addresses": [],
        "primary_email_address_id": None,
    }
    console.service.deliver(user_event(grace, **changed))

    def found(text: str) -> set[str]:
        answer = console.search(text)
        assert (answer.status_code, answer.request.query_string) == (200, b"")
        ids = {user_id for user_id in (ada, grace, other) if user_id in answer.text}
        if answer.request.method == "GET" and text.strip():
            assert answer.request.path.startswith("/console/users/user_")
            assert len(ids) == 1
        return ids

    assert found("") == found("  ") == {ada, grace}
    assert found("ada@example.org") == found("ADA@example.org") == {ada}
    assert found(" love ") == found("aDa") == found(f" {ada} ") == {ada}
    assert found("brewster") == found("Grace Brew") == {grace}
    for text in ("velace", "100%", "A_a Love", "nobody@example.org"):
        assert found(text) == set()
    console.service.deliver(user_event(other))
    assert found("ada@example.org") == found("ada l") == {ada, other}
    unknown = clerk_id("user")
    assert console.search(unknown).request.path == f"/console/users/{unknown}"


def test_pages_through_users(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both the list and a search show each user once, on pages of a fixed size."""
    monkeypatch.setattr(pages, "PAGE", 2)
    ids = {clerk_id("user") for _ in range(5)}
    for user_id in ids:
        console.service.deliver(user_event(user_id))
    console.service.rows("UPDATE users SET created_at = '2026-01-01 00:00:00.000000'")
    listed, answer = list[list[str]](), console.get("/console/users")
    while following := find_users_of(answer, listed, r'rel="next" href="([^"]*)"'):
        answer = console.get(following)
    searched, answer = list[list[str]](), console.search("ada")
    while following := find_users_of(answer, searched, r'name="after" value="([^"]*)"'):
        answer = console.search("ada", after=following)
    for found in (listed, searched):
        assert [len(page) for page in found] == [2, 2, 1]
        assert {user_id for page in found for user_id in page} == ids


def find_users_of(answer: TestResponse, found: list[list[str]], pattern: str) -> str | None:
    """Add the users on the page to *found*, and return the link or cursor of the next page."""
    found.append(re.findall(r'href="/console/users/(\w+)"', answer.text))
    assert len(found) < 9
    following = re.search(pattern, answer.text)
    return following and following[1].replace("&amp;", "&")


@given(st.data())
def test_pages_through_messages(service: Service, data: st.DataObject) -> None:
    """For any page size and search limit, each match appears once, and newer ones come first."""
    outcomes = data.draw(
        st.lists(
            st.tuples(st.sampled_from(["applied", "stale", "failed"]), st.integers(0, 3)),
            max_size=12,
        )
    )
    limit, searched = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    wanted = data.draw(st.sampled_from([None, "applied", "stale", "failed"]))
    service.rows("DELETE FROM webhook_messages")
    for number, (outcome, second) in enumerate(outcomes):
        at = f"2026-01-01 00:00:0{second}.000000"
        service.rows(
            "INSERT INTO webhook_messages VALUES "
            f"('msg_{number:02}', 'user.updated', NULL, NULL, '{outcome}', 1, NULL, '{at}', "
            "NULL, NULL)"
        )
    kept = [
        (second, f"msg_{number:02}")
        for number, (outcome, second) in enumerate(outcomes)
        if wanted in (None, outcome)
    ]
    expected = [message_id for _, message_id in sorted(kept, reverse=True)]
    found: list[str] = []
    before, store = None, find_store(service)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queries, "MAX_EXAMINED", searched)
        for _ in range(40):
            page = queries.list_messages(store, outcome=wanted).read_page(limit, before)
            found += [message.message_id for message in page.rows]
            before = page.next and queries.Cursor.parse(str(page.next))
            if before is None:
                break
        latest = queries.list_messages(store, outcome=wanted).read_all(3 * limit)
    assert found == expected
    assert [message.message_id for message in latest] == expected[: 3 * limit]


def test_reports_how_far_back_it_searched(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a filter has no index, a page covers part of the log and shows how far back it goes."""
    monkeypatch.setattr(queries, "MAX_EXAMINED", 2)
    for number in range(5):
        console.service.deliver(
            user_event(clerk_id("user"), "user.created" if number == 0 else "user.updated"),
            f"msg_{number}",
        )
    page = console.get("/console/messages?type=user.created").text
    assert "No matches so far." in page
    assert "Searched back to" in page
    for _ in range(2):
        following = re.search(r'rel="next" href="([^"]*)"', page)
        assert following is not None
        page = console.get(following[1].replace("&amp;", "&")).text
    assert "msg_0" in page
    assert 'href="/console/messages?type=user.created">Newest' in page


def test_reports_how_far_back_it_searched_users(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a search by name, a page covers part of the table and shows how far back it goes."""
    monkeypatch.setattr(queries, "MAX_EXAMINED", 2)
    oldest = clerk_id("user")
    console.service.deliver(user_event(oldest, first_name="Grace", last_name=None))
    for _ in range(4):
        console.service.deliver(user_event(clerk_id("user")))
    answer = console.search("grace")
    assert "No matches so far." in answer.text
    assert "Searched back to" in answer.text
    for _ in range(2):
        following = re.search(r'name="after" value="([^"]*)"', answer.text)
        assert following is not None
        answer = console.search("grace", after=following[1])
    assert oldest in answer.text
    store = find_store(console.service)
    assert [user.id for user in queries.list_users(store, "grace").read_all(50)] == [oldest]


def test_lists_each_message_once_while_others_arrive(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New messages during a search do not cause missing or repeated results."""
    for number in range(9):
        service.deliver(user_event(clerk_id("user"), "user.created"), f"msg_{number}")
    store, ids = find_store(service), [f"msg_{number}" for number in range(9)]
    execute: Callable[..., Any] = store.database.execute

    def execute_while_more_arrive(query: Any) -> Any:
        service.deliver(user_event(clerk_id("user")))
        return execute(query)

    monkeypatch.setattr(store.database, "execute", execute_while_more_arrive)
    monkeypatch.setattr(queries, "MAX_EXAMINED", 2)
    messages = queries.list_messages(store, event_type="user.created").read_all(50)
    found = [message.message_id for message in messages]
    assert sorted(found) == ids


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "\u202egnp.exe",
    "x" * 10_000,
    "\U0001f469\u200d\U0001f680 \U0001f389",
    "{{ 7 * 7 }}",
    "%00",
    "\ufffe",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_escapes_hostile_content(console: Console, name: str) -> None:
    """Names, types, ids, errors and search terms are escaped in HTML."""
    user_id = clerk_id("user")
    console.service.deliver(user_event(user_id, first_name=name, last_name=None))
    quoted = name[:200].replace("'", "''")
    at = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
    ids = f"'{user_id}', 'org_{quoted}'"
    values = f"'msg {quoted}', '{quoted}', {ids}, 'failed', 1, NULL, '{at}', NULL, '{quoted}'"
    console.service.rows(
        f"INSERT INTO webhook_messages VALUES ({values})".replace(
            "%", "%%" if "sqlite" not in console.service.database_url else "%"
        )
    )
    for path in (
        "/console",
        "/console/users",
        f"/console/users/{user_id}",
        "/console/messages",
        f"/console/messages/{quote('msg ' + name[:200], safe='')}",
    ):
        answer = console.get(path)
        assert answer.status_code == 200, path
        page = answer.text
        assert "<script" not in page
        assert "<img" not in page
        assert "style=" not in page
    for answer in (console.search(name), console.search(name[:20], after="2126-01-01,x")):
        assert answer.status_code == 200
        assert "<script" not in answer.text
        assert "<img" not in answer.text


@pytest.mark.parametrize(
    "path",
    [
        "/console/messages?outcome=nothing",
        "/console/messages?since=1y",
        "/console/messages?after=yesterday",
        "/console/messages?after=0001-01-01T00:00:00%2B14:00,x",
        "/console/users?after=,",
        "/console/users?show=secrets",
        "/console/users?after=9999-12-31T23:59:59-14:00,x",
    ],
)
def test_refuses_malformed_urls(console: Console, path: str) -> None:
    """The response to malformed filters and cursors is 400."""
    answer = console.get(path)
    assert (answer.status_code, answer.content_type) == (400, "application/problem+json")
    assert_strict(answer)


@pytest.mark.parametrize(
    "path", ["/console/messages?user=%00", "/console/messages?type=a%00b", "/console/messages/%00"]
)
def test_refuses_characters_that_the_database_refuses(console: Console, path: str) -> None:
    """PostgreSQL refuses NUL, so the response is 400. On SQLite, nothing matches."""
    answer = console.get(path)
    is_sqlite = console.service.database_url.startswith("sqlite")
    assert answer.status_code == (200 if is_sqlite else 400)
    assert is_sqlite or answer.get_json()["reason"] == "filter_malformed"
    assert console.search("a\0").status_code == answer.status_code


@pytest.mark.parametrize("fields", [("ada", "\0"), ("ada", "yesterday")])
def test_refuses_malformed_searches(console: Console, fields: tuple[str, ...]) -> None:
    """The response to a malformed search or cursor is 400."""
    answer = console.search(*fields)
    assert (answer.status_code, answer.content_type) == (400, "application/problem+json")


@given(
    st.sampled_from(["outcome", "type", "user", "since", "after", "show", "search"]),
    st.text(max_size=30),
    st.binary(max_size=30),
)
def test_answers_any_url_without_a_server_error(
    console: Console, name: str, text: str, body: bytes
) -> None:
    """No query string, path or body causes a 5xx response."""
    for path in ("/console/messages", "/console/users"):
        assert console.get(path, query_string={name: text}).status_code < 500
    for path in ("/console/messages/", "/console/users/", "/console/"):
        assert console.get(path + text).status_code < 500
    assert console.http.post(
        "/console/users", data=b"search=" + body, auth=("operator", PASSWORD)
    ).status_code in (200, 303, 400)


def test_works_on_a_database_of_another_encoding(postgresql: str, clerk: FakeClerk) -> None:
    """Characters that are missing from the encoding cause a 400. Other requests work."""
    with psycopg.connect(postgresql, autocommit=True) as connection:
        connection.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    url = (
        make_url(postgresql)
        .set(drivername="postgresql", database="latin")
        .render_as_string(hide_password=False)
    )
    migrate(url, clerk)
    config = clerk.environ | {"DATABASE_URL": url, "CONSOLE_PASSWORD": PASSWORD}
    console = Console(Service(create_app(config), clerk, url))
    try:
        console.service.deliver(user_event(clerk_id("user"), first_name="Élodie", last_name="Noël"))
        for search in ("Élod", "noël"[:3], "ada@example.org"):
            assert "Élodie Noël" in console.search(search).text
        assert console.search("\U0001f389").status_code == 400
        for path in (
            "/console/messages?type=\U0001f389",
            "/console/messages/\U0001f389",
        ):
            assert console.get(path).status_code == 400
    finally:
        disconnect(console.service.app)
        with psycopg.connect(postgresql, autocommit=True) as connection:
            connection.execute("DROP DATABASE latin WITH (FORCE)")


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_logs_neither_searches_nor_the_password(
    console: Console, formatter: logging.Formatter
) -> None:
    """A request's log line contains the path, but neither the query string nor the body."""
    with captured_lines(formatter) as written:
        assert console.search("lovelace").request.query_string == b""
        assert console.search("ada@example.org").request.query_string == b""
        Console(console.service, "a wrong password").get("/console")
    assert [("/console" in line) for line in written] == [True] * 3
    for secret in ("lovelace", "ada@example", PASSWORD, "a wrong password", "search="):
        assert secret not in "".join(written)


def test_counts_up_to_a_limit(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting stops at a limit. The counts by outcome then include only the newest messages."""
    for number in range(5):
        console.service.deliver(user_event(clerk_id("user"), at=NOW_MS + number))
    store = find_store(console.service)
    monkeypatch.setattr(activity, "MAX_COUNT", 3)
    monkeypatch.setattr(texts, "MAX_COUNT", 3)
    monkeypatch.setitem(pages._ENVIRONMENT.globals, "max_count", 3)
    assert activity.count_users(store) == 4
    assert activity.count_new_users(store, datetime(2020, 1, 1, tzinfo=UTC)) == 4
    assert activity.count_tombstones(store) == 0
    words = console.read("/console")
    assert "Total users more than 3" in words
    assert "Messages in the last 24 hours: more than 3" in words
    assert "The figures by outcome cover only the newest 3 messages." in words


def test_counts_the_messages_of_a_day(service: Service) -> None:
    """Messages older than a day are not counted. An outcome without messages counts as 0."""
    for number in range(3):
        service.deliver(user_event(clerk_id("user")), f"msg_{number}")
    service.rows(
        "UPDATE webhook_messages SET received_at = '2020-01-01 00:00:00' WHERE message_id = 'msg_0'"
    )
    since = datetime.now(UTC) - timedelta(hours=24)
    counts = activity.count_outcomes(find_store(service), since)
    assert counts == {"applied": 2, "stale": 0, "ignored": 0, "failed": 0}


def test_measures_the_lag_of_the_latest_messages(service: Service) -> None:
    """The lag is the time between an event and the end of its processing."""
    now = int(time.time() * 1000)
    for seconds in (100, 200, 300):
        service.deliver(user_event(clerk_id("user"), at=now - seconds * 1000))
    lag = activity.find_lag(find_store(service), datetime.now(UTC) - timedelta(hours=1))
    assert lag is not None
    assert 199 < lag.median < 290
    assert 299 < lag.p99 < 390


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0401, "40 ms"),
        (2.5, "2.5 s"),
        (7, "7 s"),
        (60, "1 minute"),
        (3599, "59 minutes"),
        (7200, "2 hours"),
        (86_400 * 1200, "1,200 days"),
    ],
)
def test_formats_a_duration(seconds: float, text: str) -> None:
    """The unit of a duration depends on its length."""
    assert texts.duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "just now"),
        (1, "just now"),
        (2, "2 s ago"),
        (7300, "2 hours ago"),
        (-1, "just now"),
        (-90, "in 1 minute"),
    ],
)
def test_formats_a_time_in_the_past(seconds: int, text: str) -> None:
    """A time in the future, due to clock skew, can also be formatted."""
    now = datetime.now(UTC)
    assert texts.ago(now - timedelta(seconds=seconds), now) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(1234, "1,234"), (100_000, "100,000"), (100_001, "more than 100,000")],
)
def test_formats_a_number(count: int, text: str) -> None:
    """A number above the limit is shown as "more than" the limit."""
    assert texts.number(count) == text

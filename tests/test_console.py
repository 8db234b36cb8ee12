"""The console in this process: who gets in, what each page says, and that it stays quick and harmless."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError
from werkzeug.test import TestResponse

from clerkhooks import activity, create_app, reports
from clerkhooks.activity import Activity, Count
from clerkhooks.cli.pretend import PretendedClerk, clerk_id
from clerkhooks.console import access, checkup, texts
from clerkhooks.console.chart import HEIGHT, draw, round_up
from clerkhooks.console.checkup import Checkup
from clerkhooks.diagnosis import Finding, Level
from clerkhooks.logs import JsonFormatter, TextFormatter
from clerkhooks.settings import Settings
from clerkhooks.testing import disconnect
from tests.backend import Backend
from tests.conftest import MakeDatabase, MakeService, migrate
from tests.issuer import Issuer, jwk, settle
from tests.support import NOW_MS, Service, broken_users, deletion, lines, user_event

PASSWORD = "correct horse battery staple"
WELL = (Finding("settings_valid", Level.OK, "settings", "Every variable is well-formed."),)
PAGES = ("/console", "/console/", "/console/messages", "/console/messages/msg_1", "/console/users", "/console/users/user_1")


class Console:
    """A browser that has the password."""

    def __init__(self, service: Service, password: str = PASSWORD) -> None:
        self.service, self.http, self.password = service, service.app.test_client(), password

    def get(self, path: str, **options: Any) -> TestResponse:
        """A page."""
        return self.http.get(path, auth=("operator", self.password), **options)

    def read(self, path: str, **options: Any) -> str:
        """The words of a page that must be there."""
        answer = self.get(path, **options)
        assert answer.status_code == 200, answer.text
        return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", answer.text.replace("<dd", " <dd")))

    def search(self, text: str) -> TestResponse:
        """Where a search leads to."""
        return self.http.post("/console/users", data={"search": text}, auth=("operator", self.password))


@pytest.fixture(autouse=True)
def doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the doctor look at nothing outside, and find all well."""
    monkeypatch.setattr(checkup, "diagnose", lambda _environ, checks: iter(WELL))


@pytest.fixture
def service(make_service: MakeService) -> Service:
    """The service, with a console."""
    return make_service(CONSOLE_PASSWORD=PASSWORD)


@pytest.fixture
def console(service: Service) -> Console:
    """A browser that has the password."""
    return Console(service)


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
def test_is_not_there_without_a_password(make_service: MakeService, method: str) -> None:
    """Nobody can tell that there might be something."""
    service = make_service()
    for path in PAGES:
        answer = service.http.open(path, method=method, auth=("operator", ""))
        assert (answer.status_code, answer.get_json()["reason"]) == (404, "not_found")


@pytest.mark.parametrize("sent", [
    None, "", "Basic", "Basic ", "Basic !!!!", "Basic Og==", "Basic YTpi", "Basic /////w==", "Basic AA==" * 2000, "Bearer x",
    "Basic \xe9", "Basic YWJj\xff", "basic  \x80", "Digest \xe9", "\xff",
])  # fmt: skip
def test_lets_nobody_in_without_the_password(service: Service, sent: str | None) -> None:
    """Whatever is sent in its place, for whatever is asked; and the answer keeps to itself."""
    headers = {} if sent is None else {"Authorization": sent}
    for method, path in (
        ("GET", "/console"),
        ("GET", "/console/static/console.css"),
        ("POST", "/console/nowhere"),
        ("DELETE", "/console/users"),
    ):
        answer = service.http.open(path, method=method, headers=headers)
        assert answer.status_code in (401, 429)
        assert answer.content_type == "application/problem+json"
        assert_strict(answer)
        if answer.status_code == 401:
            assert answer.headers["WWW-Authenticate"] == 'Basic realm="clerkhooks console", charset="UTF-8"'


@pytest.mark.parametrize("password", ["correct horse", "pässwört-日本語", "with:colon:inside", "'quotes\" and %"])
def test_lets_in_who_has_the_password(make_service: MakeService, password: str) -> None:
    """Under any name, with any characters."""
    service = make_service(CONSOLE_PASSWORD=password)
    for path in PAGES:
        answer = Console(service, password).get(path)
        assert answer.status_code == 200
        assert_strict(answer)


def assert_strict(answer: TestResponse) -> None:
    """Nothing may be run, framed, sniffed, told to others or kept."""
    policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["style-src"] == policy["img-src"] == policy["form-action"] == "'self'"
    assert policy.keys() == {"default-src", "base-uri", "frame-ancestors", "style-src", "img-src", "form-action"}
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert answer.headers["Referrer-Policy"] == "no-referrer"


def test_leaves_other_answers_as_they_are(service: Service) -> None:
    """The headers are the console's."""
    for path in ("/healthz", "/api/me", "/consoles"):
        assert "Content-Security-Policy" not in service.http.get(path).headers


def test_brakes_guessing(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five may be wrong at once; then not even the right one is looked at until a while has passed, and then one guess in a while."""
    now = 1000.0
    monkeypatch.setattr(access.time, "monotonic", lambda: now)  # type: ignore[attr-defined]

    def status(password: str) -> tuple[int, str | None]:
        answer = Console(service, password).get("/console/users")
        return answer.status_code, answer.headers.get("Retry-After")

    assert status(PASSWORD) == (200, None)
    assert [status(f"guess {number}")[0] for number in range(7)] == [401] * 5 + [429] * 2
    assert status(PASSWORD) == (429, "10")
    now += 4
    assert status(PASSWORD) == (429, "6")
    now += 6
    assert status("another guess")[0] == 401
    assert status(PASSWORD) == (429, "10")
    now += 10
    assert status(PASSWORD) == (200, None)
    now += 100
    assert [status("guess")[0] for _ in range(7)] == [401] * 5 + [429] * 2


def test_lets_in_who_has_been_in_before_while_others_guess(service: Service) -> None:
    """A stranger who guesses all day does not keep the operator out; what the browser is known by is no password."""
    operator = Console(service)
    first = operator.get("/console")
    assert "Max-Age=2592000; HttpOnly; Path=/console; SameSite=Strict" in first.headers["Set-Cookie"]
    assert operator.get("/console").headers["Set-Cookie"] == first.headers["Set-Cookie"]  # a month from the last visit
    assert "Set-Cookie" not in Console(service, "guess").get("/console").headers
    for _ in range(7):
        Console(service, "guess").get("/console")
    assert Console(service).get("/console").status_code == 429
    assert operator.get("/console").status_code == 200
    operator.password = "wrong"
    assert [operator.get("/console").status_code for _ in range(6)] == [401] * 5 + [429]


def test_keeps_the_cookie_to_https(service: Service) -> None:
    """Also where a proxy says that the browser came by it; and on a developer's machine it works without."""
    https = ({"X-Forwarded-Proto": "https"}, {"X-Forwarded-Proto": "HTTPS, http"}, {"Forwarded": "for=192.0.2.1;proto=https"})
    for headers, is_secure in (*((headers, True) for headers in https), ({"X-Forwarded-Proto": "http"}, False), ({}, False)):
        cookie = Console(service).get("/console", headers=headers).headers["Set-Cookie"]
        assert ("Secure" in cookie) == is_secure
    assert "Secure" in Console(service).get("/console", base_url="https://localhost").headers["Set-Cookie"]


def test_changes_nothing(console: Console) -> None:
    """Every page is read, and every row is as it was."""
    user_id = clerk_id("user")
    console.service.deliver(user_event(user_id), "msg_1")
    tables = ("SELECT * FROM users", "SELECT * FROM webhook_messages")
    before = [console.service.rows(query) for query in tables]
    for path in (*PAGES, f"/console/users/{user_id}", "/console/messages?outcome=failed&since=24h", "/console/users?show=deleted"):
        assert console.get(path).status_code == 200
    assert console.search("ada").status_code == 303
    assert [console.service.rows(query) for query in tables] == before
    for method in ("PUT", "PATCH", "DELETE"):
        assert console.http.open("/console/users", method=method, auth=("operator", PASSWORD)).status_code == 405


def test_says_that_all_is_well(console: Console) -> None:
    """The figures of a day on which nothing went wrong."""
    console.service.deliver(user_event(clerk_id("user")))
    gone = clerk_id("user")
    console.service.deliver(deletion(gone))
    words = console.read("/console")
    assert "All is well" in words
    for figure in ("Failed, never mended 0", "Users in all 2", "New today (UTC) 2", "Unfilled after an hour 0", "Tombstones 1"):
        assert figure in words
    assert "Messages of the last 24 hours: 2 " in words
    assert "applied 2 stale 0 ignored 0 failed 0" in words
    assert "Session keys 1 key configured" in words
    assert "Last webhook just now" in words or "s ago" in words


def test_says_what_is_wrong(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the doctor found comes first, with what to do about it; and what is in the database is found anew at every look."""
    findings = (Finding("a", Level.OK, "clock", "Right."), Finding("b", Level.WARNING, "keys", "Old.", "Look."))
    monkeypatch.setattr(checkup, "diagnose", lambda _environ, checks: iter(findings))
    console.service.deliver(user_event(clerk_id("user")))
    assert "Well, with 1 warning keys: Old. Look." in console.read("/console")
    body = user_event(clerk_id("user"))
    with broken_users(console.service):
        console.service.deliver(body, "msg_1")
    words = console.read("/console")
    assert re.search("1 thing is wrong webhooks: Of the last day.* messages 1 failed.* keys: Old. Look. ", words)
    assert "Failed, never mended 1" in words
    assert "applied 1 stale 0 ignored 0 failed 1" in words
    console.service.deliver(body, "msg_1")
    assert "Well, with 1 warning keys" in console.read("/console")


def test_says_that_it_does_not_know_yet(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was well an hour ago is no verdict, nor is half of it."""
    console.service.deliver(user_event(clerk_id("user")))
    assert "All is well" in console.read("/console")
    own = console.service.app.extensions["clerkhooks.checkup"]
    monkeypatch.setattr(checkup, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 3600))
    monkeypatch.setattr(checkup, "PATIENCE", 0.01)
    may_end = threading.Event()
    monkeypatch.setattr(checkup, "diagnose", lambda _environ, checks: iter(WELL if may_end.wait(20) else ()))
    words = console.read("/console")
    assert "Looking into it" in words
    assert "the rest in some seconds" in words
    may_end.set()
    own._thread.join()
    assert "All is well" in console.read("/console")


def test_says_that_the_database_is_away(make_unreachable: MakeService) -> None:
    """The overview is a page all the same, and says what to do; other pages are a problem for now."""
    console = Console(make_unreachable(CONSOLE_PASSWORD=PASSWORD))
    words = console.read("/console")
    assert "1 thing is wrong database: The database does not answer (OperationalError" in words
    assert "Is it running, and reachable from here" in words
    answer = console.get("/console/users")
    assert (answer.status_code, answer.get_json()["reason"]) == (503, "database_unavailable")
    assert_strict(answer)


def test_says_that_the_database_is_not_migrated(make_database: MakeDatabase, make_service: MakeService, database_url: str) -> None:
    """And how to."""
    kind = make_url(database_url).get_backend_name()
    console = Console(make_service(DATABASE_URL=make_database(kind), CONSOLE_PASSWORD=PASSWORD))
    words = console.read("/console")
    assert "1 thing is wrong database: The database answers, and is not migrated. Migrate: flask --app wsgi db upgrade" in words
    assert "There are no figures until the database answers, and is migrated." in words


def test_says_that_the_figures_cannot_be_read(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one of them takes too long, what was found is said all the same, and the log names the error."""

    def find_lag(_now: datetime) -> None:
        raise OperationalError("SELECT", {}, Exception("canceling statement due to statement timeout"))

    monkeypatch.setattr(activity, "find_lag", find_lag)
    console.service.deliver(user_event(clerk_id("user")))
    with lines(JsonFormatter()) as written:
        words = console.read("/console")
    assert "The figures cannot be read now" in words
    assert [json.loads(line).get("error") for line in written] == ["OperationalError"]
    assert "No message of the last day is left failed." in words


def test_says_how_the_keys_are(make_service: MakeService) -> None:
    """Configured, fetched, not fetched yet, or none."""
    none = make_service(CONSOLE_PASSWORD=PASSWORD, CLERK_JWT_KEY=None, CLERK_PUBLISHABLE_KEY=None)
    assert "Session keys none: protected routes answer 503" in Console(none).read("/console")
    with Issuer(jwk(none.clerk)).open() as issuer:
        fetched = make_service(CONSOLE_PASSWORD=PASSWORD, CLERK_JWT_KEY=None, CLERK_JWKS_URL=issuer.url)
        assert "Session keys not fetched yet" in Console(fetched).read("/console")
        fetched.call(clerk_id("user"))
        assert "Session keys fetched just now" in Console(fetched).read("/console")
        settle()


def test_filters_messages(console: Console) -> None:
    """By outcome, type, user and time, each and together; and each leads to its user."""
    ada, grace = clerk_id("user"), clerk_id("user")
    console.service.deliver(user_event(ada, at=NOW_MS), "msg_new")
    console.service.deliver(user_event(ada, at=NOW_MS - 5000), "msg_old")
    console.service.deliver(user_event(grace, "user.created"), "msg_grace")
    with broken_users(console.service):
        console.service.deliver(user_event(clerk_id("user")), "msg_failed")

    def shown(query: str) -> set[str]:
        return set(re.findall(r"/console/messages/(\w+)", console.get(f"/console/messages?{query}").text))

    assert shown("") == {"msg_new", "msg_old", "msg_grace", "msg_failed"}
    assert shown("outcome=stale") == {"msg_old"}
    assert shown("outcome=failed&since=1h") == {"msg_failed"}
    assert shown("type=user.created") == {"msg_grace"}
    assert shown(f"user={ada}&outcome=applied&type=user.updated&since=24h") == {"msg_new"}
    assert shown("type=nothing") == shown("user=user_nobody") == set()
    console.service.rows("UPDATE webhook_messages SET received_at = '2020-01-01 00:00:00' WHERE message_id = 'msg_new'")
    assert "msg_new" not in shown("since=30d")
    assert f"/console/users/{grace}" in console.get("/console/messages").text


def test_follows_a_failed_message_to_its_user(console: Console) -> None:
    """What failed, how often, why, and how the row looks."""
    user_id = clerk_id("user")
    with broken_users(console.service):
        for _ in range(2):
            console.service.deliver(user_event(user_id), "msg_1")
    words = console.read("/console/messages/msg_1")
    assert "failed It failed, and no retry has succeeded so far." in words
    assert "Attempts 2" in words
    assert re.search(r"Error IntegrityError \w+", words)
    assert "Done not yet" in words
    assert f"No row for {user_id}" in console.read(f"/console/users/{user_id}")
    console.service.deliver(user_event(user_id), "msg_1")
    assert "applied It was done, and changed something here." in console.read("/console/messages/msg_1")
    assert "Ada Lovelace" in console.read(f"/console/users/{user_id}")
    assert "There is no such message here." in console.read("/console/messages/msg_2")


def test_says_why_a_row_looks_as_it_does(console: Console, syncing: Service, backend: Backend) -> None:
    """Which event won, or what else made the row."""
    seen, filled, gone, synced = (clerk_id("user") for _ in range(4))
    console.service.call(seen)
    console.service.deliver(user_event(filled, at=NOW_MS), "msg_winner")
    console.service.deliver(user_event(filled, at=NOW_MS - 1000), "msg_loser")
    console.service.deliver(deletion(gone))
    words = console.read(f"/console/users/{filled}")
    assert re.search(r"The event user\.updated of \d\d \w+ \d{4}, [\d:]+ .* filled it, by the message msg_winner\. Nothing newer", words)
    assert "The user's first call made it" in console.read(f"/console/users/{seen}")
    assert "Presence offline, last seen" in console.read(f"/console/users/{seen}")
    console.service.call(seen, "PUT", "/api/me/presence", body={"isOnline": True})
    assert "Presence online, last seen" in console.read(f"/console/users/{seen}")
    assert "That is final" in console.read(f"/console/users/{gone}")
    console.service.rows("DELETE FROM webhook_messages WHERE message_id = 'msg_winner'")
    assert "msg_winner filled it, which has been pruned from the log" in console.read(f"/console/users/{filled}")
    backend.sign_up(synced)
    assert syncing.app.test_cli_runner().invoke(args=["users", "sync", synced]).exit_code == 0
    assert "A sync filled it" in console.read(f"/console/users/{synced}")
    backend.delete(synced)
    console.service.rows("UPDATE users SET created_at = '2020-01-01 00:00:00'")
    assert syncing.app.test_cli_runner().invoke(args=["users", "sync", synced]).exit_code == 0
    assert "A sync did not find the user in Clerk any more" in console.read(f"/console/users/{synced}")


def test_searches_users(console: Console) -> None:
    """By id, email, and the beginning of a name or of a last name, in any case; and in the address it cannot be read."""
    ada, grace = clerk_id("user"), clerk_id("user")
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
        assert answer.status_code == 303
        assert not text or text.lower() not in answer.location.lower()
        page = console.get(answer.location).text
        return {name for name in ("Ada Lovelace", "Grace Brewster Hopper") if name in page}

    both = {"Ada Lovelace", "Grace Brewster Hopper"}
    assert found("") == both
    assert found("ada@example.org") == found("ADA@example.org") == found(" love ") == found("aDa") == {"Ada Lovelace"}
    assert found("brewster") == found("Grace Brew") == {"Grace Brewster Hopper"}
    assert found("velace") == found("100%") == found("A_a") == found("nobody@example.org") == set()
    assert console.search(f" {ada} ").location == f"/console/users/{ada}"


def test_says_that_a_search_cannot_be_read_any_more(console: Console) -> None:
    """After the signing secret was replaced, or of somebody's making."""
    for sealed in ("gAAAAA", "\u202e", "x" * 5000):
        assert "That search cannot be read any more" in console.read("/console/users", query_string={"search": sealed})


def test_pages_through_users(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, whatever was searched for or chosen, until there are no more."""
    monkeypatch.setattr("clerkhooks.console.PAGE", 2)
    ids = {clerk_id("user") for _ in range(5)}
    for user_id in ids:
        console.service.deliver(user_event(user_id))
    console.service.call(clerk_id("user"))
    console.service.rows("UPDATE users SET created_at = '2026-01-01 00:00:00.000000'")
    path, pages = console.search("ada").location, list[list[str]]()
    while path and len(pages) < 9:
        page = console.get(path).text
        pages.append(re.findall(r'href="/console/users/(\w+)"', page))
        following = re.search(r'rel="next" href="([^"]*)"', page)
        path = following[1].replace("&amp;", "&") if following else ""
    assert [len(page) for page in pages] == [2, 2, 1]
    assert {user_id for page in pages for user_id in page} == ids


@given(st.data())
def test_pages_through_messages(service: Service, data: st.DataObject) -> None:
    """Every message that is wanted comes once, latest first, however small the pages and however far each looks."""
    outcomes = data.draw(st.lists(st.tuples(st.sampled_from(["applied", "stale", "failed"]), st.integers(0, 3)), max_size=12))
    limit, searched = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    wanted = data.draw(st.sampled_from([None, "applied", "stale", "failed"]))
    service.rows("DELETE FROM webhook_messages")
    for number, (outcome, second) in enumerate(outcomes):
        at = f"2026-01-01 00:00:0{second}.000000"
        service.rows(
            f"INSERT INTO webhook_messages VALUES ('msg_{number:02}', 'user.updated', NULL, '{outcome}', 1, NULL, '{at}', NULL, NULL)"
        )
    kept = [(second, f"msg_{number:02}") for number, (outcome, second) in enumerate(outcomes) if wanted in (None, outcome)]
    expected = [message_id for _, message_id in sorted(kept, reverse=True)]
    found: list[str] = []
    before = None
    with pytest.MonkeyPatch.context() as patch, service.app.app_context():
        patch.setattr(reports, "SEARCHED", searched)
        for _ in range(40):
            page = reports.read_message_page(outcome=wanted, before=before, limit=limit)
            found += [message.message_id for message in page.messages]
            before = page.next and reports.Place.parse(str(page.next))
            if before is None:
                break
        latest = reports.find_messages(outcome=wanted, limit=3 * limit)
    assert found == expected
    assert [message.message_id for message in latest] == expected[: 3 * limit]


def test_says_how_far_it_looked(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no index serves a filter, a page looks at some of the messages, and the next goes on from there."""
    monkeypatch.setattr(reports, "SEARCHED", 2)
    for number in range(5):
        console.service.deliver(user_event(clerk_id("user"), "user.created" if number == 0 else "user.updated"), f"msg_{number}")
    page = console.get("/console/messages?type=user.created").text
    assert "None of the messages looked at is one of these." in page
    assert "Looked as far back as" in page
    for _ in range(2):
        following = re.search(r'rel="next" href="([^"]*)"', page)
        assert following is not None
        page = console.get(following[1].replace("&amp;", "&")).text
    assert "msg_0" in page
    assert 'href="/console/messages?type=user.created">Newest' in page


def test_lists_each_message_once_while_others_come(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many arrive between the statements that a search takes."""
    for number in range(9):
        service.deliver(user_event(clerk_id("user"), "user.created"), f"msg_{number}")
    read, ids = reports._read, [f"msg_{number}" for number in range(9)]

    def read_while_more_come(query: Any) -> Any:
        service.deliver(user_event(clerk_id("user")))
        return read(query)

    monkeypatch.setattr(reports, "_read", read_while_more_come)
    monkeypatch.setattr(reports, "SEARCHED", 2)
    with service.app.app_context():
        found = [message.message_id for message in reports.find_messages(event_type="user.created")]
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
def test_shows_hostile_content_as_text(console: Console, name: str) -> None:
    """In a name, a type, a message's id, an error, a search."""
    user_id = clerk_id("user")
    console.service.deliver(user_event(user_id, first_name=name, last_name=None))
    quoted = name[:200].replace("'", "''")
    at = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
    values = f"'msg {quoted}', '{quoted}', '{user_id}', 'failed', 1, NULL, '{at}', NULL, '{quoted}'"
    console.service.rows(
        f"INSERT INTO webhook_messages VALUES ({values})".replace("%", "%%" if "sqlite" not in console.service.database_url else "%")
    )
    for path in ("/console", "/console/users", f"/console/users/{user_id}", "/console/messages", f"/console/messages/msg {name[:200]}"):
        page = console.get(path).text
        assert "<script" not in page
        assert "<img" not in page
        assert "style=" not in page
    assert console.get(console.search(name).location).status_code == 200


@pytest.mark.parametrize("path", [
    "/console/messages?user=%00", "/console/messages?type=a%00b", "/console/messages?outcome=nothing", "/console/messages?since=1y",
    "/console/messages?after=yesterday", "/console/messages?after=0001-01-01T00:00:00%2B14:00,x", "/console/users?after=,",
    "/console/users?show=secrets", "/console/users?after=9999-12-31T23:59:59-14:00,x", "/console/messages/%00",
])  # fmt: skip
def test_refuses_what_no_page_links_to(console: Console, path: str) -> None:
    """A malformed address is the asker's mistake."""
    answer = console.get(path)
    assert (answer.status_code, answer.content_type) == (400, "application/problem+json")
    assert_strict(answer)


@given(st.sampled_from(["outcome", "type", "user", "since", "after", "show", "search"]), st.text(max_size=30), st.binary(max_size=30))
def test_bears_any_address(console: Console, name: str, text: str, body: bytes) -> None:
    """Nothing that is asked for gives a 5xx."""
    for path in ("/console/messages", "/console/users"):
        assert console.get(path, query_string={name: text}).status_code < 500
    for path in ("/console/messages/", "/console/users/", "/console/"):
        assert console.get(path + text).status_code < 500
    assert console.http.post("/console/users", data=b"search=" + body, auth=("operator", PASSWORD)).status_code in (303, 400)


def test_bears_a_database_of_another_encoding(postgresql: str, clerk: PretendedClerk) -> None:
    """What its characters cannot say is not found, and all the rest is."""
    with psycopg.connect(postgresql, autocommit=True) as connection:
        connection.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    url = make_url(postgresql).set(drivername="postgresql", database="latin").render_as_string(hide_password=False)
    migrate(url, clerk)
    settings = Settings.from_environ(clerk.environ | {"DATABASE_URL": url, "CONSOLE_PASSWORD": PASSWORD})
    console = Console(Service(create_app(settings), clerk, url))
    try:
        console.service.deliver(user_event(clerk_id("user"), first_name="Élodie", last_name="Noël"))
        for search in ("Élod", "noël"[:3], "ada@example.org"):
            assert "Élodie Noël" in console.get(console.search(search).location).text
        for path in (console.search("\U0001f389").location, "/console/messages?type=\U0001f389", "/console/messages/\U0001f389"):
            assert console.get(path).status_code == 400
    finally:
        disconnect(console.service.app)
        with psycopg.connect(postgresql, autocommit=True) as connection:
            connection.execute("DROP DATABASE latin WITH (FORCE)")


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_logs_neither_searches_nor_the_password(console: Console, formatter: logging.Formatter) -> None:
    """A line holds the path alone."""
    with lines(formatter) as written:
        console.get(console.search("ada@example.org").location)
        Console(console.service, "a wrong password").get("/console")
    assert [("/console" in line) for line in written] == [True] * 3
    for secret in ("ada@example", PASSWORD, "a wrong password", "search="):
        assert secret not in "".join(written)


def test_counts_the_hours_of_a_busy_day_from_a_sample(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """About as many as there are; what failed is counted, one by one."""
    now = datetime.now(UTC)
    first = now - timedelta(hours=24)
    rows = []
    for number in range(1440):
        at = first + timedelta(minutes=number + (number == 1439) * 5, seconds=number * 37 % 60)  # the last by a clock that is ahead
        outcome = "failed" if number % 97 == 0 else "applied"
        rows.append(f"('msg_{number}', 'user.updated', NULL, '{outcome}', 1, NULL, '{at:%Y-%m-%d %H:%M:%S.%f}', NULL, NULL)")
    service.rows(f"INSERT INTO webhook_messages VALUES {', '.join(rows)}")
    with service.app.app_context():
        whole = activity.read_activity(now)
        monkeypatch.setattr(activity, "SAMPLE", 150)
        sample = activity.read_activity(now)
        monkeypatch.setattr(activity, "COUNTED", 14)
        disaster = activity.read_activity(now)
    assert (whole.total, whole.share) == (1440, 1.0)
    assert [sum(counts.values()) for _, counts in whole.hours] == [60] * 24
    assert whole.hours[0][0] == first
    assert sample.share < 0.2
    assert 0.5 < sample.total / 1440 < 1.5
    for (_, exact), (_, estimated) in zip(whole.hours, sample.hours, strict=True):
        assert exact["failed"] == estimated["failed"]
    assert sum(counts["failed"] for _, counts in whole.hours) == 15
    assert {counts["failed"] for _, counts in disaster.hours} <= {round(number / disaster.share) for number in range(6)}


def test_estimates_what_is_too_much_to_count(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """On PostgreSQL; SQLite counts."""
    monkeypatch.setattr(activity, "COUNTED", 3)
    for _ in range(5):
        service.deliver(user_event(clerk_id("user")))
    is_postgresql = not service.database_url.startswith("sqlite")
    if is_postgresql:
        service.rows("ANALYZE users")
    with service.app.app_context():
        assert activity.count_users() == Count(5, is_exact=not is_postgresql)
        assert activity.count_new_users(datetime(2020, 1, 1, tzinfo=UTC)) == (Count(4, is_exact=False) if is_postgresql else Count(5))
        assert activity.count_tombstones() == Count(0)


def test_takes_the_lag_of_the_latest_messages(service: Service) -> None:
    """From the event to the end of its processing."""
    for seconds in (1, 2, 3):
        service.deliver(user_event(clerk_id("user"), at=NOW_MS - seconds * 100_000))
    with service.app.app_context():
        lag = activity.find_lag(datetime.now(UTC))
    assert lag is not None
    assert 199 < lag.median < 290
    assert 299 < lag.p99 < 390


def test_examines_beside_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that takes its time holds no page, is made once, and is kept for a minute."""
    may_end, count = threading.Event(), [0]

    def diagnose(_environ: object, checks: object) -> Any:
        count[0] += 1
        assert may_end.wait(20)
        return iter(WELL)

    monkeypatch.setattr(checkup, "diagnose", diagnose)
    monkeypatch.setattr(checkup, "PATIENCE", 0.01)
    own = Checkup()
    assert own.read().findings == own.read().findings == ()
    assert count == [1]
    may_end.set()
    assert own._thread is not None
    own._thread.join()
    assert own.read().findings == WELL
    assert count == [1]
    monkeypatch.setattr(checkup, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 61))
    monkeypatch.setattr(checkup, "PATIENCE", 20)
    assert own.read().findings == WELL
    assert count == [2]


@given(st.integers(0, 10**9))
def test_rounds_up_to_one_digit(number: int) -> None:
    """The top of a chart is a number that is easily read, and nothing is higher."""
    top = round_up(number)
    assert number <= top <= max(2 * number, 1)
    assert len(str(top).rstrip("0")) <= 1


@given(st.lists(st.fixed_dictionaries({outcome: st.integers(0, 10**6) for outcome in activity.STORED}), min_size=1, max_size=24))
def test_draws_within_the_chart(hours: list[dict[str, int]]) -> None:
    """No bar leaves the chart, and whatever was counted is to be seen."""
    first = datetime(2026, 1, 1, tzinfo=UTC)
    chart = draw(Activity([(first + timedelta(hours=hour), counts) for hour, counts in enumerate(hours)], 1.0))
    for bar in chart.bars:
        assert {piece.outcome for piece in bar.pieces} == {outcome for outcome, count in bar.counts.items() if count}
        assert all(0 <= piece.y <= HEIGHT for piece in bar.pieces)
        assert 0 <= bar.x <= bar.x + chart.bar_width <= chart.width


@pytest.mark.parametrize(("seconds", "text"), [
    (0.0401, "40 ms"), (2.5, "2.5 s"), (7, "7 s"), (60, "1 minute"), (3599, "59 minutes"), (7200, "2 hours"), (86_400 * 1200, "1,200 days"),
])  # fmt: skip
def test_writes_a_length_of_time(seconds: float, text: str) -> None:
    """In the unit that suits it."""
    assert texts.duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "just now"), (1, "just now"), (2, "2 s ago"), (7300, "2 hours ago"), (-1, "just now"), (-90, "in 1 minute")]
)
def test_writes_how_long_ago(seconds: int, text: str) -> None:
    """Also of what is ahead, by somebody else's clock."""
    now = datetime.now(UTC)
    assert texts.ago(now - timedelta(seconds=seconds), now) == text


@pytest.mark.parametrize(("count", "text"), [
    (1234, "1,234"), (Count(10_000), "10,000"), (Count(10_001, is_exact=False), "over 10,000"),
    (Count(1_004_711, is_exact=False), "about 1,000,000"),
])  # fmt: skip
def test_writes_a_number(count: int | Count, text: str) -> None:
    """And whether it was counted."""
    assert texts.number(count) == text

"""An application's handlers: when they are called, and how their errors affect a message."""

from __future__ import annotations

import functools
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from flask import abort
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from clerkhooks import Event, Outcome, from_clerk
from clerkhooks.clerk.fake import FakeClerk, clerk_id, event_body
from clerkhooks.errors import EventError, Unauthenticated
from clerkhooks.events import Version
from clerkhooks.web.state import disconnect
from tests.application import Application, MakeApplication
from tests.conftest import MakeDatabase
from tests.racing import PausePoint, call, delivery, overtake
from tests.support import NOW_MS, Service, deletion, user_event

pytest_plugins = ["tests.application"]
LOG = "SELECT outcome, attempts, error FROM webhook_messages WHERE message_id = 'msg_1'"
whens = pytest.mark.parametrize("after_commit", [False, True], ids=["inside", "after"])


def organization(name: str = "Acme", at: int = NOW_MS) -> bytes:
    """Return an event that clerkhooks itself ignores."""
    return event_body("organization.created", {"id": "org_1", "name": name, "updated_at": at}, at)


class Recorder:
    """A handler that records its events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        """Record one event."""
        self.events.append(event)

    def record(self, event: Event) -> None:
        """Record one event through a bound method."""
        self.events.append(event)


def new_row(application: Application, user_id: str, name: str) -> Any:
    """Return a new user for a handler to add."""
    found = application.db.session.get_one(application.model, user_id)
    times = {key: getattr(found, key) for key in ("last_seen", "created_at", "updated_at")}
    return application.model(id=clerk_id("user"), name=name, is_online=False, **times)


def user_row(application: Application, user_id: str) -> tuple[Any, ...]:
    """Return the name and the external id that a handler reads from the user's row."""
    found = application.db.session.get_one(application.model, user_id)
    return (found.name, found.external_id)


@whens
@pytest.mark.parametrize("pattern", ["organization.created", "organization.*", "*"])
def test_gets_the_event_once(
    application: Application,
    after_commit: bool,
    pattern: str,
) -> None:
    """
    A handler registered for a type, a family of types or all types gets each message once.

    The event carries the message's data and version. Registering a handler twice has no effect, and
    the decorator returns the handler itself, so that other code can call it.
    """
    recorder = Recorder()
    for each in (pattern, pattern, "organization.created"):
        assert application.hooks.on(each, after_commit=after_commit)(recorder) is recorder
    assert application.outcome(organization(), "msg_1") == "applied"
    assert application.outcome(organization(), "msg_1") == "duplicate"
    [event] = recorder.events
    assert (event.type, event.outcome, event.message_id) == (
        "organization.created",
        Outcome.APPLIED,
        "msg_1",
    )
    assert event.data == {"id": "org_1", "name": "Acme", "updated_at": NOW_MS}
    assert event.version == Version(NOW_MS, NOW_MS, "msg_1")
    assert event.occurred_at is not None
    assert event.occurred_at.timestamp() == NOW_MS / 1000
    assert "Acme" not in repr(event)


def test_records_when_the_last_handler_returned(application: Application) -> None:
    """Therefore, the lag that operators see includes the handlers."""
    application.hooks.on("organization.*")(lambda _event: time.sleep(0.2))
    assert application.outcome(organization(), "msg_1") == "applied"
    store = application.state.store
    query = sa.select(store.messages.c.received_at, store.messages.c.processed_at)
    [times] = store.database.execute(query)
    assert times.processed_at - times.received_at >= timedelta(seconds=0.2)


@whens
@pytest.mark.parametrize("arrives_first", [False, True])
def test_gets_the_external_id_of_a_deleted_user(
    make_application: MakeApplication,
    empty_database: str,
    caplog: pytest.LogCaptureFixture,
    after_commit: bool,
    arrives_first: bool,
) -> None:
    """
    A handler can erase what the application keeps under its own id.

    The id is only in the event. The tombstone, the message log and the log lines do not contain it.
    """
    columns = {"external_id": from_clerk("external_id", sa.Text)}
    application = make_application(empty_database, columns)
    user_id, customer_id = clerk_id("user"), "customer_7"
    recorder, rows = Recorder(), list[tuple[Any, ...] | None]()

    @application.hooks.on("user.deleted", after_commit=after_commit)
    def erase(event: Event) -> None:
        rows.append(user_row(application, user_id))
        recorder.record(event)

    data = {"deleted": True, "external_id": customer_id, "id": user_id, "object": "user"}
    bodies = [
        user_event(user_id, "user.created", external_id=customer_id),
        event_body("user.deleted", data, NOW_MS),
    ]
    outcomes = [application.outcome(body) for body in bodies[:: -1 if arrives_first else 1]]
    assert outcomes == ["applied", "stale" if arrives_first else "applied"]
    [event] = recorder.events
    assert (event.type, event.data["external_id"]) == ("user.deleted", customer_id)
    assert rows == [("Deleted User", None)]
    assert application.user(user_id, ("name", "external_id")) == rows[0]
    kept = application.rows("SELECT * FROM users") + application.rows(
        "SELECT * FROM webhook_messages"
    )
    assert customer_id not in f"{kept} {event!r} {caplog.text}"


def test_gets_deletions_without_an_external_id(application: Application) -> None:
    """A user for whom the application set no ``external_id`` has none in the event."""
    recorder = Recorder()
    application.hooks.on("user.deleted")(recorder)
    assert application.outcome(deletion(clerk_id("user"))) == "applied"
    assert [event.data.get("external_id") for event in recorder.events] == [None]


@pytest.mark.parametrize(
    "pattern",
    ["organization", "organization.deleted", "organizationMembership.*", "organization.created.*"],
)
def test_ignores_other_types(application: Application, pattern: str) -> None:
    """A type without a handler is ignored, even if a pattern is a prefix of the type."""
    recorder = Recorder()
    application.hooks.on(pattern)(recorder)
    application.hooks.on(pattern, after_commit=True)(recorder)
    assert application.outcome(organization()) == "ignored"
    assert recorder.events == []


@pytest.mark.parametrize(
    "pattern",
    ["", "organization.", "organization.created.", "*.created", "organization*", "a b", ".*"],
)
def test_refuses_a_malformed_pattern(application: Application, pattern: str) -> None:
    """A pattern that can never match raises ValueError when the handler is registered."""
    with pytest.raises(ValueError, match="is not an event type"):
        application.hooks.on(pattern)(Recorder())


async def asynchronous(_event: Event) -> None:
    """Do nothing. A synchronous caller would never await this coroutine."""


async def asynchronous_generator(_event: Event) -> AsyncIterator[None]:
    """Do nothing. clerkhooks would never iterate over the returned generator."""
    yield


def generator(_event: Event) -> Iterator[None]:
    """Do nothing. clerkhooks would never iterate over the returned generator."""
    yield


class AsynchronousCall:
    """A callable object whose result would never be awaited."""

    async def __call__(self, _event: Event) -> None:
        """Do nothing."""


@whens
@pytest.mark.parametrize(
    "handler",
    [
        asynchronous,
        asynchronous_generator,
        generator,
        functools.partial(asynchronous),
        AsynchronousCall(),
        "handler",
    ],
    ids=["async", "async generator", "generator", "partial", "async call", "text"],
)
def test_refuses_a_handler_that_would_not_run(
    application: Application,
    after_commit: bool,
    handler: Any,
) -> None:
    """
    A handler that cannot be called synchronously is refused when it is registered.

    Otherwise its messages would count as processed although the handler never ran.
    """
    with pytest.raises(TypeError, match="handler must be"):
        application.hooks.on("user.*", after_commit=after_commit)(handler)
    assert application.outcome(user_event(clerk_id("user"))) == "applied"


def later(_event: Event) -> Any:
    """Return a generator, although this function is not itself a generator function."""
    return generator(_event)


def later_still(_event: Event) -> Any:
    """Return an asynchronous generator."""
    return asynchronous_generator(_event)


def no_argument() -> None:
    """Do nothing. A handler must accept an event, but this function has no parameter."""


@pytest.mark.parametrize("handler", [later, later_still, no_argument])
def test_fails_the_message_if_the_handler_cannot_run(
    application: Application,
    handler: Any,
) -> None:
    """
    A message fails if its handler returns a generator or accepts no event.

    The response is 500, the message is recorded as failed, and its changes are rolled back.
    """
    application.hooks.on("*")(handler)
    assert application.deliver(user_event(clerk_id("user")), "msg_1").status_code == 500
    assert application.rows(LOG) == [("failed", 1, "TypeError")]
    assert application.rows("SELECT count(*) FROM users") == [(0,)]


def test_holds_handlers_strongly(application: Application) -> None:
    """A closure or bound method that nothing else references is still called."""
    events: list[str] = []

    def register() -> None:
        class Local:
            def handle(self, event: Event) -> None:
                events.append(f"method {event.type}")

        application.hooks.on("organization.*")(Local().handle)
        application.hooks.on("*", after_commit=True)(lambda event: events.append(event.type))

    register()
    gc.collect()
    assert application.outcome(organization()) == "applied"
    assert events == ["method organization.created", "organization.created"]


def test_calls_a_method_once(application: Application) -> None:
    """A bound method registered for three patterns is called once per message."""
    recorder = Recorder()
    for pattern in ("*", "user.*", "user.updated"):
        application.hooks.on(pattern)(recorder.record)
    application.outcome(user_event(clerk_id("user")))
    assert len(recorder.events) == 1


def test_calls_handlers_in_registration_order(application: Application) -> None:
    """Handlers inside the transaction run first, followed by handlers after the commit."""
    called: list[str] = []

    def register(name: str, pattern: str, *, after_commit: bool = False) -> None:
        application.hooks.on(pattern, after_commit=after_commit)(lambda _: called.append(name))

    register("after", "*", after_commit=True)
    register("first", "*")
    register("second", "user.updated")
    register("third", "user.*")
    application.outcome(user_event(clerk_id("user")))
    assert called == ["first", "second", "third", "after"]


def test_shares_nothing_between_two_applications(
    make_application: MakeApplication,
    make_database: MakeDatabase,
) -> None:
    """Two ``ClerkHooks`` in one process have separate handlers, tables and state."""
    one, other = (make_application(make_database("sqlite")) for _ in range(2))
    recorder = Recorder()
    one.hooks.on("organization.*")(recorder)
    assert other.outcome(organization()) == "ignored"
    assert one.outcome(organization()) == "applied"
    assert len(recorder.events) == 1
    assert one.outcome(user_event(clerk_id("user"))) == "applied"
    assert (one.state.users is other.state.users, one.database is other.database) == (False, False)
    assert other.rows("SELECT count(*) FROM users") == [(0,)]


def test_shares_handlers_between_applications_of_one_object(
    make_application: MakeApplication,
    make_database: MakeDatabase,
    clerk: FakeClerk,
) -> None:
    """
    All applications created with the same ``ClerkHooks`` share its handlers.

    Test suites need this, because they call an application factory several times.
    """
    application = make_application(make_database("sqlite"))
    url = make_database("sqlite")
    second = Service(application.create_app(clerk, url), clerk, url)
    with second.app.app_context():
        application.db.create_all()
    recorder = Recorder()
    application.hooks.on("organization.*")(recorder)
    for each in (application, second):
        assert each.outcome(organization()) == "applied"
    assert len(recorder.events) == 2
    disconnect(second.app)


def test_gets_the_outcome_of_user_events(application: Application) -> None:
    """Handlers also get stale events, because the application's tables may need them."""
    inside, after = Recorder(), Recorder()
    application.hooks.on("user.*")(inside)
    application.hooks.on("user.*", after_commit=True)(after)
    user_id = clerk_id("user")
    stale = user_event(user_id, at=1000)
    for body in (user_event(user_id, at=2000), stale, deletion(user_id)):
        application.outcome(body, "msg_1" if body is stale else None)
    assert application.outcome(stale, "msg_1") == "duplicate"
    expected = [
        ("user.updated", Outcome.APPLIED),
        ("user.updated", Outcome.STALE),
        ("user.deleted", Outcome.APPLIED),
    ]
    for recorder in (inside, after):
        assert [(event.type, event.outcome) for event in recorder.events] == expected
        assert {event.data["id"] for event in recorder.events} == {user_id}


def test_commits_handler_writes_with_the_message(application: Application) -> None:
    """
    A handler runs in the message's transaction, and sees the user's new row.

    If it raises, both its writes and the message's changes are rolled back.
    """
    user_id = clerk_id("user")
    failing = [True]

    @application.hooks.on("user.*")
    def add_friend(event: Event) -> None:
        session = application.db.session
        name = session.get_one(application.model, event.data["id"]).name
        session.add(new_row(application, user_id, f"Friend of {name}"))
        session.flush()
        if failing:
            raise ValueError("ada@example.org")

    body = user_event(user_id)
    assert application.deliver(body, "msg_1").status_code == 500
    assert application.rows("SELECT count(*) FROM users") == [(0,)]
    assert application.rows(LOG) == [("failed", 1, "ValueError")]
    assert application.outcome(event_body("session.created", {}, NOW_MS)) == "ignored"
    failing.clear()
    assert application.outcome(body, "msg_1") == "applied"
    assert application.rows("SELECT count(*) FROM users WHERE name = 'Friend of Ada Lovelace'") == [
        (1,)
    ]
    assert application.rows(LOG) == [("applied", 2, None)]


def test_flushes_pending_objects_at_commit(application: Application) -> None:
    """The commit flushes pending objects. If that fails, everything is rolled back."""
    user_id = clerk_id("user")

    @application.hooks.on("user.created")
    def add_invalid(event: Event) -> None:
        row = new_row(application, event.data["id"], "Friend")
        row.name = None
        application.db.session.add(row)

    @application.hooks.on("user.updated")
    def add_valid(event: Event) -> None:
        application.db.session.add(new_row(application, event.data["id"], "Friend"))

    assert application.deliver(user_event(user_id, "user.created"), "msg_1").status_code == 500
    assert application.rows("SELECT count(*) FROM users") == [(0,)]
    assert application.rows("SELECT outcome FROM webhook_messages") == [("failed",)]
    assert application.outcome(user_event(user_id)) == "applied"
    assert application.rows("SELECT count(*) FROM users") == [(2,)]


def test_calls_every_handler_again_on_retry(application: Application) -> None:
    """If a handler fails, all writes are rolled back, and the retry calls every handler again."""
    recorder, after = Recorder(), Recorder()
    failing = [True]

    def fail(_event: Event) -> None:
        if failing:
            raise LookupError

    application.hooks.on("*")(recorder)
    application.hooks.on("*")(fail)
    application.hooks.on("*", after_commit=True)(after)
    assert application.deliver(organization(), "msg_1").status_code == 500
    assert (len(recorder.events), len(after.events)) == (1, 0)
    failing.clear()
    assert application.outcome(organization(), "msg_1") == "applied"
    assert (len(recorder.events), len(after.events)) == (2, 1)
    assert application.outcome(organization(), "msg_1") == "duplicate"
    assert (len(recorder.events), len(after.events)) == (2, 1)


def swallow(application: Application) -> None:
    """Run a failing statement without a savepoint, and ignore the error."""
    with suppress(DBAPIError):
        application.db.session.execute(sa.text("INSERT INTO users (id) VALUES ('user_x')"))


def swallow_flush(application: Application) -> None:
    """Flush an invalid object without a savepoint, and ignore the error."""
    application.db.session.add(application.model(id="user_x"))
    with suppress(IntegrityError):
        application.db.session.flush()


def swallow_refusal(application: Application) -> None:
    """Commit, and ignore the resulting error."""
    with suppress(RuntimeError):
        application.db.session.commit()


def commit_inside_a_savepoint(application: Application) -> None:
    """Commit everything while a savepoint is open."""
    application.db.session.begin_nested()
    application.db.session.commit()


ENDINGS: dict[str, Callable[[Application], object]] = {
    "commit": lambda application: application.db.session.commit(),
    "swallowed refusal": swallow_refusal,
    "commit inside a savepoint": commit_inside_a_savepoint,
    "commit of the connection": lambda application: application.db.session.connection().commit(),
    "rollback": lambda application: application.db.session.rollback(),
    "rollback of the connection": lambda application: (
        application.db.session.connection().rollback()
    ),
    "raw rollback": lambda application: application.db.session.connection().connection.rollback(),
    "ROLLBACK": lambda application: application.db.session.execute(sa.text("ROLLBACK")),
    "close": lambda application: application.db.session.close(),
    "remove": lambda application: application.db.session.remove(),
    "swallowed error": swallow,
    "swallowed flush": swallow_flush,
}


@pytest.mark.filterwarnings("ignore:transaction already deassociated:sqlalchemy.exc.SAWarning")
@pytest.mark.parametrize("ending", ENDINGS)
def test_loses_nothing_to_a_handler_that_ends_the_transaction(
    application: Application,
    ending: str,
) -> None:
    """
    A handler that commits, rolls back or breaks the transaction causes a 500.

    None of the message's changes are committed. A retry is applied once the handler is fixed.
    """
    user_id, recorder, misbehaving = clerk_id("user"), Recorder(), [True]
    body = user_event(user_id)

    @application.hooks.on("user.*")
    def end(event: Event) -> None:
        if misbehaving:
            application.db.session.add(new_row(application, event.data["id"], "Friend"))
            ENDINGS[ending](application)

    application.hooks.on("user.*")(recorder)
    application.hooks.on("user.*", after_commit=True)(recorder)
    status = application.deliver(body, "msg_1").status_code
    # SQLite rolls back only the failed statement, so the transaction is still valid.
    is_harmless = ending == "swallowed error" and application.database_url.startswith("sqlite")
    assert status == (200 if is_harmless else 500)
    assert application.rows("SELECT count(*) FROM users") == [(2 if is_harmless else 0,)]
    assert application.rows("SELECT outcome FROM webhook_messages") == [
        ("applied" if is_harmless else "failed",)
    ]
    assert len(recorder.events) == (2 if is_harmless else 0)
    misbehaving.clear()
    assert application.outcome(body, "msg_1") == ("duplicate" if is_harmless else "applied")
    assert application.user(user_id, ["name"]) == ("Ada Lovelace",)
    assert len(recorder.events) == 2


def test_lets_a_handler_use_a_savepoint(application: Application) -> None:
    """An error caught inside a savepoint leaves the rest of the transaction intact."""

    @application.hooks.on("user.*")
    def attempt(event: Event) -> None:
        session = application.db.session
        with suppress(IntegrityError), session.begin_nested():
            session.execute(sa.text("INSERT INTO users (id) VALUES ('user_x')"))
        with session.begin_nested():
            session.add(new_row(application, event.data["id"], "Friend"))

    assert application.outcome(user_event(clerk_id("user"))) == "applied"
    assert application.rows("SELECT count(*) FROM users") == [(2,)]


class OperationalError(Exception):
    """An error from another library, such as a message broker's client."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OperationalError(), "OperationalError"),
        (Unauthenticated("user_deleted"), "Unauthenticated"),
        (EventError("user_id_malformed"), "EventError"),
    ],
)
def test_fails_the_message_with_an_error_of_any_class(
    application: Application,
    error: Exception,
    expected: str,
) -> None:
    """Any exception from a handler, even one of clerkhooks' own, causes a 500 and is recorded."""

    @application.hooks.on("*")
    def fail(_event: Event) -> None:
        raise error

    answer = application.deliver(organization(), "msg_1")
    assert (answer.status_code, answer.get_json()["reason"]) == (500, "internal_error")
    assert application.rows(LOG) == [("failed", 1, expected)]


@pytest.mark.parametrize("status", [404, 401, 410])
def test_fails_the_message_if_a_handler_aborts(
    application: Application,
    caplog: pytest.LogCaptureFixture,
    status: int,
) -> None:
    """If a handler calls ``abort`` or ``get_or_404``, the response is 500; an error is logged."""
    application.hooks.on("*")(lambda _: abort(status))
    with caplog.at_level(logging.ERROR, logger="clerkhooks"):
        assert application.deliver(organization(), "msg_1").status_code == 500
    [(outcome, attempts, error)] = application.rows(LOG)
    assert (outcome, attempts) == ("failed", 1)
    [record] = [one for one in caplog.records if one.levelno == logging.ERROR]
    assert (record.getMessage(), vars(record)["error"]) == ("request_failed", error)


@pytest.mark.parametrize(
    "failure", [ValueError("ada@example.org"), SystemExit("ada@example.org")], ids=repr
)
def test_is_called_after_the_commit(
    application: Application,
    caplog: pytest.LogCaptureFixture,
    failure: BaseException,
) -> None:
    """
    With ``after_commit``, a handler runs once everything has been committed.

    Its exception is logged and does not change the response.
    """
    user_id = clerk_id("user")
    recorder = Recorder()

    @application.hooks.on("user.created", after_commit=True)
    def fail(_event: Event) -> None:
        assert application.user(user_id, ["name"]) == ("Ada Lovelace",)
        application.db.session.execute(sa.text("UPDATE users SET name = 'never committed'"))
        raise failure

    application.hooks.on("*", after_commit=True)(recorder)
    body = user_event(user_id, "user.created")
    with caplog.at_level(logging.ERROR, logger="clerkhooks"):
        assert application.outcome(body, "msg_1") == "applied"
    [record] = caplog.records
    assert (record.getMessage(), vars(record)["message_id"], vars(record)["error"]) == (
        "handler_failed",
        "msg_1",
        type(failure).__name__,
    )
    assert "example.org" not in str(vars(record))
    assert len(recorder.events) == 1
    assert application.user(user_id, ["name"]) == ("Ada Lovelace",)
    assert application.outcome(body, "msg_1") == "duplicate"
    assert len(recorder.events) == 1


def test_may_commit_after_the_commit(application: Application) -> None:
    """A handler that runs after the commit may commit its own, separate transaction."""
    user_id = clerk_id("user")

    @application.hooks.on("user.*", after_commit=True)
    def rename(event: Event) -> None:
        application.db.session.add(new_row(application, event.data["id"], "Friend"))
        application.db.session.commit()

    assert application.outcome(user_event(user_id)) == "applied"
    assert application.rows("SELECT count(*) FROM users WHERE name = 'Friend'") == [(1,)]


def test_does_not_hold_the_users_row_after_the_commit(application: Application) -> None:
    """A handler that runs after the commit does not block the user's deliveries and calls."""
    user_id, hold = clerk_id("user"), PausePoint()
    application.hooks.on("user.*", after_commit=True)(hold)
    first = delivery(application, user_event(user_id))
    answers = overtake(hold, first, delivery(application, user_event(user_id, at=NOW_MS + 1)))
    assert [answer.status_code for answer in answers] == [200, 200]
    assert call(application, user_id)().status_code == 200


LIMITS = (
    "SELECT current_setting('lock_timeout'), current_setting('statement_timeout'),"
    " current_setting('idle_in_transaction_session_timeout')"
)


@pytest.mark.parametrize(
    ("options", "expected"),
    [("", ("0", "0", "0")), ("-c lock_timeout=7s -c statement_timeout=1min", ("7s", "1min", "0"))],
    ids=["the server's", "the application's"],
)
def test_does_not_limit_statements_of_handlers(
    make_application: MakeApplication,
    make_database: MakeDatabase,
    options: str,
    expected: tuple[str, ...],
) -> None:
    """
    A handler's own statements are not subject to clerkhooks' timeouts.

    Inside the handler, the application's timeouts are in effect.
    """
    arguments = {"connect_args": {"options": options}} if options else {}
    application = make_application(make_database("postgresql"), SQLALCHEMY_ENGINE_OPTIONS=arguments)
    found: list[tuple[str, ...]] = []

    @application.hooks.on("*")
    def look(event: Event) -> None:
        found.append(tuple(application.db.session.execute(sa.text(LIMITS)).one()))
        if event.type == "session.created":
            application.db.session.execute(sa.text("SELECT pg_sleep(3.5)"))

    assert application.outcome(user_event(clerk_id("user"))) == "applied"
    assert application.outcome(event_body("session.created", {}, NOW_MS)) == "applied"
    assert found == [expected] * 2
    with application.app.app_context():
        assert tuple(application.db.session.execute(sa.text(LIMITS)).one()) == expected


def test_keeps_limits_that_the_application_set_in_the_transaction(
    make_application: MakeApplication,
    make_database: MakeDatabase,
) -> None:
    """Timeouts set by ``SET LOCAL`` before the delivery are restored for the handler."""
    application = make_application(make_database("postgresql"))
    found: list[str] = []

    @application.app.before_request
    def limit() -> None:
        application.db.session.execute(sa.text("SET LOCAL statement_timeout = '45s'"))

    @application.hooks.on("*")
    def look(_event: Event) -> None:
        found.append(application.db.session.scalar(sa.text("SHOW statement_timeout")))

    assert application.outcome(user_event(clerk_id("user"))) == "applied"
    assert found == ["45s"]


def test_limits_its_own_wait_for_a_row_lock(
    make_application: MakeApplication,
    make_database: MakeDatabase,
) -> None:
    """A locked row causes a 500 and a recorded failure, even if a handler is registered."""
    application = make_application(make_database("postgresql"))
    application.hooks.on("*")(Recorder())
    user_id = clerk_id("user")
    assert application.outcome(user_event(user_id)) == "applied"
    later = user_event(user_id, at=NOW_MS + 1)
    with psycopg.connect(application.database_url) as other:
        other.execute("SELECT 1 FROM users WHERE id = %s FOR UPDATE", [user_id])
        assert application.deliver(later, "msg_1").status_code == 500
        assert application.rows(LOG) == [("failed", 1, "OperationalError 55P03")]
    assert application.outcome(later, "msg_1") == "applied"


def test_detects_a_commit_that_rolled_back(
    make_application: MakeApplication, make_database: MakeDatabase
) -> None:
    """If a listener swallows an error during the commit, the response is 500, not 200."""
    application = make_application(make_database("postgresql"))
    application.hooks.on("user.created")(lambda _event: None)
    session = application.db.session

    def audit(session: Session) -> None:
        with suppress(sa.exc.SQLAlchemyError):
            session.execute(sa.text("INSERT INTO missing VALUES (1)"))

    sa.event.listen(session, "before_commit", audit)
    body = user_event(clerk_id("user"), "user.created")
    assert application.deliver(body, "msg_1").status_code == 500
    assert application.rows("SELECT outcome FROM webhook_messages") == [("failed",)]
    sa.event.remove(session, "before_commit", audit)
    assert application.outcome(body, "msg_1") == "applied"


@pytest.mark.parametrize("skip", [False, True])
def test_rolls_back_on_sqlite_in_autocommit(
    make_application: MakeApplication, make_database: MakeDatabase, skip: bool
) -> None:
    """
    A failing handler leaves no open transaction in the application's pool.

    The retry runs the handler again.
    """
    options = {"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": skip}
    application = make_application(make_database("sqlite"), SQLALCHEMY_ENGINE_OPTIONS=options)
    runs: list[str] = []

    @application.hooks.on("user.created")
    def fail_once(event: Event) -> None:
        runs.append(event.message_id)
        if len(runs) == 1:
            raise ValueError

    body = user_event(clerk_id("user"), "user.created")
    assert application.deliver(body, "msg_1").status_code == 500
    assert application.rows("SELECT outcome FROM webhook_messages") == [("failed",)]
    assert application.outcome(body, "msg_1") == "applied"
    assert application.rows("SELECT outcome FROM webhook_messages") == [("applied",)]
    assert runs == ["msg_1", "msg_1"]

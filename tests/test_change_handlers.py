"""Durable handlers are called for each change at least once and in order."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gevent
import pytest
import sqlalchemy as sa

from clerkhooks import Event, SettingsError
from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.console import pages
from clerkhooks.doctor.change_feed import judge_changes
from clerkhooks.doctor.findings import APPLICATION
from clerkhooks.settings import PROJECT
from clerkhooks.store.change_reader import ChangeReader
from clerkhooks.sync import change_handlers
from clerkhooks.sync.change_handlers import PREFIX, ChangeHandlerLoop, find_handlers
from clerkhooks.sync.lease import stop_all
from clerkhooks.web.background import make_handler_loops
from clerkhooks.web.metrics import Metrics
from tests.application import Application, MakeApplication
from tests.conftest import SLOW_ON_SQLITE
from tests.racing import eventually
from tests.server import ended_by, environ
from tests.support import NOW_MS, deletion, join, user_event

pytest_plugins = ["tests.application"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for changes a hundred times a second, and for the lease twice a second."""
    monkeypatch.setattr(change_handlers, "POLL", 0.01)
    monkeypatch.setattr(change_handlers, "LIFETIME", 1.5)


@pytest.fixture
def application(make_application: MakeApplication, empty_database: str) -> Application:
    """Create an application with the change feed."""
    return make_application(empty_database, CLERK_TABLES="changes", METRICS_TOKEN="m" * 16)


class Recorder:
    """A handler that records events, and fails while *fails* returns true."""

    def __init__(self, fails: Callable[[Event[Any]], bool] = lambda _: False) -> None:
        self.events: list[Event[Any]] = []
        self.failed: list[Event[Any]] = []
        self.fails = fails

    def __call__(self, event: Event[Any]) -> None:
        """Record one event."""
        if self.fails(event):
            self.failed.append(event)
            raise ValueError("ada@example.org is not accepted")
        self.events.append(event)

    @property
    def told(self) -> list[tuple[str, str]]:
        """The types and the ids of the objects."""
        return [(event.type, event.data["id"]) for event in self.events]


@contextmanager
def running(application: Application) -> Iterator[list[tuple[str, Any]]]:
    """Run the loops of all durable handlers in threads. Yield the events that they tell."""
    told: list[tuple[str, Any]] = []
    loops = make_handler_loops(application.app, lambda *event: told.append(event))
    threads = [threading.Thread(target=loop.run) for loop in loops]
    for thread in threads:
        thread.start()
    try:
        yield told
    finally:
        for loop in loops:
            loop.stop()
        join(*threads)


def sign_up(application: Application) -> str:
    """Deliver an event for a new user; return the id."""
    user_id = clerk_id("user")
    assert application.outcome(user_event(user_id)) == "applied"
    return user_id


def test_is_called_for_each_change_in_order(application: Application) -> None:
    """The event has the id and the names of the changed columns, and no values."""
    told = Recorder()
    for pattern in ("user.created", "user.deleted", "user.barred"):
        application.hooks.on(pattern, durable=True, name="told", from_start=True)(told)
    user_id, other = sign_up(application), clerk_id("user")
    for body in (
        user_event(user_id, at=NOW_MS + 1, first_name="Augusta"),
        user_event(user_id, at=NOW_MS + 2, first_name="Augusta", banned=True),
        user_event(other, banned=True),
        deletion(user_id, NOW_MS + 3),
    ):
        application.outcome(body)
    with running(application):
        eventually(lambda: len(told.events) == 5)
    assert told.told == [
        ("user.created", user_id),
        ("user.barred", user_id),
        ("user.created", other),
        ("user.barred", other),
        ("user.deleted", user_id),
    ]
    barred = told.events[1]
    assert barred.data == {"id": user_id, "kind": "barred", "fields": ["banned_at"]}
    assert barred.version == (NOW_MS + 2, 0, "")
    assert len({event.message_id for event in told.events}) == 4


def test_is_told_of_a_new_user_when_the_profile_is_known(application: Application) -> None:
    """A first call creates a row without a profile."""
    told = Recorder()
    application.hooks.on("user.*", durable=True, from_start=True, name="told")(told)
    user_id = clerk_id("user")
    store = application.state.store
    application.state.users.get_authenticated(user_id, impersonated=False)
    application.outcome(user_event(user_id))
    with running(application):
        eventually(lambda: find_handlers(store) and find_handlers(store)[0].position.cursor)
        eventually(lambda: len(told.events) == 1)
    [event] = told.events
    assert (event.type, event.data["kind"]) == ("user.created", "filled")


def test_begins_with_new_changes_and_continues(application: Application) -> None:
    """After a restart, the handler is not called again for changes that are done."""
    told = Recorder()
    application.hooks.on("user.created", durable=True, name="told")(told)
    sign_up(application)
    store = application.state.store
    with running(application):
        eventually(lambda: find_handlers(store) and find_handlers(store)[0].position.cursor)
        second = sign_up(application)
        eventually(lambda: told.told == [("user.created", second)])
    third = sign_up(application)
    with running(application):
        eventually(lambda: len(told.events) > 1)
    assert told.told == [("user.created", second), ("user.created", third)]


def test_is_repeated_after_a_failure_and_holds_up_no_other(application: Application) -> None:
    """Operators see the failing handler. Neither the log nor the table quotes the exception."""
    is_broken = threading.Event()
    is_broken.set()
    failing, other = Recorder(lambda _: is_broken.is_set()), Recorder()
    application.hooks.on("user.created", durable=True, name="failing", from_start=True)(failing)
    application.hooks.on("user.created", durable=True, name="other", from_start=True)(other)
    user_ids = [sign_up(application), sign_up(application)]
    store = application.state.store
    with running(application) as told:
        eventually(lambda: len(failing.failed) == 2 and len(other.events) == 2)
        eventually(lambda: find_handlers(store)[0].position.failures == 2)
        [finding, _] = judge_changes(store)
        assert finding.code == "change_handler_failing"
        assert "The handler failing failed 2 times (ValueError)." in finding.what
        is_broken.clear()
        eventually(lambda: len(failing.events) == 2)
        eventually(lambda: find_handlers(store)[0].position.failures == 0)
    assert failing.told == [("user.created", user_id) for user_id in user_ids]
    failures = [fields for event, fields in told if event == "round_failed"]
    assert [fields["retry_in_s"] for fields in failures] == [1.0, 2.0]
    assert failures[0]["lease"] == f"{PREFIX}failing"
    assert failures[0]["id"] == user_ids[0]
    assert failures[0]["cursor"] == failing.events[0].message_id
    assert "ada@example.org" not in repr(told)
    assert [finding.code for finding in judge_changes(store)] == ["changes_readable"]


def test_waits_after_a_failure_in_another_process(application: Application) -> None:
    """The pause is stored. It grows to an hour."""
    told = Recorder(lambda _: True)
    application.hooks.on("user.created", durable=True, name="told", from_start=True)(told)
    sign_up(application)
    for failures in range(1, 15):
        [loop] = make_handler_loops(application.app, lambda *_: None)
        assert isinstance(loop, ChangeHandlerLoop)
        loop._turn()
        loop.stop()
        [handler] = find_handlers(application.state.store)
        assert handler.position.failures == failures
        pause = handler.position.retry_at - time.time() * 1000
        assert pause == pytest.approx(min(3600, 2 ** (failures - 1)) * 1000, abs=2000)
        [loop] = make_handler_loops(application.app, lambda *_: None)
        loop._turn()
        loop.stop()
        assert len(told.failed) == failures
        _set_position(application, **{**vars_of(handler), "retry_at": 0})


def vars_of(handler: change_handlers.HandlerReport) -> dict[str, Any]:
    """Return the stored position of a handler."""
    return {name: getattr(handler.position, name) for name in ("cursor", "failures", "error")}


def _set_position(application: Application, **position: Any) -> None:
    table = application.state.store.leases.table
    changed = sa.update(table).values(state=json.dumps(position)).returning(table.c.name)
    application.state.store.database.write(changed)


def test_reports_pruned_changes_as_a_failure(application: Application) -> None:
    """Changes that no handler has seen are never skipped silently."""
    told = Recorder()
    application.hooks.on("user.created", durable=True, name="told")(told)
    sign_up(application)
    _run_once(application)
    _set_position(application, cursor="0-0")
    application.rows("UPDATE user_changes SET changed_at = '2020-01-01'")
    list(ChangeReader(application.state.store).prune(datetime.now(UTC)))
    _run_once(application)
    [handler] = find_handlers(application.state.store)
    assert (handler.position.failures, handler.position.error) == (1, "ChangesPruned")


def _run_once(application: Application) -> None:
    for loop in make_handler_loops(application.app, lambda *_: None):
        loop._turn()
        loop.stop()


@pytest.mark.parametrize("is_early", [True, False])
def test_reports_pruned_changes_to_a_handler_that_has_not_succeeded(
    application: Application, is_early: bool
) -> None:
    """The handler fails at its first change, or has seen no change. Both end with from_start."""
    told = Recorder(lambda _: True)
    application.hooks.on("user.created", durable=True, name="told", from_start=True)(told)
    if is_early:
        _run_once(application)
    sign_up(application)
    if not is_early:
        _run_once(application)
    [handler] = find_handlers(application.state.store)
    application.rows("UPDATE user_changes SET changed_at = '2020-01-01'")
    list(ChangeReader(application.state.store).prune(datetime.now(UTC)))
    _set_position(application, **vars_of(handler))
    _run_once(application)
    [handler] = find_handlers(application.state.store)
    assert handler.position.error == "ChangesPruned"


def test_continues_if_the_database_clock_was_set_back(application: Application) -> None:
    """No pause is longer than an hour."""
    told = Recorder()
    application.hooks.on("user.created", durable=True, name="told", from_start=True)(told)
    sign_up(application)
    _run_once(application)
    [handler] = find_handlers(application.state.store)
    user_id = sign_up(application)
    in_a_day = int(time.time() * 1000) + 86_400_000
    _set_position(application, **{**vars_of(handler), "failures": 1, "retry_at": in_a_day})
    _run_once(application)
    assert told.told[1:] == [("user.created", user_id)]


def test_is_called_by_one_process(application: Application) -> None:
    """Another process takes over when this one stops."""
    told = Recorder()
    application.hooks.on("user.created", durable=True, name="told", from_start=True)(told)
    [first], [second] = (make_handler_loops(application.app, lambda *_: None) for _ in range(2))
    threads = [threading.Thread(target=loop.run) for loop in (first, second)]
    threads[0].start()
    sign_up(application)
    eventually(lambda: len(told.events) == 1)
    threads[1].start()
    first.stop()
    second._next_at = 0.0
    sign_up(application)
    try:
        eventually(lambda: len(told.events) == 2)
    finally:
        second.stop()
        join(*threads)
    assert len(told.events) == 2


@pytest.mark.parametrize("limit", [600.0, 0.0])
def test_is_called_once_even_if_it_takes_longer_than_the_lease(
    application: Application, monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    """Beyond a limit, another process calls it too, because the first one may hang."""
    monkeypatch.setattr(change_handlers, "LIFETIME", 0.6)
    monkeypatch.setattr(change_handlers, "MAX_CALL", limit)
    told, released = Recorder(), threading.Event()

    def take_long(event: Event[Any]) -> None:
        told(event)
        assert released.wait(20)

    application.hooks.on("user.created", durable=True, name="long", from_start=True)(take_long)
    sign_up(application)
    loops = [make_handler_loops(application.app, lambda *_: None)[0] for _ in range(2)]
    threads = [threading.Thread(target=loop.run) for loop in loops]
    for thread in threads:
        thread.start()
    eventually(lambda: len(told.events) == (1 if limit else 2))
    time.sleep(1.5)
    released.set()
    for loop in loops:
        loop.stop()
    join(*threads)
    assert len(told.events) == (1 if limit else 2)


def test_keeps_the_position_of_another_process_after_a_late_failure(
    application: Application,
) -> None:
    """A call outlives its lease. Meanwhile, another process calls the handler, and stops."""
    began, released, told = threading.Event(), threading.Event(), Recorder()

    def fail_late(event: Event[Any]) -> None:
        told(event)
        if len(told.events) == 1:
            began.set()
            assert released.wait(20)
            raise ValueError

    application.hooks.on("user.created", durable=True, name="late", from_start=True)(fail_late)
    for _ in range(2):
        sign_up(application)
    [late] = make_handler_loops(application.app, lambda *_: None)
    thread = threading.Thread(target=late._turn)
    thread.start()
    assert began.wait(20)
    _end_leases(application)
    _run_once(application)
    [expected] = find_handlers(application.state.store)
    released.set()
    join(thread)
    late.stop()
    assert find_handlers(application.state.store) == [expected]
    assert len(told.events) == 3


def test_does_not_repeat_what_another_process_did_while_it_was_frozen(
    application: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process stops between two changes of a page, for longer than its lease."""
    told = Recorder()
    application.hooks.on("user.created", durable=True, name="told", from_start=True)(told)
    user_ids = [sign_up(application) for _ in range(3)]
    [frozen] = make_handler_loops(application.app, lambda *_: None)
    assert isinstance(frozen, ChangeHandlerLoop)
    save = frozen._save

    def freeze(position: change_handlers.Position) -> None:
        save(position)
        if len(told.events) == 1:
            _end_leases(application)
            _run_once(application)
            frozen.lease._renewed_at = -frozen.lease.lifetime

    monkeypatch.setattr(frozen, "_save", freeze)
    frozen._turn()
    frozen.stop()
    assert [user_id for _, user_id in told.told] == user_ids


def _end_leases(application: Application) -> None:
    table = application.state.store.leases.table
    ended = sa.update(table).values(expires_at=0).returning(table.c.name)
    application.state.store.database.write(ended)


class Crash(BaseException):
    """The process is killed."""


def test_is_called_again_after_a_crash(
    application: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event is the same, so its message id is an idempotency key."""
    told = Recorder()
    application.hooks.on("user.created", durable=True, name="told")(told)
    _run_once(application)
    sign_up(application)
    [loop] = make_handler_loops(application.app, lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_save", raise_crash)
        with pytest.raises(Crash):
            loop._turn()
    loop.stop()
    for _ in range(2):
        _run_once(application)
    first, second = told.events
    assert first == second


def raise_crash(_position: object) -> None:
    """End the process after the handler has returned."""
    raise Crash


@pytest.mark.parametrize("ends", [True, False])
def test_waits_for_a_running_handler_at_the_end(
    application: Application, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """The handler is not called again, unless it takes too long."""
    if not ends:
        monkeypatch.setattr(change_handlers, "STOP_TIMEOUT", 0.01)
    began, released, told = threading.Event(), threading.Event(), Recorder()

    def wait(event: Event[Any]) -> None:
        told(event)
        began.set()
        assert released.wait(20)

    application.hooks.on("user.created", durable=True, name="wait", from_start=True)(wait)
    user_ids = [sign_up(application), sign_up(application)]
    [loop] = make_handler_loops(application.app, lambda *_: None)
    working, stopping = threading.Thread(target=loop.run), threading.Thread(target=loop.stop)
    working.start()
    assert began.wait(20)
    stopping.start()
    if not ends:
        join(stopping)
    released.set()
    join(working, stopping)
    _run_once(application)
    expected = user_ids if ends else [user_ids[0], *user_ids]
    assert [user_id for _, user_id in told.told] == expected


def test_counts_no_failure_of_the_database(
    application: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an outage, the handler continues at once."""
    told = Recorder()
    application.hooks.on("user.created", durable=True, name="told", from_start=True)(told)
    sign_up(application)
    with monkeypatch.context() as patch:
        failure = sa.exc.OperationalError("", {}, Exception())
        patch.setattr(ChangeReader, "read", FailingRead(failure))
        _run_once(application)
    _run_once(application)
    assert len(told.events) == 1


class FailingRead:
    """Replaces a method, and raises *error*."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, *_: object) -> None:
        """Raise the error."""
        raise self.error


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, gevent.Timeout])
def test_survives_a_handler_that_exits(application: Application, kind: type[BaseException]) -> None:
    """These are not an Exception."""

    def leave(_event: Event[Any]) -> None:
        raise kind

    application.hooks.on("user.created", durable=True, name="leave", from_start=True)(leave)
    sign_up(application)
    _run_once(application)
    [handler] = find_handlers(application.state.store)
    assert (handler.position.failures, handler.position.error) == (1, "RuntimeError")


def test_reports_where_a_handler_had_a_database_error(application: Application) -> None:
    """The frames lead to the statement."""

    def fail(_event: Event[Any]) -> None:
        raise sa.exc.IntegrityError("INSERT", {}, Exception("ada@example.org"))

    application.hooks.on("user.created", durable=True, name="fail", from_start=True)(fail)
    sign_up(application)
    told: list[Any] = []
    [loop] = make_handler_loops(application.app, lambda *event: told.append(event))
    loop._turn()
    loop.stop()
    [_, (event, fields)] = told
    assert (event, fields["error"]) == ("round_failed", "IntegrityError")
    assert fields["frames"][-1].endswith(" fail")


def test_waits_longer_with_each_failure_of_the_database(
    application: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage is logged once per attempt to take the lease at most, after the first seconds."""
    monkeypatch.setattr(change_handlers, "POLL", 1.0)
    monkeypatch.setattr(change_handlers, "LIFETIME", 30.0)
    application.hooks.on("user.created", durable=True, name="told")(Recorder())
    told: list[Any] = []
    [loop] = make_handler_loops(application.app, lambda *event: told.append(event))
    with monkeypatch.context() as patch:
        failure = sa.exc.OperationalError("", {}, Exception())
        patch.setattr(loop.lease, "acquire", FailingRead(failure))
        for _ in range(5):
            loop._next_at = 0.0
            loop._turn()
    loop.stop()
    assert [fields["retry_in_s"] for _, fields in told] == [2.0, 4.0, 8.0, 10.0, 10.0]


def test_several_handlers_that_hang_do_not_delay_the_end(
    application: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A platform kills a process that takes too long to stop."""
    monkeypatch.setattr(change_handlers, "STOP_TIMEOUT", 0.3)
    released, begun = threading.Event(), Recorder()

    def hang(event: Event[Any]) -> None:
        begun(event)
        assert released.wait(20)

    for name in "abcdefgh":
        application.hooks.on("user.created", durable=True, name=name, from_start=True)(hang)
    sign_up(application)
    loops = make_handler_loops(application.app, lambda *_: None)
    threads = [threading.Thread(target=loop.run) for loop in loops]
    for thread in threads:
        thread.start()
    eventually(lambda: len(begun.events) == len(loops))
    began_at = time.monotonic()
    stop_all(loops)
    took = time.monotonic() - began_at
    released.set()
    join(*threads)
    assert 0.3 <= took < 8 * 0.3


def test_reports_a_handler_that_no_process_calls(application: Application) -> None:
    """Only the command calls handlers, so it is easily forgotten."""
    application.hooks.on("user.created", durable=True, name="told")(Recorder())
    store = application.state.store
    [finding, _] = judge_changes(store, ["told"])
    assert finding.code == "change_handler_not_running"
    with running(application):
        eventually(lambda: len(list(judge_changes(store, ["told"]))) == 1)
    assert len(list(judge_changes(store, ["told"]))) == 2


def test_the_console_reports_a_handler_that_no_process_calls(
    make_application: MakeApplication, empty_database: str
) -> None:
    """It knows which handlers the application has."""
    application = make_application(empty_database, CLERK_TABLES="changes")
    application.hooks.on("user.created", durable=True, name="told")(Recorder())
    with application.app.app_context():
        found = pages._judge_database(application.state, APPLICATION)
    assert "change_handler_not_running" in [finding.code for finding in found]


def test_exports_the_failures(application: Application) -> None:
    """The metric has a sample for each handler."""
    told = Recorder(lambda _: True)
    application.hooks.on("user.created", durable=True, name="told", from_start=True)(told)
    sign_up(application)
    _run_once(application)
    metrics = Metrics(application.state.store, follows=False)
    [family] = (each for each in metrics.collect() if each.name.endswith("handler_failures"))
    assert [(one.labels, one.value) for one in family.samples] == [({"handler": "told"}, 1)]


# Registration


@pytest.mark.parametrize("is_early", [True, False])
def test_needs_the_change_feed(
    make_application: MakeApplication, empty_database: str, clerk: FakeClerk, is_early: bool
) -> None:
    """A module with handlers may be imported after init_app."""
    application = make_application(empty_database, CLERK_TABLES="changes")
    register = application.hooks.on("user.created", durable=True)
    if is_early:
        register(print)
        with pytest.raises(SettingsError, match="durable=True"):
            application.create_app(clerk, empty_database)
    else:
        application.create_app(clerk, empty_database)
        with pytest.raises(SettingsError, match="durable=True"):
            register(print)


def test_refuses_contradicting_options(application: Application) -> None:
    on: Any = application.hooks.on
    for options in ({"durable": True, "after_commit": True}, {"name": "x"}, {"from_start": True}):
        with pytest.raises(ValueError, match="Use durable=True"):
            on("user.created", **options)
    on("user.created", durable=True, name="same")(print)
    on("user.updated", durable=True, name="same")(print)
    with pytest.raises(ValueError, match="Another durable handler has the name 'same'"):
        on("user.created", durable=True, name="same")(repr)
    with pytest.raises(ValueError, match="not an event type"):
        on("user created", durable=True)(print)
    for pattern in ("session.created", "user.create", "organizationInvitation.*"):
        with pytest.raises(ValueError, match="No change has the type"):
            on(pattern, durable=True, name="never")(print)
    on("user.created", durable=True)(Recorder())
    on("user.created", durable=True)(sign_up)
    assert sorted(application.hooks._handlers.durable) == [
        "same",
        f"{__name__}.Recorder",
        f"{__name__}.sign_up",
    ]


def test_from_start_holds_for_all_patterns_of_a_handler(application: Application) -> None:
    """The order of the decorators does not matter."""
    told = Recorder()
    user_id = sign_up(application)
    application.hooks.on("user.created", durable=True, name="told", from_start=True)(told)
    application.hooks.on("user.deleted", durable=True, name="told")(told)
    _run_once(application)
    assert told.told == [("user.created", user_id)]


# The command

MODULE = """
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase

from clerkhooks import ClerkHooks


class Base(DeclarativeBase):
    pass


db = SQLAlchemy(model_class=Base)
hooks = ClerkHooks(db)


@hooks.on("user.created", durable=True, name="told", from_start=True)
def told(event):
    print("told", event.data["id"], flush=True)


def create_app():
    app = Flask(__name__)
    app.config.from_prefixed_env("APP")
    db.init_app(app)
    hooks.init_app(app)
    return app
"""


@pytest.mark.parametrize("empty_database", SLOW_ON_SQLITE, indirect=True)
def test_runs_handlers_until_it_is_interrupted(
    make_application: MakeApplication, empty_database: str, clerk: FakeClerk, tmp_path: Path
) -> None:
    application = make_application(empty_database, CLERK_TABLES="changes")
    user_id = sign_up(application)
    (tmp_path / "shop.py").write_text(MODULE)
    own = {
        "APP_SQLALCHEMY_DATABASE_URI": json.dumps(
            application.app.config["SQLALCHEMY_DATABASE_URI"]
        ),
        "CLERK_TABLES": "changes",
        "PYTHONPATH": str(PROJECT),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "flask", "--app", "shop", "clerk", "changes", "--run-handlers"],
        cwd=tmp_path,
        env=environ(**clerk.environ, **own),
        stdout=subprocess.PIPE,
        text=True,
    )
    with ended_by(signal.SIGTERM, process):
        assert process.stdout is not None
        lines = iter(process.stdout)
        eventually(lambda: f"told {user_id}\n" in lines)


def test_runs_no_command_without_handlers(application: Application) -> None:
    result = application.app.test_cli_runner().invoke(args=["clerk", "changes", "--run-handlers"])
    assert (result.exit_code, "No handler is registered" in result.output) == (2, True)

"""Handlers of account state changes: told once, whichever side the change came from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import sqlalchemy as sa

from clerkhooks import Event, Outcome
from clerkhooks.clerk.fake import clerk_id, event_body
from clerkhooks.events import Version
from clerkhooks.sync.comparison import Finding
from tests.application import Application, MakeApplication
from tests.backend import Backend
from tests.conftest import MakeDatabase
from tests.racing import Told, call, delivery, following, registered_handler
from tests.support import NOW_MS, Service, ThreadPool, deletion, user_event
from tests.syncing import make_old, sync

pytest_plugins = ["tests.application"]
LONG_AGO = NOW_MS - 3_600_000
whens = pytest.mark.parametrize("after_commit", [False, True], ids=["inside", "after"])


@whens
def test_tells_of_each_change_once(service: Service, after_commit: bool) -> None:
    """A message that changes nothing tells nobody: repeated, stale, or barred a second time."""
    user_id = clerk_id("user")
    bodies = [
        user_event(user_id, at=LONG_AGO),
        user_event(user_id, at=LONG_AGO + 2, banned=True),
        user_event(user_id, at=LONG_AGO + 3, banned=True, deprovisioned=True),
        user_event(user_id, at=LONG_AGO + 4, deprovisioned=True),
        user_event(user_id, at=LONG_AGO + 1),
        user_event(user_id, at=LONG_AGO + 5, locked=True),
        user_event(user_id, at=LONG_AGO + 6),
    ]
    with following(service, after_commit) as told:
        for number, body in enumerate(bodies):
            for expected in (told_after(number), "duplicate"):
                assert service.outcome(body, f"msg_{number}") == expected
        assert told.changes == ["user.barred", "user.restored"]
    assert [event.message_id for event in told.events] == ["msg_1", "msg_5"]


def told_after(number: int) -> str:
    """Return the outcome of the first delivery of message *number* of the test above."""
    return "stale" if number == 4 else "applied"


@whens
def test_passes_the_message_that_made_the_change(service: Service, after_commit: bool) -> None:
    """The event has the change as its type, and the user object and version of the message."""
    user_id = clerk_id("user")
    with following(service, after_commit) as told:
        service.outcome(user_event(user_id, "user.created", banned=True), "msg_1")
    [event] = told.events
    assert (event.type, event.outcome) == ("user.barred", Outcome.APPLIED)
    assert (event.data["id"], event.data["banned"]) == (user_id, True)
    assert (event.message_id, event.version) == ("msg_1", Version(NOW_MS, NOW_MS, "msg_1"))
    assert event.occurred_at is not None
    assert event.occurred_at.timestamp() == NOW_MS / 1000


@pytest.mark.parametrize("pattern", ["*", "user.*"])
def test_does_not_count_a_change_as_a_message(service: Service, pattern: str) -> None:
    """A family and ``*`` get each message once, so a change reaches only handlers that name it."""
    told = Told()
    with registered_handler(service.app, told, pattern):
        service.outcome(user_event(clerk_id("user"), banned=True))
    assert told.changes == ["user.updated"]


@whens
def test_ignores_a_message_with_the_type_of_a_change(service: Service, after_commit: bool) -> None:
    """A signed message of the type ``user.barred`` is not a change of the account state."""
    body = event_body("user.barred", {"id": clerk_id("user"), "banned": True}, NOW_MS)
    with following(service, after_commit) as told:
        assert service.outcome(body) == "ignored"
    assert told.changes == []


def test_tells_nobody_of_a_deletion(service: Service) -> None:
    """A tombstone erases the state, but the user is not restored."""
    user_id = clerk_id("user")
    with following(service) as told:
        service.outcome(user_event(user_id, banned=True))
        service.outcome(deletion(user_id))
        assert service.outcome(user_event(user_id)) == "stale"
    assert told.changes == ["user.barred"]


def test_is_told_in_the_transaction_of_the_message(application: Application) -> None:
    """A handler's writes are committed with the message. If it fails, both are rolled back."""
    user_id = clerk_id("user")
    failing = [True]

    @application.hooks.on("user.barred")
    def rename(event: Event) -> None:
        user = application.db.session.get_one(application.model, event.data["id"])
        user.name = f"Barred {user.banned_at is not None}"
        if failing:
            raise RuntimeError("the handler fails")

    body = user_event(user_id, banned=True)
    assert application.deliver(body, "msg_1").status_code == 500
    assert application.user(user_id) is None
    failing.clear()
    assert application.outcome(body, "msg_1") == "applied"
    assert application.user(user_id, ["name"]) == ("Barred True",)


def test_calls_handlers_of_the_message_before_those_of_its_change(service: Service) -> None:
    """Both run in the message's transaction."""
    both = Told()
    with (
        registered_handler(service.app, both, "user.barred"),
        registered_handler(service.app, both, "user.created"),
    ):
        service.outcome(user_event(clerk_id("user"), "user.created", banned=True))
    assert both.changes == ["user.created", "user.barred"]


@pytest.mark.parametrize("after_commit", [False, True], ids=["inside", "after"])
def test_tells_once_under_concurrent_deliveries(
    make_application: MakeApplication, make_database: MakeDatabase, kind: str, after_commit: bool
) -> None:
    """
    For any interleaving of events and first calls, the changes alternate and end with the row.

    Several events of a new user bar the user at the same time, so nobody may be told twice.
    """
    application = make_application(make_database(kind))
    rng = random.Random(4)
    for _ in range(12):
        user_id = clerk_id("user")
        with following(application, after_commit) as told:
            requests: list[Any] = [
                delivery(
                    application,
                    user_event(user_id, at=LONG_AGO + number, banned=rng.random() < 0.6),
                    f"msg_{number}_{user_id}",
                )
                for number in range(6)
            ]
            requests += [*requests, call(application, user_id)]
            rng.shuffle(requests)
            with ThreadPool(len(requests)) as pool:
                answers = [each.result(60) for each in [pool.submit(one) for one in requests]]
        assert {answer.status_code for answer in answers} <= {200, 401}
        row = application.user(user_id, ["banned_at"])
        assert row is not None
        check_changes(told, is_barred=row[0] is not None, in_order=not after_commit)


@pytest.fixture(params=["sqlite", "postgresql"])
def kind(request: pytest.FixtureRequest) -> str:
    """Return a kind of database."""
    return str(request.param)


def check_changes(told: Told, *, is_barred: bool, in_order: bool) -> None:
    """
    Check that the changes alternate, begin with a bar, and end with the row's state.

    After the commit, handlers of two messages may run in any order.
    """
    changes = told.changes
    barred, restored = changes.count("user.barred"), changes.count("user.restored")
    assert barred - restored == is_barred
    if in_order:
        assert changes == ["user.barred", "user.restored"] * restored + ["user.barred"] * is_barred


@whens
def test_tells_of_changes_that_a_sync_finds(
    syncing: Service, backend: Backend, after_commit: bool
) -> None:
    """A sync tells handlers of each change once, with an empty message id. A check tells nobody."""
    user_id, other = backend.sign_up(at=LONG_AGO, banned=True), backend.sign_up(at=LONG_AGO)
    with following(syncing, after_commit) as told:
        sync(syncing, backend, check=True)
        assert told.changes == []
        assert sync(syncing, backend)[0] == {"created": 2}
        sync(syncing, backend)
        [event] = told.events
        assert (event.type, event.data["id"], event.message_id) == ("user.barred", user_id, "")
        assert event.version == Version(LONG_AGO, 0, "")
        backend.update(user_id, banned=False, updated_at=LONG_AGO + 1)
        backend.update(other, first_name="Grace", updated_at=LONG_AGO + 1)
        assert sync(syncing, backend)[0] == {"updated": 2}
        sync(syncing, backend)
        assert told.changes == ["user.barred", "user.restored"]


@pytest.mark.parametrize("event_first", [False, True])
def test_tells_of_a_change_once_if_an_event_and_a_sync_bring_it(
    syncing: Service, backend: Backend, event_first: bool
) -> None:
    """The side that comes second finds the state unchanged."""
    user_id = backend.sign_up(at=LONG_AGO)
    with following(syncing) as told:
        sync(syncing, backend)
        backend.update(user_id, banned=True, updated_at=LONG_AGO + 1)
        body = event_body("user.updated", backend.users[user_id], LONG_AGO + 1)
        if event_first:
            syncing.outcome(body)
        sync(syncing, backend)
        if not event_first:
            syncing.outcome(body)
        assert told.changes == ["user.barred"]


def test_tells_of_a_repaired_state_with_a_newer_version(syncing: Service, backend: Backend) -> None:
    """
    A handler can use ``upsert`` for each change.

    Even if Clerk's ``updated_at`` did not move, the version is higher than the last event's.
    """
    user_id = backend.sign_up(at=LONG_AGO)
    with following(syncing) as told:
        syncing.outcome(user_event(user_id, at=LONG_AGO, banned=True))
        sync(syncing, backend)
        barred, restored = told.events
    assert barred.version < restored.version
    assert restored.type == "user.restored"


@pytest.mark.parametrize("follows", [False, True])
def test_bars_after_an_inferred_deletion(syncing: Service, backend: Backend, follows: bool) -> None:
    """A tombstone has no state, so a banned user who comes back is barred again."""
    user_id, _ = backend.sign_up(at=LONG_AGO, banned=True), backend.sign_up(at=LONG_AGO)
    with following(syncing) if follows else nullcontext() as told:
        sync(syncing, backend)
        make_old(syncing)
        data = backend.users.pop(user_id)
        assert sync(syncing, backend)[0]["tombstoned"] == 1
        backend.users[user_id] = data
        assert sync(syncing, backend)[0]["updated"] == 1
        assert syncing.call(user_id).status_code == 401
        if told is not None:
            assert told.changes == ["user.barred", "user.barred"]


def test_continues_a_sync_after_a_failing_handler(syncing: Service, backend: Backend) -> None:
    """The user's row is unchanged and reported, so the next sync tells the handler again."""
    barred, other = backend.sign_up(at=LONG_AGO, banned=True), backend.sign_up(at=LONG_AGO)
    failing = [True]

    def fail(_event: Event) -> None:
        if failing:
            raise RuntimeError("the handler fails")

    with registered_handler(syncing.app, fail, "user.barred"):
        summary, findings, run = sync(syncing, backend)
        assert (summary, run.ok) == ({"created": 1, "failed": 1}, False)
        assert findings == [Finding("handler_failed", barred, "RuntimeError")]
        assert (syncing.user(barred), syncing.user(other) is None) == (None, False)
        failing.clear()
        assert sync(syncing, backend)[0] == {"created": 1, "unchanged": 1}


def test_refuses_a_handler_that_ends_the_transaction_of_a_sync(
    syncing: Service, backend: Backend
) -> None:
    """As with a message, a handler that commits or rolls back fails."""
    user_id = backend.sign_up(at=LONG_AGO, banned=True)
    session = syncing.app.extensions["sqlalchemy"].session

    def commit(_event: Event) -> None:
        session.commit()

    def roll_back(_event: Event) -> None:
        session.rollback()

    for handler in (commit, roll_back):
        with registered_handler(syncing.app, handler, "user.barred"):
            assert sync(syncing, backend)[0] == {"failed": 1}
        assert syncing.user(user_id) is None


def test_logs_the_error_of_a_handler_after_the_commit_of_a_sync(
    syncing: Service, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """The row is committed, so the sync succeeds."""
    user_id = backend.sign_up(at=LONG_AGO, banned=True)

    def fail(_event: Event) -> None:
        raise RuntimeError("the handler fails")

    with registered_handler(syncing.app, fail, "user.barred", after_commit=True):
        assert sync(syncing, backend)[0] == {"created": 1}
    assert [record.message for record in caplog.records] == ["handler_failed"]
    assert syncing.call(user_id).status_code == 401


@pytest.mark.parametrize("barred_here", [False, True])
def test_leaves_a_change_to_the_event_that_makes_it_during_a_sync(
    syncing: Service, backend: Backend, barred_here: bool
) -> None:
    """
    An event may arrive after the sync has compared the rows.

    The sync neither repeats the event's change nor makes a change without telling the handlers.
    """
    user_id = backend.sign_up(at=LONG_AGO)
    store = syncing.app.extensions["clerkhooks"].store
    syncing.outcome(user_event(user_id, at=LONG_AGO, banned=barred_here))
    backend.update(user_id, banned=barred_here, updated_at=LONG_AGO + 9)
    merge, late = store.statements.merge_snapshots, list[bytes]()
    event = user_event(user_id, at=LONG_AGO + 1, banned=not barred_here)

    def deliver(*_: object) -> None:
        if not late:
            late.append(event)
            syncing.outcome(event)

    if syncing.database_url.startswith("sqlite"):
        pytest.skip("the sync holds the write lock")
    with following(syncing) as told, on_merge(syncing, merge, deliver):
        assert sync(syncing, backend)[0] == {"newer_here": 1}
        changed = told.changes
        assert changed == (["user.restored"] if barred_here else ["user.barred"])
        assert sync(syncing, backend)[0] == {"updated": 1}
        assert len(told.changes) == 2
        assert (syncing.call(user_id).status_code == 401) is barred_here


@contextmanager
def on_merge(service: Service, merge: sa.TextClause, then: Any) -> Iterator[None]:
    """Call *then* before the sync writes snapshots."""
    engine = service.app.extensions["clerkhooks"].store.database.engine
    beginning = str(merge)[:8]

    def listen(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith(beginning) and "may_bar" in statement:
            then()

    sa.event.listen(engine, "before_cursor_execute", listen)
    yield
    sa.event.remove(engine, "before_cursor_execute", listen)

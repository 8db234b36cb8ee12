"""What an application may listen to, and what that means for a message."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any

import pytest
from blinker import ANY

from clerkhooks.clerk.events import Event, UserEvent, Version
from clerkhooks.cli.pretend import clerk_id, event_body
from clerkhooks.models import Outcome, User, db
from clerkhooks.signals import EventSignal, event_processed, event_processing
from tests.support import NOW_MS, Service, deletion, user_event

SIGNALS = (event_processing, event_processed)


@pytest.fixture(autouse=True)
def only_ours() -> Iterator[None]:
    """Leave no receiver behind."""
    yield
    for signal in SIGNALS:
        signal._clear_state()


def organization(name: str = "Acme", at: int = NOW_MS) -> bytes:
    """An event that the service itself ignores."""
    return event_body("organization.created", {"id": "org_1", "name": name, "updated_at": at}, at)


class Heard:
    """A receiver that remembers."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Event, Outcome]] = []

    def __call__(self, sender: str, *, event: Event, outcome: Outcome) -> None:
        """Remember one call."""
        self.calls.append((sender, event, outcome))

    def listen(self, sender: str, *, event: Event, outcome: Outcome) -> None:
        """Remember one call, as a method."""
        self(sender, event=event, outcome=outcome)


@pytest.mark.parametrize("signal", SIGNALS, ids=["processing", "processed"])
@pytest.mark.parametrize("subscribed", ["organization.created", "organization.", ANY])
def test_reaches_those_who_subscribed(service: Service, signal: EventSignal, subscribed: Any) -> None:
    """By type, by prefix or to everything: once for the message, with the data and the version."""
    heard = Heard()
    signal.connect(heard, sender=subscribed)
    signal.connect(heard, sender="organization.created")
    assert service.outcome(organization(), "msg_1") == "applied"
    assert service.outcome(organization(), "msg_1") == "duplicate"
    [(sender, event, outcome)] = heard.calls
    assert (sender, event.type, outcome) == ("organization.created", "organization.created", "applied")
    assert event.data == {"id": "org_1", "name": "Acme", "updated_at": NOW_MS}
    assert event.version == Version(NOW_MS, NOW_MS, "msg_1")
    assert "Acme" not in repr(event)


@pytest.mark.parametrize("subscribed", ["organization", "organization.deleted", "organizationMembership.", "organization.created.", ""])
def test_leaves_others_alone(service: Service, subscribed: str) -> None:
    """A type that nobody subscribed to is ignored, and its neighbours hear nothing."""
    heard = Heard()
    for signal in SIGNALS:
        signal.connect(heard, sender=subscribed)
    assert service.outcome(organization()) == "ignored"
    assert heard.calls == []


def test_hands_over_the_outcome_for_users(service: Service) -> None:
    """Also a stale event is handed over, once, for the application's own tables may not know it yet."""
    heard = Heard()
    event_processing.connect(heard, sender="user.")
    user_id = clerk_id("user")
    for body in (user_event(user_id, at=2000), user_event(user_id, at=1000), deletion(user_id)):
        service.outcome(body)
    assert [(sender, outcome) for sender, _, outcome in heard.calls] == [
        ("user.updated", "applied"),
        ("user.updated", "stale"),
        ("user.deleted", "applied"),
    ]
    assert all(isinstance(event, UserEvent) and event.user_id == user_id for _, event, _ in heard.calls)


def test_commits_what_a_receiver_writes_with_the_message(service: Service) -> None:
    """A receiver sees the user's new row and writes in its transaction; when it raises, nothing of either stays."""
    user_id, other_id = clerk_id("user"), clerk_id("user")
    failing = [True]

    @event_processing.connect_via("user.")
    def copy(sender: str, *, event: UserEvent, outcome: Outcome) -> None:
        user = db.session.get_one(User, event.user_id)
        moments = {"last_seen": user.last_seen, "created_at": user.created_at, "updated_at": user.updated_at}
        db.session.add(User(id=other_id, name=f"Friend of {user.name}", is_online=False, **moments))
        db.session.flush()
        if failing:
            raise ValueError("ada@example.org")

    body = user_event(user_id)
    assert service.deliver(body, "msg_1").status_code == 500
    assert service.rows("SELECT count(*) FROM users") == [(0,)]
    assert service.rows("SELECT outcome, error FROM webhook_messages") == [("failed", "ValueError")]
    assert service.outcome(event_body("session.created", {}, NOW_MS)) == "ignored"
    failing.clear()
    assert service.outcome(body, "msg_1") == "applied"
    assert service.user(other_id, ["name"]) == ("Friend of Ada Lovelace",)
    assert service.rows("SELECT attempts FROM webhook_messages WHERE message_id = 'msg_1'") == [(2,)]


def swallow(statement: str) -> None:
    """Run a statement that fails, and pass over it, as one must not without a savepoint."""
    with suppress(db.exc.DBAPIError):
        db.session.execute(db.text(statement))


ENDINGS: dict[str, Callable[[], object]] = {
    "commit": lambda: db.session.commit(),
    "rollback": lambda: db.session.rollback(),
    "raw rollback": lambda: db.session.connection().connection.rollback(),
    "swallowed error": lambda: swallow("INSERT INTO users (id) VALUES ('user_x')"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_loses_nothing_to_a_receiver_that_ends_the_transaction(service: Service, ending: str) -> None:
    """It is a 500 or, where the database bears it, done; never answered 200 and lost; and others are heard, too."""
    user_id, heard = clerk_id("user"), Heard()
    body = user_event(user_id)

    def end(sender: str, **_: object) -> None:
        ENDINGS[ending]()

    with event_processing.connected_to(end, sender="user."), event_processing.connected_to(heard, sender="user."):
        status = service.deliver(body, "msg_1").status_code
    borne = ending == "swallowed error" and service.database_url.startswith("sqlite")
    assert status == (200 if borne else 500)
    with event_processing.connected_to(heard, sender="user."):
        assert service.outcome(body, "msg_1") == ("duplicate" if borne else "applied")
    assert service.user(user_id, ["name"]) == ("Ada Lovelace",)
    assert heard.calls


@pytest.mark.parametrize("signal", SIGNALS, ids=["processing", "processed"])
def test_calls_a_method_once(service: Service, signal: EventSignal) -> None:
    """Also one that is held weakly and subscribed twice."""
    heard = Heard()
    for sender in (ANY, "user.", "user.updated"):
        signal.connect(heard.listen, sender=sender)
    service.outcome(user_event(clerk_id("user")))
    assert len(heard.calls) == 1
    with signal.muted():
        service.outcome(user_event(clerk_id("user")))
    assert len(heard.calls) == 1


def test_ignores_again_when_nobody_listens_any_more(service: Service) -> None:
    """A receiver that was taken away leaves nothing behind."""
    heard = Heard()
    event_processing.connect(heard, sender="organization.")
    event_processing.disconnect(heard, sender="organization.")
    assert service.outcome(organization()) == "ignored"


def test_refuses_receivers_that_nobody_would_run(service: Service) -> None:
    """A coroutine or a generator would do nothing, and the message count as done."""

    async def later(sender: str, **_: object) -> None:
        """Never awaited."""

    def lazily(sender: str, **_: object) -> Iterator[None]:
        yield

    for receiver in (later, lazily):
        with event_processing.connected_to(receiver), pytest.warns() if receiver is later else nullcontext():
            assert service.deliver(organization(), "msg_1").status_code == 500
    assert service.rows("SELECT outcome, error FROM webhook_messages") == [("failed", "TypeError")]


def test_remembers_a_failure_of_any_name(service: Service) -> None:
    """A receiver's own OperationalError says nothing about the database."""

    class OperationalError(Exception):
        """Such as a message broker's."""

    def fail(sender: str, **_: object) -> None:
        raise OperationalError

    with event_processing.connected_to(fail):
        assert service.deliver(organization(), "msg_1").status_code == 500
    assert service.rows("SELECT outcome, error FROM webhook_messages") == [("failed", "OperationalError")]


def test_lets_a_receiver_use_a_savepoint(service: Service) -> None:
    """A part that fails and is caught in a savepoint leaves the rest of the transaction whole."""

    def attempt(sender: str, *, event: UserEvent, outcome: Outcome) -> None:
        try:
            with db.session.begin_nested():
                db.session.execute(db.text("INSERT INTO users (id) VALUES ('user_x')"))
        except db.exc.IntegrityError:
            pass

    with event_processing.connected_to(attempt, sender="user."):
        assert service.outcome(user_event(clerk_id("user"))) == "applied"
    assert service.rows("SELECT count(*) FROM users") == [(1,)]


@pytest.mark.parametrize("failure", [ValueError("ada@example.org"), SystemExit("ada@example.org")], ids=repr)
def test_tells_after_the_commit(service: Service, caplog: pytest.LogCaptureFixture, failure: BaseException) -> None:
    """A receiver of the second signal finds everything committed; what it raises is logged and changes nothing."""
    user_id = clerk_id("user")
    heard = Heard()

    @event_processed.connect_via("user.created")
    def fail(sender: str, **_: object) -> None:
        assert service.user(user_id, ["name"]) == ("Ada Lovelace",)
        db.session.execute(db.text("UPDATE users SET name = 'never committed'"))
        raise failure

    event_processed.connect(heard)
    with caplog.at_level(logging.ERROR, logger="clerkhooks"):
        assert service.outcome(user_event(user_id, "user.created"), "msg_1") == "applied"
    [record] = caplog.records
    assert (record.getMessage(), vars(record)["message_id"], vars(record)["error"]) == ("receiver_failed", "msg_1", type(failure).__name__)
    assert "example.org" not in str(vars(record))
    assert len(heard.calls) == 1
    assert service.user(user_id, ["name"]) == ("Ada Lovelace",)
    assert service.outcome(user_event(user_id, "user.created"), "msg_1") == "duplicate"
    assert len(heard.calls) == 1

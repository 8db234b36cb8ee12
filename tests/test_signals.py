"""What an application may listen to, and what that means for a message."""

from __future__ import annotations

import logging
from collections.abc import Iterator
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


@pytest.mark.parametrize("ending", ["commit", "rollback"])
def test_refuses_a_receiver_that_ends_the_transaction(service: Service, ending: str) -> None:
    """After a rollback in a receiver the message would be answered 200 and lost; so it is a 500, and is done again."""
    user_id = clerk_id("user")
    body = user_event(user_id)

    def end(sender: str, **_: object) -> None:
        getattr(db.session, ending)()

    with event_processing.connected_to(end, sender="user."):
        assert service.deliver(body, "msg_1").status_code == 500
    assert service.outcome(body, "msg_1") == ("duplicate" if ending == "commit" else "applied")
    assert service.user(user_id, ["name"]) == ("Ada Lovelace",)


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


def test_tells_after_the_commit(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """A receiver of the second signal finds everything committed; what it raises is logged and changes nothing."""
    user_id = clerk_id("user")
    heard = Heard()

    @event_processed.connect_via("user.created")
    def fail(sender: str, **_: object) -> None:
        assert service.user(user_id, ["name"]) == ("Ada Lovelace",)
        db.session.execute(db.text("UPDATE users SET name = 'never committed'"))
        raise ValueError("ada@example.org")

    event_processed.connect(heard)
    with caplog.at_level(logging.ERROR, logger="clerkhooks"):
        assert service.outcome(user_event(user_id, "user.created"), "msg_1") == "applied"
    [record] = caplog.records
    assert (record.getMessage(), vars(record)["message_id"], vars(record)["error"]) == ("receiver_failed", "msg_1", "ValueError")
    assert "example.org" not in str(vars(record))
    assert len(heard.calls) == 1
    assert service.user(user_id, ["name"]) == ("Ada Lovelace",)
    assert service.outcome(user_event(user_id, "user.created"), "msg_1") == "duplicate"
    assert len(heard.calls) == 1

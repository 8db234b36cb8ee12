"""On each database, the stored subscriptions do not depend on the order of events."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from clerkhooks.clerk.fake import FakeClerk, clerk_id, event_body
from clerkhooks.testing import ClerkService
from clerkhooks.web.state import disconnect
from tests.conftest import KINDS, MakeDatabase
from tests.examples.billing.app import PRO, Subscription, create_app, db
from tests.racing import delivery, outcomes, run_contending
from tests.support import Service, deletion

AT = 1_700_000_000_000


@pytest.fixture(params=KINDS)
def clerkhooks_app(
    request: pytest.FixtureRequest, clerk: FakeClerk, make_database: MakeDatabase
) -> Iterator[Flask]:
    """Create the application and its tables on each kind of database."""
    url = make_database(request.param).replace("postgresql://", "postgresql+psycopg://", 1)
    app = create_app(clerk.environ | {"SQLALCHEMY_DATABASE_URI": url})
    with app.app_context():
        db.create_all()
    yield app
    disconnect(app)


def subscription(status: str, at: int, user_id: str = "user_1", plan_id: str = PRO) -> bytes:
    """Return an event about a subscription with one item."""
    item = {"id": "csub_item_1", "status": status, "plan_id": plan_id}
    data = {
        "id": f"csub_{user_id}",
        "items": [item],
        "object": "commerce_subscription",
        "payer": {"id": "cpayer_1", "user_id": user_id},
        "status": status,
        "updated_at": AT + at,
    }
    return event_body("subscription.updated", data, AT + at)


def outcome(service: ClerkService, body: bytes, message_id: str | None = None) -> str:
    """Deliver an event, check that the status is 200, and return the outcome."""
    response = service.deliver_body(body, message_id)
    assert response.status_code == 200, response.text
    return str(response.get_json()["outcome"])


def rows(app: Flask, *columns: Any) -> list[tuple[Any, ...]]:
    """Select *columns* and return the rows."""
    with app.app_context():
        return [tuple(row) for row in db.session.execute(sa.select(*columns))]


def service_of(clerk_service: ClerkService) -> Service:
    """Return the application as the helpers for races need it."""
    app = clerk_service.app
    url = app.config["SQLALCHEMY_DATABASE_URI"].replace("+psycopg", "")
    return Service(app, clerk_service.clerk, url)


def forget(app: Flask) -> None:
    """Delete every subscription."""
    with app.app_context():
        db.session.execute(sa.delete(Subscription))
        db.session.commit()


def test_ends_the_same_in_every_order(clerk_service: ClerkService) -> None:
    """The newest status is stored, regardless of the order of events."""
    statuses = ("incomplete", "active", "past_due")
    events = [subscription(status, at) for at, status in enumerate(statuses)]
    for order in permutations(events):
        forget(clerk_service.app)
        assert [outcome(clerk_service, body) for body in order] == ["applied"] * 3
        assert rows(clerk_service.app, Subscription.status, Subscription.plan_ids) == [
            ("past_due", ["cplan_pro"])
        ]


def test_admits_users_who_have_paid(clerk_service: ClerkService) -> None:
    """The view follows the subscription."""
    user_id = clerk_service.sign_up()
    client = clerk_service.client(user_id)
    assert client.get("/report").status_code == 402
    outcome(clerk_service, subscription("active", -1, user_id, "cplan_free"))
    assert client.get("/report").status_code == 402
    for at, (status, answer) in enumerate((("active", 200), ("past_due", 200), ("ended", 402))):
        outcome(clerk_service, subscription(status, at, user_id))
        assert client.get("/report").status_code == answer


def test_keeps_every_subscription_of_clerks(clerk_service: ClerkService) -> None:
    """The complete data of each event type is stored. The payer is the organization."""
    for verb in ("created", "active", "updated", "pastDue"):
        assert clerk_service.deliver(f"subscription.{verb}").status_code == 200
    columns = (Subscription.organization_id, Subscription.status)
    assert ("past_due",) in rows(clerk_service.app, columns[1])
    assert all(found[0].startswith("org_") for found in rows(clerk_service.app, *columns))


def test_forgets_a_deleted_payer(clerk_service: ClerkService) -> None:
    """The subscription remains for the accounts, but does not name the user."""
    user_id = clerk_id("user")
    outcome(clerk_service, subscription("active", 1, user_id))
    outcome(clerk_service, deletion(user_id))
    stored = (Subscription.user_id, Subscription.status)
    assert rows(clerk_service.app, *stored) == [(None, "active")]
    outcome(clerk_service, subscription("ended", 2, user_id))
    assert rows(clerk_service.app, *stored) == [(None, "ended")], "a late event names the user"


@pytest.mark.parametrize("deletion_first", [True, False])
def test_forgets_a_payer_who_is_deleted_meanwhile(
    clerk_service: ClerkService, deletion_first: bool
) -> None:
    """Of two concurrent requests, the second waits, and the user is erased."""
    service = service_of(clerk_service)
    user_id = clerk_service.sign_up()
    requests = [
        delivery(service, deletion(user_id)),
        delivery(service, subscription("active", 1, user_id)),
    ]
    first, second = requests if deletion_first else reversed(requests)
    assert outcomes(run_contending(service, first, second)) == ["applied", "applied"]
    assert rows(clerk_service.app, Subscription.user_id) == [(None,)]


def test_processes_each_message_once(clerk_service: ClerkService) -> None:
    """A repeated message does not reach the application's handlers."""
    body = subscription("active", 1)
    assert outcome(clerk_service, body, "msg_1") == "applied"
    forget(clerk_service.app)
    assert outcome(clerk_service, body, "msg_1") == "duplicate"
    assert rows(clerk_service.app, Subscription.id) == []


def test_rolls_back_a_failed_message(clerk_service: ClerkService) -> None:
    """
    The response to an event without an id is 500, and no subscription is stored.

    Later events are still processed.
    """
    body = event_body("subscription.created", {"payer": {}, "items": []}, AT)
    assert clerk_service.deliver_body(body, "msg_1").status_code == 500
    assert rows(clerk_service.app, Subscription.id) == []
    log: list[sa.ColumnClause[Any]] = [sa.column("outcome"), sa.column("error")]
    with clerk_service.app.app_context():
        found = db.session.execute(sa.select(*log).select_from(sa.table("webhook_messages"))).all()
    assert [tuple(row) for row in found] == [("failed", "KeyError")]
    assert outcome(clerk_service, subscription("active", 1)) == "applied"


@pytest.mark.parametrize("newer_first", [True, False], ids=["newer first", "older first"])
def test_keeps_the_newer_of_two_in_a_race(clerk_service: ClerkService, newer_first: bool) -> None:
    """The second request waits for the first, and the newer status is stored."""
    service = service_of(clerk_service)
    requests = [
        delivery(service, subscription("active", 1)),
        delivery(service, subscription("ended", 2)),
    ]
    first, second = reversed(requests) if newer_first else requests
    assert outcomes(run_contending(service, first, second)) == ["applied", "applied"]
    assert rows(clerk_service.app, Subscription.status) == [("ended",)]

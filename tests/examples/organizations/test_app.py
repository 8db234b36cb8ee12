"""On each database, the stored organizations do not depend on the order of events."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from clerkhooks.clerk.fake import FakeClerk, event_body
from clerkhooks.testing import ClerkService
from clerkhooks.web.state import disconnect
from tests.conftest import KINDS, MakeDatabase
from tests.examples.organizations.app import Membership, Organization, create_app, db
from tests.racing import delivery, outcomes, run_contending
from tests.support import Service, user_event

AT = 1_700_000_000_000


@pytest.fixture(params=KINDS)
def clerkhooks_app(
    request: pytest.FixtureRequest, clerk: FakeClerk, make_database: MakeDatabase
) -> Iterator[Flask]:
    """Create the application on each kind of database."""
    url = make_database(request.param).replace("postgresql://", "postgresql+psycopg://", 1)
    app = create_app(clerk.environ | {"SQLALCHEMY_DATABASE_URI": url})
    yield app
    disconnect(app)


def organization(event_type: str, at: int, **data: Any) -> bytes:
    """Return an event about an organization. A deletion event has no ``updated_at``."""
    times = {} if event_type == "deleted" else {"updated_at": AT + at}
    whole = {"id": "org_1", "object": "organization"} | times | data
    return event_body(f"organization.{event_type}", whole, AT + at)


def membership(event_type: str, at: int, role: str) -> bytes:
    """Return an event about a membership."""
    whole = {
        "id": "orgmem_1",
        "organization": {"id": "org_1"},
        "public_user_data": {"user_id": "user_1"},
        "role": role,
        "updated_at": AT + at,
    }
    return event_body(f"organizationMembership.{event_type}", whole, AT + at)


def outcome(service: ClerkService, body: bytes, message_id: str | None = None) -> str:
    """Deliver an event, check that the status is 200, and return the outcome."""
    response = service.deliver_body(body, message_id)
    assert response.status_code == 200, response.text
    return str(response.get_json()["outcome"])


def rows(app: Flask, *columns: Any) -> list[tuple[Any, ...]]:
    """Select *columns* and return the rows."""
    with app.app_context():
        return [tuple(row) for row in db.session.execute(sa.select(*columns))]


def forget(app: Flask) -> None:
    """Delete every organization."""
    with app.app_context():
        db.session.execute(sa.delete(Organization))
        db.session.commit()


def test_ends_the_same_in_every_order(clerk_service: ClerkService) -> None:
    """The newest name is stored, regardless of the order of events."""
    names = ("Acne", "Acme", "Acme Inc")
    events = [organization("updated", at, name=name) for at, name in enumerate(names)]
    for order in permutations(events):
        forget(clerk_service.app)
        assert [outcome(clerk_service, body) for body in order] == ["applied"] * 3
        assert rows(clerk_service.app, Organization.id, Organization.name) == [
            ("org_1", "Acme Inc")
        ]


def test_keeps_deleted_rows_deleted(clerk_service: ClerkService) -> None:
    """A deletion is final, regardless of the order of events."""
    events = [
        organization("created", 1, name="Acme"),
        organization("deleted", 2),
        organization("updated", 3, name="Acme"),
    ]
    for order in permutations(events):
        forget(clerk_service.app)
        for body in order:
            outcome(clerk_service, body)
        [(name, deleted_at)] = rows(clerk_service.app, Organization.name, Organization.deleted_at)
        assert (name, deleted_at is not None) == (None, True)


def test_keeps_memberships(clerk_service: ClerkService) -> None:
    """A membership is stored even if its organization and its user are not stored yet."""
    assert outcome(clerk_service, membership("updated", 2, "org:admin")) == "applied"
    assert outcome(clerk_service, membership("created", 1, "org:member")) == "applied"
    columns = (Membership.organization_id, Membership.user_id, Membership.role)
    assert rows(clerk_service.app, *columns) == [("org_1", "user_1", "org:admin")]
    assert outcome(clerk_service, user_event("user_1")) == "applied"


def test_processes_each_message_once(clerk_service: ClerkService) -> None:
    """A repeated message does not reach the application's handlers."""
    body = organization("created", 1, name="Acme")
    assert outcome(clerk_service, body, "msg_1") == "applied"
    forget(clerk_service.app)
    assert outcome(clerk_service, body, "msg_1") == "duplicate"
    assert rows(clerk_service.app, Organization.id) == []


def test_rolls_back_a_failed_message(clerk_service: ClerkService) -> None:
    """
    The response to an event without an id is 500, and no organization is stored.

    Later events are still processed.
    """
    body = event_body("organization.created", {}, AT)
    assert clerk_service.deliver_body(body, "msg_1").status_code == 500
    assert rows(clerk_service.app, Organization.id) == []
    log: list[sa.ColumnClause[Any]] = [sa.column("outcome"), sa.column("error")]
    with clerk_service.app.app_context():
        found = db.session.execute(sa.select(*log).select_from(sa.table("webhook_messages"))).all()
    assert [tuple(row) for row in found] == [("failed", "KeyError")]
    assert outcome(clerk_service, membership("created", 1, "org:member")) == "applied"


@pytest.mark.parametrize("deletion_first", [True, False], ids=["deletion first", "update first"])
def test_keeps_a_deleted_organization_deleted_in_a_race(
    clerk_service: ClerkService, deletion_first: bool
) -> None:
    """
    A deletion and an update of a new organization are processed at the same time.

    The second request waits for the first, and the organization stays deleted.
    """
    app, clerk = clerk_service.app, clerk_service.clerk
    service = Service(app, clerk, app.config["SQLALCHEMY_DATABASE_URI"].replace("+psycopg", ""))
    requests = [
        delivery(service, organization("deleted", 1)),
        delivery(service, organization("updated", 2, name="Acme")),
    ]
    first, second = requests if deletion_first else reversed(requests)
    assert outcomes(run_contending(service, first, second)) == ["applied", "applied"]
    [(name, deleted_at)] = rows(app, Organization.name, Organization.deleted_at)
    assert (name, deleted_at is not None) == (None, True)

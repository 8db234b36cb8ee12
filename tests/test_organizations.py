"""The tables of organizations and memberships depend only on the set of events."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from clerkhooks.clerk.events import parse_event
from clerkhooks.clerk.fake import FakeClerk, clerk_id, event_body
from clerkhooks.clerk.signatures import VerifiedMessage
from clerkhooks.events import Event
from clerkhooks.store import endings
from tests.conftest import SLOW_ON_SQLITE, MakeDatabase, migrate
from tests.organizations import (
    CONTRADICTING,
    Draft,
    Ids,
    Sent,
    expected_row,
    expected_rows,
    orders,
    stored_rows,
)
from tests.racing import blocked, delivery, outcomes, registered_handler, run_contending
from tests.server import Server, serving
from tests.support import (
    NOW_MS,
    Service,
    ThreadPool,
    deletion,
    membership_event,
    organization_event,
    user_event,
)

ORGANIZATIONS = "SELECT name, slug, image_url, deleted_at IS NOT NULL FROM organizations"
MEMBERSHIPS = """
SELECT id, organization_id, user_id, role, deleted_at IS NOT NULL FROM organization_memberships
ORDER BY id
"""


def new_ids() -> tuple[str, str, str]:
    """Return new ids of a membership, its organization and its user."""
    return clerk_id("orgmem"), clerk_id("org"), clerk_id("user")


@dataclass
class Run:
    """A run of a history against both the service and the model."""

    service: Service
    ids: Ids = field(default_factory=Ids.new)
    arrived: set[Sent] = field(default_factory=set)

    def deliver(self, event: Sent) -> None:
        """Deliver *event* and check the outcome."""
        self.expect(event, self.service.outcome(event.body, event.message_id))

    def expect(self, event: Sent, outcome: str) -> None:
        """Check the outcome of a delivery, and update the model."""
        if event in self.arrived:
            assert outcome == "duplicate"
            return
        before = expected_row(event.object_id, self.arrived)
        self.arrived.add(event)
        changes = before != expected_row(event.object_id, self.arrived)
        assert outcome == ("applied" if changes else "stale")

    def check(self) -> None:
        """Check that the tables agree with the model."""
        assert stored_rows(self.service.database_url, self.ids) == expected_rows(
            self.ids, self.arrived
        )


@given(handled=st.booleans(), history=orders())
def test_ends_as_the_set_of_events_says(
    organizations: Service, handled: bool, history: tuple[list[Draft], list[int]]
) -> None:
    """The rows and outcomes match the model for any order, with and without handlers."""
    run, (drafts, order) = Run(organizations), history
    events = [draft.sent(run.ids, number) for number, draft in enumerate(drafts)]
    with registered_handler(organizations.app, do_nothing, "*" if handled else "session.created"):
        for number in order:
            run.deliver(events[number])
    run.check()


@given(history=orders(each=CONTRADICTING))
def test_ends_the_same_although_events_contradict_each_other(
    organizations: Service, history: tuple[list[Draft], list[int]]
) -> None:
    """If events name different parents of a membership, their order does not matter."""
    run, (drafts, order) = Run(organizations), history
    events = [draft.sent(run.ids, number) for number, draft in enumerate(drafts)]
    for number in order:
        run.deliver(events[number])
    run.check()


@given(history=orders())
def test_writes_a_batch_as_its_events_one_by_one(
    organizations: Service, history: tuple[list[Draft], list[int]]
) -> None:
    """Events in one transaction have the same results as separate deliveries."""
    run, (drafts, order) = Run(organizations), history
    events = [draft.sent(run.ids, number) for number, draft in enumerate(drafts)]
    state = organizations.app.extensions["clerkhooks"]
    batches: list[list[Sent]] = [[]]
    for event in (events[number] for number in order):
        last = batches[-1]
        same_family = {other.draft.family for other in last} <= {event.draft.family}
        if not same_family or event.object_id in {other.object_id for other in last}:
            batches.append([])
        batches[-1].append(event)
    for batch in batches:
        messages = [
            VerifiedMessage(event.message_id, int(time.time()), event.body.decode())
            for event in batch
        ]
        parsed = [parse_event(message, state.store.stored_types) for message in messages]
        for event, outcome in zip(batch, state.deliveries._apply_all(parsed), strict=True):
            run.expect(event, outcome)
    run.check()


@pytest.fixture(scope="module", params=SLOW_ON_SQLITE)
def server(
    request: pytest.FixtureRequest,
    make_database: MakeDatabase,
    clerk: FakeClerk,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """Run the real server with tables of organizations on a database of each kind."""
    url, log = make_database(request.param), tmp_path_factory.mktemp("server") / "server.log"
    migrate(url, clerk)
    with serving(url, clerk, log, CLERK_TABLES="organizations") as server:
        yield server


# Shrinking is off, because a race cannot be reproduced exactly.
@settings(max_examples=settings().max_examples // 4, phases=[Phase.generate])
@given(history=orders(most=24))
def test_ends_the_same_under_16_threads(
    server: Server, history: tuple[list[Draft], list[int]]
) -> None:
    """Two workers serve 16 threads: no delivery fails, and the rows agree with the model."""
    ids, (drafts, order) = Ids.new(), history
    events = [draft.sent(ids, number) for number, draft in enumerate(drafts)]

    def deliver(number: int) -> tuple[int, int, str]:
        event = events[number]
        response = server.deliver(event.body, event.message_id)
        return number, response.status, response.json().get("outcome")

    with ThreadPool(16) as pool:
        answers = list(pool.map(deliver, [*order, *order], timeout=60))
    assert {status for _, status, _ in answers} == {200}
    processed = [number for number, _, outcome in answers if outcome != "duplicate"]
    assert sorted(processed) == list(range(len(events)))
    assert stored_rows(server.database_url, ids) == expected_rows(ids, events)


def do_nothing(_event: Event) -> None:
    """Do nothing. With a handler, messages take a different code path."""


@pytest.mark.parametrize(
    ("data", "row"),
    [
        ({}, ("Acme", "acme")),
        ({"name": None}, ("acme", "acme")),
        ({"name": " Acme ", "slug": None}, ("Acme", None)),
        ({"name": 5, "slug": {}}, ("New Organization", None)),
        ({"name": "x" * 300, "slug": "y" * 256}, ("x" * 255, None)),
        ({"name": "nul\x00", "slug": "lone \ud800"}, ("New Organization", None)),
    ],
)
def test_stores_an_organization(
    organizations: Service, data: dict[str, Any], row: tuple[Any, ...]
) -> None:
    """A field of a wrong type, or one that cannot be stored, counts as absent."""
    organization_id = clerk_id("org")
    assert organizations.outcome(organization_event(organization_id, **data)) == "applied"
    image_url = f"https://img.clerk.com/{organization_id}"
    [found] = organizations.rows(ORGANIZATIONS)
    assert found == (*row, image_url, False)
    organizations.outcome(organization_event(organization_id, "deleted"))
    [found] = organizations.rows(ORGANIZATIONS)
    assert found == ("Deleted Organization", None, None, True)


def test_stores_a_membership(organizations: Service) -> None:
    """The role is updated; the log names the member."""
    ids = new_ids()
    organizations.outcome(membership_event(ids), "msg_1")
    assert organizations.rows(MEMBERSHIPS) == [(*ids, "org:member", False)]
    organizations.outcome(membership_event(ids, "updated", at=NOW_MS + 1, role="org:admin"))
    assert organizations.rows(MEMBERSHIPS) == [(*ids, "org:admin", False)]
    organizations.outcome(membership_event(ids, "deleted"))
    assert organizations.rows(MEMBERSHIPS) == [(*ids, None, True)]
    log = "SELECT clerk_user_id FROM webhook_messages WHERE message_id = 'msg_1'"
    assert organizations.rows(log) == [(ids[2],)]
    assert organizations.user(ids[2]) is None


def test_learns_the_user_later(organizations: Service) -> None:
    """Clerk's schema does not require the user. Another event of the membership fills it in."""
    ids, later = new_ids(), NOW_MS + 10
    body = membership_event(ids, at=later, role="org:admin", public_user_data=None)
    assert organizations.outcome(body, "msg_1") == "applied"
    assert organizations.rows(MEMBERSHIPS) == [(*ids[:2], None, "org:admin", False)]
    assert organizations.rows("SELECT clerk_user_id FROM webhook_messages") == [(None,)]
    assert organizations.outcome(membership_event(ids)) == "applied"
    assert organizations.rows(MEMBERSHIPS) == [(*ids, "org:admin", False)]
    body = membership_event(ids, at=later + 1, role="org:viewer", public_user_data=None)
    assert organizations.outcome(body) == "applied"
    assert organizations.rows(MEMBERSHIPS) == [(*ids, "org:viewer", False)]
    organizations.outcome(deletion(ids[2]))
    assert organizations.rows(MEMBERSHIPS) == [(*ids, None, True)]


@pytest.mark.parametrize("what", ["user", "organization"])
def test_ends_when_it_learns_that_the_user_was_deleted(organizations: Service, what: str) -> None:
    """A membership of an unknown user ends with its organization, or once the user is known."""
    ids = new_ids()
    organizations.outcome(membership_event(ids, at=NOW_MS + 10, public_user_data=None))
    body = deletion(ids[2]) if what == "user" else organization_event(ids[1], "deleted")
    organizations.outcome(body)
    assert organizations.rows(MEMBERSHIPS)[0][-1] == (what == "organization")
    assert organizations.outcome(membership_event(ids)) == "applied"
    assert organizations.rows(MEMBERSHIPS) == [(*ids, None, True)]


def test_ends_with_the_organization_and_the_user(organizations: Service) -> None:
    """Members of a deleted organization and memberships of a deleted user end; others stay."""
    (one, acme, ada), (two, other, bob) = new_ids(), new_ids()
    three = clerk_id("orgmem")
    for ids in ((one, acme, ada), (two, other, bob), (three, other, ada)):
        organizations.outcome(membership_event(ids))
    organizations.outcome(organization_event(acme, "deleted"))
    ended = {row[0]: row[-1] for row in organizations.rows(MEMBERSHIPS)}
    assert ended == {one: True, two: False, three: False}
    organizations.outcome(deletion(ada))
    ended = {row[0]: row[-1] for row in organizations.rows(MEMBERSHIPS)}
    assert ended == {one: True, two: False, three: True}


def test_ends_a_membership_that_arrives_later(organizations: Service) -> None:
    """The membership is a tombstone at once. A user who comes back has another membership."""
    ids, later = new_ids(), NOW_MS + 10
    organizations.outcome(deletion(ids[2]))
    assert organizations.outcome(membership_event(ids, at=later)) == "applied"
    assert organizations.rows(MEMBERSHIPS) == [(*ids, None, True)]
    again = (clerk_id("orgmem"), ids[1], clerk_id("user"))
    organizations.outcome(membership_event(again, at=later))
    assert (*again, "org:member", False) in organizations.rows(MEMBERSHIPS)


def test_ends_more_memberships_than_one_statement(
    organizations: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large organization's memberships end in several statements of one transaction."""
    monkeypatch.setattr(endings, "MAX_ENDED", 3)
    organization_id = clerk_id("org")
    for _ in range(8):
        ids = (clerk_id("orgmem"), organization_id, clerk_id("user"))
        organizations.outcome(membership_event(ids))
    organizations.outcome(organization_event(organization_id, "deleted"))
    assert [row[-1] for row in organizations.rows(MEMBERSHIPS)] == [True] * 8


@pytest.mark.parametrize(
    ("event_type", "data", "reason"),
    [
        ("organization.created", {}, "organization_id_malformed"),
        ("organization.updated", {"id": "user_1"}, "organization_id_malformed"),
        ("organization.deleted", {"id": "org_-"}, "organization_id_malformed"),
        ("organizationMembership.created", {"id": "org_1"}, "membership_id_malformed"),
        ("organizationMembership.deleted", {"id": None}, "membership_id_malformed"),
        ("organizationMembership.created", {"organization": None}, "organization_id_malformed"),
        ("organizationMembership.updated", {"public_user_data": {}}, "user_id_malformed"),
        (
            "organizationMembership.created",
            {"public_user_data": {"user_id": "user_\x00"}},
            "user_id_malformed",
        ),
    ],
)
def test_refuses_malformed_ids(
    organizations: Service, event_type: str, data: dict[str, Any], reason: str
) -> None:
    """The response is 400, so Svix retries. Nothing is stored."""
    whole = {
        "id": "orgmem_1" if "Membership" in event_type else None,
        "organization": {"id": "org_1"},
        "public_user_data": {"user_id": "user_1"},
    }
    response = organizations.deliver(event_body(event_type, whole | data, NOW_MS))
    assert (response.status_code, response.get_json()["reason"]) == (400, reason)
    assert organizations.rows("SELECT * FROM webhook_messages") == []


@pytest.mark.parametrize("handled", [False, True])
def test_stores_nothing_by_default(service: Service, handled: bool) -> None:
    """Without CLERK_TABLES, only handlers see the events, even if an id is malformed."""
    bodies = [
        membership_event(new_ids()),
        organization_event(clerk_id("org")),
        organization_event("malformed", "deleted"),
    ]
    with registered_handler(service.app, do_nothing, "*" if handled else "session.*"):
        found = [service.outcome(body) for body in bodies]
    assert found == ["applied" if handled else "ignored"] * 3
    assert service.rows(MEMBERSHIPS) == service.rows(ORGANIZATIONS) == []
    assert service.rows("SELECT DISTINCT clerk_user_id FROM webhook_messages") == [(None,)]


@pytest.mark.parametrize("plain", [False, True], ids=["with handlers", "without"])
@pytest.mark.parametrize("what", ["user", "organization"])
@pytest.mark.parametrize("deletion_first", [False, True])
def test_ends_a_membership_that_is_written_at_the_same_time(
    organizations: Service, plain: bool, what: str, deletion_first: bool
) -> None:
    """Neither the deletion nor the membership misses the other. No row needs to exist before."""
    ids = new_ids()
    deleted = deletion(ids[2]) if what == "user" else organization_event(ids[1], "deleted")
    requests = [delivery(organizations, membership_event(ids)), delivery(organizations, deleted)]
    first, second = reversed(requests) if deletion_first else requests
    answers = run_contending(organizations, first, second, plain=plain)
    assert outcomes(answers) == ["applied", "applied"]
    assert organizations.rows(MEMBERSHIPS) == [(*ids, None, True)]


def test_does_not_delay_other_events(organizations: Service) -> None:
    """While a deletion is being written, other users' events and memberships are applied."""
    if organizations.database_url.startswith("sqlite"):
        pytest.skip("SQLite has one writer at a time")
    ids = new_ids()
    waiting = delivery(organizations, deletion(ids[2]))
    store = organizations.app.extensions["clerkhooks"].store
    with store.database.connect() as connection:
        connection.exec_driver_sql("BEGIN")
        store.endings.lock_parents(connection, [{"organization_id": ids[1], "user_id": ids[2]}])
        with blocked(organizations, waiting) as answer:
            assert organizations.outcome(user_event(ids[2], at=NOW_MS + 1)) == "applied"
            assert organizations.outcome(organization_event(ids[1])) == "applied"
            connection.exec_driver_sql("ROLLBACK")
            assert answer.result(20).status_code == 200

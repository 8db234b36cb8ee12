"""The sync of organizations and memberships with the Backend API."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clerkhooks.clerk.fake import clerk_id, event_body
from clerkhooks.clerk.kinds import ORGANIZATION
from clerkhooks.errors import BackendApiError
from clerkhooks.sync import listing
from clerkhooks.sync.reconcile import Reconciliation
from tests.backend import Backend, Behaviour, Query, answering_json, refusing
from tests.conftest import SLOW_ON_POSTGRESQL, MakeService
from tests.racing import on_statement
from tests.support import (
    NOW_MS,
    Service,
    deletion,
    membership_event,
    organization_event,
    user_event,
)
from tests.syncing import make_old, sync

OLD = NOW_MS - 86_400_000
MEMBERSHIPS = "SELECT id, organization_id, user_id, role, deleted_at IS NOT NULL"


@pytest.fixture
def storing(make_service: MakeService, backend: Backend) -> Service:
    """Create the service with tables of organizations and access to the Backend API."""
    return make_service(CLERK_TABLES="organizations", **backend.environ)


def make_all_old(service: Service) -> None:
    """Make every row old enough for a sync to check whether Clerk has deleted the object."""
    make_old(service)
    for table in ("organizations", "organization_memberships"):
        service.rows(f"UPDATE {table} SET created_at = '2020-01-01 00:00:00.000000'")


def organizations(service: Service) -> dict[str, tuple[Any, ...]]:
    """Return the name of each organization, and whether it is a tombstone."""
    found = service.rows("SELECT id, name, deleted_at IS NOT NULL FROM organizations")
    return {row[0]: (row[1], bool(row[2])) for row in found}


def memberships(service: Service) -> dict[str, tuple[Any, ...]]:
    """Return the other columns of each membership, and whether it is a tombstone."""
    found = service.rows(f"{MEMBERSHIPS} FROM organization_memberships")
    return {row[0]: (*row[1:-1], bool(row[-1])) for row in found}


def summaries(run: Reconciliation) -> list[dict[str, int]]:
    """Return the nonzero counts of organizations and of memberships."""
    return [
        {name: count for name, count in table.summary().items() if count}
        for table in run.tables[1:]
    ]


def test_fills_empty_tables(storing: Service, backend: Backend) -> None:
    """All objects are read in pages from three lists, without a request for each organization."""
    users = [backend.sign_up() for _ in range(3)]
    ids = [backend.found(name=f"Acme {number}") for number in range(40)]
    for organization_id in ids:
        backend.join(organization_id, users[0], role="org:admin")
    run = sync(storing, backend)[2]
    assert summaries(run) == [{"created": 40}, {"created": 40}]
    assert run.ok
    assert organizations(storing) == {
        organization_id: (f"Acme {number}", False) for number, organization_id in enumerate(ids)
    }
    assert set(memberships(storing).values()) == {
        (organization_id, users[0], "org:admin", False) for organization_id in ids
    }
    assert sum(path.startswith("/v1/organization") for path, _ in backend.requests) == 14
    assert summaries(sync(storing, backend)[2]) == [{"unchanged": 40}, {"unchanged": 40}]


def test_updates_older_rows_only(storing: Service, backend: Backend) -> None:
    """Newer rows are kept. A role that differs at the same ``updated_at`` is repaired."""
    user_id, acme, other = backend.sign_up(), backend.found(at=OLD), backend.found(at=OLD)
    member = backend.join(acme, user_id, at=OLD, role="org:admin")
    storing.outcome(organization_event(acme, at=OLD - 1, name="Before"))
    storing.outcome(organization_event(other, at=OLD + 1, name="After"))
    storing.outcome(membership_event((member, acme, user_id), at=OLD, role="org:member"))
    run = sync(storing, backend)[2]
    assert summaries(run) == [{"updated": 1, "newer_here": 1}, {"updated": 1}]
    assert organizations(storing) == {acme: ("Acme", False), other: ("After", False)}
    assert memberships(storing)[member] == (acme, user_id, "org:admin", False)
    late = membership_event((member, acme, user_id), "updated", at=OLD, role="org:viewer")
    assert storing.outcome(late) == "stale"


def test_ends_although_a_row_seems_to_be_from_the_future(
    storing: Service, backend: Backend
) -> None:
    """A membership that was created while the clock was wrong is left, and the sync ends."""
    acme = backend.found()
    member = backend.join(acme, backend.sign_up())
    sync(storing, backend)
    make_all_old(storing)
    storing.rows("UPDATE organization_memberships SET created_at = '2099-01-01 00:00:00'")
    del backend.organizations[acme], backend.memberships[member]
    sync(storing, backend)
    assert organizations(storing)[acme] == ("Deleted Organization", True)


def test_ends_what_clerk_deleted(storing: Service, backend: Backend) -> None:
    """Each deletion is confirmed by Clerk. An organization's memberships end with it."""
    user_id = backend.sign_up()
    acme, other = backend.found(), backend.found()
    kept, left, gone = (backend.join(each, user_id) for each in (other, other, acme))
    sync(storing, backend)
    make_all_old(storing)
    del backend.organizations[acme], backend.memberships[gone], backend.memberships[left]
    backend.requests.clear()
    run = sync(storing, backend)[2]
    assert summaries(run) == [
        {"unchanged": 1, "tombstoned": 1},
        {"unchanged": 1, "tombstoned": 1},
    ]
    asked = [path for path, _ in backend.requests]
    assert f"/v1/organizations/{acme}" in asked
    assert f"/v1/organizations/{other}/memberships" in asked
    assert organizations(storing)[acme] == ("Deleted Organization", True)
    assert {each: row[-1] for each, row in memberships(storing).items()} == {
        kept: False,
        left: True,
        gone: True,
    }
    # Later evidence restores what a sync did not find.
    later = int(time.time() * 1000) + 60_000
    storing.outcome(membership_event((left, other, user_id), "updated", at=later))
    assert memberships(storing)[left] == (other, user_id, "org:member", False)


def test_learns_the_users_of_memberships(storing: Service, backend: Backend) -> None:
    """A sync fills in users that events did not name, and ends the memberships that are gone."""
    user_id, acme = backend.sign_up(), backend.found()
    kept, gone = backend.join(acme, user_id, at=OLD), backend.join(acme, user_id, at=OLD)
    for member in (kept, gone):
        ids = (member, acme, user_id)
        storing.outcome(membership_event(ids, at=OLD, public_user_data=None))
    sync(storing, backend, lambda run: run.sync_some([user_id, kept]))
    assert memberships(storing)[kept] == (acme, user_id, "org:member", False)
    make_all_old(storing)
    storing.rows("UPDATE organization_memberships SET user_id = NULL")
    del backend.memberships[gone]
    assert sync(storing, backend, check=True)[2].tables[2].drifted == 2
    sync(storing, backend)
    assert memberships(storing) == {
        kept: (acme, user_id, "org:member", False),
        gone: (acme, None, None, True),
    }
    assert sync(storing, backend, check=True)[2].drifted == 0


def test_corrects_the_parents_of_a_membership(storing: Service, backend: Backend) -> None:
    """If events contradict each other, a sync decides. A check then finds no difference."""
    users = sorted(backend.sign_up() for _ in range(2))
    parents = sorted(backend.found() for _ in range(2))
    member = backend.join(parents[0], users[0], at=OLD)
    storing.outcome(membership_event((member, parents[1], users[1]), at=OLD))
    [finding] = [each for each in sync(storing, backend, check=True)[1] if each.id == member]
    assert finding.fields.keys() == {"organization_id", "user_id"}
    sync(storing, backend)
    assert memberships(storing)[member] == (parents[0], users[0], "org:member", False)
    assert sync(storing, backend, check=True)[2].drifted == 0


def test_keeps_the_user_that_clerks_list_lacks(storing: Service, backend: Backend) -> None:
    """The user in the row stays, and a check finds no difference."""
    user_id, acme = backend.sign_up(), backend.found()
    member = backend.join(acme, user_id, at=OLD, public_user_data=None)
    storing.outcome(membership_event((member, acme, user_id), at=OLD - 1, role="org:admin"))
    sync(storing, backend)
    assert memberships(storing)[member] == (acme, user_id, "org:member", False)
    assert sync(storing, backend, check=True)[2].drifted == 0


def test_ends_memberships_of_a_user_that_clerk_does_not_know(
    storing: Service, backend: Backend
) -> None:
    """The inferred deletion of a user ends older memberships, also those that arrive later."""
    user_id, _, acme = backend.sign_up(), backend.sign_up(), backend.found()
    member = backend.join(acme, user_id)
    sync(storing, backend)
    make_all_old(storing)
    backend.delete(user_id)
    data = backend.memberships.pop(member)
    run = sync(storing, backend)[2]
    assert run.users.summary()["tombstoned"] == 1
    assert summaries(run) == [{"unchanged": 1}, {}]
    late, later = (clerk_id("orgmem"), acme, user_id), int(time.time() * 1000) + 60_000
    storing.outcome(membership_event(late, at=OLD))
    newer = (clerk_id("orgmem"), acme, user_id)
    storing.outcome(membership_event(newer, at=later))
    ended = {each: row[-1] for each, row in memberships(storing).items()}
    assert ended == {member: True, late[0]: True, newer[0]: False}
    # The user is found again, with the memberships.
    backend.sign_up(user_id)
    backend.memberships[member] = data
    sync(storing, backend)
    assert not memberships(storing)[member][-1]


def test_keeps_a_final_deletion(storing: Service, backend: Backend) -> None:
    """What an event deleted stays deleted, although Clerk's lists still contain it."""
    user_id, acme = backend.sign_up(), backend.found()
    backend.join(acme, user_id)
    storing.outcome(deletion(user_id))
    run = sync(storing, backend)[2]
    assert summaries(run) == [{"created": 1}, {"created": 1}]
    assert [row[-1] for row in memberships(storing).values()] == [True]
    assert summaries(sync(storing, backend)[2]) == [{"unchanged": 1}, {"newer_here": 1}]


@pytest.mark.parametrize("force", [False, True])
def test_deletes_only_a_few(storing: Service, backend: Backend, force: bool) -> None:
    """More than 20, and more than a tenth, are deleted only with ``force``."""
    user_id, acme = backend.sign_up(), backend.found()
    kept = backend.join(acme, user_id)
    for _ in range(21):
        backend.join(acme, user_id)
    sync(storing, backend)
    make_all_old(storing)
    backend.memberships = {kept: backend.memberships[kept]}
    run = sync(storing, backend, force=force)[2]
    table = run.tables[2]
    assert (table.withheld, run.ok) == (0 if force else 21, force)
    ended = sum(row[-1] for row in memberships(storing).values())
    assert ended == (21 if force else 0)


def test_checks_without_changing_anything(storing: Service, backend: Backend) -> None:
    """A check reports organizations and memberships that differ."""
    user_id, acme, lost = backend.sign_up(), backend.found(name="Acme"), backend.found()
    member, left = backend.join(acme, user_id), backend.join(acme, user_id)
    sync(storing, backend)
    make_all_old(storing)
    backend.organizations[acme] |= {"name": "Acme 2"}
    new = backend.join(acme, user_id)
    backend.memberships[member] |= {"role": "org:admin"}
    del backend.memberships[left], backend.organizations[lost]
    before = organizations(storing), memberships(storing)
    _, findings, run = sync(storing, backend, check=True)
    assert (organizations(storing), memberships(storing)) == before
    assert {(each.kind, each.noun, each.id) for each in findings} == {
        ("differs", "organization", acme),
        ("gone_at_clerk", "organization", lost),
        ("missing_here", "membership", new),
        ("differs", "membership", member),
        ("gone_at_clerk", "membership", left),
    }
    fields = {each.id: each.fields for each in findings if each.kind == "differs"}
    assert fields == {
        acme: {"name": ("Acme", "Acme 2")},
        member: {"role": ("org:member", "org:admin")},
    }
    assert (run.drifted, run.ok) == (5, False)


def test_reports_malformed_objects(storing: Service, backend: Backend) -> None:
    """The run continues. Other objects are stored."""
    user_id, acme = backend.sign_up(), backend.found()
    backend.organizations["odd"] = backend.organizations[acme] | {"id": "odd"}
    backend.join(acme, user_id)
    backend.join(acme, "malformed")
    _, findings, run = sync(storing, backend)
    assert summaries(run) == [{"created": 1, "failed": 1}, {"created": 1, "failed": 1}]
    assert [(each.noun, each.reason) for each in findings] == [
        ("organization", "organization_id_malformed"),
        ("membership", "user_id_malformed"),
    ]


@pytest.mark.parametrize("answer", [[], {"data": []}, {"data": {}, "total_count": 0}])
def test_stops_at_an_unusable_answer(storing: Service, backend: Backend, answer: Any) -> None:
    """Nothing is deleted because of a response that is not Clerk's."""

    def before(path: str, _query: Query) -> None:
        if path == "/v1/organizations":
            backend.behaviours = [answering_json(200, answer)]

    backend.before = before
    with pytest.raises(BackendApiError, match="a list and its length"):
        sync(storing, backend)


UNPROVEN = [
    answering_json(200, {"data": [], "total_count": 7}),
    answering_json(200, {"data": [{"id": "odd"}], "total_count": 1}),
    refusing(404, "host_invalid"),
]


@pytest.mark.parametrize("database_url", SLOW_ON_POSTGRESQL, indirect=True)
@pytest.mark.parametrize("behaviour", UNPROVEN)
@pytest.mark.parametrize("what", ["organization", "membership", "user"])
def test_keeps_what_clerk_does_not_confirm_to_be_gone(
    storing: Service, backend: Backend, what: str, behaviour: Behaviour
) -> None:
    """The row is reported, and the sync continues with the other objects."""
    user_id, other = backend.sign_up(), backend.sign_up()
    acme, lost = backend.found(), backend.found()
    member, left = backend.join(acme, user_id), backend.join(acme, user_id)
    sync(storing, backend)
    make_all_old(storing)
    del backend.organizations[lost], backend.memberships[left], backend.users[other]
    path = {
        "organization": f"/v1/organizations/{lost}",
        "membership": f"/v1/organizations/{acme}/memberships",
        "user": f"/v1/users/{other}",
    }[what]
    kept = {"organization": lost, "membership": left, "user": other}[what]

    def before(asked: str, _query: Query) -> None:
        backend.behaviours = [behaviour] if asked == path else []

    backend.before = before
    new = backend.join(acme, user_id)
    _, findings, run = sync(storing, backend)
    assert [(each.kind, each.noun, each.id) for each in findings] == [("unconfirmed", what, kept)]
    assert (findings[0].reason, run.ok) == ("answer_unusable", False)
    assert organizations(storing)[lost][-1] == (what != "organization")
    ended = {each: row[-1] for each, row in memberships(storing).items()}
    assert ended == {member: False, new: False, left: what != "membership"}
    assert (storing.user(other, ("deleted_at",)) == (None,)) == (what == "user")


@pytest.mark.parametrize("count", [2, 3])
def test_ends_although_a_list_ignores_the_offset(count: int) -> None:
    """Pages that change but contain nothing new do not keep a sync running for ever."""
    objects = [{"id": f"org_{number}", "created_at": OLD} for number in range(count)]
    requests = 0

    def get_page(_order: str, _limit: int, _offset: int) -> list[Any]:
        nonlocal requests
        requests += 1
        assert requests < 1000
        return [objects[requests % count]]

    pages = listing.read_by_offset(get_page, ORGANIZATION, listing.IdSet())
    with pytest.raises(BackendApiError, match="the same objects again"):
        list(pages)


def test_tombstones_many_memberships_in_one_statement(storing: Service, backend: Backend) -> None:
    """Their deletion locks no other rows, so one transaction is enough."""
    user_id, acme = backend.sign_up(), backend.found()
    gone = [backend.join(acme, user_id) for _ in range(8)]
    sync(storing, backend)
    make_all_old(storing)
    for each in gone:
        del backend.memberships[each]
    updates: list[None] = []
    with on_statement(storing, "UPDATE organization_memberships", lambda: updates.append(None)):
        assert summaries(sync(storing, backend)[2])[1] == {"tombstoned": 8}
    assert len(updates) == 1


def test_syncs_given_objects(storing: Service, backend: Backend) -> None:
    """Only these are updated. Memberships are searched for if they have no row."""
    user_id, acme, other = backend.sign_up(), backend.found(), backend.found()
    new, changed, unasked = (backend.join(each, user_id) for each in (acme, other, acme))
    gone = (clerk_id("orgmem"), other, backend.sign_up())
    storing.outcome(membership_event(gone, at=OLD))
    storing.outcome(membership_event((changed, other, user_id), at=OLD))
    make_all_old(storing)
    backend.memberships[changed] |= {"role": "org:admin"}
    ids = [acme, gone[0], changed]
    _, findings, run = sync(storing, backend, lambda run: run.sync_some(ids))
    assert summaries(run) == [{"created": 1}, {"updated": 1, "tombstoned": 1}]
    assert "/v1/organization_memberships" not in {path for path, _ in backend.requests}
    run = sync(storing, backend, lambda run: run.sync_some([new, clerk_id("orgmem")]))[2]
    assert summaries(run) == [{}, {"created": 1, "unknown": 1}]
    assert (findings, run.unknown, run.users.summary()["created"]) == ([], 1, 0)
    assert organizations(storing).keys() == {acme}
    assert memberships(storing) == {
        new: (acme, user_id, "org:member", False),
        changed: (other, user_id, "org:admin", False),
        gone[0]: (*gone[1:], None, True),
    }
    assert unasked not in memberships(storing)


def test_repairs_the_objects_of_failed_messages(storing: Service, backend: Backend) -> None:
    """A failure while organizations or memberships are written is repaired by ``--failed``."""
    user_id, acme, lost = backend.sign_up(), backend.found(), backend.found()
    ended, kept = backend.join(lost, user_id), backend.join(acme, user_id)
    sync(storing, backend)
    make_all_old(storing)
    del backend.organizations[lost], backend.memberships[ended]
    new = backend.join(acme, user_id)
    at = int(time.time() * 1000) + 1000
    backend.memberships[kept] |= {"role": "org:admin", "updated_at": at}
    events = [
        organization_event(lost, "deleted"),
        membership_event((new, acme, user_id)),
        membership_event((kept, acme, user_id), "updated", at=at, role="org:admin"),
    ]
    storing.rows("ALTER TABLE organization_memberships RENAME TO elsewhere")
    try:
        assert {storing.deliver(body).status_code for body in events} == {500}
    finally:
        storing.rows("ALTER TABLE elsewhere RENAME TO organization_memberships")
    run = sync(storing, backend, Reconciliation.sync_failed)[2]
    assert summaries(run) == [{"tombstoned": 1}, {"created": 1, "updated": 1}]
    assert (run.ok, sync(storing, backend, check=True)[2].drifted) == (True, 0)
    assert memberships(storing)[ended] == (lost, user_id, None, True)


def test_records_the_object_of_an_event(storing: Service) -> None:
    """The message log names organizations and memberships. Users have a column of their own."""
    ids = (clerk_id("orgmem"), clerk_id("org"), clerk_id("user"))
    for body in (membership_event(ids), organization_event(ids[1]), user_event(ids[2])):
        storing.outcome(body)
    query = "SELECT clerk_user_id, clerk_object_id FROM webhook_messages"
    assert set(storing.rows(query)) == {(ids[2], ids[0]), (None, ids[1]), (ids[2], None)}


@given(
    count=st.integers(0, 24),
    deletions=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 24)), max_size=8),
    ties=st.booleans(),
)
def test_lists_every_object_while_others_are_deleted(
    count: int, deletions: list[tuple[int, int]], ties: bool
) -> None:
    """No object is skipped or repeated if others are deleted between two requests."""
    objects = [
        {"id": f"org_{number:02}", "created_at": OLD + (0 if ties else number)}
        for number in range(count)
    ]
    requests, deleted = 0, set[str]()

    def get_page(order: str, limit: int, offset: int) -> list[Any]:
        nonlocal requests
        for at, number in deletions:
            if at == requests and number < count:
                deleted.add(f"org_{number:02}")
        requests += 1
        assert requests < 100
        kept = [each for each in objects if each["id"] not in deleted]
        return (kept if order == "+created_at" else kept[::-1])[offset:][:limit]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "PAGE", 4)
        pages = list(listing.read_by_offset(get_page, ORGANIZATION, listing.IdSet()))
    read = [each["id"] for page in pages for each in page]
    assert len(read) == len(set(read))
    assert {each["id"] for each in objects} - deleted <= set(read)


class World:
    """A Clerk instance with two users and two organizations, its events, and the tables."""

    def __init__(self, service: Service, backend: Backend) -> None:
        self.service, self.backend, self.now = service, backend, OLD
        self.sent: list[tuple[str, bytes]] = []
        for objects in (backend.users, backend.organizations, backend.memberships):
            objects.clear()
        for _ in range(2):
            user_id, organization_id = backend.sign_up(at=OLD), backend.found(at=OLD)
            self._send(event_body("user.created", backend.users[user_id], OLD))
            self._send(organization_event(organization_id, at=OLD))

    def perform(self, method: str, number: int) -> None:
        """Call the method that a step names. Each change has a new time."""
        self.now += 1
        getattr(self, method)(number)

    def join(self, number: int) -> None:
        """Make a user a member of an organization, possibly again."""
        users, organizations = list(self.backend.users), list(self.backend.organizations)
        if users and organizations:
            parents = organizations[number // 2 % len(organizations)], users[number % len(users)]
            member = self.backend.join(*parents, at=self.now)
            self._send_membership("created", member)

    def change(self, number: int) -> None:
        """Change the role of a member."""
        if member := self._pick(self.backend.memberships, number):
            changed = {"role": f"org:role_{number}", "updated_at": self.now}
            self.backend.memberships[member] |= changed
            self._send_membership("updated", member)

    def leave(self, number: int) -> None:
        """Remove a member."""
        if member := self._pick(self.backend.memberships, number):
            self._send_membership("deleted", member)
            del self.backend.memberships[member]

    def rename(self, number: int) -> None:
        """Rename an organization."""
        if organization := self._pick(self.backend.organizations, number):
            changed = {"name": f"Acme {number}", "updated_at": self.now}
            self.backend.organizations[organization] |= changed
            data = self.backend.organizations[organization]
            self._send(event_body("organization.updated", data, self.now))

    def dissolve(self, number: int) -> None:
        """Delete an organization. Clerk sends no events about its memberships."""
        if organization := self._pick(self.backend.organizations, number):
            del self.backend.organizations[organization]
            self._end_memberships("organization", organization)
            self._send(organization_event(organization, "deleted", at=self.now))

    def delete(self, number: int) -> None:
        """Delete a user. Clerk sends no events about the user's memberships."""
        if user_id := self._pick(self.backend.users, number):
            self.backend.delete(user_id)
            self._end_memberships("user", user_id)
            self._send(deletion(user_id, self.now))

    def deliver(self, number: int) -> None:
        """Deliver one of the events sent so far, possibly again."""
        message_id, body = self.sent[number % len(self.sent)]
        assert self.service.deliver(body, message_id).status_code == 200

    def sync(self, _number: int) -> None:
        """Run a sync."""
        make_all_old(self.service)
        sync(self.service, self.backend, force=True)

    def check(self) -> None:
        """Check that all of Clerk's objects have rows, and that other rows are tombstones."""
        known = {key: (each["name"], False) for key, each in self.backend.organizations.items()}
        found = organizations(self.service)
        assert {key: row for key, row in found.items() if not row[-1]} == known
        members = {
            key: (each["organization"]["id"], each["public_user_data"]["user_id"], each["role"])
            for key, each in self.backend.memberships.items()
        }
        stored = memberships(self.service)
        assert {key: row[:-1] for key, row in stored.items() if not row[-1]} == members

    def _pick(self, objects: dict[str, Any], number: int) -> str | None:
        return list(objects)[number % len(objects)] if objects else None

    def _end_memberships(self, parent: str, parent_id: str) -> None:
        for key, each in list(self.backend.memberships.items()):
            ids = {"organization": each["organization"]["id"]}
            ids["user"] = each["public_user_data"]["user_id"]
            if ids[parent] == parent_id:
                del self.backend.memberships[key]

    def _send_membership(self, verb: str, member: str) -> None:
        data = self.backend.memberships[member]
        self._send(event_body(f"organizationMembership.{verb}", data, self.now))

    def _send(self, body: bytes) -> None:
        self.sent.append((clerk_id("msg"), body))


METHODS = ["join"] * 3 + ["deliver"] * 5 + ["change"] * 2
METHODS += ["leave", "rename", "dissolve", "delete", "sync"]


@settings(max_examples=settings().max_examples // 2)
@given(
    steps=st.lists(st.tuples(st.sampled_from(METHODS), st.integers(0, 20)), max_size=24),
    order=st.randoms(use_true_random=False),
    last=st.sampled_from(["events", "sync"]),
)
def test_ends_in_clerks_state(
    storing: Service, backend: Backend, steps: list[tuple[str, int]], order: Any, last: str
) -> None:
    """After any changes, events and syncs, all events or one more sync repair every row."""
    for table in ("users", "organizations", "organization_memberships"):
        storing.rows(f"DELETE FROM {table}")
    world = World(storing, backend)
    for method, number in steps:
        world.perform(method, number)
    if last == "sync":
        world.sync(0)
    else:
        for number in order.sample(range(len(world.sent)), len(world.sent)):
            world.deliver(number)
    world.check()

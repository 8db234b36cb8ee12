"""The follower of organizations and memberships: right even if no webhook arrives."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clerkhooks.clerk.fake import event_body
from clerkhooks.store.awaited import now_ms
from clerkhooks.sync import passes
from clerkhooks.sync.watch import GRACE
from tests.backend import Backend
from tests.conftest import TABLES, MakeService
from tests.following import Crash, Following
from tests.support import NOW_MS, Service
from tests.test_reconcile_organizations import (
    METHODS,
    World,
    make_all_old,
    memberships,
    organizations,
)
from tests.test_watch import pass_time

OLD = NOW_MS - 86_400_000
sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def storing(make_service: MakeService, backend: Backend) -> Service:
    """Create the service with tables of organizations and access to the Backend API."""
    return make_service(CLERK_TABLES="organizations", **backend.environ)


@pytest.fixture
def following(storing: Service, backend: Backend) -> Following:
    """Return a follower that has not run yet."""
    return Following(storing, backend)


def test_follows_every_change(following: Following, storing: Service, backend: Backend) -> None:
    """New objects, changes and deletions are written in the next round."""
    user_id, acme, gone = backend.sign_up(at=OLD), backend.found(at=OLD), backend.found(at=OLD)
    kept, left, ended = (backend.join(each, user_id, at=OLD) for each in (acme, acme, gone))
    following.run()
    assert {*organizations(storing)} == {acme, gone}
    assert {*memberships(storing)} == {kept, left, ended}
    assert storing.rows("SELECT * FROM clerk_awaited_webhooks") == []
    make_all_old(storing)
    other = backend.found(name="Other")
    joined = backend.join(other, user_id)
    backend.memberships[kept] |= {"role": "org:admin", "updated_at": now_ms()}
    backend.organizations[acme] |= {"name": "Acme Ltd", "updated_at": now_ms()}
    del backend.organizations[gone], backend.memberships[ended], backend.memberships[left]
    following.run()
    assert organizations(storing) == {
        acme: ("Acme Ltd", False),
        other: ("Other", False),
        gone: ("Deleted Organization", True),
    }
    assert memberships(storing) == {
        kept: (acme, user_id, "org:admin", False),
        left: (acme, user_id, None, True),
        ended: (gone, user_id, None, True),
        joined: (other, user_id, "org:member", False),
    }
    assert following.events[-1][1] == {
        "organizations_created": 1,
        "organizations_updated": 1,
        "organizations_tombstoned": 1,
        "memberships_created": 1,
        "memberships_updated": 1,
        "memberships_tombstoned": 1,
    }
    awaited = dict(storing.rows("SELECT object_id, is_deletion FROM clerk_awaited_webhooks"))
    assert awaited == {
        **dict.fromkeys((acme, other, kept, joined), False),
        **dict.fromkeys((gone, left), True),
    }


def test_needs_few_requests(following: Following, storing: Service, backend: Backend) -> None:
    """In a small instance, an idle round sends one request for each table, and one for users."""
    backend.join(backend.found(at=OLD), backend.sign_up(at=OLD), at=OLD)
    following.run()
    make_all_old(storing)
    backend.requests.clear()
    following.run()
    assert sorted(path for path, _ in backend.requests) == [
        "/v1/organization_memberships",
        "/v1/organizations",
        "/v1/users",
        "/v1/users",
    ]


@sqlite
def test_reads_long_lists_in_many_rounds(
    following: Following, storing: Service, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New objects are found in the next round, and other changes by the pass over the list."""
    monkeypatch.setattr(passes, "PAGE", 20)
    user_id = backend.sign_up(at=OLD)
    ids = [backend.found(at=OLD + number) for number in range(45)]
    following.run()
    assert len(organizations(storing)) == 20
    following.run(3)
    assert len(organizations(storing)) == 45
    make_all_old(storing)
    following.run()
    backend.organizations[ids[0]] |= {"name": "Changed", "updated_at": now_ms()}
    del backend.organizations[ids[40]]
    new = backend.found()
    backend.join(new, user_id)
    following.run()
    assert organizations(storing)[new] == ("Acme", False)
    assert len(memberships(storing)) == 1
    following.run(8)
    assert organizations(storing)[ids[0]] == ("Changed", False)
    assert organizations(storing)[ids[40]] == ("Deleted Organization", True)


@sqlite
def test_continues_a_pass_of_another_process(
    following: Following, storing: Service, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if no process runs as long as a pass takes, the last page is read."""
    monkeypatch.setattr(passes, "PAGE", 20)
    monkeypatch.setattr(passes, "SHARED", 2)
    for number in range(60):
        backend.found(at=OLD + number)
    ended = list(backend.organizations)[10]
    following.run()
    make_all_old(storing)
    del backend.organizations[ended]
    for _ in range(8):
        Following(storing, backend).run()
    found = organizations(storing)
    assert len(found) == 60
    assert storing.rows("SELECT * FROM clerk_awaited_webhooks") == []
    assert not found[ended][1]
    Following(storing, backend).run(16)
    assert organizations(storing)[ended][1], "a whole pass finds deletions"


def test_reads_very_long_lists_faster(following: Following, backend: Backend) -> None:
    """A pass takes about an hour. In the tests, an hour is shorter."""
    for number in range(60):
        backend.found(at=OLD + number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "PAGE", 20)
        patch.setattr(passes, "HOUR", 60.0)
        following.run(2)
    asked = [query for path, query in backend.requests if path == "/v1/organizations"]
    assert [query["offset"] for query in asked[:1]] == [["0"]]
    assert len(asked) >= 5


@pytest.mark.parametrize("verb", ["created", "updated", "deleted"])
def test_reports_a_change_without_a_webhook(
    following: Following, storing: Service, backend: Backend, verb: str
) -> None:
    """A change counts as missed six minutes later, until its webhook arrives."""
    user_id, acme = backend.sign_up(at=OLD), backend.found(at=OLD)
    kept = backend.join(acme, user_id, at=OLD)
    following.run()
    make_all_old(storing)
    if verb == "created":
        member = backend.join(acme, user_id)
        data = backend.memberships[member]
    elif verb == "updated":
        data = backend.memberships[kept] = backend.memberships[kept] | {
            "role": "org:admin",
            "updated_at": now_ms(),
        }
    else:
        data = backend.memberships.pop(kept)
    following.run()
    pass_time(storing, GRACE + 1000)
    following.run()
    assert following.missed().missed == 1
    assert "deliveries_missed" in following.names()
    storing.deliver(event_body(f"organizationMembership.{verb}", data, now_ms()))
    following.run()
    assert following.missed().recorded == 0


def test_counts_a_failed_message_as_arrived(
    following: Following, storing: Service, backend: Backend
) -> None:
    """A delivery that failed here is not lost; it is reported as failed."""
    following.run()
    acme = backend.found()
    backend.join(acme, backend.sign_up())
    following.run()
    columns = "message_id, event_type, clerk_object_id, outcome, attempts, received_at"
    at = time.strftime("%Y-%m-%d %H:%M:%S.000000", time.gmtime())
    values = f"'msg_1', 'organization.created', '{acme}', 'failed', 1, '{at}'"
    storing.rows(f"INSERT INTO webhook_messages ({columns}) VALUES ({values})")
    following.run()
    awaited = storing.rows("SELECT object_id FROM clerk_awaited_webhooks")
    assert acme not in {object_id for (object_id,) in awaited}
    assert len(awaited) == 2


@sqlite
def test_stops_before_it_deletes_too_many(
    following: Following, storing: Service, backend: Backend
) -> None:
    """Each table has a limit for deletions of its own."""
    user_id, acme = backend.sign_up(at=OLD), backend.found(at=OLD)
    ids = [backend.join(acme, user_id, at=OLD + number) for number in range(30)]
    following.run()
    make_all_old(storing)
    for member in ids[:21]:
        del backend.memberships[member]
    following.run()
    assert sum(row[-1] for row in memberships(storing).values()) == 0
    assert following.progress().fault == "deletions_withheld"
    told = dict(following.events)["deletions_withheld"]
    assert (told["kind"], told["deleted"]) == ("organizationMembership", 0)


@sqlite
def test_continues_where_another_process_stopped(
    following: Following, storing: Service, backend: Backend
) -> None:
    """Wherever the process is killed, the next one misses no change."""
    user_id, acme = backend.sign_up(at=OLD), backend.found(at=OLD)
    following.run()
    for steps in range(0, 14, 2):
        members = [backend.join(acme, user_id) for _ in range(25)]
        with suppress(Crash):  # the round may need fewer steps
            Following(storing, backend).run(steps=steps)
        Following(storing, backend).run()
        assert {*members} <= {*memberships(storing)}


class FollowedWorld(World):
    """Clerk, its events, and a service with a follower. The first user is never deleted."""

    def __init__(self, service: Service, backend: Backend) -> None:
        super().__init__(service, backend)
        self.deliver(0)  # otherwise, the follower might suspect a wrong instance

    def delete(self, number: int) -> None:
        """Delete another user than the first one."""
        if number % len(self.backend.users):
            super().delete(number)

    def follow(self, _number: int) -> None:
        """Run a round."""
        make_all_old(self.service)
        Following(self.service, self.backend).run()

    def crash(self, number: int) -> None:
        """Kill the follower during a round."""
        make_all_old(self.service)
        with suppress(Crash):
            Following(self.service, self.backend).run(2, number)


@sqlite
@settings(max_examples=settings().max_examples // 2)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from([*METHODS, "follow", "follow", "crash"]), st.integers(0, 20)),
        max_size=24,
    )
)
def test_ends_in_clerks_state(
    storing: Service, backend: Backend, steps: list[tuple[str, int]]
) -> None:
    """After any changes, lost events, syncs and crashes, two rounds repair every row."""
    for table in TABLES:
        storing.rows(f"DELETE FROM {table}")
    world = FollowedWorld(storing, backend)
    for method, number in steps:
        world.perform(method, number)
    make_all_old(storing)
    Following(storing, backend).run(2)
    world.check()

"""Reconciliation: the table converges to Clerk's state, even if webhooks are lost or late."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError

from clerkhooks.clerk.backend_api import BackendApi
from clerkhooks.clerk.fake import clerk_id, event_body
from clerkhooks.clerk.kinds import parse_profile
from clerkhooks.errors import BackendApiError
from clerkhooks.sync import connections, listing, reconcile, tables
from tests.backend import Backend, Query, answering_json, refusing
from tests.conftest import MakeService
from tests.racing import following, on_statement
from tests.support import NOW_MS, Service, deletion
from tests.syncing import make_old, store_of, sync

LONG_AGO = NOW_MS - 3_600_000
Step = tuple[str, int, int]


@dataclass
class World:
    """
    Clerk, the messages that it sent, and the service.

    Clerk's times follow the service's clock, because a tombstone written by a sync is
    replaced only by a later event.
    """

    service: Service
    backend: Backend
    ids: list[str] = field(default_factory=lambda: [clerk_id("user") for _ in range(4)])
    sent: list[tuple[str, bytes]] = field(default_factory=list)
    hidden: dict[str, Any] = field(default_factory=dict)
    ever_hidden: set[str] = field(default_factory=set)
    now: int = 0
    later: list[Step] = field(default_factory=list)
    running: bool = False

    def perform(self, step: Step) -> None:
        """Call the method that *step* names."""
        method, user, number = step
        getattr(self, method)(self.ids[user], number)

    def change(self, user_id: str, number: int) -> None:
        """Sign the user up, or change the name. Clerk does not reuse a deleted user's id."""
        if user_id in self.hidden or any(
            b"user.deleted" in body and user_id.encode() in body for _, body in self.sent
        ):
            return
        self._tick()
        if user_id not in self.backend.users:
            self.backend.sign_up(user_id, at=self.now)
        self.backend.update(user_id, first_name=f"Ada {number}", updated_at=self.now)
        self._send(event_body("user.updated", self.backend.users[user_id], self.now))

    def ban(self, user_id: str, number: int) -> None:
        """Ban or unban the user. Clerk does not document that this moves ``updated_at``."""
        if user_id in self.backend.users:
            self._tick()
            data = self.backend.users[user_id]
            updated_at = self.now if number % 2 else data["updated_at"]
            self.backend.update(user_id, banned=not data["banned"], updated_at=updated_at)
            self._send(event_body("user.updated", self.backend.users[user_id], self.now))

    def delete(self, user_id: str, _number: int) -> None:
        """Delete the user if it exists."""
        if user_id in self.backend.users:
            self._tick()
            self.backend.delete(user_id)
            self._send(deletion(user_id, self.now))

    def hide(self, user_id: str, _number: int) -> None:
        """Omit the user from Clerk's responses for a while, as in an outage."""
        if user_id in self.backend.users:
            self.hidden[user_id] = self.backend.users.pop(user_id)
            self.ever_hidden.add(user_id)

    def deliver(self, _user: str, number: int) -> None:
        """Deliver one of the events sent so far, possibly again."""
        if self.sent:
            message_id, body = self.sent[number % len(self.sent)]
            assert self.service.deliver(body, message_id).status_code == 200

    def call(self, user_id: str, _number: int) -> None:
        """Call the API as the user, possibly with a token that outlives the account."""
        if self.has_signed_up(user_id):
            assert self.service.call(user_id).status_code in (200, 401)

    def sync(self, _user: str, number: int) -> None:
        """Run a sync and perform the next *number* steps during it, one before each request."""
        if self.running:  # this step is performed during another run
            with pytest.raises(connections.AlreadyRunning):
                sync(self.service, self.backend, force=True)
            return
        self.running = True
        make_old(self.service)
        with self.performing(number):
            sync(self.service, self.backend, force=True)
        self.running = False

    @contextmanager
    def performing(self, number: int) -> Iterator[None]:
        """Perform the next *number* steps during the block, one before each request."""
        during, self.later = self.later[:number], self.later[number:]
        step_lock, failures, outer = Lock(), list[Exception](), self.backend.before

        def before(_path: str, _query: Query) -> None:
            with step_lock:  # a sync sends requests from several threads
                step = during.pop(0) if during else None
            try:
                if step:
                    self.perform(step)
            except Exception as error:  # noqa: BLE001  # the backend's server would swallow it
                failures.append(error)

        self.backend.before = before
        try:
            yield
        finally:
            self.backend.before = outer
        if failures:
            raise failures[0]

    def check(self, excluded: AbstractSet[str] = frozenset()) -> None:
        """Check that Clerk's users have rows with profiles, and that other rows are tombstones."""
        columns = ("email", "name", "image_url", "deleted_at", "banned_at IS NOT NULL")
        for user_id in set(self.ids) - excluded:
            row = self.service.user(user_id, columns)
            data = self.backend.users.get(user_id)
            if data is None:
                tombstone = (None, "Deleted User", None)
                assert row is None or (row[:3] == tombstone and row[3] and not row[4])
            else:
                profile = parse_profile(data)
                shown = (profile.email, profile.name, profile.image_url)
                assert row == (*shown, None, data["banned"])

    def has_signed_up(self, user_id: str) -> bool:
        """Return whether the user has ever signed up, even if the user has been deleted since."""
        return any(user_id.encode() in body for _, body in self.sent)

    def _tick(self) -> None:
        self.now = max(self.now, int(time.time() * 1000)) + 1

    def _send(self, body: bytes) -> None:
        self.sent.append((clerk_id("msg"), body))


METHODS = ["change"] * 3 + ["deliver"] * 4 + ["ban"] * 2 + ["delete", "hide", "call"]
STEPS = st.tuples(st.sampled_from(METHODS), st.integers(0, 3), st.integers(0, 20))
RUNS = st.tuples(st.just("sync"), st.just(0), st.integers(0, 6))


@settings(max_examples=settings().max_examples // 2)
@given(
    follows=st.booleans(),
    steps=st.lists(st.one_of(STEPS, STEPS, STEPS, STEPS, RUNS), max_size=24),
    order=st.randoms(use_true_random=False),
)
def test_ends_in_clerks_state(
    syncing: Service, backend: Backend, follows: bool, steps: list[Step], order: Any
) -> None:
    """
    After any sequence of changes, webhooks, calls and runs, a last run repairs all rows.

    Before that run, all webhooks are delivered again. They repair all rows, except those of users
    that an earlier run did not find during an outage. Handlers are told of every change of the
    account state once.
    """
    backend.users.clear()
    world = World(syncing, backend, later=steps)
    with following(syncing) if follows else nullcontext() as told:
        while world.later:
            world.perform(world.later.pop(0))
        backend.users |= world.hidden
        for number in order.sample(range(len(world.sent)), len(world.sent)):
            world.deliver("", number)
        world.check(excluded=world.ever_hidden)
        world.sync("", 0)
        world.check()
    if told is None:
        return
    for user_id in backend.users.keys() - world.ever_hidden:
        changes = [event.type for event in told.events if event.data["id"] == user_id]
        is_barred = backend.users[user_id]["banned"]
        assert changes == (["user.barred", "user.restored"] * 9)[: len(changes)]
        assert len(changes) % 2 == is_barred


@dataclass
class Listing(BackendApi):
    """
    A list in pages of six users, without a network. After each page, a change is made.

    A change is a sign-up or a deletion. *created_at* holds the time of each user. *refuses* tells
    whether a request for the users after a deleted user is refused. Otherwise, no users are listed.
    """

    created_at: dict[str, int]
    changes: list[tuple[bool, int]]
    refuses: bool

    def __post_init__(self) -> None:
        """Allow all users of the only page to be deleted, but not all users of a longer list."""
        self.remaining, count = set(self.created_at), len(self.created_at)
        self.min_remaining = 0 if count <= 6 else count - 5

    def list_newest(self, limit: int) -> list[Any]:
        """Return the newest users."""
        return self._sorted()[: -limit - 1 : -1]

    def list_users(self, starting_after: str | None = None) -> list[Any]:
        """Return a page."""
        listed = self._sorted()
        if starting_after is not None:
            if starting_after not in self.created_at and self.refuses:
                raise BackendApiError("answer_unusable", "answered 404")
            ids = [user["id"] for user in listed]
            listed = listed[ids.index(starting_after) + 1 :] if starting_after in ids else []
        if self.changes:
            self._change(*self.changes.pop(0))
        return listed[:6]

    def is_gone(self, object_id: str, path: str = "/users") -> bool:
        """Return whether the user was deleted."""
        return object_id not in self.created_at

    def _sorted(self) -> list[dict[str, Any]]:
        ordered = sorted((at, user_id) for user_id, at in self.created_at.items())
        return [{"id": user_id, "created_at": at} for at, user_id in ordered]

    def _change(self, signs_up: bool, number: int) -> None:
        if signs_up:
            latest = max(self.created_at.values(), default=LONG_AGO)
            self.created_at[clerk_id("user")] = latest + number
        elif len(self.remaining) > self.min_remaining:
            user_id = sorted(self.remaining)[number % len(self.remaining)]
            self.remaining.remove(user_id)
            del self.created_at[user_id]


@settings(max_examples=settings().max_examples // 2)
@given(
    refuses=st.booleans(),
    gaps=st.lists(st.sampled_from([0, 0, 1, 2, 50]), min_size=1, max_size=30),
    changes=st.lists(st.tuples(st.booleans(), st.integers(0, 29)), max_size=12),
)
@example(refuses=True, gaps=[0] * 20, changes=[(False, 5), (False, 4), (False, 3)])
@example(refuses=False, gaps=[0], changes=[(False, 0)])
def test_reads_every_user_once_while_others_sign_up_or_are_deleted(
    refuses: bool, gaps: list[int], changes: list[tuple[bool, int]]
) -> None:
    """No user is skipped or repeated if other users sign up or are deleted during the listing."""
    times = {f"user_{number:02}": LONG_AGO + sum(gaps[: number + 1]) for number in range(len(gaps))}
    api = Listing(times, changes, refuses)
    read = [user["id"] for page in listing.read_all(api, listing.IdSet()) for user in page]
    assert len(read) == len(set(read))
    assert api.remaining <= set(read)


@pytest.mark.parametrize("is_refused", [True, False])
def test_reads_on_if_the_last_user_of_a_page_is_deleted(
    syncing: Service, backend: Backend, is_refused: bool
) -> None:
    """The sync continues after the last user that still exists, however Clerk responds."""
    users = [backend.sign_up(at=LONG_AGO + number) for number in range(503)]
    if not is_refused:
        backend.lost_cursor = answering_json(200, [])

    def delete(path: str, query: Query) -> None:
        if query.get("starting_after") == [users[499]]:
            for user_id in users[498:500]:
                backend.users.pop(user_id, None)

    backend.before = delete
    assert sync(syncing, backend)[0] == {"created": 503}
    cursors = [
        query["starting_after"] for _, query in backend.requests if "starting_after" in query
    ]
    assert cursors == [[users[499]], [users[498]], [users[497]], [users[502]]]


def test_fails_if_clerk_refuses_the_cursor(syncing: Service, backend: Backend) -> None:
    """A refusal for another reason than a deleted user ends the sync."""
    backend.sign_up(at=LONG_AGO)

    def refuse(_path: str, query: Query) -> None:
        if "starting_after" in query:
            backend.behaviours.append(refusing(422, "form_param_unknown"))

    backend.before = refuse
    with pytest.raises(BackendApiError, match="422"):
        sync(syncing, backend)


def test_reads_on_after_a_short_page(syncing: Service, backend: Backend) -> None:
    """Every user is read even if Clerk ignores the limit and returns pages of ten users."""
    for number in range(25):
        backend.sign_up(at=LONG_AGO + number // 12)

    def ignore_limit(path: str, query: Query) -> None:
        if path == "/v1/users" and "limit" in query and "user_id" not in query:
            backend.behaviours.append(backend._list(query | {"limit": ["501"]}))

    backend.before = ignore_limit
    assert sync(syncing, backend)[0] == {"created": 25}


def test_counts_users_by_result(syncing: Service, backend: Backend) -> None:
    """Each user is counted under its result, and a second run changes nothing."""
    names = (
        "created",
        "updated",
        "unchanged",
        "unfilled",
        "newer",
        "deleted",
        "gone",
        "gone and new",
    )
    users = {name: backend.sign_up(at=LONG_AGO + number) for number, name in enumerate(names)}
    for name in ("updated", "unchanged", "newer", "gone", "deleted"):
        syncing.clerk_service.deliver("user.created", backend.users[users[name]])
    syncing.call(users["unfilled"])
    backend.update(users["updated"], first_name="Grace", updated_at=LONG_AGO + 100)
    syncing.clerk_service.deliver(
        "user.updated",
        backend.users[users["newer"]] | {"first_name": "Grace", "updated_at": LONG_AGO + 100},
    )
    syncing.deliver(deletion(users["deleted"]))
    make_old(syncing)
    syncing.call(users["gone and new"])
    backend.delete(users["gone"])
    backend.delete(users["gone and new"])
    expected = {"created": 1, "updated": 2, "unchanged": 1, "newer_here": 2, "tombstoned": 1}
    assert sync(syncing, backend)[0] == expected
    assert syncing.user(users["updated"], ("name",)) == ("Grace Lovelace",)
    assert syncing.user(users["newer"], ("name",)) == ("Grace Lovelace",)
    assert syncing.user(users["gone"]) == (None, "Deleted User", None)
    assert syncing.user(users["gone and new"], ("name",)) == ("New User",)
    assert sync(syncing, backend)[0] == {"unchanged": 4, "newer_here": 2}


def test_revives_an_inferred_tombstone_only(syncing: Service, backend: Backend) -> None:
    """
    A later update revives a user whom a sync has marked as deleted.

    An earlier update does not. A ``user.deleted`` event is final.
    """
    user_id = backend.sign_up(at=LONG_AGO)
    data = backend.users[user_id]
    assert sync(syncing, backend)[0] == {"created": 1}
    make_old(syncing)
    backend.delete(user_id)
    assert sync(syncing, backend, force=True)[0] == {"tombstoned": 1}
    assert syncing.call(user_id).get_json()["reason"] == "user_deleted"
    late = event_body("user.updated", data | {"updated_at": LONG_AGO + 1}, NOW_MS)
    assert syncing.outcome(late) == "stale"
    later = int(time.time() * 1000) + 60_000
    assert (
        syncing.outcome(event_body("user.updated", data | {"updated_at": later}, later))
        == "applied"
    )
    assert syncing.user(user_id, ("name", "deleted_at")) == ("Ada Lovelace", None)
    assert sync(syncing, backend, force=True)[0] == {}, "the row is newer than the run"
    assert syncing.outcome(deletion(user_id)) == "applied"
    backend.sign_up(user_id, at=later + 60_000)
    assert sync(syncing, backend)[0] == {"newer_here": 1}
    assert syncing.user(user_id, ("name",)) == ("Deleted User",)


@pytest.mark.parametrize(
    ("rows", "gone", "withheld"),
    [(30, 20, 0), (30, 21, 21), (219, 21, 0), (209, 21, 21), (5, 5, 5)],
)
def test_stops_before_it_deletes_too_many(
    syncing: Service, backend: Backend, rows: int, gone: int, withheld: int
) -> None:
    """
    A sync refuses to delete more than 20 users if they are more than a tenth of all users.

    It also refuses if Clerk knows none of the users. With ``force``, the users are deleted.
    """
    users = [backend.sign_up(at=LONG_AGO + number) for number in range(rows)]
    sync(syncing, backend)
    make_old(syncing)
    for user_id in users[:gone]:
        backend.delete(user_id)
    summary, _, run = sync(syncing, backend)
    assert (summary.get("tombstoned", 0), bool(run.users.withheld), run.ok) == (
        0 if withheld else gone,
        bool(withheld),
        not withheld,
    )
    if withheld:
        assert sync(syncing, backend, force=True)[0].get("tombstoned") == gone
    assert syncing.rows("SELECT count(*) FROM users WHERE deleted_at IS NULL") == [(rows - gone,)]


def test_does_not_delete_a_user_whom_a_list_omits(syncing: Service, backend: Backend) -> None:
    """Only a 404 for the user's own path proves a deletion; absence from a list does not."""
    user_id = backend.sign_up(at=LONG_AGO)
    sync(syncing, backend)
    make_old(syncing)

    def forget_in_lists(_path: str, query: Query) -> None:
        if "user_id" in query or query.get("order_by") == ["+created_at"]:
            backend.behaviours.append(answering_json(200, []))

    backend.before = forget_in_lists
    summary, _, _ = sync(syncing, backend, force=True)
    assert summary == {}
    assert backend.requests[-1][0] == f"/v1/users/{user_id}"
    assert syncing.user(user_id, ("deleted_at",)) == (None,)


def test_asks_only_about_rows_whose_users_were_not_listed(
    syncing: Service, backend: Backend
) -> None:
    """A sync looks up only those rows whose users were not listed."""
    users = [backend.sign_up(at=LONG_AGO + number) for number in range(20)]
    sync(syncing, backend)
    make_old(syncing)
    backend.delete(users[7])
    for check in (True, False):
        backend.requests.clear()
        sync(syncing, backend, check=check)
        newest, asked = [query["user_id"] for _, query in backend.requests if "user_id" in query]
        assert (sorted(newest), asked) == (sorted(users), [users[7]])
        assert backend.requests[-1][0] == f"/v1/users/{users[7]}"


def test_holds_a_million_ids_in_little_memory() -> None:
    """Only ids that were added are found. A set of strings would take more than 100 MB."""
    seen = listing.IdSet()
    ids = (f"user_{number:027}" for number in range(1_000_000))
    assert all(map(seen.add, ids))
    assert sum(map(sys.getsizeof, seen._buckets)) < 16e6
    assert not seen.add("user_" + "0" * 27)
    assert all(f"user_{number:027}" in seen for number in range(0, 1_000_000, 1000))
    assert not any(f"user_{number}" in seen for number in range(1000))


ODD: list[Any] = [
    None,
    5,
    [],
    "user",
    {},
    {"id": None},
    {"id": "org_1"},
    {"id": "user_<script>"},
    {"id": clerk_id("user"), "updated_at": "x"},
]


def test_reports_a_malformed_user_and_continues(syncing: Service, backend: Backend) -> None:
    """Users with malformed data are counted and reported, and all other users are synced."""
    for number, odd in enumerate(ODD):
        backend.users[f"odd {number}"] = odd
    user_id = backend.sign_up(
        at=LONG_AGO, email_addresses=5, first_name=["x"], last_name=None, username="ada"
    )
    summary, findings, run = sync(syncing, backend)
    assert summary == {"created": 1, "failed": len(ODD)}
    assert syncing.user(user_id, ("name",)) == ("ada",)
    assert not run.ok
    assert [(finding.id, finding.reason) for finding in findings] == [
        (None, "user_id_malformed")
    ] * 8 + [(ODD[-1]["id"], "updated_at_missing")]


def test_checks_without_changing_anything(syncing: Service, backend: Backend) -> None:
    """A check finds the fields that differ. After a sync, a check finds no differences."""
    users = {
        name: backend.sign_up(at=LONG_AGO + number)
        for number, name in enumerate(("new", "differs", "unfilled", "gone", "moved"))
    }
    for name in ("differs", "gone", "moved"):
        syncing.clerk_service.deliver("user.created", backend.users[users[name]])
    syncing.call(users["unfilled"])
    make_old(syncing)
    backend.update(users["differs"], first_name="Grace", image_url=None, updated_at=LONG_AGO + 100)
    backend.update(users["moved"], updated_at=LONG_AGO + 100)  # no stored field changes
    backend.delete(users["gone"])
    before = syncing.rows("SELECT * FROM users ORDER BY id")
    _, findings, run = sync(syncing, backend, check=True)
    assert syncing.rows("SELECT * FROM users ORDER BY id") == before
    assert (run.drifted, run.ok) == (4, False)
    assert {finding.kind: finding.id for finding in findings} == {
        "missing_here": users["new"],
        "differs": users["differs"],
        "unfilled_here": users["unfilled"],
        "gone_at_clerk": users["gone"],
    }
    [fields] = [finding.fields for finding in findings if finding.kind == "differs"]
    image = f"https://img.clerk.com/{users['differs']}"
    assert fields == {"name": ("Ada Lovelace", "Grace Lovelace"), "image_url": (image, None)}
    assert "Grace" not in repr(findings), "the repr may be logged"
    sync(syncing, backend)
    assert sync(syncing, backend, check=True)[2].ok


def test_checks_rows_that_have_clerks_version(syncing: Service, backend: Backend) -> None:
    """A check finds a row that was edited by hand. A sync repairs it if its version is NULL."""
    edited, left = (backend.sign_up(at=LONG_AGO + number) for number in range(2))
    sync(syncing, backend)
    syncing.clerk_service.deliver("user.updated", backend.users[left])  # the same data, as an event
    syncing.rows(f"UPDATE users SET email = 'old@example.org' WHERE id = '{edited}'")
    summary, [finding], run = sync(syncing, backend, check=True)
    assert (summary, run.drifted, run.ok) == ({"unchanged": 2}, 1, False)
    emails = ("old@example.org", f"{edited.lower()}@example.org")
    assert (finding.kind, finding.id, finding.fields) == ("differs", edited, {"email": emails})
    assert sync(syncing, backend)[0] == {"unchanged": 2}
    syncing.rows(f"UPDATE users SET version_updated_at = NULL WHERE id = '{edited}'")
    assert sync(syncing, backend)[0] == {"updated": 1, "unchanged": 1}
    assert sync(syncing, backend, check=True)[2].ok


def test_syncs_selected_users_only(syncing: Service, backend: Backend) -> None:
    """Named users, users without a profile, and users with failed messages are read by id."""
    users = {
        name: backend.sign_up(at=LONG_AGO) for name in ("named", "unfilled", "failed", "other")
    }
    unknown = clerk_id("user")
    syncing.call(users["unfilled"])
    columns = "message_id, event_type, clerk_user_id, outcome, attempts, received_at"
    values = (
        f"'msg_1', 'user.created', '{users['failed']}', 'failed', 1, '2020-01-01 00:00:00.000000'"
    )
    syncing.rows(f"INSERT INTO webhook_messages ({columns}) VALUES ({values})")
    assert sync(syncing, backend, reconcile.Reconciliation.sync_missing)[0] == {"updated": 1}
    assert sync(syncing, backend, reconcile.Reconciliation.sync_failed)[0] == {"created": 1}
    summary, _, _ = sync(syncing, backend, lambda run: run.sync_some([users["named"], unknown]))
    assert summary == {"created": 1, "unknown": 1}
    assert syncing.user(users["other"]) is None
    assert sync(syncing, backend, reconcile.Reconciliation.sync_missing)[0] == {}


def test_refuses_a_second_run_at_the_same_time(syncing: Service, backend: Backend) -> None:
    """A second run is refused during the first run, and accepted once the first has ended."""
    store = store_of(syncing)
    with connections.sole_writer(store):
        with pytest.raises(connections.AlreadyRunning), connections.sole_writer(store):
            pass
        with connections.reader(store) as connection:
            assert connection.scalar(sa.text("SELECT 1")) == 1
    for _ in range(10):  # the server may notice a closed connection late
        with connections.sole_writer(store):
            pass
    assert sync(syncing, backend)[0] == {}


def test_does_not_overwrite_a_concurrent_webhook(syncing: Service, backend: Backend) -> None:
    """A webhook that is applied between a sync's read and write of a row is not overwritten."""
    names = ("changed", "deleted", "created")
    users = {name: backend.sign_up(at=LONG_AGO) for name in names}
    syncing.clerk_service.deliver(
        "user.created", backend.users[users["changed"]] | {"updated_at": LONG_AGO - 1}
    )
    done: list[bool] = []

    def deliver_meanwhile() -> None:
        if not done:
            done.append(True)
            for name in ("changed", "created"):
                syncing.clerk_service.deliver(
                    "user.updated",
                    backend.users[users[name]] | {"first_name": "Grace", "updated_at": NOW_MS},
                )
            syncing.deliver(deletion(users["deleted"]))

    # On SQLite no other connection can write after BEGIN.
    is_sqlite = syncing.database_url.startswith("sqlite")
    with on_statement(syncing, "BEGIN" if is_sqlite else "WITH r AS", deliver_meanwhile):
        assert sync(syncing, backend)[0] == {"newer_here": 3}
    assert [syncing.user(users[name], ("name",)) for name in names] == [
        ("Grace Lovelace",),
        ("Deleted User",),
        ("Grace Lovelace",),
    ]


def test_retries_a_batch_after_a_lock_timeout(syncing: Service, backend: Backend) -> None:
    """The batch is compared again with the rows that the other writer has committed."""
    user_id = backend.sign_up(at=LONG_AGO)
    syncing.clerk_service.deliver("user.created", backend.users[user_id])
    backend.update(user_id, first_name="Grace", updated_at=LONG_AGO + 1)
    attempts = []
    write = tables.TableSync._write

    def write_late(self: tables.TableSync, snapshots: Any) -> Any:
        attempts.append(snapshots)
        if len(attempts) == 1:
            self.run.connection.execute(sa.text("SELECT 1"))
            raise lock_timeout(syncing)
        return write(self, snapshots)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables.TableSync, "_write", write_late)
        assert sync(syncing, backend)[0] == {"updated": 1}
    assert len(attempts) == 2


def lock_timeout(service: Service) -> Exception:
    """Return the error of a writer that timed out waiting for a lock."""
    database = store_of(service).database
    with database.connect() as holder, database.connect() as waiter:
        if holder.dialect.name == "sqlite":
            limit, lock = "PRAGMA busy_timeout = 10", "BEGIN IMMEDIATE"
        else:
            limit, lock = "SET lock_timeout = '10ms'", "LOCK TABLE users"
            for connection in (holder, waiter):
                connection.exec_driver_sql("BEGIN")
        waiter.exec_driver_sql(limit)
        try:
            holder.exec_driver_sql(lock)
            waiter.exec_driver_sql(lock)
        except OperationalError as error:
            return error
        finally:
            holder.invalidate()
            waiter.invalidate()
    raise AssertionError("the second writer got the lock")


def test_ends_while_users_keep_signing_up(syncing: Service, backend: Backend) -> None:
    """A run does not read users who sign up during the run, even if one signs up per request."""
    early = [backend.sign_up(at=LONG_AGO + number) for number in range(3)]
    requests: list[str] = []

    def sign_up(path: str, query: Query) -> None:
        requests.append(path)
        assert len(requests) < 50  # the client gives up after some failed requests
        if query.get("order_by") == ["+created_at"]:
            backend.sign_up()

    backend.before = sign_up
    for check in (False, True):
        requests.clear()
        sync(syncing, backend, check=check)
        assert len(requests) < 50, "the run reads users who signed up during it"
    assert all(syncing.user(user_id) for user_id in early)


def test_ends_if_pages_repeat(syncing: Service, backend: Backend) -> None:
    """If a proxy drops the query string or returns a cached page, the run fails."""
    for number in range(3):
        backend.sign_up(at=LONG_AGO + number)
    whole = answering_json(200, list(backend.users.values()))

    def repeat(path: str, query: Query) -> None:
        assert len(backend.requests) < 50, "the run does not end"
        if path == "/v1/users" and "starting_after" in query:
            backend.behaviours.append(whole)

    backend.before = repeat
    with pytest.raises(BackendApiError, match="same page"):
        sync(syncing, backend)


def test_ends_if_users_repeat_in_any_order() -> None:
    """A run fails if a proxy drops the query string and users repeat in random order."""

    class Api(BackendApi):
        """List some of thirty users, without a network."""

        def __init__(self) -> None:
            """Open no connection."""
            self.requests = 0

        def list_newest(self, limit: int) -> list[Any]:
            """Return ten users."""
            self.requests += 1
            assert self.requests < 500, "the run does not end"
            numbers = random.sample(range(30), 10)
            return [{"id": f"user_{number}", "created_at": LONG_AGO} for number in numbers]

        def list_users(self, starting_after: str | None = None) -> list[Any]:
            """Return ten users."""
            return self.list_newest(10)

    with pytest.raises(BackendApiError, match="same page"):
        list(listing.read_all(Api(), listing.IdSet()))


@pytest.mark.parametrize("count", [1, 15])
@pytest.mark.parametrize("strangers", [0, 3])
def test_deletes_nobody_with_the_key_of_another_instance(
    syncing: Service, backend: Backend, count: int, strangers: int
) -> None:
    """Without ``force``, no user is deleted if Clerk has none of the users in the table."""
    here = [backend.sign_up(at=LONG_AGO) for _ in range(count)]
    assert sync(syncing, backend)[0] == {"created": count}
    make_old(syncing)
    for user_id in here:
        backend.delete(user_id)
    for _ in range(strangers):
        backend.sign_up(at=LONG_AGO)
    summary, _, run = sync(syncing, backend)
    assert "tombstoned" not in summary
    assert (run.users.withheld > 0, run.ok) == (True, False)
    assert sync(syncing, backend, force=True)[0]["tombstoned"] == count


def test_stops_if_it_loses_its_lock(syncing: Service, backend: Backend) -> None:
    """After a failover, another run may have begun, so this run must stop writing."""
    if syncing.database_url.startswith("sqlite"):
        pytest.skip("the lock on a file lasts as long as the process")
    user_id = backend.sign_up(at=LONG_AGO)

    def cut(_path: str, _query: Query) -> None:
        syncing.rows(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' "
            "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )

    backend.before = cut
    with pytest.raises(OperationalError):
        sync(syncing, backend)
    assert syncing.user(user_id) is None


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_runs_with_a_pool_of_one_connection(
    make_service: MakeService, database_url: str, backend: Backend
) -> None:
    """The lock's connection is not taken from the pool."""
    service = make_service(DATABASE_POOL_SIZE="1")
    backend.sign_up(at=LONG_AGO)
    assert sync(service, backend)[0] == {"created": 1}

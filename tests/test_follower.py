"""The follower: users are right even if no webhook arrives."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clerkhooks import Event
from clerkhooks.clerk.fake import clerk_id
from clerkhooks.clerk.kinds import USER
from clerkhooks.errors import BackendApiError
from clerkhooks.store.leases import Held
from clerkhooks.sync.lease import Lease, LeaseLost
from clerkhooks.sync.leased import TooManyRefused, WrongInstance
from clerkhooks.sync.progress import FOLLOWER, Deletions
from clerkhooks.sync.rounds import SETTLED_AFTER
from tests.backend import Backend, Query, answering, answering_json, limiting
from tests.following import Crash, Following
from tests.racing import registered_handler
from tests.support import NOW_MS, TABLES, Service
from tests.syncing import make_old, store_of, sync
from tests.test_reconcile import METHODS, World

LONG_AGO = NOW_MS - 3_600_000
postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def following(syncing: Service, backend: Backend) -> Following:
    """Return a follower that has not run yet."""
    return Following(syncing, backend)


@dataclass
class FollowedWorld(World):
    """
    Clerk, the messages that it sent, and a service with a follower.

    One user is never changed. Otherwise, the follower would suspect a wrong instance if all others
    were deleted.
    """

    is_following: bool = False

    def follow(self, _user: str, number: int) -> None:
        """Run a round, during which the next *number* steps are performed."""
        self._follow(number, 10**9)

    def crash(self, _user: str, number: int) -> None:
        """Kill the follower during a round."""
        self._follow(number % 3, number)

    def _follow(self, during: int, steps: int) -> None:
        if self.is_following:  # this step is performed during another round
            return
        self.is_following = True
        make_old(self.service)
        with self.performing(during), suppress(Crash, LeaseLost):
            Following(self.service, self.backend).run(2, steps)
        self.is_following = False


STEPS = st.tuples(
    st.sampled_from([*METHODS, "follow", "follow", "crash"]), st.integers(0, 3), st.integers(0, 20)
)
RUNS = st.tuples(st.just("sync"), st.just(0), st.integers(0, 6))


@sqlite
@settings(max_examples=settings().max_examples // 2)
@given(steps=st.lists(st.one_of(STEPS, STEPS, STEPS, STEPS, RUNS), max_size=24))
def test_ends_in_clerks_state(syncing: Service, backend: Backend, steps: list[Any]) -> None:
    """
    After any changes, lost webhooks, calls, syncs and crashes, rounds repair all rows.

    No webhook is delivered again before the check.
    """
    backend.users.clear()
    for table in TABLES:
        syncing.rows(f"DELETE FROM {table}")
    stays = backend.sign_up(at=int(time.time() * 1000) - 3_600_000)
    syncing.clerk_service.deliver("user.created", backend.users[stays])
    world = FollowedWorld(syncing, backend, later=steps)
    while world.later:
        world.perform(world.later.pop(0))
    backend.users |= world.hidden
    make_old(syncing)
    users = syncing.rows("SELECT count(*) FROM users")[0][0]
    Following(syncing, backend).run(2 * (users // 100 + 2))
    world.check()


def test_reads_everything_in_the_first_round(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """A new table is filled without a sync. Later rounds read what has changed since."""
    users = [backend.sign_up(at=LONG_AGO - number * 60_000) for number in range(250)]
    following.run()
    assert syncing.rows("SELECT count(*) FROM users WHERE name = 'Ada Lovelace'") == [(250,)]
    backend.requests.clear()
    following.run()
    lists = [query for _, query in backend.requests if "order_by" in query]
    assert [query["limit"] for query in lists] == [["10"]]
    backend.update(users[7], first_name="Grace")
    following.run()
    assert syncing.user(users[7], ("name",)) == ("Grace Lovelace",)
    assert following.names().count("objects_healed") == 2


@sqlite
def test_continues_where_another_process_stopped(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """Wherever the process is killed, the next one misses no change."""
    backend.sign_up(at=LONG_AGO)
    following.run()
    for steps in range(0, 12, 2):
        users = [backend.sign_up() for _ in range(30)]
        with suppress(Crash):  # the round may need fewer steps
            Following(syncing, backend).run(steps=steps)
        Following(syncing, backend).run()
        assert all(syncing.user(user_id) for user_id in users)


@sqlite
def test_continues_an_interrupted_import(
    following: Following, syncing: Service, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The import continues with the page at which it was interrupted."""
    monkeypatch.setattr("clerkhooks.clerk.backend_api.PAGE", 20)
    users = [backend.sign_up(at=LONG_AGO + number) for number in range(100)]
    with suppress(Crash):
        following.run(steps=12)
    reached = syncing.rows("SELECT count(*) FROM users")[0][0]
    assert 20 < reached < 100
    backend.delete(users[0])
    backend.requests.clear()
    Following(syncing, backend).run()
    pages = [query for _, query in backend.requests if query.get("order_by") == ["+created_at"]]
    assert "starting_after" in pages[0]
    assert len(pages) <= 3
    assert syncing.rows("SELECT count(*) FROM users") == [(100,)]
    assert following.missed().recorded == 0


@sqlite
def test_reads_all_users_if_very_many_have_changed(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """If the latest changes fill too many pages and reading fails, all users are read."""
    backend.sign_up(at=LONG_AGO - 1_000_000)
    following.run()
    for number in range(2500):
        backend.sign_up(at=LONG_AGO + 1000 * number)

    def limit(_path: str, query: Query) -> None:
        if int(query.get("offset", ["0"])[0]) > 2300:
            backend.behaviours.append(limiting(1))

    backend.before = limit
    with pytest.raises(BackendApiError):
        following.run()
    assert syncing.rows("SELECT count(*) FROM users")[0][0] < 2501
    Following(syncing, backend).run()
    assert syncing.rows("SELECT count(*) FROM users") == [(2501,)]
    assert following.missed().recorded == 2500, "webhooks must have announced them"


def test_ignores_what_another_release_has_stored(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """During an upgrade or a rollback, processes of both releases run."""
    backend.sign_up(at=LONG_AGO)
    following.run()
    state = following.progress().state
    state |= {"later": 1, "deletions": {"user": {"count": 3, "later": 1}}}
    following.lease.save(state)
    following.run()
    assert following.progress().deletions_of(USER).count == 3


@sqlite
def test_follows_changes_made_while_an_import_was_interrupted(
    following: Following, backend: Backend, syncing: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user who was imported before the interruption changes before the import continues."""
    monkeypatch.setattr("clerkhooks.clerk.backend_api.PAGE", 20)
    users = [backend.sign_up(at=LONG_AGO + number) for number in range(100)]
    with suppress(Crash):
        following.run(steps=12)
    assert syncing.user(users[0])
    for number, user_id in enumerate(users[:60], 1):
        backend.update(user_id, first_name="Grace", updated_at=LONG_AGO + 60_000 * number)
    Following(syncing, backend).run()
    names = syncing.rows("SELECT count(*) FROM users WHERE name = 'Grace Lovelace'")
    assert names == [(60,)]


def test_begins_with_an_empty_instance(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """The first user is written in the next round, and the webhook is expected."""
    following.run(2)
    user_id = backend.sign_up()
    following.run()
    assert syncing.user(user_id, ("name",)) == ("Ada Lovelace",)
    assert following.missed().recorded == 1


def test_writes_nothing_after_it_has_lost_the_lease(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """Another process takes the lease during a request."""
    backend.sign_up(at=LONG_AGO)
    following.run()
    user_id = backend.sign_up()

    def replace_holder(_path: str, _query: Query) -> None:
        syncing.rows("UPDATE clerk_leases SET holder = 'another'")
        following.lease._renewed_at = -1000.0

    backend.before = replace_holder
    with pytest.raises(LeaseLost):
        following.run()
    assert syncing.user(user_id) is None


def test_waits_for_changes_that_become_visible_late(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """A change may appear after a later one, so each round reads two minutes again."""
    backend.sign_up()
    following.run()
    late = backend.sign_up(at=int(time.time() * 1000) - 60_000)
    following.run()
    assert syncing.user(late, ("name",)) == ("Ada Lovelace",)


@sqlite
def test_does_not_read_many_changes_again_and_again(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """If nothing changes after many users have changed at once, each round is short again."""
    for number in range(300):
        backend.sign_up(at=LONG_AGO + number)
    following.run(2)
    following.change_state(moved_at=following.progress().moved_at - SETTLED_AFTER - 1)
    following.run()
    backend.requests.clear()
    following.run()
    lists = [query for _, query in backend.requests if "order_by" in query]
    assert [query["limit"] for query in lists] == [["10"]]
    late = backend.sign_up(at=LONG_AGO + 1000)
    following.run()
    assert syncing.user(late)
    assert not following.progress().is_settled


def test_reads_a_user_who_moves_to_the_first_page(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """A user who changes while the list is read is not left to the next round."""
    users = [backend.sign_up(at=LONG_AGO + number) for number in range(30)]
    following.run()
    for user_id in users:
        backend.update(user_id, first_name="Grace")
    time.sleep(0.1)  # the fake Clerk may have used times in the future
    lists = 0

    def change(_path: str, query: Query) -> None:
        nonlocal lists
        lists += query.get("order_by") == ["-updated_at"]
        if lists == 2:
            backend.update(users[5], first_name="Alan")

    backend.before = change
    following.run()
    assert lists == 4
    assert syncing.user(users[5], ("name",)) == ("Alan Lovelace",)


def test_finds_deletions_in_turn(following: Following, syncing: Service, backend: Backend) -> None:
    """Each batch of a hundred users is compared by id, and a missing user is confirmed."""
    users = sorted(backend.sign_up(at=LONG_AGO + number) for number in range(230))
    following.run()
    make_old(syncing)
    for number in (3, 150, 229):
        backend.delete(users[number])
    for found in ([3], [3, 150], [3, 150, 229]):
        following.run()
        deleted = syncing.rows("SELECT id FROM users WHERE deleted_at IS NOT NULL ORDER BY id")
        assert deleted == [(users[number],) for number in found]
    assert following.progress().deletions_of(USER).count == 3


def test_does_not_delete_a_user_whom_a_list_omits(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """Only a 404 for the user's own path proves a deletion; absence from a list does not."""
    user_id, other = backend.sign_up(at=LONG_AGO), backend.sign_up(at=LONG_AGO)
    following.run()
    make_old(syncing)

    def forget(_path: str, query: Query) -> None:
        if "user_id" in query:
            backend.behaviours.append(answering_json(200, [backend.users[other]]))

    backend.before = forget
    following.run(2)
    assert syncing.rows("SELECT count(*) FROM users WHERE deleted_at IS NULL") == [(2,)]
    assert f"/v1/users/{user_id}" in [path for path, _ in backend.requests]


def test_continues_if_clerk_does_not_confirm_a_deletion(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """A 404 that is not Clerk's proves nothing. The user is kept, and others are deleted."""
    first, second, _ = sorted(backend.sign_up(at=LONG_AGO + number) for number in range(3))
    following.run()
    make_old(syncing)
    backend.delete(first)
    backend.delete(second)

    def answer(path: str, _query: Query) -> None:
        if path == f"/v1/users/{first}":
            backend.behaviours.append(answering(404))

    backend.before = answer
    following.run()
    deleted = syncing.rows("SELECT id FROM users WHERE deleted_at IS NOT NULL")
    assert deleted == [(second,)]


@sqlite
@pytest.mark.parametrize(("rows", "gone", "deleted"), [(60, 20, 20), (60, 21, 0), (250, 22, 22)])
def test_stops_before_it_deletes_too_many(
    following: Following, syncing: Service, backend: Backend, rows: int, gone: int, deleted: int
) -> None:
    """At most 20 users or a tenth of all users are deleted within a day."""
    users = sorted(backend.sign_up(at=LONG_AGO + number) for number in range(rows))
    following.run()
    make_old(syncing)
    for user_id in users[-gone:]:
        backend.delete(user_id)
    following.run(4)
    count = "SELECT count(*) FROM users WHERE deleted_at IS NOT NULL"
    assert syncing.rows(count) == [(deleted,)]
    assert (following.progress().fault == "deletions_withheld") == (deleted < gone)
    if deleted < gone:
        assert "deletions_withheld" in following.names()
        sync(syncing, backend, force=True)
        following.run(4)
        assert following.progress().fault is None
        return
    backend.delete(users[0])
    following.run(4)
    assert syncing.rows(count) == [(deleted,)], "the limit is for a day"
    following.change_state(deletions={"user": Deletions()})
    following.run(4)
    assert syncing.rows(count) == [(deleted + 1,)]


@sqlite
def test_withholds_nothing_that_is_not_deleted(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """The limit may fall below the number of deletions, because fewer users are left."""
    hidden, other = backend.sign_up(at=LONG_AGO), backend.sign_up(at=LONG_AGO)
    following.run()
    make_old(syncing)
    following.change_state(deletions={"user": Deletions(since=int(time.time() * 1000), count=25)})

    def forget(_path: str, query: Query) -> None:
        if "user_id" in query:
            backend.behaviours.append(answering_json(200, [backend.users[other]]))

    backend.before = forget
    following.run(2)
    assert f"/v1/users/{hidden}" in [path for path, _ in backend.requests]
    assert following.progress().fault is None


@sqlite
def test_counts_deletions_anew_after_the_clock_was_set_back(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """Otherwise, deletions would be withheld until the clock shows the later time again."""
    user_id, _ = backend.sign_up(at=LONG_AGO), backend.sign_up(at=LONG_AGO)
    following.run()
    make_old(syncing)
    next_year = int(time.time() * 1000) + 365 * 86_400_000
    following.change_state(deletions={"user": Deletions(since=next_year, count=20)})
    backend.delete(user_id)
    following.run(2)
    assert syncing.user(user_id, ("name",)) == ("Deleted User",)


def test_revives_a_user_whom_an_outage_hid(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """Recent tombstones of the sweep are compared again: a user may exist after all."""
    user_id, _ = backend.sign_up(at=LONG_AGO), backend.sign_up(at=LONG_AGO)
    following.run()
    make_old(syncing)
    hidden = backend.users.pop(user_id)
    following.run(2)
    assert syncing.user(user_id, ("name",)) == ("Deleted User",)
    backend.users[user_id] = hidden
    following.run(2)
    assert syncing.user(user_id, ("name", "deleted_at")) == ("Ada Lovelace", None)


def test_does_not_revive_with_data_from_before_the_deletion(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """A page that was requested before a sync wrote a tombstone does not prove anything."""
    user_id, _ = backend.sign_up(at=LONG_AGO), backend.sign_up(at=LONG_AGO)
    following.run()
    make_old(syncing)
    page = list(backend.users.values())
    read = following.leased.ask(lambda: page)
    time.sleep(0.002)
    backend.delete(user_id)
    assert sync(syncing, backend)[0]["tombstoned"] == 1
    following.leased.apply(USER, read)
    assert syncing.user(user_id, ("name",)) == ("Deleted User",)


@pytest.mark.parametrize("strangers", [0, 3])
def test_stops_at_another_instance(
    following: Following, syncing: Service, backend: Backend, strangers: int
) -> None:
    """With the key of another instance, nothing is changed. The reason is stored."""
    for _ in range(5):
        backend.sign_up(at=LONG_AGO)
    following.run()
    make_old(syncing)
    before = syncing.rows("SELECT * FROM users ORDER BY id")
    ours = dict(backend.users)
    backend.users.clear()
    for _ in range(strangers):
        backend.sign_up()
    other = Following(syncing, backend)
    with pytest.raises(WrongInstance):
        other.run()
    other.rounds.fail("wrong_instance")
    assert syncing.rows("SELECT * FROM users ORDER BY id") == before
    assert other.progress().fault == "wrong_instance"
    backend.users |= ours
    other.run()
    assert other.progress().fault is None


@sqlite
def test_follows_although_the_newest_users_were_deleted(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """If a hundred bots have signed up and were deleted, older users prove the instance."""
    user_id = backend.sign_up(at=LONG_AGO)
    following.run()
    make_old(syncing)
    bots = [backend.sign_up(at=LONG_AGO + number) for number in range(100)]
    following.run()
    for bot in bots:
        backend.delete(bot)
    backend.update(user_id, first_name="Grace")
    Following(syncing, backend).run()
    assert syncing.user(user_id, ("name",)) == ("Grace Lovelace",)


def test_stops_if_the_instance_vanishes_meanwhile(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """If the sweep finds none of a hundred users, the instance is checked before a deletion."""
    for _ in range(5):
        backend.sign_up(at=LONG_AGO)
    following.run()
    make_old(syncing)
    backend.users.clear()
    with pytest.raises(WrongInstance):
        following.run(2)
    assert syncing.rows("SELECT count(*) FROM users WHERE deleted_at IS NULL") == [(5,)]


def test_sweeps_even_if_the_list_is_not_in_order(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """A proxy that drops the query string does not stop the sweep."""
    user_id, _ = backend.sign_up(at=LONG_AGO), backend.sign_up(at=LONG_AGO)
    following.run()
    make_old(syncing)
    backend.update(user_id, first_name="Grace")

    def reverse(_path: str, query: Query) -> None:
        if "order_by" in query:
            backend.behaviours.append(answering_json(200, list(backend.users.values())[::-1]))

    backend.before = reverse
    with pytest.raises(BackendApiError, match="latest changes first"):
        following.run()
    assert syncing.user(user_id, ("name",)) == ("Grace Lovelace",)


def test_tells_handlers_of_changes_of_the_account_state(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """If a handler fails, the user is not written, and the next round tries again."""
    user_id = backend.sign_up(at=LONG_AGO)
    following.run()
    backend.update(user_id, banned=True)
    told = list[str]()

    def handle(event: Event) -> None:
        told.append(event.type)
        if len(told) == 1:
            raise ValueError

    with registered_handler(syncing.app, handle, "user.barred", after_commit=False):
        following.run()
        assert following.events[-1] == (
            "object_not_followed",
            {"id": user_id, "reason": "ValueError"},
        )
        following.run()
    assert told == ["user.barred", "user.barred"]
    assert syncing.rows("SELECT count(*) FROM users WHERE banned_at IS NOT NULL") == [(1,)]


def test_repeats_what_a_handler_has_refused(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """A ban is written as soon as the handler works, even if many others changed later."""
    now = int(time.time() * 1000)
    user_id = backend.sign_up(at=LONG_AGO)
    following.run()
    backend.update(user_id, banned=True, updated_at=now - 500_000)
    fails = True

    def handle(_event: Event) -> None:
        if fails:
            raise ValueError

    with registered_handler(syncing.app, handle, "user.barred", after_commit=False):
        following.run()
        for number in range(20):
            backend.sign_up(at=now - 20_000 * number)
        following.run()
        assert following.progress().failed == [user_id]
        fails = False
        following.run()
    assert syncing.rows("SELECT id FROM users WHERE banned_at IS NOT NULL") == [(user_id,)]
    assert following.progress().failed == []


def test_continues_if_the_database_refuses_a_user(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """A constraint of the application does not hold up other users. It is tried again."""
    backend.sign_up(at=LONG_AGO)
    following.run()
    syncing.rows("CREATE UNIQUE INDEX only_one ON users (email)")
    users = [backend.sign_up(email="ada@example.org") for _ in range(2)]
    others = [backend.sign_up() for _ in range(30)]
    try:
        following.run()
    finally:
        syncing.rows("DROP INDEX only_one")
    assert all(syncing.user(user_id) for user_id in others)
    [refused] = [user_id for user_id in users if syncing.user(user_id) is None]
    assert following.progress().failed == [refused]
    reasons = [
        fields["reason"] for name, fields in following.events if name == "object_not_followed"
    ]
    assert all("IntegrityError" in reason for reason in reasons)
    following.run()
    assert syncing.user(refused, ("email",)) == ("ada@example.org",)
    following.run()
    assert following.progress().failed == []


@postgresql
@pytest.mark.slow
def test_continues_while_a_row_is_locked(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """A long transaction of the application does not hold up other users."""
    users = [backend.sign_up(at=LONG_AGO) for _ in range(5)]
    following.run()
    for user_id in users[:4]:
        backend.update(user_id, first_name="Grace")
    others = [backend.sign_up() for _ in range(30)]
    with psycopg.connect(syncing.database_url) as connection:
        connection.execute("SELECT FROM users WHERE id = %s FOR UPDATE", (users[0],))
        following.run()
        assert all(syncing.user(user_id) for user_id in others)
        assert following.progress().failed == [users[0]]
    following.run()
    assert syncing.user(users[0], ("name",)) == ("Grace Lovelace",)


@sqlite
def test_stops_if_the_database_refuses_all_users(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """Otherwise, it would forget some of them. It continues when they are accepted."""
    backend.sign_up(at=LONG_AGO)
    following.run()
    syncing.rows("CREATE UNIQUE INDEX only_one ON users (name)")
    for number in range(250):
        backend.sign_up(at=LONG_AGO + 10_000 * number)
    for _ in range(2):
        with pytest.raises(TooManyRefused):
            following.run()
    syncing.rows("DROP INDEX only_one")
    following.run()
    assert syncing.rows("SELECT count(*) FROM users") == [(251,)]
    assert following.progress().failed == []


def test_reports_a_malformed_user(following: Following, syncing: Service, backend: Backend) -> None:
    """Other users are written."""
    backend.users["odd"] = {"id": clerk_id("user"), "updated_at": "x"}
    user_id = backend.sign_up(at=LONG_AGO)
    following.run()
    assert syncing.user(user_id, ("name",)) == ("Ada Lovelace",)
    reasons = [
        fields["reason"] for name, fields in following.events if name == "object_not_followed"
    ]
    assert set(reasons) == {"updated_at_missing"}


def test_stops_when_it_is_replaced(
    following: Following, syncing: Service, backend: Backend
) -> None:
    """A process that has lost the lease neither reads nor writes."""
    backend.sign_up(at=LONG_AGO)
    following.run()
    Following(syncing, backend)
    Lease(store_of(syncing), FOLLOWER).acquire()
    following.lease._renewed_at = -1000.0
    backend.requests.clear()
    with pytest.raises(LeaseLost):
        following.rounds.run(Held(0, None, {}))
    assert backend.requests == []

"""The watch: lost webhooks are reported, and delayed webhooks are not."""

from __future__ import annotations

import time
from typing import Any

import pytest

from clerkhooks.clerk.fake import event_body
from clerkhooks.errors import BackendApiError
from clerkhooks.store import awaited
from clerkhooks.store.awaited import DAY, now_ms
from clerkhooks.sync import watch
from clerkhooks.sync.progress import Progress
from clerkhooks.sync.watch import GRACE, find_due
from tests.backend import Backend
from tests.following import Following
from tests.support import Service, deletion
from tests.syncing import make_old, store_of

MINUTE = 60_000
# Svix's attempts: milliseconds since the first one.
ATTEMPTS = [1000 * at for at in (0, 5, 305, 2105, 9305, 27305, 63305, 99305)]


@pytest.fixture
def followed(syncing: Service, backend: Backend) -> Following:
    """Return a follower that has completed its first round."""
    backend.sign_up(at=now_ms() - DAY)
    following = Following(syncing, backend)
    following.run()
    return following


def pass_time(service: Service, milliseconds: int) -> None:
    """Make the recorded changes older."""
    service.rows(
        f"UPDATE clerk_awaited_webhooks SET due_at = due_at - {milliseconds}, "
        f"changed_at = changed_at - {milliseconds}"
    )


def test_reports_a_change_without_a_webhook(
    followed: Following, syncing: Service, backend: Backend
) -> None:
    """A change counts as missed six minutes later, and for a day."""
    backend.sign_up()
    followed.run()
    assert followed.missed()[:2] == (1, 0)
    pass_time(syncing, GRACE - 5000)
    followed.run()
    assert followed.missed().missed == 0
    pass_time(syncing, 10_000)
    followed.run()
    assert followed.missed()[:2] == (1, 1)
    assert followed.names().count("deliveries_missed") == 1
    followed.run()
    assert followed.names().count("deliveries_missed") == 1, "it is logged once"
    pass_time(syncing, DAY)
    followed.run()
    assert followed.missed()[:2] == (0, 0)


@pytest.mark.parametrize("what", ["update", "delete"])
def test_forgets_a_change_when_its_webhook_arrives(
    followed: Following, syncing: Service, backend: Backend, what: str
) -> None:
    """A late webhook clears the report, even though it changes nothing."""
    user_id = backend.sign_up(at=now_ms() - DAY + 1)
    followed.run()
    syncing.deliver(event_body("user.created", backend.users[user_id], now_ms() - MINUTE // 2))
    make_old(syncing)
    if what == "update":
        backend.update(user_id, first_name="Grace")
        body = event_body("user.updated", backend.users[user_id], now_ms())
    else:
        backend.delete(user_id)
        body = deletion(user_id, now_ms() - MINUTE // 2)
    followed.run(3)
    syncing.rows(f"UPDATE clerk_awaited_webhooks SET due_at = due_at - {GRACE + 1000}")
    assert followed.missed().missed == 1
    syncing.deliver(body)
    followed.run()
    assert followed.missed().missed == 0


def test_does_not_count_a_webhook_that_has_arrived_since_the_last_round(
    followed: Following, syncing: Service, backend: Backend
) -> None:
    """The count is right even before the next round, which may be an hour away."""
    user_id = backend.sign_up()
    followed.run()
    syncing.deliver(event_body("user.created", backend.users[user_id], now_ms()))
    pass_time(syncing, GRACE + 1000)
    assert followed.missed()[:2] == (1, 0)


def test_counts_a_failed_message_as_arrived(
    followed: Following, syncing: Service, backend: Backend
) -> None:
    """A delivery that failed here is not lost; it is reported as failed."""
    user_id = backend.sign_up()
    followed.run()
    pass_time(syncing, GRACE + 1000)
    columns = "message_id, event_type, clerk_user_id, outcome, attempts, received_at"
    at = time.strftime("%Y-%m-%d %H:%M:%S.000000", time.gmtime())
    values = f"'msg_1', 'user.created', '{user_id}', 'failed', 1, '{at}'"
    syncing.rows(f"INSERT INTO webhook_messages ({columns}) VALUES ({values})")
    followed.run()
    assert followed.missed().missed == 0


def test_expects_no_webhook_for_what_is_not_stored(
    followed: Following, syncing: Service, backend: Backend
) -> None:
    """
    Changes before the first round, or of no stored column, are not reported.

    Clerk may move ``updated_at`` without an event, and has no event for a ban.
    """
    [user_id] = backend.users
    backend.update(user_id, last_sign_in_at=now_ms())
    followed.run()
    backend.update(user_id, banned=True)
    followed.run()
    make_old(syncing)
    syncing.rows("UPDATE users SET deleted_at = created_at, version_updated_at = 5")
    followed.run(3)
    assert syncing.user(user_id, ("deleted_at",)) == (None,)
    assert syncing.rows("SELECT * FROM clerk_awaited_webhooks") == []


def test_expects_a_webhook_for_each_kind_of_change(
    followed: Following, syncing: Service, backend: Backend
) -> None:
    """New users, users without a profile, changed users and deleted users are recorded."""
    unfilled, changed, deleted = (backend.sign_up(at=now_ms() - DAY + n) for n in (1, 2, 3))
    Following(syncing, backend).run()
    syncing.rows(f"UPDATE users SET version_updated_at = NULL WHERE id = '{unfilled}'")
    make_old(syncing)
    created = backend.sign_up()
    backend.update(changed, first_name="Grace")
    backend.delete(deleted)
    syncing.rows(f"UPDATE users SET email = NULL WHERE id = '{unfilled}'")
    followed = Following(syncing, backend)
    followed.run(3)
    found = dict(syncing.rows("SELECT object_id, is_deletion FROM clerk_awaited_webhooks"))
    assert found == {unfilled: False, changed: False, deleted: True, created: False}


@pytest.mark.parametrize("outage", [1, 10, 60, 600])
def test_gives_more_time_after_an_outage(
    followed: Following, syncing: Service, backend: Backend, outage: int
) -> None:
    """
    After an outage of *outage* minutes, a webhook is not overdue before its next attempt.

    It makes no difference whether the follower found the change before, during or after the outage.
    """
    before = backend.sign_up(at=now_ms() - outage * MINUTE)
    followed.run()
    backend.sign_up(at=now_ms() - outage * MINUTE // 2)
    followed.change_state(watched_at=followed.progress().watched_at - outage * MINUTE)
    syncing.rows(f"UPDATE clerk_leases SET completed_at = completed_at - {outage * MINUTE}")
    Following(syncing, backend).run()
    due = dict(syncing.rows("SELECT changed_at, due_at FROM clerk_awaited_webhooks"))
    assert len(due) == 2
    for changed_at, due_at in due.items():
        attempt = next(at for at in ATTEMPTS if changed_at + at > now_ms())
        assert due_at > changed_at + attempt or due_at >= changed_at + DAY
    assert backend.users[before]["updated_at"] in due


def test_gives_more_time_while_webhooks_are_late(
    followed: Following, syncing: Service, backend: Backend
) -> None:
    """While webhooks arrive late, missing ones are not yet reported as lost."""
    user_id, late = (backend.sign_up(at=now_ms() - 5 * MINUTE) for _ in range(2))
    followed.run()
    pass_time(syncing, 2 * MINUTE)
    assert followed.missed().missed == 2
    syncing.deliver(event_body("user.created", backend.users[late], now_ms() - 5 * MINUTE))
    followed.run()
    assert followed.missed().missed == 0
    [(found, due_at)] = syncing.rows("SELECT object_id, due_at FROM clerk_awaited_webhooks")
    assert found == user_id
    assert due_at > now_ms() + 30 * MINUTE


def test_reports_while_another_part_of_each_round_fails(
    followed: Following, syncing: Service, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds that never complete are not an outage, which would postpone the alarm each time."""
    backend.sign_up()
    followed.run()
    pass_time(syncing, GRACE + 5000)

    def fail(_progress: Progress) -> Progress:
        raise BackendApiError("secret_key_forbidden", "answered 403")

    monkeypatch.setattr(followed.rounds._sweep, "run", fail)
    syncing.rows(f"UPDATE clerk_leases SET completed_at = completed_at - {60 * MINUTE}")
    for _ in range(2):
        with pytest.raises(BackendApiError):
            followed.run()
        assert followed.missed()[:2] == (1, 1)
    assert followed.names().count("deliveries_missed") == 1


def test_expects_no_webhook_at_once_if_the_clock_is_fast(
    followed: Following, backend: Backend
) -> None:
    """Clerk's times seem old then, but the webhooks of new changes are still on their way."""
    backend.sign_up(at=now_ms() - 2 * GRACE)
    followed.run()
    assert followed.missed()[:2] == (1, 0)


def test_is_due_after_the_next_attempt() -> None:
    """Without an outage, a webhook is overdue after six minutes; with one, a day at most."""
    at = now_ms()
    assert find_due(at, 0) == find_due(at, at - MINUTE) == at + GRACE
    for ended in range(at, at + DAY // 2, 7 * MINUTE):
        attempt = next(at + each for each in ATTEMPTS if at + each >= ended)
        assert find_due(at, ended) >= min(attempt, at + DAY)
    assert find_due(at, at + 20 * DAY) == at + DAY
    assert find_due(at - 30 * DAY, 0) >= at, "what was lost long ago is reported now"


def test_limits_what_it_records(
    followed: Following, syncing: Service, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If very many webhooks are lost, the table does not grow without limit."""
    monkeypatch.setattr(watch, "GRACE", 0)
    monkeypatch.setattr(watch, "MIN_GRACE", 0)
    store = store_of(syncing)
    store.awaited._names["max_awaited"] = "3"
    for _ in range(3):
        backend.sign_up()
        backend.sign_up()
        followed.run()
    assert store.awaited.count().missed == 4, "the last group may exceed the limit"


def test_uses_an_index_for_each_change(syncing: Service) -> None:
    """The log of messages is not scanned."""
    webhooks: Any = store_of(syncing).awaited
    if syncing.database_url.startswith("sqlite"):
        query = webhooks._text(f"EXPLAIN QUERY PLAN {awaited._DELETE}")
        with store_of(syncing).database.connect() as connection:
            plan = " ".join(str(row) for row in connection.execute(query, {"now": 0}))
        assert "ix_webhook_messages_clerk_user_id" in plan

"""Races: one test for each pair of statements that can interleave, with the first held at that point."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from clerkhooks.clerk.fake import clerk_id
from tests.racing import (
    TIMEOUT,
    FailingHandler,
    PausePoint,
    before_failure_record,
    blocked,
    call,
    delivery,
    outcomes,
    overtake,
    paused,
    paused_before,
    registered_handler,
    run_contending,
    uncommitted_first_call,
    wait_until_blocked,
)
from tests.support import Service, deletion, user_event

LOG = "SELECT outcome, attempts, error FROM webhook_messages WHERE message_id = 'msg_1'"
LONG_AGO = "2020-01-01 00:00:00.000000"
PROFILE = ("email", "name", "deleted_at IS NOT NULL")
ADA = ("ada@example.org", "Ada Lovelace", False)
GRACE = ("ada@example.org", "Grace Lovelace", False)
DELETED = (None, "Deleted User", True)
Row = tuple[Any, ...]
BodyOf = Callable[[str], bytes]

known = pytest.mark.parametrize("known", [False, True], ids=["a new user", "a known user"])
plain = pytest.mark.parametrize("plain", [False, True], ids=["with handlers", "without"])
events = pytest.mark.parametrize(
    ("body_of", "status", "row"),
    [
        pytest.param(user_event, 200, ADA, id="update"),
        pytest.param(deletion, 401, DELETED, id="deletion"),
    ],
)


@known
@plain
@pytest.mark.parametrize("newer_first", [False, True], ids=["older first", "newer first"])
def test_lets_the_newer_of_two_versions_win(
    service: Service, known: bool, plain: bool, newer_first: bool
) -> None:
    """Of two versions delivered at once, in either order, the second waits and the newer one stays."""
    user_id = new_user(service, known)
    acts = [
        delivery(service, user_event(user_id, at=1001)),
        delivery(service, user_event(user_id, at=1002, first_name="Grace")),
    ]
    first, second = reversed(acts) if newer_first else acts
    answers = run_contending(service, first, second, plain=plain)
    assert outcomes(answers) == ["applied", "stale" if newer_first else "applied"]
    assert service.user(user_id, PROFILE) == GRACE


@known
@plain
@pytest.mark.parametrize(("first", "second", "outcome"), [
    ("deletion", "update", "stale"), ("update", "deletion", "applied"), ("deletion", "deletion", "stale"),
])  # fmt: skip
def test_deletes_for_good(
    service: Service, known: bool, plain: bool, first: str, second: str, outcome: str
) -> None:
    """After a deletion and a newer update, or two deletions, at once, the user is deleted."""
    user_id = new_user(service, known)
    bodies = {"deletion": deletion(user_id, 1001), "update": user_event(user_id, at=1002)}
    acts = [delivery(service, bodies[name]) for name in (first, second)]
    answers = run_contending(service, *acts, plain=plain)
    assert outcomes(answers) == ["applied", outcome]
    assert service.user(user_id, PROFILE) == DELETED


@plain
@pytest.mark.parametrize("failed", [False, True], ids=["a new message", "one that failed"])
def test_processes_a_message_once(service: Service, plain: bool, failed: bool) -> None:
    """Of two deliveries of a message at once, one is processed; the other waits and is a duplicate."""
    user_id = clerk_id("user")
    again = delivery(service, user_event(user_id), "msg_1")
    if failed:
        with registered_handler(service.app, FailingHandler()):
            assert again().status_code == 500
    assert outcomes(run_contending(service, again, again, plain=plain)) == ["applied", "duplicate"]
    assert service.user(user_id, PROFILE) == ADA
    assert service.rows(LOG) == [("applied", 1 + failed, None)]


@pytest.mark.parametrize("plain", [False, True], ids=["with handlers", "without"])
def test_answers_a_duplicate_without_waiting_for_the_user(service: Service, plain: bool) -> None:
    """A processed message is a duplicate at once, even while another of its user is being written."""
    if service.database_url.startswith("sqlite"):
        pytest.skip("SQLite has one writer at a time")
    user_id = clerk_id("user")
    again = delivery(service, user_event(user_id, at=1001), "msg_1")
    assert again().get_json()["outcome"] == "applied"
    newer, hold = delivery(service, user_event(user_id, at=1002, first_name="Grace")), PausePoint()
    with ExitStack() as registered:
        registered.enter_context(registered_handler(service.app, hold))
        with paused(hold, newer) as first:
            if plain:
                registered.close()
            assert again().get_json()["outcome"] == "duplicate"
            hold.released.set()
            assert outcomes([first.result(TIMEOUT)]) == ["applied"]
    assert service.user(user_id, PROFILE) == GRACE


@events
@pytest.mark.parametrize("seen", [None, LONG_AGO], ids=["first call", "later call"])
@pytest.mark.parametrize("call_first", [False, True], ids=["webhook first", "call first"])
def test_answers_a_call_with_what_the_webhook_wrote(
    service: Service, body_of: BodyOf, status: int, row: Row, seen: str | None, call_first: bool
) -> None:
    """A call that meets a webhook while it creates the user, or moves last_seen, returns its row."""
    user_id = called_before(service, seen)
    delivers, calls = delivery(service, body_of(user_id)), call(service, user_id)
    if call_first:
        with paused_before(service, "UPDATE users" if seen else "INSERT INTO users") as hold:
            called, delivered = overtake(hold, calls, delivers)
    elif seen and not service.database_url.startswith("sqlite"):
        pytest.skip("it does not wait there: see the next test")
    else:
        delivered, called = run_contending(service, delivers, calls)
    assert outcomes([delivered]) == ["applied"]
    name = row[1] if status == 200 else None
    assert (called.status_code, called.get_json().get("name")) == (status, name)
    assert service.user(user_id, PROFILE) == row
    assert count_unseen(service) == (1 if seen and status == 401 else 0)


@events
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_does_not_wait_to_move_last_seen(
    service: Service, body_of: BodyOf, status: int, row: Row
) -> None:
    """A call that finds the row locked by a webhook returns what is committed; the next one moves it."""
    user_id, hold = called_before(service, LONG_AGO), PausePoint()
    with registered_handler(service.app, hold):
        delivered, called = overtake(
            hold, delivery(service, body_of(user_id)), call(service, user_id)
        )
    assert (outcomes([delivered]), called.get_json()["name"]) == (["applied"], "New User")
    assert called.get_json()["lastSeen"].startswith("2020-01-01")
    assert (service.user(user_id, PROFILE), count_unseen(service)) == (row, 1)
    assert service.call(user_id).status_code == status
    assert count_unseen(service) == (0 if status == 200 else 1)


@events
def test_fills_the_row_of_a_call_that_is_not_committed(
    service: Service, body_of: BodyOf, status: int, row: Row
) -> None:
    """A webhook that meets an uncommitted first call waits for it, then fills or deletes its row."""
    user_id = clerk_id("user")
    with (
        uncommitted_first_call(service, user_id) as commit,
        blocked(service, delivery(service, body_of(user_id))) as delivered,
    ):
        commit()
    assert outcomes([delivered.result()]) == ["applied"]
    assert service.user(user_id, PROFILE) == row
    assert service.call(user_id).status_code == status


def test_creates_a_user_once_for_two_first_calls(service: Service) -> None:
    """Of two first calls one creates the row, and both return it."""
    user_id, other_id = clerk_id("user"), clerk_id("user")
    with paused_before(service, "INSERT INTO users") as hold:
        answers = overtake(hold, call(service, user_id), call(service, user_id))
    with (
        uncommitted_first_call(service, other_id) as commit,
        blocked(service, call(service, other_id)) as called,
    ):
        commit()
    assert [answer.get_json()["name"] for answer in (*answers, called.result())] == ["New User"] * 3
    assert answers[0].get_json() == answers[1].get_json()


def test_moves_last_seen_once_for_two_calls(service: Service) -> None:
    """Of two calls that find last_seen old, one moves it, and the other returns what that one wrote."""
    user_id = called_before(service, LONG_AGO)
    with paused_before(service, "UPDATE users") as hold:
        answers = overtake(hold, call(service, user_id), call(service, user_id))
    assert answers[0].get_json() == answers[1].get_json()
    assert count_unseen(service) == 0


@events
def test_keeps_presence_and_profile_apart(
    service: Service, body_of: BodyOf, status: int, row: Row
) -> None:
    """Presence set while a webhook is being written survives an update and is refused by a deletion."""
    user_id = new_user(service, known=True)
    comes_online = call(service, user_id, "PUT", "/api/me/presence", {"isOnline": True})
    delivered, put = run_contending(service, delivery(service, body_of(user_id)), comes_online)
    assert (outcomes([delivered]), put.status_code) == (["applied"], status)
    assert service.user(user_id, (*PROFILE, "is_online")) == (*row, status == 200)


@pytest.mark.parametrize("committed", [False, True], ids=["while it is written", "after it"])
def test_never_records_a_failure_over_a_success(service: Service, committed: bool) -> None:
    """A failure recorded late, while its retry is written or after it, leaves the retry's success alone."""
    user_id, retry_commit = clerk_id("user"), PausePoint()
    attempt = delivery(service, user_event(user_id), "msg_1")
    failing = FailingHandler(later=None if committed else retry_commit)
    with before_failure_record(service, failing) as record, paused(record, attempt) as first:
        if committed:
            retry = attempt()
        else:
            with paused(retry_commit, attempt) as second:
                record.released.set()
                wait_until_blocked(service, first)
                retry_commit.released.set()
                retry = second.result()
        record.released.set()
        assert outcomes([first.result(), retry]) == ["500", "applied"]
    assert service.user(user_id, PROFILE) == ADA
    assert service.rows(LOG) == [("applied", 1, None)]


@plain
def test_retries_when_the_first_attempt_fails_at_last(service: Service, plain: bool) -> None:
    """A retry that waits for an attempt that then fails is applied, whichever is recorded first."""
    user_id = clerk_id("user")
    attempt = delivery(service, user_event(user_id), "msg_1")
    answers = run_contending(service, attempt, attempt, fails=True, plain=plain)
    assert outcomes(answers) == ["500", "applied"]
    assert service.user(user_id, PROFILE) == ADA
    assert [row[::2] for row in service.rows(LOG)] == [("applied", None)]


def test_counts_two_failures(service: Service) -> None:
    """Two attempts that fail at once count as two, and nothing of the user is stored."""
    user_id = clerk_id("user")
    attempt = delivery(service, user_event(user_id), "msg_1")
    with before_failure_record(service, FailingHandler(always=True)) as record:
        assert outcomes(overtake(record, attempt, attempt)) == ["500", "500"]
    assert service.rows(
        "SELECT outcome, attempts FROM webhook_messages WHERE message_id = 'msg_1'"
    ) == [("failed", 2)]
    assert service.user(user_id) is None


def new_user(service: Service, known: bool) -> str:
    """Return a user's id, with a row if the user is *known*."""
    user_id = clerk_id("user")
    if known:
        service.outcome(user_event(user_id, at=1000, first_name="Before"))
    return user_id


def called_before(service: Service, seen: str | None) -> str:
    """Return a user's id, with the row of a call at the time *seen*, if any."""
    user_id = clerk_id("user")
    if seen:
        service.call(user_id)
        service.rows(f"UPDATE users SET last_seen = '{seen}'")
    return user_id


def count_unseen(service: Service) -> int:
    """Return how many users were last seen long ago."""
    [(count,)] = service.rows("SELECT count(*) FROM users WHERE last_seen < '2021-01-01'")
    return int(count)

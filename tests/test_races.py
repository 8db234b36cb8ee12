"""Races: one test for each pair of statements that can interleave."""

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
    """If two versions are delivered at once, in either order, the newer one is stored."""
    user_id = make_user(service, known)
    requests = [
        delivery(service, user_event(user_id, at=1001)),
        delivery(service, user_event(user_id, at=1002, first_name="Grace")),
    ]
    first, second = reversed(requests) if newer_first else requests
    answers = run_contending(service, first, second, plain=plain)
    assert outcomes(answers) == ["applied", "stale" if newer_first else "applied"]
    assert service.user(user_id, PROFILE) == GRACE


@known
@plain
@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        ("deletion", "update", "stale"),
        ("update", "deletion", "applied"),
        ("deletion", "deletion", "stale"),
    ],
)
def test_keeps_a_deleted_user_deleted(
    service: Service, known: bool, plain: bool, first: str, second: str, outcome: str
) -> None:
    """The user stays deleted if a newer update or a second deletion arrives at the same time."""
    user_id = make_user(service, known)
    bodies = {"deletion": deletion(user_id, 1001), "update": user_event(user_id, at=1002)}
    requests = [delivery(service, bodies[name]) for name in (first, second)]
    answers = run_contending(service, *requests, plain=plain)
    assert outcomes(answers) == ["applied", outcome]
    assert service.user(user_id, PROFILE) == DELETED


@plain
@pytest.mark.parametrize("failed", [False, True], ids=["a new message", "one that failed"])
def test_processes_a_message_once(service: Service, plain: bool, failed: bool) -> None:
    """If a message is delivered twice at once, the second waits and counts as a duplicate."""
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
    """A duplicate is answered while another message for the same user is being written."""
    if service.database_url.startswith("sqlite"):
        pytest.skip("SQLite has one writer at a time")
    user_id = clerk_id("user")
    again = delivery(service, user_event(user_id, at=1001), "msg_1")
    assert again().get_json()["outcome"] == "applied"
    newer, point = delivery(service, user_event(user_id, at=1002, first_name="Grace")), PausePoint()
    with ExitStack() as registered:
        registered.enter_context(registered_handler(service.app, point))
        with paused(point, newer) as first:
            if plain:
                registered.close()
            assert again().get_json()["outcome"] == "duplicate"
            point.released.set()
            assert outcomes([first.result(TIMEOUT)]) == ["applied"]
    assert service.user(user_id, PROFILE) == GRACE


@events
@pytest.mark.parametrize("seen", [None, LONG_AGO], ids=["first call", "later call"])
@pytest.mark.parametrize("call_first", [False, True], ids=["webhook first", "call first"])
def test_answers_a_call_with_what_the_webhook_wrote(
    service: Service, body_of: BodyOf, status: int, row: Row, seen: str | None, call_first: bool
) -> None:
    """A call that races with a webhook returns the row that the webhook wrote."""
    user_id = make_caller(service, seen)
    delivers, calls = delivery(service, body_of(user_id)), call(service, user_id)
    if call_first:
        with paused_before(service, "UPDATE users" if seen else "INSERT INTO users") as point:
            called, delivered = overtake(point, calls, delivers)
    elif seen and not service.database_url.startswith("sqlite"):
        pytest.skip("the call does not wait on PostgreSQL: see the next test")
    else:
        delivered, called = run_contending(service, delivers, calls)
    assert outcomes([delivered]) == ["applied"]
    name = row[1] if status == 200 else None
    assert (called.status_code, called.get_json().get("name")) == (status, name)
    assert service.user(user_id, PROFILE) == row
    assert count_unseen(service) == (1 if seen and status == 401 else 0)


@events
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_does_not_wait_to_update_last_seen(
    service: Service, body_of: BodyOf, status: int, row: Row
) -> None:
    """While a webhook holds the row's lock, a call returns the committed row unchanged."""
    user_id, point = make_caller(service, LONG_AGO), PausePoint()
    with registered_handler(service.app, point):
        delivered, called = overtake(
            point, delivery(service, body_of(user_id)), call(service, user_id)
        )
    assert (outcomes([delivered]), called.get_json()["name"]) == (["applied"], "New User")
    assert called.get_json()["lastSeen"].startswith("2020-01-01")
    assert (service.user(user_id, PROFILE), count_unseen(service)) == (row, 1)
    assert service.call(user_id).status_code == status
    assert count_unseen(service) == (0 if status == 200 else 1)


@events
def test_waits_for_the_row_of_an_uncommitted_first_call(
    service: Service, body_of: BodyOf, status: int, row: Row
) -> None:
    """A webhook waits for an uncommitted first call, then updates or tombstones the new row."""
    user_id = clerk_id("user")
    with (
        uncommitted_first_call(service, user_id) as commit,
        blocked(service, delivery(service, body_of(user_id))) as delivered,
    ):
        commit()
    assert outcomes([delivered.result(TIMEOUT)]) == ["applied"]
    assert service.user(user_id, PROFILE) == row
    assert service.call(user_id).status_code == status


def test_creates_a_user_once_for_two_first_calls(service: Service) -> None:
    """Of two simultaneous first calls, one creates the row, and both return it."""
    user_id, other_id = clerk_id("user"), clerk_id("user")
    with paused_before(service, "INSERT INTO users") as point:
        answers = overtake(point, call(service, user_id), call(service, user_id))
    with (
        uncommitted_first_call(service, other_id) as commit,
        blocked(service, call(service, other_id)) as called,
    ):
        commit()
    answers.append(called.result(TIMEOUT))
    assert [answer.get_json()["name"] for answer in answers] == ["New User"] * 3
    assert answers[0].get_json() == answers[1].get_json()


def test_updates_last_seen_once_for_two_calls(service: Service) -> None:
    """Of two concurrent calls, one updates an old ``last_seen``; both return the new value."""
    user_id = make_caller(service, LONG_AGO)
    with paused_before(service, "UPDATE users") as point:
        answers = overtake(point, call(service, user_id), call(service, user_id))
    assert answers[0].get_json() == answers[1].get_json()
    assert count_unseen(service) == 0


@events
def test_keeps_presence_and_profile_apart(
    service: Service, body_of: BodyOf, status: int, row: Row
) -> None:
    """Presence that is set during an update is kept. After a deletion, it cannot be set."""
    user_id = make_user(service, known=True)
    set_online = call(service, user_id, "PUT", "/api/me/presence", {"isOnline": True})
    delivered, put = run_contending(service, delivery(service, body_of(user_id)), set_online)
    assert (outcomes([delivered]), put.status_code) == (["applied"], status)
    assert service.user(user_id, (*PROFILE, "is_online")) == (*row, status == 200)


@pytest.mark.parametrize("committed", [False, True], ids=["while it is written", "after it"])
def test_never_records_a_failure_over_a_success(service: Service, committed: bool) -> None:
    """A failure recorded during or after a successful retry does not replace the success."""
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
                retry = second.result(TIMEOUT)
        record.released.set()
        assert outcomes([first.result(TIMEOUT), retry]) == ["500", "applied"]
    assert service.user(user_id, PROFILE) == ADA
    assert service.rows(LOG) == [("applied", 1, None)]


@plain
def test_applies_a_retry_that_waits_for_a_failing_attempt(service: Service, plain: bool) -> None:
    """The retry is applied, whichever of the two attempts is recorded first."""
    user_id = clerk_id("user")
    attempt = delivery(service, user_event(user_id), "msg_1")
    answers = run_contending(service, attempt, attempt, fails=True, plain=plain)
    assert outcomes(answers) == ["500", "applied"]
    assert service.user(user_id, PROFILE) == ADA
    assert [row[::2] for row in service.rows(LOG)] == [("applied", None)]


def test_counts_two_failures(service: Service) -> None:
    """Two attempts that fail at the same time are counted as two, and no user is stored."""
    user_id = clerk_id("user")
    attempt = delivery(service, user_event(user_id), "msg_1")
    with before_failure_record(service, FailingHandler(always=True)) as record:
        assert outcomes(overtake(record, attempt, attempt)) == ["500", "500"]
    assert service.rows(
        "SELECT outcome, attempts FROM webhook_messages WHERE message_id = 'msg_1'"
    ) == [("failed", 2)]
    assert service.user(user_id) is None


def make_user(service: Service, known: bool) -> str:
    """Return a user id; if *known* is true, create the user's row."""
    user_id = clerk_id("user")
    if known:
        service.outcome(user_event(user_id, at=1000, first_name="Before"))
    return user_id


def make_caller(service: Service, seen: str | None) -> str:
    """Return a user id; if *seen* is given, create a row with that ``last_seen``."""
    user_id = clerk_id("user")
    if seen:
        service.call(user_id)
        service.rows(f"UPDATE users SET last_seen = '{seen}'")
    return user_id


def count_unseen(service: Service) -> int:
    """Return how many users have an old ``last_seen``."""
    [(count,)] = service.rows("SELECT count(*) FROM users WHERE last_seen < '2021-01-01'")
    return int(count)

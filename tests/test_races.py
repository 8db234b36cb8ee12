"""Races, one for each pair of statements that could interleave: the first is held where it hurts, the second comes, both end well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from clerkhooks.cli.pretend import clerk_id
from clerkhooks.signals import event_processing
from tests.racing import (
    Failing,
    Hold,
    before,
    before_failure_record,
    blocked,
    call,
    delivery,
    held,
    meet,
    outcomes,
    overtake,
    uncommitted_first_call,
    wait_for_a_waiter,
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
events = pytest.mark.parametrize(
    ("body_of", "status", "row"), [pytest.param(user_event, 200, ADA, id="update"), pytest.param(deletion, 401, DELETED, id="deletion")]
)


@known
@pytest.mark.parametrize("newer_first", [False, True], ids=["older first", "newer first"])
def test_lets_the_newer_of_two_versions_win(service: Service, known: bool, newer_first: bool) -> None:
    """Two versions at once, in either order, of a new user or a known one: the second waits, and the newer stays."""
    user_id = new_user(service, known)
    older, newer = delivery(service, user_event(user_id, at=1001)), delivery(service, user_event(user_id, at=1002, first_name="Grace"))
    answers = meet(service, newer, older) if newer_first else meet(service, older, newer)
    assert outcomes(answers) == ["applied", "stale" if newer_first else "applied"]
    assert service.user(user_id, PROFILE) == GRACE


@known
@pytest.mark.parametrize(("first", "second", "outcome"), [
    ("deletion", "update", "stale"), ("update", "deletion", "applied"), ("deletion", "deletion", "stale"),
])  # fmt: skip
def test_deletes_for_good(service: Service, known: bool, first: str, second: str, outcome: str) -> None:
    """A deletion and an update at once, or two deletions: the user is deleted, though the update is the newer."""
    user_id = new_user(service, known)
    bodies = {"deletion": deletion(user_id, 1001), "update": user_event(user_id, at=1002)}
    answers = meet(service, delivery(service, bodies[first]), delivery(service, bodies[second]))
    assert outcomes(answers) == ["applied", outcome]
    assert service.user(user_id, PROFILE) == DELETED


@pytest.mark.parametrize("failed", [False, True], ids=["a new message", "one that failed"])
def test_does_a_message_once(service: Service, failed: bool) -> None:
    """Two deliveries of a message at once, also of one that failed before: one does the work, the other waits and is a duplicate."""
    user_id = clerk_id("user")
    again = delivery(service, user_event(user_id), "msg_1")
    if failed:
        with event_processing.connected_to(Failing()):
            assert again().status_code == 500
    assert outcomes(meet(service, again, again)) == ["applied", "duplicate"]
    assert service.user(user_id, PROFILE) == ADA
    assert service.rows(LOG) == [("applied", 1 + failed, None)]


def test_answers_a_duplicate_without_waiting_for_the_user(service: Service) -> None:
    """A message that was done is a duplicate at once, also while another message of the user is being written."""
    if service.database_url.startswith("sqlite"):
        pytest.skip("SQLite has one writer at a time")
    user_id = clerk_id("user")
    again = delivery(service, user_event(user_id, at=1001), "msg_1")
    assert again().get_json()["outcome"] == "applied"
    newer, hold = delivery(service, user_event(user_id, at=1002, first_name="Grace")), Hold()
    with event_processing.connected_to(hold):
        assert outcomes(overtake(hold, newer, again)) == ["applied", "duplicate"]
    assert service.user(user_id, PROFILE) == GRACE


@events
@pytest.mark.parametrize("seen", [None, LONG_AGO], ids=["first call", "later call"])
@pytest.mark.parametrize("call_first", [False, True], ids=["webhook first", "call first"])
def test_answers_a_call_with_what_the_webhook_wrote(
    service: Service, body_of: BodyOf, status: int, row: Row, seen: str | None, call_first: bool
) -> None:
    """A call that meets a webhook of its user, about to create the user or to move last_seen: it answers with the webhook's row."""
    user_id = clerk_id("user")
    if seen:
        service.call(user_id)
        service.rows(f"UPDATE users SET last_seen = '{seen}'")
    if call_first:
        with before(service, "UPDATE users" if seen else "INSERT INTO users") as hold:
            called, delivered = overtake(hold, call(service, user_id), delivery(service, body_of(user_id)))
    else:
        delivered, called = meet(service, delivery(service, body_of(user_id)), call(service, user_id))
    assert outcomes([delivered]) == ["applied"]
    assert (called.status_code, called.get_json().get("name")) == (status, row[1] if status == 200 else None)
    assert service.user(user_id, PROFILE) == row
    assert service.rows("SELECT count(*) FROM users WHERE last_seen < '2021-01-01'") == [(1 if seen and status == 401 else 0,)]


@events
def test_fills_the_row_of_a_call_that_is_not_committed(service: Service, body_of: BodyOf, status: int, row: Row) -> None:
    """A webhook that finds a first call at work waits for it, then fills or deletes its row."""
    user_id = clerk_id("user")
    with uncommitted_first_call(service, user_id) as commit, blocked(service, delivery(service, body_of(user_id))) as delivered:
        commit()
    assert outcomes([delivered.result()]) == ["applied"]
    assert service.user(user_id, PROFILE) == row
    assert service.call(user_id).status_code == status


def test_creates_a_user_once_for_two_first_calls(service: Service) -> None:
    """Of two first calls one makes the row, whether the other finds it written or committed; both are answered with it."""
    user_id, other_id = clerk_id("user"), clerk_id("user")
    with before(service, "INSERT INTO users") as hold:
        answers = overtake(hold, call(service, user_id), call(service, user_id))
    with uncommitted_first_call(service, other_id) as commit, blocked(service, call(service, other_id)) as called:
        commit()
    assert [answer.get_json()["name"] for answer in (*answers, called.result())] == ["New User"] * 3
    assert answers[0].get_json() == answers[1].get_json()


def test_moves_last_seen_once_for_two_calls(service: Service) -> None:
    """Of two calls that find last_seen old, one moves it, and the other answers with what that one wrote."""
    user_id = clerk_id("user")
    service.call(user_id)
    service.rows(f"UPDATE users SET last_seen = '{LONG_AGO}'")
    with before(service, "UPDATE users") as hold:
        answers = overtake(hold, call(service, user_id), call(service, user_id))
    assert answers[0].get_json() == answers[1].get_json()
    assert service.rows("SELECT count(*) FROM users WHERE last_seen < '2021-01-01'") == [(0,)]


@events
def test_keeps_presence_and_profile_apart(service: Service, body_of: BodyOf, status: int, row: Row) -> None:
    """A user who comes online while a webhook is at work: an update keeps that, a deletion refuses it."""
    user_id = new_user(service, known=True)
    comes_online = call(service, user_id, "PUT", "/api/me/presence", {"isOnline": True})
    delivered, put = meet(service, delivery(service, body_of(user_id)), comes_online)
    assert (outcomes([delivered]), put.status_code) == (["applied"], status)
    assert service.user(user_id, (*PROFILE, "is_online")) == (*row, status == 200)


@pytest.mark.parametrize("committed", [False, True], ids=["while it is written", "after it"])
def test_never_records_a_failure_over_a_success(service: Service, committed: bool) -> None:
    """A failure that is recorded late, while its retry is written or after that, leaves the retry's success alone."""
    user_id, retry_commit = clerk_id("user"), Hold()
    attempt = delivery(service, user_event(user_id), "msg_1")
    failing = Failing(later=None if committed else retry_commit)
    with before_failure_record(service, failing) as record, held(record, attempt) as first:
        if committed:
            retry = attempt()
        else:
            with held(retry_commit, attempt) as second:
                record.released.set()
                wait_for_a_waiter(service, first)
                retry_commit.released.set()
                retry = second.result()
        record.released.set()
        assert outcomes([first.result(), retry]) == ["500", "applied"]
    assert service.user(user_id, PROFILE) == ADA
    assert service.rows(LOG) == [("applied", 1, None)]


def test_retries_when_the_first_attempt_fails_at_last(service: Service) -> None:
    """A retry that waits for an attempt which then fails does the work itself, whichever of the two records comes first."""
    user_id = clerk_id("user")
    attempt = delivery(service, user_event(user_id), "msg_1")
    assert outcomes(meet(service, attempt, attempt, fails=True)) == ["500", "applied"]
    assert service.user(user_id, PROFILE) == ADA
    assert [row[::2] for row in service.rows(LOG)] == [("applied", None)]


def test_counts_two_failures(service: Service) -> None:
    """Two attempts that fail at once are two attempts, and nothing of the user is there."""
    user_id = clerk_id("user")
    attempt = delivery(service, user_event(user_id), "msg_1")
    with before_failure_record(service, Failing(always=True)) as record:
        assert outcomes(overtake(record, attempt, attempt)) == ["500", "500"]
    assert service.rows("SELECT outcome, attempts FROM webhook_messages WHERE message_id = 'msg_1'") == [("failed", 2)]
    assert service.user(user_id) is None


def new_user(service: Service, known: bool) -> str:
    """A user's id, with a row where the user is known."""
    user_id = clerk_id("user")
    if known:
        service.outcome(user_event(user_id, at=1000, first_name="Before"))
    return user_id

"""The users service: which event wins, and what an authenticated call changes."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import StatementError

from clerkhooks.clerk.fake import clerk_id
from clerkhooks.errors import Unauthenticated
from clerkhooks.service import db, hooks
from clerkhooks.users import is_present
from tests.support import Service, deletion, user_event

VERSION = ("version_updated_at", "version_timestamp", "version_message_id")


def test_leaves_a_newer_row_alone(service: Service) -> None:
    """
    An event is stale if its ``updated_at`` is older.

    If ``updated_at`` is equal, an older ``timestamp`` makes it stale.
    """
    user_id = clerk_id("user")
    assert service.outcome(user_event(user_id, at=2000, first_name="New")) == "applied"
    assert service.outcome(user_event(user_id, at=1999, first_name="Old")) == "stale"
    assert service.outcome(envelope(user_id, updated_at=2000, timestamp=1999)) == "stale"
    assert service.outcome(envelope(user_id, updated_at=2000, timestamp=2001)) == "applied"


def test_breaks_ties_by_the_bytes_of_the_message_id(service: Service) -> None:
    """
    Message ids decide between events of the same millisecond, in either order.

    They are compared by bytes: on every database, capitals come before lower-case letters.
    """
    for first, second in (("msg_a", "msg_B"), ("msg_B", "msg_a")):
        user_id = clerk_id("user")
        for message_id in (first, second):
            service.outcome(user_event(user_id, at=5, first_name=message_id), message_id + user_id)
        assert service.user(user_id, ["name"]) == ("msg_a Lovelace",)


@pytest.mark.parametrize(("data", "timestamp", "version"), [
    ({"updated_at": 7}, 9, (7_000, 9_000)),
    ({"updated_at": 7}, None, (7_000, 7_000)),
    ({}, 9, (9_000, 9_000)),
    ({}, None, (-1, 1_700_000_000_000)),
])  # fmt: skip
def test_replaces_a_missing_time_by_the_other(
    service: Service, data: dict[str, int], timestamp: int | None, version: tuple[int, int]
) -> None:
    """
    If an event has only one of the two times, that time is used for both.

    Events with neither time rank below all others, in the order of their delivery attempts.
    """
    user_id = clerk_id("user")
    body = json.dumps(
        {"type": "user.updated", "timestamp": timestamp, "data": data | {"id": user_id}}
    ).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clerkhooks.web.webhooks.time.time", lambda: 1_700_000_000)
        assert service.outcome(body, "msg_1", 1_700_000_000) == "applied"
    assert service.user(user_id, VERSION) == (*version, "msg_1")


def test_keeps_a_deleted_user_deleted(service: Service) -> None:
    """No later event restores a deleted user, and a second deletion is stale."""
    user_id = clerk_id("user")
    service.outcome(user_event(user_id, at=1000))
    assert service.outcome(deletion(user_id, 500)) == "applied"
    assert service.outcome(user_event(user_id, at=9000)) == "stale"
    assert service.outcome(deletion(user_id, 9500)) == "stale"
    assert service.user(user_id, ("email", "name", "image_url", "is_online", *VERSION)) == (
        None,
        "Deleted User",
        None,
        False,
        None,
        None,
        None,
    )
    assert service.rows("SELECT count(*) FROM users WHERE deleted_at IS NOT NULL") == [(1,)]


def test_applies_a_deletion_that_arrives_first(service: Service) -> None:
    """The deletion leaves a tombstone, and the sign-up that follows does not restore the user."""
    user_id = clerk_id("user")
    assert service.outcome(deletion(user_id, 1000)) == "applied"
    assert service.outcome(user_event(user_id, "user.created", at=900)) == "stale"
    assert service.user(user_id) == (None, "Deleted User", None)


def test_allows_two_users_with_one_address(service: Service) -> None:
    """An email address may move to another user, and the two events may arrive in any order."""
    for user_id in (clerk_id("user"), clerk_id("user")):
        assert service.outcome(user_event(user_id)) == "applied"
    assert service.rows("SELECT count(*) FROM users WHERE email = 'ada@example.org'") == [(2,)]


def test_fills_a_fallback_row_from_any_event(service: Service) -> None:
    """
    A call that arrives before the webhook creates a minimal user.

    Any event, even an old one, completes this user and does not change the presence.
    """
    user_id = clerk_id("user")
    assert service.call(user_id).get_json()["name"] == "New User"
    service.call(user_id, "PUT", "/api/me/presence", body={"isOnline": True})
    seen = service.user(user_id, ["last_seen"])
    assert service.user(user_id, ("email", "name", *VERSION)) == (
        None,
        "New User",
        None,
        None,
        None,
    )
    assert service.outcome(user_event(user_id, at=1)) == "applied"
    assert service.user(user_id, ("name", "is_online", "last_seen")) == (
        "Ada Lovelace",
        True,
        *(seen or ()),
    )


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["user.created", "user.updated", "user.updated", "user.deleted"]),
        st.integers(1, 3) | st.none(),
        st.integers(1, 3) | st.none(),
    ),
    min_size=2,
    max_size=6,
)


@given(events=EVENTS, data=st.data())
def test_ends_the_same_in_every_order(
    service: Service, events: list[tuple[str, int | None, int | None]], data: st.DataObject
) -> None:
    """
    The same events lead to equal rows for two users.

    Each user's events are shuffled and repeated, with a call among them.
    """
    ends: list[tuple[object, ...]] = []
    run = clerk_id("msg")
    for _ in range(2):
        user_id = clerk_id("user")
        deliveries = data.draw(
            st.permutations([*enumerate(events), *enumerate(events), (-1, None)])
        )
        for number, event in deliveries:
            if event is None:
                service.call(user_id)
            elif event[1] or event[2]:  # without any time, the order is best effort
                body = envelope(
                    user_id,
                    event[0],
                    updated_at=event[1],
                    timestamp=event[2],
                    first_name=f"N{number}",
                )
                service.deliver(body, f"{run}-{number}-{len(ends)}")
        row = service.user(user_id, ("email", "name", *VERSION[:2])) or ()
        ends.append(
            (
                *row,
                len(
                    service.rows(
                        f"SELECT 1 FROM users WHERE id = '{user_id}' AND deleted_at IS NULL"
                    )
                ),
            )
        )
    assert ends[0] == ends[1]


def test_moves_last_seen_once_a_minute(service: Service) -> None:
    """
    A call within a minute of the last update leaves ``last_seen`` unchanged.

    A later call updates it and returns the new value.
    """
    user_id = clerk_id("user")
    first = service.call(user_id).get_json()["lastSeen"]
    assert service.call(user_id).get_json()["lastSeen"] == first
    was = set_last_seen(service, user_id, datetime.now(UTC) - timedelta(seconds=50))
    assert datetime.fromisoformat(service.call(user_id).get_json()["lastSeen"]) == was
    set_last_seen(service, user_id, datetime.now(UTC) - timedelta(seconds=70))
    moved = service.call(user_id).get_json()["lastSeen"]
    assert datetime.fromisoformat(moved) >= datetime.fromisoformat(first)


def test_does_not_move_last_seen_for_an_impersonator(service: Service) -> None:
    user_id = clerk_id("user")
    service.call(user_id)
    long_ago = set_last_seen(service, user_id, datetime.now(UTC) - timedelta(days=1))
    service.call(user_id, act={"sub": "user_admin"})
    with service.app.app_context():
        assert db.session.get_one(hooks.model, user_id).last_seen == long_ago
    service.call(user_id)
    with service.app.app_context():
        assert db.session.get_one(hooks.model, user_id).last_seen > long_ago


def test_is_online_only_while_seen(service: Service) -> None:
    """``isOnline`` becomes false five minutes after the last call."""
    now, user_id = datetime.now(UTC), clerk_id("user")
    service.call(user_id, "PUT", "/api/me/presence", body={"isOnline": True})
    for ago, present in ((timedelta(minutes=4, seconds=59), True), (timedelta(minutes=5), False)):
        user = SimpleNamespace(is_online=True, last_seen=now - ago)
        assert is_present(user) is present
        user.is_online = False
        assert not is_present(user)
        set_last_seen(service, user_id, now - ago + timedelta(seconds=2) * present)
        answer = service.call(user_id, act={"sub": "user_admin"})
        assert answer.get_json()["isOnline"] is present


def test_does_not_set_the_presence_of_a_deleted_user(service: Service) -> None:
    """A deletion between the token's verification and the write takes precedence."""
    user_id = clerk_id("user")
    service.outcome(deletion(user_id))
    with service.app.app_context(), pytest.raises(Unauthenticated, match="user_deleted"):
        service.app.extensions["clerkhooks"].users.set_presence(user_id, is_online=True)
    assert service.user(user_id, ["is_online"]) == (False,)


def test_refuses_times_without_a_zone(service: Service) -> None:
    """Loaded times are time-zone-aware; a naive datetime raises an error before SQL is sent."""
    user_id = clerk_id("user")
    service.call(user_id)
    with service.app.app_context():
        user = db.session.get_one(hooks.model, user_id)
        assert user.created_at.utcoffset() == timedelta(0)
        user.last_seen = datetime(2026, 1, 1)  # noqa: DTZ001
        with pytest.raises(StatementError, match="without a time zone"):
            db.session.commit()
        db.session.rollback()


def set_last_seen(service: Service, user_id: str, moment: datetime) -> datetime:
    """Set ``last_seen`` in the database to *moment* in whole seconds, and return it."""
    moment = moment.replace(microsecond=0)
    with service.app.app_context():
        db.session.execute(
            db.update(hooks.model).where(hooks.model.id == user_id).values(last_seen=moment)
        )
        db.session.commit()
    return moment


def envelope(
    user_id: str,
    event_type: str = "user.updated",
    *,
    updated_at: int | None,
    timestamp: int | None,
    first_name: str = "Ada",
) -> bytes:
    """Return a user event with these two times."""
    data = {"id": user_id, "first_name": first_name, "updated_at": updated_at}
    return json.dumps({"type": event_type, "timestamp": timestamp, "data": data}).encode()

"""The list of the latest changes, read while users change and are deleted."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clerkhooks.clerk.kinds import USER
from clerkhooks.errors import BackendApiError
from clerkhooks.sync import newest
from tests.support import NOW_MS

LONG_AGO = NOW_MS - 3_600_000
CHANGES = st.tuples(st.sampled_from(["update", "delete", "sign up"]), st.integers(0, 400))


class Clerk:
    """The users of an instance by id, each with the time of the last change."""

    def __init__(self, times: list[int], *, shuffles: bool = False, ignores: bool = False) -> None:
        self.users = {f"user_{number}": at for number, at in enumerate(times)}
        self.unchanged = set(self.users)
        self.shuffles, self.ignores = shuffles, ignores
        self.requests = 0
        self.later: list[tuple[str, int]] = []

    def read(self, limit: int, offset: int) -> list[Any]:
        """Return a page, after which a user changes."""
        self.requests += 1
        assert self.requests < 2000, "the listing does not end"
        found = list(self.users.items())
        if self.shuffles:
            random.shuffle(found)
        found.sort(key=lambda user: user[1], reverse=True)
        page = found[offset:][: 10 if self.ignores else limit]
        if self.later:
            self._change(*self.later.pop())
        return [{"id": user_id, "updated_at": at} for user_id, at in page]

    def _change(self, what: str, number: int) -> None:
        now = max(self.users.values(), default=LONG_AGO) + 1
        ids = sorted(self.users)
        user_id = ids[number % len(ids)] if ids else "user_0"
        if what == "sign up":
            self.users[f"user_new{number}"] = now
            return
        self.unchanged.discard(user_id)
        if what == "delete":
            self.users.pop(user_id, None)
        else:
            self.users[user_id] = now


def listing(read: newest.Read, until: int) -> list[Any]:
    """List users, latest change first."""
    return [data for page in newest.read_newest(read, USER, "updated_at", until) for data in page]


@pytest.fixture(autouse=True)
def short_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read pages of twelve users, so that a few users fill several pages."""
    monkeypatch.setattr(newest, "PAGE", 12)


@given(
    gaps=st.lists(st.sampled_from([0, 0, 1, 2, 50]), max_size=60),
    changes=st.lists(CHANGES, max_size=20),
    back=st.integers(0, 600),
    ignores=st.booleans(),
)
@example(gaps=[0] * 40, changes=[], back=5000, ignores=False)
@example(gaps=[1] * 40, changes=[("delete", 39)] * 12, back=5000, ignores=False)
@example(gaps=[1] * 40, changes=[("update", 0)] * 15, back=5000, ignores=True)
def test_skips_nobody(
    gaps: list[int], changes: list[tuple[str, int]], back: int, ignores: bool
) -> None:
    """Every user that changed after *until* and does not change meanwhile is listed."""
    times = [LONG_AGO + sum(gaps[: number + 1]) for number in range(len(gaps))]
    clerk = Clerk(times, ignores=ignores)
    clerk.later = list(changes)
    until = max(times, default=LONG_AGO) - back
    listed = {user["id"] for user in listing(clerk.read, until)}
    wanted = {user_id for user_id in clerk.unchanged if clerk.users[user_id] >= until}
    assert wanted <= listed


@pytest.mark.parametrize("size", [2, 5, 11])
def test_accepts_ties_in_any_order(size: int) -> None:
    """Users with the same time may be listed in another order on each page."""
    clerk = Clerk([LONG_AGO + number // size for number in range(60)], shuffles=True)
    listed = {user["id"] for user in listing(clerk.read, 0)}
    assert listed == set(clerk.users)


@pytest.mark.parametrize(("users", "requests"), [(0, 1), (1, 1), (9, 1), (200, 1)])
def test_reads_one_page_if_little_has_changed(users: int, requests: int) -> None:
    """An idle round needs one request."""
    clerk = Clerk([LONG_AGO + number for number in range(users)])
    listing(clerk.read, LONG_AGO + users - 5)
    assert clerk.requests == requests


def test_accepts_malformed_users() -> None:
    """A user without a valid time does not end the listing."""
    users: list[Any] = [
        {"id": f"user_{at}", "updated_at": at} for at in range(NOW_MS, NOW_MS - 40, -1)
    ]
    users[0], users[9], users[12], users[30] = None, {"id": 5}, {"updated_at": "x"}, 7
    listed = listing(lambda limit, offset: users[offset : offset + limit], 0)
    assert all(user in listed for user in users)


def test_fails_if_users_are_not_in_order() -> None:
    """If a proxy drops the query string, users are listed by sign-up."""
    users = [{"id": "user_1", "updated_at": NOW_MS - 1}, {"id": "user_2", "updated_at": NOW_MS}]
    with pytest.raises(BackendApiError, match="latest changes first"):
        listing(lambda _limit, _offset: users, 0)


def test_fails_if_a_page_repeats() -> None:
    """If a proxy returns a cached page, the listing fails instead of running forever."""
    users = [{"id": f"user_{number}", "updated_at": NOW_MS} for number in range(10)]
    with pytest.raises(BackendApiError, match="same page"):
        listing(lambda _limit, _offset: users, 0)

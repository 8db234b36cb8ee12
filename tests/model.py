"""
A model of the service: generated histories of events and the rows they must produce.

It shares no code with the service.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import strategies as st

COLUMNS = (
    "email, name, image_url, version_updated_at, version_timestamp, version_message_id,"
    " deleted_at IS NOT NULL, banned_at, deprovisioned_at, locked_until"
)
FOREVER = 253_402_214_400_000  # 9999-12-31
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
Row = dict[str, Any]
State = tuple[int | str | None, int | str | None, int | str | None]
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Sent:
    """
    A message about a user.

    ``updated_at`` and ``timestamp`` are in milliseconds, or in seconds if below 10**11. Either may
    be missing.
    """

    message_id: str
    user_id: str
    type: str
    updated_at: int | None
    timestamp: int | None
    first_name: str
    email: str | None
    image_url: str | None
    account: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def body(self) -> bytes:
        """
        The event as JSON, without fields that are None.

        Clerk's own deletion events have no ``updated_at``.
        """
        data: dict[str, Any] = {"id": self.user_id, "object": "user", "updated_at": self.updated_at}
        if self.type == "user.deleted":
            data["deleted"] = True
        else:
            data |= {"first_name": self.first_name, "last_name": None, "image_url": self.image_url}
            data["email_addresses"] = (
                [{"id": "idn_1", "email_address": self.email}] if self.email else []
            )
            data["primary_email_address_id"] = "idn_1" if self.email else None
            data |= self.account
        event = {
            "type": self.type,
            "timestamp": self.timestamp,
            "data": {key: value for key, value in data.items() if value is not None},
        }
        return json.dumps(
            {key: value for key, value in event.items() if value is not None}
        ).encode()

    @property
    def version(self) -> tuple[int, int, bytes]:
        """
        The event's version: two times in milliseconds and the message id.

        If an event has neither ``updated_at`` nor ``timestamp``, its times are -1 and 0. The
        service orders such events by their delivery attempts, which are not part of the event.
        """
        times = (self.updated_at, self.timestamp)
        # A time below 10**11 is in seconds.
        known = [time * 1000 if time < 10**11 else time for time in times if time is not None]
        return (
            (known[0], known[-1], self.message_id.encode())
            if known
            else (-1, 0, self.message_id.encode())
        )

    @property
    def state(self) -> State:
        """
        The account state: since when the user is banned and deprovisioned, and locked until when.

        The times are in milliseconds. If the event has neither time, the time of the delivery
        attempt replaces it, and the state is UNKNOWN instead.
        """
        at = self.version[1] if self.version[0] >= 0 else UNKNOWN
        seconds = self.account.get("lockout_expires_in_seconds")
        ends = at + seconds * 1000 if seconds is not None and isinstance(at, int) else at
        return (
            at if self.account.get("banned") else None,
            at if self.account.get("deprovisioned") else None,
            (FOREVER if seconds is None else ends) if self.account.get("locked") else None,
        )


def expected_row(events: Iterable[Sent], called: bool) -> Row | None:
    """
    Return the row that *events* must produce, regardless of their order and any duplicates.

    *called* is true if the user called the API before any deletion.
    """
    found = list(events)
    if any(event.type == "user.deleted" for event in found):
        return _row(None, "Deleted User", None, deleted=True)
    if found:
        newest = max(found, key=lambda event: event.version)
        profile = (newest.email, newest.first_name, newest.image_url)
        return _row(*profile, newest.version, state=newest.state)
    return _row(None, "New User", None) if called else None


def stored_row(values: Iterable[Any]) -> Row:
    """Convert a row that was read with ``COLUMNS`` to the format of ``expected_row``."""
    email, name, image_url, updated_at, timestamp, message_id, deleted, *account = values
    version = (
        None
        if updated_at is None
        else (updated_at, 0 if updated_at == -1 else timestamp, message_id.encode())
    )
    times: list[int | str | None] = [at and _milliseconds(at) for at in account]
    if updated_at == -1:
        times = [at if at in (None, FOREVER) else UNKNOWN for at in times]
    state = (times[0], times[1], times[2])
    return _row(email, name, image_url, version, deleted=bool(deleted), state=state)


def _milliseconds(at: datetime | str) -> int:
    """Convert a time to milliseconds. SQLite returns it as a string without a time zone."""
    moment = datetime.fromisoformat(at) if isinstance(at, str) else at
    return (moment.replace(tzinfo=moment.tzinfo or UTC) - EPOCH) // timedelta(milliseconds=1)


def is_barred(row: Row | None) -> bool:
    """Return whether calls of the row's user are refused."""
    return row is not None and (row["deleted"] or row["state"][:2] != (None, None))


def _row(
    email: str | None,
    name: str,
    image_url: str | None,
    version: Any = None,
    *,
    deleted: bool = False,
    state: State = (None, None, None),
) -> Row:
    return {
        "email": email,
        "name": name,
        "image_url": image_url,
        "version": version,
        "deleted": deleted,
        "state": state,
    }


@dataclass(frozen=True)
class Draft:
    """An event of a history, before ids are assigned."""

    user: int
    type: str
    updated_at: int | None
    timestamp: int | None
    letter: str
    email: str | None
    account: dict[str, Any]

    def sent(self, ids: list[str], number: int) -> Sent:
        """Return the message for event *number* in a run whose users have these *ids*."""
        message_id = f"msg_{self.letter}{number}_{ids[0][5:]}"
        image_url = f"https://img.example.org/{number}" if number % 3 else None
        return Sent(
            message_id,
            ids[self.user],
            self.type,
            self.updated_at,
            self.timestamp,
            f"N{number}",
            self.email,
            image_url,
            self.account,
        )


USERS = range(3)
ATTEMPTS = st.integers(-200, 200)  # seconds from now
# 10**8 s and 10**11 ms are the same time.
_times = st.sampled_from([None, 0, 1, 2, 10**8, 10**11, 10**11 + 1])
# A linguistic collation does not sort these letters in byte order.
_letters = st.sampled_from("aAbB09")
# Only two addresses, so that several users get the same one.
_emails = st.sampled_from([None, "ada@example.org", "bob@example.org"])
# Each field may be absent. Most users are neither banned nor deprovisioned.
_accounts = st.fixed_dictionaries(
    {},
    optional={
        "banned": st.sampled_from([False, False, True]),
        "deprovisioned": st.sampled_from([False, False, True]),
        "locked": st.sampled_from([False, True]),
        "lockout_expires_in_seconds": st.sampled_from([None, 0, 3600]),
    },
)
_rest = (_times, _times, _letters, _emails, _accounts)
_users = st.sampled_from([0, 0, 0, 1, 2])  # mostly one user, whose events often have equal times
UPDATES = st.builds(Draft, _users, st.sampled_from(["user.created", "user.updated"]), *_rest)
DELETIONS = st.builds(Draft, _users, st.just("user.deleted"), *_rest)


def determined(drafts: Iterable[Draft]) -> list[Draft]:
    """
    Return *drafts*, changed so that each user has at most one event without a time.

    The order of several events with neither ``updated_at`` nor ``timestamp`` would depend on their
    delivery attempts, which are not part of the events.
    """
    found: list[Draft] = []
    for draft in drafts:
        timeless = [old.user for old in found if old.updated_at is None and old.timestamp is None]
        found.append(
            replace(draft, timestamp=0)
            if draft.timestamp is None and draft.user in timeless
            else draft
        )
    return found


@dataclass(frozen=True)
class History:
    """
    Events and the steps of a run.

    A step is ``("deliver", (event number, seconds from now))``, ``("call", user number)`` or
    ``("prune", event numbers)``.
    """

    events: list[Draft]
    steps: list[tuple[str, Any]]


@st.composite
def histories(draw: st.DrawFn, fewest: int = 1, most: int = 8) -> History:
    """Draw a history: deliveries of every event, API calls and prunes, in random order."""
    updates, deletions = (
        draw(st.lists(UPDATES, min_size=fewest, max_size=most)),
        draw(st.lists(DELETIONS, max_size=2)),
    )
    events = determined([*updates, *deletions])
    numbers = st.integers(0, len(events) - 1)
    repeated = [*range(len(events)), *draw(st.lists(numbers, max_size=2 * most))]
    steps: list[tuple[str, Any]] = [("deliver", (number, draw(ATTEMPTS))) for number in repeated]
    steps += [("call", user) for user in draw(st.lists(st.sampled_from(USERS), max_size=4))]
    steps += [
        ("prune", pruned) for pruned in draw(st.lists(st.sets(numbers, min_size=1), max_size=2))
    ]
    return History(events, draw(st.permutations(steps)))

"""Random histories of a user's events, and the row that each history must produce."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from clerkhooks.clerk.fake import BASE62, event_body, user_data
from tests.support import NOW_MS

Row = tuple[str | None, str, str | None, int | None, int | None, str | None, bool, bool, bool, bool]
COLUMNS = (
    "email, name, image_url, version_updated_at, version_timestamp, version_message_id,"
    " deleted_at IS NOT NULL, banned_at IS NOT NULL, deprovisioned_at IS NOT NULL,"
    " locked_until IS NOT NULL"
)
STATES = ("banned", "deprovisioned", "locked")


@dataclass(frozen=True)
class Message:
    """A user event. A deletion has no version."""

    message_id: str
    user_id: str
    version: tuple[int, int, str] | None
    email: str
    state: tuple[bool, bool, bool]
    body: bytes = field(repr=False)


def history(rng: random.Random) -> list[Message]:
    """
    Return a random history of one user's events.

    It consists of a creation, up to five updates and, in 30% of cases, a deletion. Several events
    may have the same timestamps.
    """
    user_id = _id(rng, "user")
    types = (
        ["user.created"]
        + ["user.updated"] * rng.randrange(6)
        + ["user.deleted"] * (rng.random() < 0.3)
    )
    return [_message(rng, user_id, event_type) for event_type in types]


def expected_row(messages: list[Message]) -> Row:
    """
    Return the row that *messages* must produce, regardless of their order.

    A deletion always wins. Otherwise, the event with the highest version wins.
    """
    if any(message.version is None for message in messages):
        return (None, "Deleted User", None, None, None, None, True, False, False, False)
    version, newest = max((message.version or (0, 0, ""), message) for message in messages)
    return (
        newest.email,
        "Ada Lovelace",
        f"https://img.clerk.com/{newest.user_id}",
        *version,
        False,
        *newest.state,
    )


def _message(rng: random.Random, user_id: str, event_type: str) -> Message:
    message_id = _id(rng, "msg")
    updated_at, timestamp = NOW_MS + rng.randrange(3), NOW_MS + rng.randrange(3)
    state = (rng.random() < 0.3, rng.random() < 0.3, rng.random() < 0.3)
    email = f"{message_id.removeprefix('msg_').lower()}@example.org"
    if event_type == "user.deleted":
        body = event_body(event_type, {"deleted": True, "id": user_id, "object": "user"}, timestamp)
        return Message(message_id, user_id, None, email, state, body)
    data = user_data(
        user_id, email=email, first_name="Ada", last_name="Lovelace", updated_at=updated_at
    ) | dict(zip(STATES, state, strict=True))
    return Message(
        message_id,
        user_id,
        (updated_at, timestamp, message_id),
        email,
        state,
        event_body(event_type, data, timestamp),
    )


def _id(rng: random.Random, prefix: str) -> str:
    return f"{prefix}_" + "".join(rng.choices(BASE62, k=27))

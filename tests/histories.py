"""Random histories of a user, as Clerk would tell them, and what they must amount to."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from clerkhooks.clerk.fake import BASE62, event_body, user_data
from tests.support import NOW_MS

Row = tuple[str | None, str, str | None, int | None, int | None, str | None, bool]


@dataclass(frozen=True)
class Message:
    """An event of a user; without a version, the deletion."""

    message_id: str
    user_id: str
    version: tuple[int, int, str] | None
    email: str
    body: bytes = field(repr=False)


def history(chance: random.Random) -> list[Message]:
    """A user's creation, some updates, of which several may share their times, and perhaps the end."""
    user_id = _id(chance, "user")
    types = (
        ["user.created"]
        + ["user.updated"] * chance.randrange(6)
        + ["user.deleted"] * (chance.random() < 0.3)
    )
    return [_message(chance, user_id, event_type) for event_type in types]


def expected_row(messages: list[Message]) -> Row:
    """What the row of a user must hold after *messages*, whatever their order: deleted wins, else the highest version."""
    if any(message.version is None for message in messages):
        return (None, "Deleted User", None, None, None, None, True)
    version, newest = max((message.version or (0, 0, ""), message) for message in messages)
    return (
        newest.email,
        "Ada Lovelace",
        f"https://img.clerk.com/{newest.user_id}",
        *version,
        False,
    )


def _message(chance: random.Random, user_id: str, event_type: str) -> Message:
    message_id = _id(chance, "msg")
    updated_at, timestamp = NOW_MS + chance.randrange(3), NOW_MS + chance.randrange(3)
    email = f"{message_id.removeprefix('msg_').lower()}@example.org"
    if event_type == "user.deleted":
        body = event_body(event_type, {"deleted": True, "id": user_id, "object": "user"}, timestamp)
        return Message(message_id, user_id, None, email, body)
    data = user_data(
        user_id, email=email, first_name="Ada", last_name="Lovelace", updated_at=updated_at
    )
    return Message(
        message_id,
        user_id,
        (updated_at, timestamp, message_id),
        email,
        event_body(event_type, data, timestamp),
    )


def _id(chance: random.Random, prefix: str) -> str:
    return f"{prefix}_" + "".join(chance.choices(BASE62, k=27))

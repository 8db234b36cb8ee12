"""Parsing of Clerk's events, and of objects from the Backend API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from typing import Any

from clerkhooks.clerk import strict_json
from clerkhooks.clerk.kinds import LABEL_LENGTH, UNSTORABLE, USER, Kind, StoredType, stored_types
from clerkhooks.clerk.signatures import VerifiedMessage
from clerkhooks.errors import EventError
from clerkhooks.events import Version

# The end of the year 9999, which is the latest time that Python and the databases support.
LAST_MILLISECOND = 253_402_300_799_999
FIRST_MILLISECOND = 10**11  # a time in 1973; smaller values are in seconds
USER_TYPES: Mapping[str, StoredType] = stored_types([USER])


@dataclass(frozen=True, slots=True)
class ReceivedEvent:
    """
    An event of any type, before it is applied.

    If it changes a row, it has the *kind* and the *id* of an object, and the *values* of the row's
    columns. *user_id* is the user that the event concerns.
    """

    message_id: str
    type: str
    version: Version
    occurred_at: datetime | None
    data: Mapping[str, Any] = field(repr=False)
    kind: Kind | None = None
    id: str | None = None
    values: Mapping[str, Any] = field(repr=False, default_factory=dict)
    is_deletion: bool = False

    @property
    def user_id(self) -> str | None:
        """The user or the member that the event concerns, or None."""
        return self.id if self.kind is USER else self.values.get("user_id")


@dataclass(frozen=True)
class Snapshot:
    """
    An object from the Backend API. It ranks below every event with the same ``updated_at``.

    *read_at* is the time before the request, in milliseconds.
    """

    kind: Kind
    id: str
    updated_at: int
    read_at: int
    data: Mapping[str, Any] = field(repr=False)

    @property
    def version(self) -> Version:
        """The snapshot's version, which can be compared with the version of an event."""
        return Version(self.updated_at, 0, "")

    @cached_property
    def values(self) -> dict[str, Any]:
        """The columns' values. They are parsed only on access: most rows are already current."""
        return self.kind.parse_rest(self.data) | self.state

    @cached_property
    def state(self) -> dict[str, Any]:
        """The values of the columns that are compared even if the row has the same version."""
        return self.kind.parse_state(self.data, self.updated_at, self.read_at)


def parse_event(
    message: VerifiedMessage, types: Mapping[str, StoredType] = USER_TYPES
) -> ReceivedEvent:
    """
    Return the event in *message*. *types* are the types of events that change rows.

    Raises:
        EventError: the body is not a JSON object with a type, or it is an event of *types* without
            a valid id.

    Source: Clerk, "Webhooks overview", structure of the payload.
    """
    try:
        payload = strict_json.parse(message.body)
    except ValueError:
        raise EventError("body_not_json") from None
    if not isinstance(payload, dict):
        raise EventError("body_not_an_object")
    event_type = payload.get("type")
    if not isinstance(event_type, str) or not event_type:
        raise EventError("event_type_missing")
    data = payload.get("data")
    data = data if isinstance(data, dict) else {}
    version, occurred_at = _parse_version(payload, data, message)
    common = (version.message_id, storable(event_type), version, occurred_at, data)
    stored = types.get(event_type)
    if stored is None:
        return ReceivedEvent(*common)
    kind, is_deletion = stored
    object_id = kind.get_id(data)
    if is_deletion:
        return ReceivedEvent(*common, kind, object_id, kind.parse_deleted(data), is_deletion=True)
    values = kind.parse(data, version.timestamp, version.timestamp)
    return ReceivedEvent(*common, kind, object_id, values)


def parse_snapshot(kind: Kind, data: Any, read_at: int) -> Snapshot:
    """
    Return the snapshot of an object from the Backend API, requested at *read_at*.

    Raises:
        EventError: *data* is not an object of *kind*, or has no valid ``updated_at``.
    """
    object_id = kind.get_id(data)
    updated_at = milliseconds(data.get("updated_at"))
    if updated_at is None:
        raise EventError("updated_at_missing")
    snapshot = Snapshot(kind, object_id, updated_at, read_at, data)
    _ = snapshot.state  # raises EventError if required values are missing
    return snapshot


def storable(text: str) -> str:
    """Truncate *text*, and replace characters that databases reject."""
    return UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", text[:LABEL_LENGTH])


def storable_id(message_id: str) -> str:
    """Return *message_id*. If it is not storable, return its beginning and a digest."""
    if storable(message_id) == message_id:
        return message_id
    digest = sha256(message_id.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{storable(message_id)[: LABEL_LENGTH - len(digest)]}{digest}"


def _parse_version(
    payload: Mapping[str, Any], data: Mapping[str, Any], message: VerifiedMessage
) -> tuple[Version, datetime | None]:
    message_id = storable_id(message.message_id)
    updated_at = milliseconds(data.get("updated_at"))
    timestamp = milliseconds(payload.get("timestamp"))
    newest = timestamp if timestamp is not None else updated_at
    if newest is None:
        return Version(-1, message.attempt_timestamp * 1000, message_id), None
    version = Version(newest if updated_at is None else updated_at, newest, message_id)
    return version, datetime.fromtimestamp(newest / 1000, UTC)


def milliseconds(value: object) -> int | None:
    """Return *value* as milliseconds since the epoch, or None if it is not a timestamp."""
    if not strict_json.is_number(value) or not 0 <= value <= LAST_MILLISECOND:
        return None
    if value != int(value):
        return None
    # In Clerk's documentation, the envelope's time is in seconds. In real deliveries, it is in
    # milliseconds.
    return int(value) * 1000 if value < FIRST_MILLISECOND else int(value)

"""Parsing of Clerk's events and user objects into the data that is stored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from clerkhooks.clerk import strict_json
from clerkhooks.clerk.account import ACTIVE, AccountState, parse_account_state
from clerkhooks.clerk.fields import find_primary
from clerkhooks.clerk.signatures import VerifiedMessage
from clerkhooks.errors import EventError
from clerkhooks.events import Version

EMAIL_LENGTH, IMAGE_URL_LENGTH, NAME_LENGTH, LABEL_LENGTH = 320, 2048, 255, 255
NEW_USER = "New User"
# The end of the year 9999, which is the latest time that Python and the databases support.
LAST_MILLISECOND = 253_402_300_799_999
FIRST_MILLISECOND = 10**11  # a time in 1973; smaller values are in seconds
_USER_ID = re.compile(r"user_[0-9A-Za-z]{1,64}")
UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
"""Characters that databases reject: NUL and lone surrogates."""


@dataclass(frozen=True, slots=True)
class Profile:
    """
    The stored part of a Clerk user. Every string is storable and fits its column.

    Each field is a column of ``users``. In a tombstone, and before the first event, all fields
    except the name are None.
    """

    name: str
    email: str | None = None
    image_url: str | None = None


@dataclass(frozen=True, slots=True)
class ReceivedEvent:
    """
    An event of any type, before it is applied.

    User events have a *user_id*. They also have a *profile* and the state of the *account*, unless
    the user was deleted.
    """

    message_id: str
    type: str
    version: Version
    occurred_at: datetime | None
    data: Mapping[str, Any] = field(repr=False)
    user_id: str | None = None
    profile: Profile | None = None
    account: AccountState = ACTIVE


@dataclass(frozen=True, slots=True)
class Snapshot:
    """
    A user from the Backend API. It ranks below every event with the same ``updated_at``.

    *read_at* is the time before the request, in milliseconds.
    """

    user_id: str
    updated_at: int
    read_at: int
    data: Mapping[str, Any] = field(repr=False)

    @property
    def version(self) -> Version:
        """The snapshot's version, which can be compared with the version of an event."""
        return Version(self.updated_at, 0, "")

    @property
    def profile(self) -> Profile:
        """The stored part. It is parsed only on access, because most rows are already current."""
        return parse_profile(self.data)

    @property
    def account(self) -> AccountState:
        """The account state."""
        return parse_account_state(self.data, self.updated_at, self.read_at)


def is_user_id(value: object) -> bool:
    """Return whether *value* is a Clerk user id: ``user_`` and 1 to 64 base-62 characters."""
    return isinstance(value, str) and _USER_ID.fullmatch(value) is not None


def parse_event(message: VerifiedMessage) -> ReceivedEvent:
    """
    Return the event in *message*.

    Raises:
        EventError: the body is not a JSON object with a type, or it is a user event without a
            valid id.

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
    if event_type not in ("user.created", "user.updated", "user.deleted"):
        return ReceivedEvent(*common)
    if not is_user_id(data.get("id")):
        raise EventError("user_id_malformed")
    if event_type == "user.deleted":
        return ReceivedEvent(*common, data["id"])
    account = parse_account_state(data, version.timestamp, version.timestamp)
    return ReceivedEvent(*common, data["id"], parse_profile(data), account)


def parse_profile(data: Mapping[str, Any]) -> Profile:
    """
    Return the stored part of a user object from an event or from the Backend API.

    A field counts as absent if it is null, empty, too long or not storable, or has the wrong type.
    A long name is truncated.
    """
    address = find_primary(data, "primary_email_address_id", "email_addresses")
    email = _text(address.get("email_address"), EMAIL_LENGTH)
    names = (_name(data.get("first_name")), _name(data.get("last_name")))
    full_name = " ".join(name for name in names if name)
    name = full_name or _local_part(email) or _name(data.get("username")) or NEW_USER
    image_url = _text(data.get("image_url"), IMAGE_URL_LENGTH)
    return Profile(name[:NAME_LENGTH].rstrip(), email, image_url)


def parse_snapshot(data: object, read_at: int) -> Snapshot:
    """
    Return the snapshot of a user object from the Backend API, requested at *read_at*.

    Raises:
        EventError: *data* is not a user object, or has no valid ``updated_at``.
    """
    if not isinstance(data, dict) or not is_user_id(data.get("id")):
        raise EventError("user_id_malformed")
    updated_at = milliseconds(data.get("updated_at"))
    if updated_at is None:
        raise EventError("updated_at_missing")
    return Snapshot(data["id"], updated_at, read_at, data)


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


def _text(value: object, length: int) -> str | None:
    if not isinstance(value, str) or not value.strip() or len(value) > length:
        return None
    return None if UNSTORABLE.search(value) else value


def _local_part(email: str | None) -> str:
    return email.rsplit("@", 1)[0].strip() if email else ""


def _name(value: object) -> str | None:
    # The name is not truncated here, because the full name is truncated later.
    if not isinstance(value, str) or UNSTORABLE.search(value):
        return None
    return value.strip()

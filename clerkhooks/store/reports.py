"""Rows as operators see them, and the cursor that marks a row in a list."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple


class Cursor(NamedTuple):
    """The end of a page that lists the newest rows first: the time and the key of its last row."""

    at: datetime
    key: str

    def __str__(self) -> str:
        return f"{self.at.isoformat()},{self.key}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """
        Return the cursor that was printed as *text*.

        Raises:
            ValueError: *text* is not a cursor.
        """
        at, _, key = text.partition(",")
        moment = datetime.fromisoformat(at)
        aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        try:
            return cls(aware.astimezone(UTC), key)
        except OverflowError:
            raise ValueError("The time is out of range.") from None


@dataclass(frozen=True, slots=True)
class UserReport:
    """A row of ``users``. The times of the version are in milliseconds."""

    id: str
    email: str | None
    name: str
    image_url: str | None
    is_online: bool
    last_seen: datetime
    created_at: datetime
    updated_at: datetime
    deleted_at: datetime | None
    version_updated_at: int | None
    version_timestamp: int | None
    version_message_id: str | None

    @property
    def cursor(self) -> Cursor:
        """The cursor of a page that ends with this row."""
        return Cursor(self.created_at, self.id)

    @property
    def as_of(self) -> datetime | None:
        """The time of the row's version, or None if there is no version or it has no time."""
        if self.version_updated_at is None or self.version_updated_at < 0:
            return None
        return datetime.fromtimestamp(self.version_updated_at / 1000, UTC)

    @property
    def source(self) -> str:
        """The kind of event that the row's content comes from."""
        if self.version_updated_at is None:
            return "first call" if self.deleted_at is None else "user.deleted"
        if self.deleted_at is not None:
            return "not found by a sync"
        return "webhook" if self.version_message_id else "sync"


@dataclass(frozen=True, slots=True)
class MessageReport:
    """A row of ``webhook_messages``."""

    message_id: str
    event_type: str
    clerk_user_id: str | None
    outcome: str
    attempts: int
    occurred_at: datetime | None
    received_at: datetime
    processed_at: datetime | None
    error: str | None

    @property
    def cursor(self) -> Cursor:
        """The cursor of a page that ends with this row."""
        return Cursor(self.received_at, self.message_id)

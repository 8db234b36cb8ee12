"""Account state: bans, deactivations by directory sync, and lockouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from clerkhooks.clerk import strict_json

# A day before the last time that Python supports: in a session whose time zone is ahead of UTC,
# the driver would fail to read a later time.
FOREVER = datetime(9999, 12, 31, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class AccountState:
    """
    The account state of a Clerk user. Each field is a column of ``users``.

    *banned_at* and *deprovisioned_at* are the time of the data that contains the state. A lockout
    ends at *locked_until*. It concerns signing in and blocks no calls.
    """

    banned_at: datetime | None = None
    deprovisioned_at: datetime | None = None
    locked_until: datetime | None = None

    @property
    def columns(self) -> dict[str, datetime | None]:
        """The values by column name."""
        return {name: getattr(self, name) for name in ACCOUNT}


ACCOUNT = ("banned_at", "deprovisioned_at", "locked_until")


def is_barred(values: Mapping[str, Any]) -> bool:
    """Return whether the calls of a user with these column values are refused."""
    return any(values.get(name) is not None for name in ("banned_at", "deprovisioned_at"))


def parse_account_state(data: Mapping[str, Any], at: int, read_at: int) -> AccountState:
    """
    Return the account state of the user object *data*.

    A field counts as false if it is absent or has the wrong type. *at* is the time of the object,
    and *read_at* the time to which the remaining seconds of a lockout refer. Both are in
    milliseconds. A lockout without a valid duration lasts until FOREVER.
    """
    told = _moment(at)
    return AccountState(
        banned_at=told if data.get("banned") is True else None,
        deprovisioned_at=told if data.get("deprovisioned") is True else None,
        locked_until=_parse_lockout(data, read_at) if data.get("locked") is True else None,
    )


def _parse_lockout(data: Mapping[str, Any], read_at: int) -> datetime:
    seconds, begins = data.get("lockout_expires_in_seconds"), _moment(read_at)
    if not strict_json.is_number(seconds) or not 0 <= seconds < (FOREVER - begins).total_seconds():
        return FOREVER
    return begins + timedelta(seconds=seconds)


def _moment(milliseconds: int) -> datetime:
    return min(FOREVER, datetime.fromtimestamp(milliseconds / 1000, UTC))

"""Numbers and times as text for the console's pages."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from clerkhooks.clerk.signing_keys import FetchedKeys, SigningKeys
from clerkhooks.doctor.findings import count
from clerkhooks.store.activity import MAX_COUNT

_UNITS = ((86_400, "day"), (3600, "hour"), (60, "minute"))


def number(rows: int) -> str:
    """Format a number of rows. Rows beyond MAX_COUNT are not counted."""
    return f"{rows:,}" if rows <= MAX_COUNT else f"more than {MAX_COUNT:,}"


def duration(seconds: float) -> str:
    """Format a duration in a suitable unit: 40 ms, 2.5 s, 3 minutes."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s".replace(".0 s", " s")
    size, unit = next((size, unit) for size, unit in _UNITS if seconds >= size)
    return count(int(seconds // size), unit)


def ago(then: datetime, now: datetime) -> str:
    """Format the time since *then*. If another clock is ahead, *then* may be in the future."""
    passed = int((now - then).total_seconds())
    if abs(passed) < 2:
        return "just now"
    return f"{duration(passed)} ago" if passed > 0 else f"in {duration(-passed)}"


def moment(then: datetime) -> str:
    """Format a point in time, in UTC."""
    return f"{then.astimezone(UTC):%d %b %Y, %H:%M:%S}"


def key_set(keys: SigningKeys) -> tuple[str, str]:
    """Return the state of the session keys as a level and a description."""
    if isinstance(keys, FetchedKeys):
        if keys.age is None:
            return "warning", "not fetched yet"
        now = datetime.now(UTC)
        return "ok", f"fetched {ago(now - timedelta(seconds=keys.age), now)}"
    if not keys.keys:
        return "warning", "missing: protected routes return 503"
    return "ok", f"{count(len(keys.keys), 'key')} configured"

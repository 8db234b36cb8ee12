"""How the console's pages write numbers and times."""

from __future__ import annotations

from datetime import UTC, datetime

from clerkhooks.clerk.signing_keys import ConfiguredKeys, FetchedKeys
from clerkhooks.store.activity import MAX_COUNT
from clerkhooks.web.state import Authenticator

_UNITS = ((86_400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


def number(count: int) -> str:
    """Write a number of rows, of which no more than MAX_COUNT are counted."""
    return f"{count:,}" if count <= MAX_COUNT else f"more than {MAX_COUNT:,}"


def duration(seconds: float) -> str:
    """Write a length of time in the unit that suits it: 40 ms, 2.5 s, 3 minutes."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s".replace(".0 s", " s")
    size, unit = next((size, unit) for size, unit in _UNITS if seconds >= size)
    whole = int(seconds // size)
    return f"{whole:,} {unit}{'' if whole == 1 else 's'}"


def ago(then: datetime, now: datetime) -> str:
    """Write how long ago *then* was; a time by a clock that runs ahead may be in the future."""
    passed = int((now - then).total_seconds())
    if abs(passed) < 2:
        return "just now"
    return f"{duration(passed)} ago" if passed > 0 else f"in {duration(-passed)}"


def moment(then: datetime) -> str:
    """Write a point in time, in UTC."""
    return f"{then.astimezone(UTC):%d %b %Y, %H:%M:%S}"


def key_set(authenticator: Authenticator) -> tuple[str, str]:
    """Return the state of the session keys as a level and in words."""
    keys = authenticator.verifier.keys
    if isinstance(keys, FetchedKeys):
        if keys.age is None:
            return "warning", "not fetched yet"
        return (
            "ok",
            f"fetched {duration(int(keys.age))} ago" if keys.age >= 1 else "fetched just now",
        )
    count = len(keys.keys) if isinstance(keys, ConfiguredKeys) else 0
    if not count:
        return "warning", "none: protected routes answer 503"
    return "ok", f"{count} key{'' if count == 1 else 's'} configured"

"""List the objects that changed last, even while objects change and are deleted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from clerkhooks.clerk.events import milliseconds
from clerkhooks.clerk.kinds import Kind
from clerkhooks.errors import BackendApiError
from clerkhooks.store.awaited import now_ms

FIRST_PAGE, PAGE = 10, 100  # usually, few objects have changed since the last round
MAX_REPEATS = 50  # pages without a new object
# In milliseconds. A change may become visible after another change with a later time.
OVERLAP = 120_000
Read = Callable[[int, int], list[Any]]


def read_newest(read: Read, kind: Kind, time_name: str, until: int) -> Iterator[list[Any]]:
    """
    Yield pages of objects, latest first, until the time *time_name* is less than *until*.

    *read* returns a page of objects from a limit and an offset.

    An object that changes meanwhile moves to the front and is left to the next call. A deletion
    moves later objects towards the front. Therefore, pages overlap, and if the first object of a
    page has not been read yet, the listing goes back half a page. Objects with the same time may be
    listed in any order, so the next page begins with the first object that has the last time, or,
    if such objects fill a page, half a page later.

    Raises:
        BackendApiError: the objects are not in this order, or a page is repeated, for example
            because a proxy drops the query string.
    """
    seen, offset, repeats, limit = set[str](), 0, 0, FIRST_PAGE
    while True:
        page = read(limit, offset)
        keys = [kind.find_id(data) or repr(data) for data in page]
        times = _read_times(page, time_name)
        meets = offset == 0 or (bool(keys) and keys[0] in seen)
        fresh = [data for data, key in zip(page, keys, strict=True) if key not in seen]
        seen.update(keys)
        repeats = 0 if fresh else repeats + 1
        if repeats > MAX_REPEATS:
            raise BackendApiError("answer_unusable", "answered with the same page again")
        if fresh:
            yield fresh
        if meets and (len(page) < FIRST_PAGE or times[-1] < until):
            return  # even if the limit is ignored, a full page has FIRST_PAGE objects
        same_time = times.index(times[-1]) if times else 0
        step = (same_time or max(1, len(page) // 2)) if meets else -PAGE // 2
        offset, limit = max(0, offset + step), PAGE


def find_latest(objects: Sequence[Any], time_name: str) -> int:
    """Return the latest time of *objects*, or 0. A time in the future does not count."""
    now, times = now_ms(), (_time_of(data, time_name) for data in objects)
    return max((at for at in times if at is not None and at <= now), default=0)


def _time_of(data: Any, name: str) -> int | None:
    """Return a time of an object in milliseconds, or None if it is malformed."""
    return milliseconds(data.get(name)) if isinstance(data, dict) else None


def _read_times(page: Sequence[Any], name: str) -> list[float]:
    """Return the time of each object. A malformed one has the time of the object before it."""
    times, latest = list[float](), math.inf
    for data in page:
        at = _time_of(data, name)
        if at is not None and at > latest:
            raise BackendApiError("answer_unusable", "did not list the latest changes first")
        latest = latest if at is None else at
        times.append(latest)
    return times

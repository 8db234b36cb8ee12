"""List all objects in the Backend API, even while objects are created or deleted."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from clerkhooks.clerk.backend_api import PAGE, BackendApi
from clerkhooks.clerk.events import milliseconds
from clerkhooks.clerk.kinds import USER, Kind
from clerkhooks.errors import BackendApiError

MAX_STEPS_BACK = 100  # per list
MAX_REPEATS = 2 * MAX_STEPS_BACK  # pages without new objects, per list
_BUCKETS = 2**16  # with a million ids, each bucket has about 15


class IdSet:
    """
    A set of ids, stored as 64-bit hashes to save memory.

    A million ids take 15 MB, about a tenth of the size of a set of strings. The probability that an
    id is mistaken for one of a million others is 5e-14.
    """

    def __init__(self) -> None:
        self._buckets: defaultdict[int, array[int]] = defaultdict(lambda: array("q"))

    def add(self, user_id: str) -> bool:
        """Add an id; return whether it is new."""
        number = hash(user_id)
        bucket = self._buckets[number % _BUCKETS]
        if number in bucket:
            return False
        bucket.append(number)
        return True

    def __contains__(self, user_id: str) -> bool:
        """Return whether the id has been added."""
        number = hash(user_id)
        return number in self._buckets[number % _BUCKETS]


def read_all(api: BackendApi, seen: IdSet, after: str | None = None) -> Iterator[list[Any]]:
    """
    Yield pages of all users that exist now, oldest first. Add the ids to *seen*.

    Begin after the user with the id *after*, or with the oldest user if that user is gone.

    Each user is yielded once. The cursor is the last user of the previous page, so sign-ups and
    deletions during the sync do not shift the following pages. Users who sign up during the sync
    are not read, so the sync ends. A short page is not necessarily the last page: Clerk returns
    fewer users if it does not accept the limit.

    Raises:
        BackendApiError: a page is repeated, for example because a proxy drops the query string.
    """
    newest_first = api.list_newest(1)
    bound = _created_at(newest_first[0]) if newest_first else -1
    page = api.list_users() if after is None else _read_after(api, [after])
    while page:
        keys, times = [_key(data) for data in page], [_created_at(data) for data in page]
        each = zip(page, keys, times, strict=True)
        new = [data for data, key, time in each if time <= bound and seen.add(key)]
        if new:
            yield new
        ids = [user_id for data in page if (user_id := USER.find_id(data))]
        if not ids or min(times) > bound:
            return
        if not new:
            raise BackendApiError("answer_unusable", "answered with the same page again")
        page = _read_after(api, ids)


def _read_after(api: BackendApi, ids: Sequence[str]) -> list[Any]:
    """
    Return the page after the last of *ids* that still exists, or the first page.

    Clerk does not document how it responds if the cursor is the id of a deleted user. If it refuses
    the request or returns no users, the user is looked up.
    """
    for user_id in reversed(ids):
        try:
            page = api.list_users(starting_after=user_id)
        except BackendApiError as error:
            if error.reason != "answer_unusable" or not api.is_gone(user_id):
                raise
        else:
            if page or not api.is_gone(user_id):
                return page
    return api.list_users()


def read_by_offset(
    get_page: Callable[[str, int, int], list[Any]], kind: Kind, seen: IdSet
) -> Iterator[list[Any]]:
    """
    Yield pages of all objects of *kind*, oldest first. Add the ids to *seen*.

    *get_page* gets the order, the limit and the offset. This is for lists without a cursor. A
    deletion moves the rest of the list, so pages overlap by one object. If the first object of a
    page has not been seen, or the list has ended, step back by half a page, and continue if there
    are new objects. The number of these steps is limited, and then objects may be missed until the
    next sync. They are not deleted here, because a deletion is confirmed separately. The number of
    pages without new objects is limited as well, so the sync ends even if Clerk ignores *offset*.

    Objects created during the sync are not read, so the sync ends.

    Raises:
        BackendApiError: pages are repeated, for example because a proxy drops the query string.
    """
    newest_first = get_page("-created_at", 1, 0)
    bound = _created_at(newest_first[0]) if newest_first else -1
    offset, steps_back, repeats, is_checked, last = 0, 0, 0, False, list[str]()
    while True:
        page = get_page("+created_at", PAGE, offset)
        keys, times = [_key(data, kind) for data in page], [_created_at(data) for data in page]
        if min(times, default=-1) > bound or (not page and (is_checked or offset == 0)):
            return
        if page and keys == last:
            raise BackendApiError("answer_unusable", "answered with the same page again")
        has_moved = bool(page) and keys[0] not in seen and steps_back < MAX_STEPS_BACK
        if offset and (not page or has_moved):
            offset, steps_back, last = max(0, offset - PAGE // 2), steps_back + 1, []
            is_checked = is_checked or not page
            continue
        each = zip(page, keys, times, strict=True)
        if new := [data for data, key, time in each if time <= bound and seen.add(key)]:
            is_checked = False
            yield new
        elif (repeats := repeats + 1) > MAX_REPEATS:
            raise BackendApiError("answer_unusable", "answered with the same objects again")
        offset, last = offset + max(1, len(page) - 1 if new else len(page)), keys


def _created_at(data: Any) -> int:
    created_at = milliseconds(data.get("created_at")) if isinstance(data, dict) else None
    return -1 if created_at is None else created_at


def _key(data: Any, kind: Kind = USER) -> str:
    return kind.find_id(data) or repr(data)

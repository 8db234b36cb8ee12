"""List all users in the Backend API, even while users are signing up or being deleted."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

from clerkhooks.clerk.backend_api import BackendApi
from clerkhooks.clerk.events import is_user_id, milliseconds
from clerkhooks.errors import BackendApiError

_BUCKETS = 2**16  # with a million ids, each bucket has about 15


class IdSet:
    """
    A set of ids, stored as 64-bit hashes to save memory.

    A million ids take 15 MB, about a tenth of the size of a set of strings. The probability that an
    id is mistaken for one of a million others is 5e-14.
    """

    def __init__(self) -> None:
        self._buckets = [array("q") for _ in range(_BUCKETS)]

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


def read_all(api: BackendApi, seen: IdSet) -> Iterator[list[Any]]:
    """
    Yield pages of all users that exist now, oldest first. Add the ids to *seen*.

    Each user is yielded once.

    The cursor is the time of creation. With an offset, each sign-up or deletion during the sync
    would shift the following pages, and a user could be read twice or never. Clerk does not
    document whether the cursor is inclusive, so pages overlap by a millisecond and known users are
    skipped. An offset is needed only for users created in the same millisecond. It advances by half
    a page, so no user is missed unless more than half a page of these users is deleted.

    Users who sign up during the sync are not read, so the sync ends. A short page is not
    necessarily the last page: Clerk returns fewer users if it does not accept the limit.

    Raises:
        BackendApiError: a page is repeated, for example because a proxy drops the query string.
    """
    newest_first = api.list_newest(1)
    bound = _created_at(newest_first[0]) if newest_first else -1
    after, offset, count = -1, 0, 0
    last: list[str] = []
    while page := api.list_users(after - 1 if after > 0 else None, offset):
        keys, times = [_key(data) for data in page], [_created_at(data) for data in page]
        each = zip(page, keys, times, strict=True)
        new = [data for data, key, time in each if time <= bound and seen.add(key)]
        newest, count = max(times), count + len(new)
        if newest > after:
            after, offset, last = newest, 0, []
        elif keys == last or offset > count:  # the pages repeat
            raise BackendApiError("answer_unusable", "answered with the same page again")
        else:
            last = keys
            offset += max(1, len(page) // 2 if new else len(page))
        if new:
            yield new
        if min(times) > bound:
            return


def id_of(data: Any) -> str | None:
    """Return a user object's id. A malformed id must not be reported, so return None for it."""
    user_id = data.get("id") if isinstance(data, dict) else None
    return user_id if is_user_id(user_id) else None


def _created_at(data: Any) -> int:
    created_at = milliseconds(data.get("created_at")) if isinstance(data, dict) else None
    return -1 if created_at is None else created_at


def _key(data: Any) -> str:
    return id_of(data) or repr(data)

"""Where a sync reads objects of each kind: lists, lookups and confirmations of Clerk's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from clerkhooks.clerk.backend_api import IDS, PAGE, BackendApi
from clerkhooks.clerk.kinds import MEMBERSHIP, ORGANIZATION, USER, Kind
from clerkhooks.errors import BackendApiError, Unconfirmed
from clerkhooks.sync.listing import IdSet, read_all, read_by_offset

ORGANIZATIONS, MEMBERSHIPS = "/organizations", "/organization_memberships"


class Source(Protocol):
    """The objects of one kind at Clerk. *noun* is used in progress messages."""

    kind: Kind
    noun: str

    def count(self) -> int:
        """Return the number of objects."""

    def read_all(self, seen: IdSet) -> Iterator[list[Any]]:
        """Yield pages of all objects that exist now. Add the ids to *seen*."""


class Lookup(Source, Protocol):
    """Objects that can be looked up by id."""

    def find(self, ids: Sequence[str]) -> list[Any]:
        """Return the objects with these ids (at most 100)."""

    def is_gone(self, object_id: str) -> bool:
        """Return whether Clerk confirms that the object does not exist."""


class Users:
    """Clerk's users."""

    kind, noun = USER, "users"

    def __init__(self, api: BackendApi) -> None:
        self._api = api
        self.count, self.find, self.is_gone = api.count_users, api.find_users, api.is_gone

    def read_all(self, seen: IdSet) -> Iterator[list[Any]]:
        """Yield pages of all users that exist now."""
        return read_all(self._api, seen)


class Organizations:
    """Clerk's organizations."""

    kind, noun = ORGANIZATION, "organizations"

    def __init__(self, api: BackendApi) -> None:
        self._api = api

    def count(self) -> int:
        """Return the number of organizations."""
        return _get_page(self._api, ORGANIZATIONS, limit=1)[1]

    def read_all(self, seen: IdSet) -> Iterator[list[Any]]:
        """Yield pages of all organizations that exist now."""
        return read_by_offset(_lister(self._api, ORGANIZATIONS), ORGANIZATION, seen)

    def find(self, ids: Sequence[str]) -> list[Any]:
        """Return the organizations with these ids."""
        parameters = {"organization_id": list(ids), "limit": IDS}
        return _get_page(self._api, ORGANIZATIONS, **parameters)[0]

    def is_gone(self, organization_id: str) -> bool:
        """Return whether a 404 in Clerk's words confirms that the organization does not exist."""
        return self._api.is_gone(organization_id, ORGANIZATIONS)


class Memberships:
    """Clerk's memberships. There are no lookups by id."""

    kind, noun = MEMBERSHIP, "memberships"

    def __init__(self, api: BackendApi) -> None:
        self._api = api

    def count(self) -> int:
        """Return the number of memberships."""
        return _get_page(self._api, MEMBERSHIPS, limit=1)[1]

    def read_all(self, seen: IdSet) -> Iterator[list[Any]]:
        """Yield pages of all memberships that exist now."""
        return read_by_offset(_lister(self._api, MEMBERSHIPS), MEMBERSHIP, seen)

    def find_of(self, organization_id: str, user_ids: Sequence[str]) -> list[Any]:
        """
        Return all memberships of these users (at most 100) in an organization.

        Without *user_ids*, return the memberships of all users.

        Raises:
            Unconfirmed: the response does not prove that there are no others.
        """
        path = f"{ORGANIZATIONS}/{organization_id}/memberships"
        answer = self._api.find(path, user_id=list(user_ids), limit=PAGE)
        if answer is None:  # the organization does not exist
            return []
        listed, total = _parse_page(answer)
        if total != len(listed) or None in map(MEMBERSHIP.find_id, listed):
            raise Unconfirmed("answer_unusable", "did not answer with all memberships")
        return listed


def _lister(api: BackendApi, path: str) -> Callable[[str, int, int], list[Any]]:
    """Return a function that gets a page of objects: ``(order_by, limit, offset)``."""

    def get(order_by: str, limit: int, offset: int) -> list[Any]:
        return _get_page(api, path, order_by=order_by, limit=limit, offset=offset)[0]

    return get


def _get_page(api: BackendApi, path: str, **parameters: Any) -> tuple[list[Any], int]:
    return _parse_page(api.get(path, **parameters))


def _parse_page(answer: Any) -> tuple[list[Any], int]:
    """Return the objects of a page, and the number of all objects."""
    listed, total = (
        (answer.get("data"), answer.get("total_count"))
        if isinstance(answer, dict)
        else (None, None)
    )
    if not isinstance(listed, list) or type(total) is not int:
        raise BackendApiError("answer_unusable", "did not answer with a list and its length")
    return listed, total

"""Where a sync reads objects of each kind: lists, lookups and confirmations of Clerk's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from clerkhooks.clerk.backend_api import IDS, PAGE, BackendApi
from clerkhooks.clerk.kinds import MEMBERSHIP, ORGANIZATION, USER, Kind
from clerkhooks.errors import BackendApiError, Unconfirmed
from clerkhooks.sync.listing import IdSet, read_all, read_by_offset


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


class PagedSource:
    """Objects that Clerk lists by limit and offset, without a cursor."""

    kind: Kind
    noun: str
    path: str

    def __init__(self, api: BackendApi) -> None:
        self._api = api

    def count(self) -> int:
        """Return the number of objects."""
        return self.list_page("-created_at", 1, 0)[1]

    def read_all(self, seen: IdSet) -> Iterator[list[Any]]:
        """Yield pages of all objects that exist now."""
        return read_by_offset(lambda *page: self.list_page(*page)[0], self.kind, seen)

    def list_page(self, order_by: str, limit: int, offset: int) -> tuple[list[Any], int]:
        """Return the objects of a page, and the number of all objects."""
        return _parse_page(self._api.get(self.path, order_by=order_by, limit=limit, offset=offset))

    def list_newest(self, limit: int, offset: int) -> list[Any]:
        """Return a page of objects, newest first."""
        return self.list_page("-created_at", limit, offset)[0]


class Organizations(PagedSource):
    """Clerk's organizations."""

    kind, noun, path = ORGANIZATION, "organizations", "/organizations"

    def find(self, ids: Sequence[str]) -> list[Any]:
        """Return the organizations with these ids."""
        return _parse_page(self._api.get(self.path, organization_id=list(ids), limit=IDS))[0]

    def is_gone(self, organization_id: str) -> bool:
        """Return whether a 404 in Clerk's words confirms that the organization does not exist."""
        return self._api.is_gone(organization_id, self.path)


class Memberships(PagedSource):
    """Clerk's memberships. There are no lookups by id."""

    kind, noun, path = MEMBERSHIP, "memberships", "/organization_memberships"

    def find_of(self, organization_id: str, user_ids: Sequence[str]) -> list[Any]:
        """
        Return all memberships of these users (at most 100) in an organization.

        Without *user_ids*, return the memberships of all users.

        Raises:
            Unconfirmed: the response does not prove that there are no others.
        """
        path = f"{Organizations.path}/{organization_id}/memberships"
        answer = self._api.find(path, user_id=list(user_ids), limit=PAGE)
        if answer is None:  # the organization does not exist
            return []
        listed, total = _parse_page(answer)
        if total != len(listed) or None in map(MEMBERSHIP.find_id, listed):
            raise Unconfirmed("answer_unusable", "did not answer with all memberships")
        return listed


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

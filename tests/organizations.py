"""
A model of organizations and memberships: messages and the rows they must produce.

It shares no code with the service.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from clerkhooks.clerk.fake import clerk_id
from tests.support import rows

Row = tuple[Any, ...]
USERS, ORGANIZATIONS = range(2), range(2)
# Both users may be members of both organizations, and user 0 joins organization 0 twice.
MEMBERSHIPS = ((0, 0), (0, 0), (0, 1), (1, 0), (1, 1))
TABLES = {
    "user": "users",
    "organization": "organizations",
    "organizationMembership": "organization_memberships",
}


@dataclass(frozen=True)
class Ids:
    """The ids of a run's objects."""

    users: tuple[str, ...]
    organizations: tuple[str, ...]
    memberships: tuple[str, ...]

    @classmethod
    def new(cls) -> Ids:
        """Return new ids."""
        counts = {"user": USERS, "org": ORGANIZATIONS, "orgmem": MEMBERSHIPS}
        return cls(*(tuple(clerk_id(prefix) for _ in each) for prefix, each in counts.items()))

    def of(self, family: str) -> tuple[str, ...]:
        """Return the ids of the objects with events of *family*."""
        names = {"user": self.users, "organization": self.organizations}
        return names.get(family, self.memberships)


@dataclass(frozen=True)
class Draft:
    """
    An event of a history, before ids are assigned. *label* is the new name or role.

    *parents* tells what an event about a membership names: ``both`` its organization and its user,
    only the ``organization``, ``none``, or ``others``, which contradicts the other events. Only
    deletions can name none.
    """

    family: str
    verb: str
    number: int
    updated_at: int | None
    timestamp: int
    letter: str
    label: int
    parents: str = "both"

    def sent(self, ids: Ids, number: int) -> Sent:
        """Return the message for event *number* of a run with these *ids*."""
        message_id = f"msg_{self.letter}{number}_{ids.users[0][5:]}"
        return Sent(message_id, self, ids.of(self.family)[self.number], *self._find_parents(ids))

    def _find_parents(self, ids: Ids) -> tuple[str | None, str | None]:
        """Return the ids of the organization and the user that the event names."""
        has_none = self.parents == "none" and self.verb == "deleted"
        if self.family != "organizationMembership" or has_none:
            return None, None
        organization, user = MEMBERSHIPS[self.number]
        if self.parents == "others":
            organization, user = 1 - organization, 1 - user
        has_user = self.parents in ("both", "others")
        return ids.organizations[organization], ids.users[user] if has_user else None


@dataclass(frozen=True)
class Sent:
    """A message about an object, and the ids of the organization and the user that it names."""

    message_id: str
    draft: Draft
    object_id: str
    organization_id: str | None
    user_id: str | None

    @property
    def type(self) -> str:
        """The type of the event."""
        return f"{self.draft.family}.{self.draft.verb}"

    @property
    def is_deletion(self) -> bool:
        """Whether the event deletes the object."""
        return self.draft.verb == "deleted"

    @property
    def body(self) -> bytes:
        """The event as JSON. Clerk's events about deleted users and organizations have no times."""
        data: dict[str, Any] = {"id": self.object_id}
        if self.is_deletion:
            data["deleted"] = True
        else:
            data |= {"updated_at": self.draft.updated_at, "slug": "acme", "role": self._label}
            data |= {"name": self._label, "first_name": self._label}
        if self.organization_id is not None:
            data["organization"] = {"id": self.organization_id, "name": "Another name"}
        if self.user_id is not None:
            data["public_user_data"] = {"user_id": self.user_id}
        event = {"type": self.type, "timestamp": self.draft.timestamp, "data": data}
        return json.dumps(event).encode()

    @property
    def _label(self) -> str:
        return f"label {self.draft.label}"

    @property
    def version(self) -> tuple[int, int, bytes]:
        """The event's version: two times in milliseconds and the message id."""
        at = self.draft.timestamp
        updated_at = at if self.draft.updated_at is None else self.draft.updated_at
        return (updated_at, at, self.message_id.encode())

    @property
    def row(self) -> Row:
        """The columns that this event writes, except a membership's parents and the version."""
        return (self._label, "acme") if self.draft.family == "organization" else (self._label,)


def expected_row(object_id: str, events: Iterable[Sent]) -> Row | None:
    """
    Return the row that *events* must produce, regardless of their order and any duplicates.

    It consists of columns, the version, and whether the row is a tombstone.
    """
    found = list(events)
    own = [event for event in found if event.object_id == object_id]
    if not own:
        return None
    deleted = {event.object_id for event in found if event.is_deletion}
    parents = max((event.organization_id or "", event.user_id or "") for event in own)
    named = tuple(each or None for each in parents)
    is_membership = own[0].draft.family == "organizationMembership"
    if not deleted.isdisjoint((object_id, *parents)):
        tombstone: dict[str, Row] = {
            "user": ("Deleted User",),
            "organization": ("Deleted Organization", None),
            "organizationMembership": (*named, None),
        }
        return (*tombstone[own[0].draft.family], None, True)
    newest = max(own, key=lambda event: event.version)
    return (*(named if is_membership else ()), *newest.row, newest.version, False)


def stored_rows(database_url: str, ids: Ids) -> dict[str, Row]:
    """Return the rows of these objects in the format of ``expected_row``."""
    columns = {
        "user": "name",
        "organization": "name, slug",
        "organizationMembership": "organization_id, user_id, role",
    }
    version = "version_updated_at, version_timestamp, version_message_id, deleted_at IS NOT NULL"
    found: dict[str, Row] = {}
    for family, shown in columns.items():
        quoted = ", ".join(f"'{each}'" for each in ids.of(family))
        query = f"SELECT id, {shown}, {version} FROM {TABLES[family]} WHERE id IN ({quoted})"
        for object_id, *kept, at, timestamp, message_id, is_deleted in rows(database_url, query):
            told = None if at is None else (at, timestamp, message_id.encode())
            found[object_id] = (*kept, told, bool(is_deleted))
    return found


def expected_rows(ids: Ids, events: Iterable[Sent]) -> Mapping[str, Row]:
    """Return the rows that *events* must produce."""
    found, every = list(events), (*ids.users, *ids.organizations, *ids.memberships)
    expected = {object_id: expected_row(object_id, found) for object_id in every}
    return {object_id: row for object_id, row in expected.items() if row is not None}


def random_group(rng: random.Random) -> tuple[Ids, list[Sent]]:
    """Return the ids of related objects, and a random history of their events."""
    ids, counts = Ids.new(), {"user": USERS, "organization": ORGANIZATIONS}
    drafts = []
    for _ in range(rng.randrange(4, 16)):
        family = rng.choice([*TABLES, "organizationMembership"])
        numbers = range(len(counts.get(family, MEMBERSHIPS)))
        verb = rng.choice(["created", "updated", "updated", "updated", "deleted"])
        times = (10**11 + rng.randrange(3), 10**11 + rng.randrange(3))
        drafts.append(Draft(family, verb, rng.choice(numbers), *times, "a", rng.randrange(4)))
    return ids, [draft.sent(ids, number) for number, draft in enumerate(drafts)]


_times = st.sampled_from([10**11, 10**11 + 1, 10**11 + 2])
_rest = (st.one_of(st.none(), _times), _times, st.sampled_from("aAbB09"), st.integers(0, 3))


def _drafts(family: str, count: int, parents: str = "both") -> st.SearchStrategy[Draft]:
    verbs = st.sampled_from(["created", "updated", "updated", "deleted"])
    numbers = st.integers(0, count - 1)
    named = st.sampled_from(parents.split())
    return st.builds(Draft, st.just(family), verbs, numbers, *_rest, named)


_memberships = _drafts("organizationMembership", len(MEMBERSHIPS), "both both organization none")
CONTRADICTING = _drafts("organizationMembership", 2, "both organization none others")
DRAFTS = st.one_of(
    _memberships,
    _memberships,
    _drafts("organization", len(ORGANIZATIONS)),
    _drafts("user", len(USERS)),
)


@st.composite
def orders(
    draw: st.DrawFn, most: int = 10, each: st.SearchStrategy[Draft] = DRAFTS
) -> tuple[list[Draft], list[int]]:
    """Draw events, and the order of their deliveries. Some are delivered several times."""
    drafts = draw(st.lists(each, min_size=1, max_size=most))
    numbers = st.integers(0, len(drafts) - 1)
    repeated = [*range(len(drafts)), *draw(st.lists(numbers, max_size=most))]
    return drafts, draw(st.permutations(repeated))

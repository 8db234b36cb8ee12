"""The kinds of Clerk's objects that are stored: users, organizations and memberships."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from clerkhooks.clerk.account import ACCOUNT, parse_account_state
from clerkhooks.clerk.fields import find_primary
from clerkhooks.errors import EventError

EMAIL_LENGTH, IMAGE_URL_LENGTH, NAME_LENGTH, LABEL_LENGTH = 320, 2048, 255, 255
NEW_USER, NEW_ORGANIZATION = "New User", "New Organization"
UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
"""Characters that databases reject: NUL and lone surrogates."""
Data = Mapping[str, Any]
Values = dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """
    A kind of Clerk's objects. Each object is a row of one table.

    *family* is the first part of the types of its events. *tombstone* has the columns that depend
    only on Clerk's data, with the values for a deleted object. *parse_state* returns the values of
    the columns *state*, which a sync compares even if the row already has Clerk's ``updated_at``,
    and *parse_rest* the values of the other columns. The columns *fixed* never change, so a
    tombstone keeps them.
    """

    family: str
    id_prefix: str
    malformed: str
    tombstone: Data
    state: tuple[str, ...]
    parse_state: Callable[[Data, int, int], Values]
    parse_rest: Callable[[Data], Values] = lambda _: {}
    find_fixed: Callable[[Data], Values] = lambda _: {}
    fixed: tuple[str, ...] = ()
    _id: re.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        """Compile the pattern of the ids: the prefix and 1 to 64 base-62 characters."""
        object.__setattr__(self, "_id", re.compile(f"{self.id_prefix}_[0-9A-Za-z]{{1,64}}"))

    def parse(self, data: Data, at: int, read_at: int) -> Values:
        """
        Return the values of the columns.

        *at* is the time of the object, and *read_at* the time at which it was read, both in
        milliseconds.

        Raises:
            EventError: a value without which the row would be useless is missing or malformed.
        """
        return self.parse_rest(data) | self.parse_state(data, at, read_at)

    def parse_deleted(self, data: Data) -> Values:
        """Return the values of a tombstone for the deleted object *data*."""
        return {**self.tombstone, **self.find_fixed(data)}

    def is_id(self, value: object) -> bool:
        """Return whether *value* is an id of this kind."""
        return isinstance(value, str) and self._id.fullmatch(value) is not None

    def find_id(self, data: object) -> str | None:
        """Return the id of the object *data*, or None if it is missing or malformed."""
        object_id = data.get("id") if isinstance(data, Mapping) else None
        return object_id if self.is_id(object_id) else None

    def get_id(self, data: object) -> str:
        """
        Return the id of the object *data*.

        Raises:
            EventError: it is missing or malformed. The reason is *malformed*.
        """
        object_id = self.find_id(data)
        if object_id is None:
            raise EventError(self.malformed)
        return object_id


@dataclass(frozen=True, slots=True)
class Profile:
    """
    The stored part of a Clerk user. Every string is storable and fits its column.

    Each field is a column of ``users``. In a tombstone, and before the first event, all fields
    except the name are None.
    """

    name: str
    email: str | None = None
    image_url: str | None = None


def parse_profile(data: Data) -> Profile:
    """
    Return the stored part of a user object from an event or from the Backend API.

    A field counts as absent if it is null, empty, too long or not storable, or has the wrong type.
    A long name is truncated.
    """
    address = find_primary(data, "primary_email_address_id", "email_addresses")
    email = _text(address.get("email_address"), EMAIL_LENGTH)
    names = (_name(data.get("first_name")), _name(data.get("last_name")))
    full_name = " ".join(name for name in names if name)
    name = full_name or _local_part(email) or _name(data.get("username")) or NEW_USER
    image_url = _text(data.get("image_url"), IMAGE_URL_LENGTH)
    return Profile(name[:NAME_LENGTH].rstrip(), email, image_url)


def _parse_profile(data: Data) -> Values:
    profile = parse_profile(data)
    return {"email": profile.email, "name": profile.name, "image_url": profile.image_url}


USER = Kind(
    family="user",
    id_prefix="user",
    malformed="user_id_malformed",
    tombstone=dict.fromkeys(("email", "name", "image_url", *ACCOUNT)) | {"name": "Deleted User"},
    state=ACCOUNT,
    parse_state=lambda data, at, read_at: {**parse_account_state(data, at, read_at).columns},
    parse_rest=_parse_profile,
)


def _parse_organization(data: Data, *_: int) -> Values:
    slug = _text(data.get("slug"), LABEL_LENGTH)
    name = _name(data.get("name")) or slug or NEW_ORGANIZATION
    image_url = _text(data.get("image_url"), IMAGE_URL_LENGTH)
    return {"name": name[:NAME_LENGTH].rstrip(), "slug": slug, "image_url": image_url}


ORGANIZATION = Kind(
    family="organization",
    id_prefix="org",
    malformed="organization_id_malformed",
    tombstone={"name": "Deleted Organization", "slug": None, "image_url": None},
    state=("name", "slug", "image_url"),
    parse_state=_parse_organization,
)


def _parse_membership(data: Data, *_: int) -> Values:
    found = _find_parents(data)
    if found["organization_id"] is None:
        raise EventError(ORGANIZATION.malformed)
    # Clerk's schema does not require the user.
    if found["user_id"] is None and data.get("public_user_data") is not None:
        raise EventError(USER.malformed)
    return found | {"role": _text(data.get("role"), LABEL_LENGTH)}


def _find_parents(data: Data) -> Values:
    """Return the ids of a membership's organization and user. Malformed ids become None."""
    user = data.get("public_user_data")
    user_id = user.get("user_id") if isinstance(user, Mapping) else None
    return {
        "organization_id": ORGANIZATION.find_id(data.get("organization")),
        "user_id": user_id if USER.is_id(user_id) else None,
    }


MEMBERSHIP = Kind(
    family="organizationMembership",
    id_prefix="orgmem",
    malformed="membership_id_malformed",
    tombstone=dict.fromkeys(("organization_id", "user_id", "role")),
    state=("organization_id", "user_id", "role"),
    parse_state=_parse_membership,
    find_fixed=_find_parents,
    fixed=("organization_id", "user_id"),
)


class StoredType(NamedTuple):
    """What an event of a type says: a change of an object of *kind*, or its deletion."""

    kind: Kind
    is_deletion: bool


def stored_types(kinds: Iterable[Kind]) -> dict[str, StoredType]:
    """Return the types of the events that change rows of *kinds*."""
    return {
        f"{kind.family}.{verb}": StoredType(kind, verb == "deleted")
        for kind in kinds
        for verb in ("created", "updated", "deleted")
    }


def _text(value: object, length: int) -> str | None:
    if not isinstance(value, str) or not value.strip() or len(value) > length:
        return None
    return None if UNSTORABLE.search(value) else value


def _local_part(email: str | None) -> str:
    return email.rsplit("@", 1)[0].strip() if email else ""


def _name(value: object) -> str | None:
    # The name is not truncated here, because the full name is truncated later.
    if not isinstance(value, str) or UNSTORABLE.search(value):
        return None
    return value.strip()

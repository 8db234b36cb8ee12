"""Read-only queries about organizations and memberships, for operators."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from clerkhooks.clerk.kinds import MEMBERSHIP, ORGANIZATION
from clerkhooks.store import Store
from clerkhooks.store.queries import MAX_EXAMINED, Cursor, Listing


@dataclass(frozen=True, slots=True)
class OrganizationReport:
    """A row of ``organizations``."""

    id: str
    name: str
    slug: str | None
    image_url: str | None
    created_at: datetime
    updated_at: datetime
    deleted_at: datetime | None

    @property
    def cursor(self) -> Cursor:
        """The cursor that continues after this row."""
        return Cursor(self.created_at, self.id)


@dataclass(frozen=True, slots=True)
class MembershipReport:
    """A row of ``organization_memberships``, with the names if their rows exist."""

    id: str
    organization_id: str | None
    organization_name: str | None
    user_id: str | None
    user_name: str | None
    role: str | None
    created_at: datetime
    deleted_at: datetime | None


def list_organizations(store: Store) -> Listing[OrganizationReport]:
    """Return a query for organizations."""
    columns = store.by_kind[ORGANIZATION].table.c
    return Listing(store, OrganizationReport, (columns.created_at, columns.id), [], [])


def find_memberships(
    store: Store, limit: int, *, user_id: str | None = None, organization_id: str | None = None
) -> list[MembershipReport]:
    """
    Return up to *limit* memberships of a user or an organization, ended ones last.

    If there are more than MAX_EXAMINED, any of them are returned. The list is empty if the
    application does not store memberships.
    """
    if MEMBERSHIP not in store.by_kind:
        return []
    table = store.by_kind[MEMBERSHIP].table
    is_asked = table.c.user_id == user_id if user_id else table.c.organization_id == organization_id
    examined = sa.select(table).where(is_asked).limit(MAX_EXAMINED).subquery()
    order = (examined.c.deleted_at.is_not(None), examined.c.created_at, examined.c.id)
    # Limit first: names must not be looked up for all members of a large organization.
    shown = sa.select(examined).order_by(*order).limit(limit).subquery()
    return _read_with_names(store, shown)


def _read_with_names(store: Store, own: sa.Subquery) -> list[MembershipReport]:
    organizations, users = store.by_kind[ORGANIZATION].table, store.users
    named = {"organization_name": organizations.c.name, "user_name": users.c.name}
    columns = (
        named[name].label(name) if name in named else own.c[name]
        for name in MembershipReport.__dataclass_fields__
    )
    query = (
        sa.select(*columns)
        .select_from(own)
        .outerjoin(organizations, organizations.c.id == own.c.organization_id)
        .outerjoin(users, users.c.id == own.c.user_id)
        .order_by(own.c.deleted_at.is_not(None), own.c.created_at, own.c.id)
    )
    return [MembershipReport(**row._mapping) for row in store.database.execute(query)]

"""Memberships, as views and ``require_auth`` read them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa

from clerkhooks.clerk.session_tokens import LEEWAY
from clerkhooks.store.database import Database


@dataclass(frozen=True, slots=True)
class Membership:
    """A membership of a user who has not left the organization. Times are in UTC."""

    id: str
    organization_id: str
    user_id: str
    role: str | None
    created_at: datetime
    updated_at: datetime


class Standing(NamedTuple):
    """Whether a user is a member of an organization, and as of when (in milliseconds)."""

    is_member: bool
    role: str | None
    at: int


class MembershipReader:
    """Reads memberships through the private engine."""

    def __init__(self, database: Database, memberships: sa.Table, organizations: sa.Table) -> None:
        self._database, columns, other = database, memberships.c, organizations.c
        shown = (columns[name] for name in Membership.__dataclass_fields__)
        self._of_user = (
            sa.select(*shown)
            .where(columns.user_id == sa.bindparam("user_id"), columns.deleted_at.is_(None))
            .order_by(columns.created_at, columns.id)
        )
        is_asked = (
            columns.user_id == sa.bindparam("user_id"),
            columns.organization_id == sa.bindparam("organization_id"),
        )
        membership = sa.select(columns.role, columns.deleted_at, columns.version_updated_at)
        deleted = sa.select(sa.null(), other.deleted_at, other.version_updated_at).where(
            other.id == sa.bindparam("organization_id"), other.deleted_at.is_not(None)
        )
        self._evidence = sa.union_all(membership.where(*is_asked), deleted)

    def read(self, user_id: str) -> tuple[Membership, ...]:
        """Return the user's memberships, oldest first."""
        found = self._database.execute(self._of_user, {"user_id": user_id})
        return tuple(Membership(**row._mapping) for row in found)

    def find_standing(self, organization_id: str, user_id: str) -> Standing | None:
        """Return the user's standing in an organization, or None if the tables do not tell."""
        asked = {"organization_id": organization_id, "user_id": user_id}
        rows = self._database.execute(self._evidence, asked)
        live = [row for row in rows if row.deleted_at is None]
        if live:
            newest = max(live, key=lambda row: row.version_updated_at or 0)
            return Standing(True, newest.role, newest.version_updated_at or 0)
        return Standing(False, None, max(map(_ended_at, rows))) if rows else None


def _ended_at(row: Any) -> int:
    """Return when a tombstone was written, which is after the deletion, plus the clocks' leeway."""
    return int((row.deleted_at.timestamp() + LEEWAY) * 1000)

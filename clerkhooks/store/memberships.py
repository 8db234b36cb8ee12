"""Memberships, as views and ``require_auth`` read them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa

from clerkhooks.clerk.session_tokens import LEEWAY
from clerkhooks.store.database import Database

_EVIDENCE = ("deleted_at", "version_updated_at", "version_timestamp")


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
    """
    Reads memberships through the private engine.

    A membership of a finally deleted organization has ended, even if its row does not say so. An
    application's transaction at REPEATABLE READ may have written it without seeing the deletion.
    """

    def __init__(self, database: Database, memberships: sa.Table, organizations: sa.Table) -> None:
        self._database, columns, other = database, memberships.c, organizations.c
        is_final = sa.and_(other.deleted_at.is_not(None), other.version_updated_at.is_(None))
        of_organization = columns.organization_id == other.id
        self._of_user = (
            sa.select(*(columns[name] for name in (*Membership.__dataclass_fields__, *_EVIDENCE)))
            .select_from(memberships.outerjoin(organizations, of_organization))
            .where(columns.user_id == sa.bindparam("user_id"), sa.not_(is_final))
            .order_by(columns.created_at, columns.id)
        )
        own = sa.select(*(columns[name] for name in ("role", "updated_at", *_EVIDENCE))).where(
            columns.user_id == sa.bindparam("user_id"),
            columns.organization_id == sa.bindparam("organization_id"),
        )
        self._evidence = own.add_columns(sa.false().label("is_parent")).union_all(
            sa.select(sa.null(), other.updated_at, *(other[name] for name in _EVIDENCE))
            .add_columns(sa.true())
            .where(other.id == sa.bindparam("organization_id"), other.deleted_at.is_not(None))
        )

    def read(self, user_id: str) -> tuple[Membership, ...]:
        """Return the user's memberships, oldest first."""
        rows = self._database.execute(self._of_user, {"user_id": user_id})
        by_organization: defaultdict[str, list[Any]] = defaultdict(list)
        for row in rows:
            by_organization[row.organization_id].append(row)
        live = {row.id for some in by_organization.values() for row in _find_live(some)}
        names = Membership.__dataclass_fields__
        shown = (row._mapping for row in rows if row.id in live)
        return tuple(Membership(**{name: row[name] for name in names}) for row in shown)

    def find_standing(self, organization_id: str, user_id: str) -> Standing | None:
        """Return the user's standing in an organization, or None if the tables do not tell."""
        asked = {"organization_id": organization_id, "user_id": user_id}
        rows = self._database.execute(self._evidence, asked)
        own = [row for row in rows if not row.is_parent]
        is_over = any(row.is_parent and _is_final(row) for row in rows)
        if not is_over and (live := _find_live(own)):
            newest = max(live, key=_as_of)
            return Standing(True, newest.role, _as_of(newest))
        ended = [row for row in rows if row.deleted_at is not None]
        return Standing(False, None, max(map(_written_at, ended))) if ended else None


def _find_live(rows: Sequence[Any]) -> list[Any]:
    """
    Return the live ones of a user's memberships in one organization.

    A user has only one at a time, so a membership that is older than the deletion of another one
    has ended too, although its own deletion event has not arrived.
    """
    ended_at = max((_to_ms(row.deleted_at) for row in rows if _is_final(row)), default=-1)
    return [row for row in rows if row.deleted_at is None and _as_of(row) >= ended_at]


def _is_final(row: Any) -> bool:
    return row.deleted_at is not None and row.version_updated_at is None


def _as_of(row: Any) -> int:
    """Return the time as of which a row is known to be right."""
    return max(row.version_updated_at or 0, row.version_timestamp or 0)


def _written_at(row: Any) -> int:
    """Return when a tombstone was written (after the deletion), plus the clocks' leeway."""
    return _to_ms(row.updated_at) + LEEWAY * 1000


def _to_ms(at: datetime) -> int:
    return round(at.timestamp() * 1000)

"""The models of the optional tables: organizations and memberships."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import Mapper

from clerkhooks.clerk.fields import Field
from clerkhooks.store import OrganizationTables
from clerkhooks.store.models import ClerkMembership, ClerkOrganization, declared_fields


@dataclass(frozen=True)
class OrganizationModels:
    """The models of the optional tables of one ``ClerkHooks``."""

    organization: type[ClerkOrganization]
    membership: type[ClerkMembership]
    fields: dict[sa.Column[Any], Field]

    @property
    def tables(self) -> OrganizationTables:
        """The models' tables."""
        return OrganizationTables(
            table_of(self.organization), table_of(self.membership), self.fields
        )


def make_organization_models(
    db: SQLAlchemy, users: sa.Table, model: type[Any] | None
) -> OrganizationModels:
    """
    Return *model* or a plain model of organizations, and the model of memberships.

    Raises:
        TypeError: *model* does not derive from ``ClerkOrganization``.
        ValueError: a column of *model* is declared incorrectly, *model* is in another database than
            *users*, or the name of a table is in use.
    """
    if model is not None and not (isinstance(model, type) and issubclass(model, ClerkOrganization)):
        raise TypeError(
            "The model must derive from ClerkOrganization: "
            "class Organization(ClerkOrganization, db.Model)"
        )
    organization = model or _make_model(db, users, ClerkOrganization, "organizations")
    if table_of(organization).metadata is not users.metadata:
        raise ValueError("Organizations must be in the same database as users.")
    membership = _make_model(db, users, ClerkMembership, "organization_memberships")
    for stored in (organization, membership):
        _add_live_index(table_of(stored))
    mapper: Mapper[Any] = sa.inspect(organization)
    return OrganizationModels(organization, membership, declared_fields(mapper))


def table_of(model: type[Any]) -> sa.Table:
    """Return the model's table."""
    return cast("sa.Table", sa.inspect(model).local_table)


def _add_live_index(table: sa.Table) -> None:
    """Add an index for counts of live rows, which may be few among many tombstones."""
    name, is_live = f"ix_{table.name}_live", sa.text("deleted_at IS NULL")
    sa.Index(name, table.c.deleted_at, postgresql_where=is_live, sqlite_where=is_live)


def _make_model(db: SQLAlchemy, users: sa.Table, mixin: type[Any], name: str) -> type[Any]:
    """Return a plain model in the database and the schema of *users*."""
    key = name if users.schema is None else f"{users.schema}.{name}"
    if key in users.metadata.tables:
        raise ValueError(
            f"A table {key!r} already exists. If it is for Clerk's organizations, derive its model "
            "from ClerkOrganization, and pass it: ClerkHooks(db, organization_model=Organization). "
            "Otherwise, give the other table another name."
        )
    place: dict[str, Any] = {"__bind_key__": users.metadata.info.get("bind_key")}
    if users.schema is not None:
        place["__table_args__"] = {"schema": users.schema}
    return type(f"Plain{mixin.__name__.removeprefix('Clerk')}", (mixin, db.Model), place)

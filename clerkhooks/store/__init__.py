"""The database: tables, SQL statements, the message log, and queries for operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import sqlalchemy as sa
from sqlalchemy.orm import Mapper

from clerkhooks.clerk.fields import Field
from clerkhooks.clerk.kinds import MEMBERSHIP, ORGANIZATION, USER, Kind, stored_types
from clerkhooks.store.awaited import AwaitedWebhooks, make_awaited_table
from clerkhooks.store.changes import ChangeWriter
from clerkhooks.store.database import Database
from clerkhooks.store.endings import Endings
from clerkhooks.store.leases import Leases, make_leases_table
from clerkhooks.store.memberships import MembershipReader
from clerkhooks.store.models import make_messages_table
from clerkhooks.store.snapshots import make_snapshots, read_columns
from clerkhooks.store.statements import Statements
from clerkhooks.store.user_statements import UserStatements


class OwnTables(NamedTuple):
    """The tables that do not contain Clerk's objects."""

    messages: sa.Table
    leases: sa.Table
    awaited: sa.Table
    changes: sa.Table | None = None


def make_own_tables(metadata: sa.MetaData, schema: str | None) -> OwnTables:
    """
    Return the log of messages, the table of leases, and the table of awaited webhooks.

    Raises:
        ValueError: the name of a table is in use.
    """
    return OwnTables(
        make_messages_table(metadata, schema),
        make_leases_table(metadata, schema),
        make_awaited_table(metadata, schema),
    )


@dataclass(frozen=True)
class OrganizationTables:
    """The optional tables. *fields* are the declared columns of organizations."""

    organizations: sa.Table
    memberships: sa.Table
    fields: dict[sa.Column[Any], Field]


class Store:
    """The tables and SQL statements of one application."""

    def __init__(
        self,
        database: Database,
        mapper: Mapper[Any],
        own: OwnTables,
        fields: dict[sa.Column[Any], Field],
        optional: OrganizationTables | None = None,
    ) -> None:
        """Use the table of *mapper* for users. *fields* are the model's declared columns."""
        self.database, self.messages, self.changes = database, own.messages, own.changes
        dialect = database.dialect
        self._writer = ChangeWriter(own.changes, dialect) if own.changes is not None else None
        self.users = cast("sa.Table", mapper.local_table)
        self.leases = Leases(database, own.leases)
        columns = read_columns(mapper)
        self.statements = UserStatements(
            self.users, own.messages, fields, dialect, columns, self._writer
        )
        self.by_kind: dict[Kind, Statements] = {USER: self.statements}
        """The statements of each stored kind."""
        self.endings: Endings | None = None
        self.memberships: MembershipReader | None = None
        if optional is not None:
            self._add_organizations(optional)
        others = {kind: each.table for kind, each in self.by_kind.items() if kind is not USER}
        self.awaited = AwaitedWebhooks(database, own.awaited, own.messages, others)
        self.stored_types = stored_types(self.by_kind)
        load = self.memberships.read if self.memberships is not None else None
        self.make_snapshot = make_snapshots(mapper, columns, load)

    def _add_organizations(self, tables: OrganizationTables) -> None:
        organizations, memberships = tables.organizations, tables.memberships
        shared = (self.database.dialect, self._writer)
        self.by_kind[ORGANIZATION] = Statements(
            ORGANIZATION, organizations, self.messages, tables.fields, *shared
        )
        self.by_kind[MEMBERSHIP] = Statements(MEMBERSHIP, memberships, self.messages, {}, *shared)
        self.endings = Endings(self.by_kind[MEMBERSHIP], self.users, organizations)
        self.memberships = MembershipReader(self.database, memberships, organizations)

    @property
    def tables(self) -> list[sa.Table]:
        """All tables."""
        kept = (statements.table for statements in self.by_kind.values())
        tables = [*kept, self.messages, self.leases.table, self.awaited.table]
        return tables if self.changes is None else [*tables, self.changes]

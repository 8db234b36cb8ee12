"""The database: tables, SQL statements, the message log, and queries for operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.orm import Mapper

from clerkhooks.clerk.fields import Field
from clerkhooks.clerk.kinds import MEMBERSHIP, ORGANIZATION, USER, Kind, stored_types
from clerkhooks.store.database import Database
from clerkhooks.store.endings import Endings
from clerkhooks.store.memberships import MembershipReader
from clerkhooks.store.snapshots import make_snapshots, read_columns
from clerkhooks.store.statements import Statements
from clerkhooks.store.user_statements import UserStatements


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
        messages: sa.Table,
        fields: dict[sa.Column[Any], Field],
        optional: OrganizationTables | None = None,
    ) -> None:
        """Use the table of *mapper* for users. *fields* are the model's declared columns."""
        self.database, self.messages = database, messages
        self.users = cast("sa.Table", mapper.local_table)
        columns = read_columns(mapper)
        self.statements = UserStatements(self.users, messages, fields, database.dialect, columns)
        self.by_kind: dict[Kind, Statements] = {USER: self.statements}
        """The statements of each stored kind."""
        self.endings: Endings | None = None
        self.memberships: MembershipReader | None = None
        if optional is not None:
            self._add_organizations(optional)
        self.stored_types = stored_types(self.by_kind)
        load = self.memberships.read if self.memberships is not None else None
        self.make_snapshot = make_snapshots(mapper, columns, load)

    def _add_organizations(self, tables: OrganizationTables) -> None:
        organizations, memberships = tables.organizations, tables.memberships
        self.by_kind[ORGANIZATION] = Statements(
            ORGANIZATION, organizations, self.messages, tables.fields, self.database.dialect
        )
        self.by_kind[MEMBERSHIP] = Statements(
            MEMBERSHIP, memberships, self.messages, {}, self.database.dialect
        )
        self.endings = Endings(self.by_kind[MEMBERSHIP], self.users, organizations)
        self.memberships = MembershipReader(self.database, memberships, organizations)

    @property
    def tables(self) -> list[sa.Table]:
        """All tables."""
        return [*(statements.table for statements in self.by_kind.values()), self.messages]

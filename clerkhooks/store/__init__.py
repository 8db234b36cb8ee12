"""The database: tables, SQL statements, the message log, and queries for operators."""

from __future__ import annotations

from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.orm import Mapper

from clerkhooks.clerk.fields import Field
from clerkhooks.clerk.kinds import USER, Kind, stored_types
from clerkhooks.store.database import Database
from clerkhooks.store.snapshots import make_snapshots, read_columns
from clerkhooks.store.statements import Statements
from clerkhooks.store.user_statements import UserStatements


class Store:
    """The tables and SQL statements of one application."""

    def __init__(
        self,
        database: Database,
        mapper: Mapper[Any],
        messages: sa.Table,
        fields: dict[sa.Column[Any], Field],
    ) -> None:
        """Use the table of *mapper* for users. *fields* are the model's declared columns."""
        self.database, self.messages = database, messages
        self.users = cast("sa.Table", mapper.local_table)
        columns = read_columns(mapper)
        self.statements = UserStatements(self.users, messages, fields, database.dialect, columns)
        self.by_kind: dict[Kind, Statements] = {USER: self.statements}
        """The statements of each stored kind."""
        self.stored_types = stored_types(self.by_kind)
        self.make_snapshot = make_snapshots(mapper, columns)

    @property
    def tables(self) -> list[sa.Table]:
        """All tables."""
        return [*(statements.table for statements in self.by_kind.values()), self.messages]

"""The database: tables, SQL statements, the message log, and queries for operators."""

from __future__ import annotations

from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.orm import Mapper

from clerkhooks.clerk.fields import Field
from clerkhooks.store.database import Database
from clerkhooks.store.snapshots import make_snapshots, read_columns
from clerkhooks.store.statements import Statements


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
        self.database, self.messages, self.fields = database, messages, fields
        self.users = cast("sa.Table", mapper.local_table)
        columns = read_columns(mapper)
        self.statements = Statements(self.users, messages, fields, database.dialect, columns)
        self.make_snapshot = make_snapshots(mapper, columns)

"""The database: tables, the SQL that decides, the message log, operators' queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from clerkhooks.clerk.fields import Field
from clerkhooks.store.database import Database
from clerkhooks.store.statements import Statements


@dataclass(frozen=True)
class Store:
    """One application's tables, in its database."""

    database: Database
    users: sa.Table
    messages: sa.Table
    fields: dict[sa.Column[Any], Field]
    statements: Statements

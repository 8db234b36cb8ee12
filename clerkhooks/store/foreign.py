"""Detection of other programs' tables that have the same names as clerkhooks' tables."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from clerkhooks.store.changes import CHANGES, make_changes_table
from clerkhooks.store.models import (
    MEMBERSHIP_COLUMNS,
    MESSAGES,
    ORGANIZATION_COLUMNS,
    OWN_COLUMNS,
    make_messages_table,
)

MAX_COLUMNS = 12  # the maximum number of columns listed in a message
_OTHER_FILE = "Use another file, such as sqlite:////path/to/clerkhooks.db, in DATABASE_URL."
_OTHER_SCHEMA = (
    "Use another database, or a separate schema: run CREATE SCHEMA clerkhooks, and append "
    "{separator}options=-csearch_path%3Dclerkhooks to DATABASE_URL. If a pooler rejects this "
    "option, use a separate role instead: ALTER ROLE name SET search_path = clerkhooks."
)


@dataclass(frozen=True)
class FoundTable:
    """A table with a name that clerkhooks uses. *missing* contains the columns it lacks."""

    name: str
    schema: str | None
    columns: tuple[str, ...]
    missing: frozenset[str]

    def describe(self) -> str:
        """Return a description to append to the name of the database."""
        place = f" in the schema {self.schema}" if self.schema else ""
        listed = ", ".join(self.columns[:MAX_COLUMNS])
        rest = ", …" if len(self.columns) > MAX_COLUMNS else ""
        return (
            f"has a table {self.name}{place} that clerkhooks did not create, with the columns "
            f"{listed}{rest}."
        )

    def remedy(self, url: sa.URL) -> str:
        """Return advice for the database at *url*."""
        is_sqlite = url.get_backend_name() == "sqlite"
        separator = "&" if url.query else "?"
        elsewhere = _OTHER_FILE if is_sqlite else _OTHER_SCHEMA.format(separator=separator)
        if self.missing:
            return elsewhere
        return (
            "If it is a copy of clerkhooks' table, run: flask --app wsgi db stamp head. Otherwise: "
            f"{elsewhere}"
        )


def find_table(connection: sa.Connection) -> FoundTable | None:
    """Return an existing table with one of our names in the current schema, or None."""
    messages = make_messages_table(sa.MetaData(), None)
    return _find(connection, {"users": OWN_COLUMNS, MESSAGES: frozenset(messages.columns.keys())})


def find_optional_table(connection: sa.Connection) -> FoundTable | None:
    """Return an existing table with the name of an optional table of objects, or None."""
    needed = {
        "organizations": ORGANIZATION_COLUMNS,
        "organization_memberships": MEMBERSHIP_COLUMNS,
    }
    return _find(connection, needed)


def find_changes_table(connection: sa.Connection) -> FoundTable | None:
    """Return an existing table with the name of the change feed's table, or None."""
    columns = make_changes_table(sa.MetaData(), None).columns.keys()
    return _find(connection, {CHANGES: frozenset(columns)})


def _find(connection: sa.Connection, needed: dict[str, frozenset[str]]) -> FoundTable | None:
    inspector = sa.inspect(connection)
    schema = None
    if connection.dialect.name == "postgresql":  # tables in other schemas do not conflict
        schema = connection.scalar(sa.select(sa.func.current_schema()))
    for name, own in needed.items():
        if inspector.has_table(name, schema):
            columns = tuple(column["name"] for column in inspector.get_columns(name, schema))
            return FoundTable(name, schema, columns, own.difference(columns))
    return None

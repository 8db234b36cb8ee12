"""Leases: a process holds a name for a short time, and keeps its progress under this name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import sqlalchemy as sa

from clerkhooks.store.columns import to_json
from clerkhooks.store.database import Database

LEASES = "clerk_leases"
MAX_LIFETIME = 60_000  # in milliseconds; a lease that ends later was written by a wrong clock

NOW = {
    "postgresql": "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)",
    "sqlite": "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)",
}
"""The database's clock in milliseconds, by dialect."""

# One statement decides who holds the lease. It needs no session, so it works through any pooler,
# and only the database's clock counts. A lease is also taken if it ends too far in the future,
# because the clock was set back.
_ACQUIRE = """
INSERT INTO {leases} AS t (name, holder, expires_at)
VALUES (:name, :holder, {now} + :lifetime)
ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, expires_at = excluded.expires_at
WHERE t.holder IS NULL OR t.holder = excluded.holder
    OR t.expires_at NOT BETWEEN {now} AND {now} + {max_lifetime}
RETURNING {now} AS now, completed_at, state
"""

_FIND_ALL = "SELECT name, {now} AS now, completed_at, state FROM {leases} ORDER BY name"

_IS_HELD = """
SELECT 1 FROM {leases} WHERE name = :name AND holder IS NOT NULL AND expires_at > {now}
"""

_RELEASE = """
UPDATE {leases} SET holder = NULL WHERE name = :name AND holder = :holder RETURNING name
"""

# Progress is stored until another process takes the lease, even if the lease has expired.
_SAVE = """
UPDATE {leases} SET
    state = :state,
    completed_at = CASE WHEN :completed THEN {now} ELSE completed_at END
WHERE name = :name AND holder = :holder
RETURNING name
"""


class Held(NamedTuple):
    """
    What is stored under the name of a lease.

    Times are in milliseconds by the database's clock. *completed_at* is the end of the last
    complete round. *state* is the progress.
    """

    now: int
    completed_at: int | None
    state: Mapping[str, Any]


def make_leases_table(metadata: sa.MetaData, schema: str | None) -> sa.Table:
    """Return the table of leases. It contains no profile data."""
    return sa.Table(
        LEASES,
        metadata,
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("holder", sa.Text),
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("completed_at", sa.BigInteger),
        sa.Column("state", sa.Text),
        schema=schema,
    )


class Leases:
    """The statements on the table of leases."""

    def __init__(self, database: Database, table: sa.Table) -> None:
        self._database, self.table = database, table
        self._names = {
            "leases": database.dialect.identifier_preparer.format_table(table),
            "now": NOW[database.dialect_name],
            "max_lifetime": str(MAX_LIFETIME),
        }

    def acquire(self, name: str, holder: str, lifetime: float) -> Held | None:
        """Take or renew a lease for *lifetime* seconds. Return None if another holder has it."""
        row = {"name": name, "holder": holder, "lifetime": int(lifetime * 1000)}
        rows = self._database.write(self._text(_ACQUIRE), row)
        return _parse(rows[0]) if rows else None

    def save(self, name: str, holder: str, state: Mapping[str, Any], *, completed: bool) -> bool:
        """Store the progress. Return False if another process has taken over."""
        row = {"state": to_json(state), "completed": completed, "name": name, "holder": holder}
        return bool(self._database.write(self._text(_SAVE), row))

    def release(self, name: str, holder: str) -> None:
        """End the lease, so that another process can take it at once."""
        self._database.write(self._text(_RELEASE), {"name": name, "holder": holder})

    def find(self, name: str) -> Held | None:
        """Return what is stored, or None if no process has ever held the lease."""
        return self.find_all().get(name)

    def find_all(self) -> dict[str, Held]:
        """Return what is stored under each name."""
        rows = self._database.execute(self._text(_FIND_ALL))
        return {row.name: _parse(row) for row in rows}

    def is_held(self, name: str) -> bool:
        """Return whether a process has renewed the lease in time."""
        return bool(self._database.execute(self._text(_IS_HELD), {"name": name}))

    def _text(self, template: str) -> sa.TextClause:
        return sa.text(template.format(**self._names))


def known_fields(cls: type[Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of *state* that are fields of the dataclass *cls* in this release."""
    names = {field.name for field in fields(cls)}
    return {name: value for name, value in state.items() if name in names}


def _parse(row: sa.Row[Any]) -> Held:
    return Held(row.now, row.completed_at, json.loads(row.state or "{}"))

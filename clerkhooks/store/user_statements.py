"""The SQL that only users need: first calls, ``last_seen`` and presence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from clerkhooks.clerk.fields import Field
from clerkhooks.clerk.kinds import NEW_USER, USER
from clerkhooks.store.changes import ChangeWriter
from clerkhooks.store.direct import DirectStatement
from clerkhooks.store.statements import OwnSql, Statements

# A change of which handlers must be told is stored only with :may_bar, which the caller sets.
_MAY_MERGE = """(:may_bar OR (t.banned_at IS NULL AND t.deprovisioned_at IS NULL)
          = (excluded.banned_at IS NULL AND excluded.deprovisioned_at IS NULL))"""

_DIFFERS = """(t.banned_at IS NULL) <> (r.banned_at IS NULL)
    OR (t.deprovisioned_at IS NULL) <> (r.deprovisioned_at IS NULL)
    OR coalesce(t.locked_until > :now, false) <> coalesce(r.locked_until > :now, false)"""

_CREATE_FIRST_SEEN = """
INSERT INTO {table} (id, name, is_online, last_seen, created_at, updated_at)
VALUES (:id, :name, false, :now, :now, :now)
ON CONFLICT (id) DO NOTHING
RETURNING {every_column}
"""

# A locked row is skipped, because an update of last_seen can wait for the next call.
_MOVE_LAST_SEEN = """
UPDATE {table} SET last_seen = :now
WHERE id = (
    SELECT id FROM {table}
    WHERE id = :id AND deleted_at IS NULL AND last_seen <= :before {skip_locked})
RETURNING {every_column}
"""

_SET_PRESENCE = """
UPDATE {table} SET is_online = :is_online
WHERE id = :id AND deleted_at IS NULL
RETURNING {every_column}
"""

_SELECT = """
SELECT {every_column_of_t} FROM ({id_rows}) AS r JOIN {table_of_r} ON t.id = r.id
"""


class UserStatements(Statements):
    """The statements for the table of users. *columns* are returned for a user."""

    own = OwnSql(
        values={"is_online": "false", "last_seen": ":now"},
        changes={"is_online": "t.is_online AND excluded.deleted_at IS NULL"},
        erased={"is_online": "false"},
        differs=_DIFFERS,
        may_merge=_MAY_MERGE,
    )

    def __init__(
        self,
        users: sa.Table,
        messages: sa.Table,
        fields: Mapping[sa.Column[Any], Field],
        dialect: sa.Dialect,
        columns: Sequence[sa.Column[Any]],
        changes: ChangeWriter | None = None,
    ) -> None:
        super().__init__(USER, users, messages, fields, dialect, changes)
        names = [self._quote(column.name) for column in columns]
        every = ", ".join(names)
        skip_locked = "FOR UPDATE SKIP LOCKED" if self._is_postgresql else ""
        every_of_t = ", ".join(f"t.{name}" for name in names)
        select = self.text(_SELECT, every_column_of_t=every_of_t).columns(*columns)
        self.select = DirectStatement(select, dialect)
        self.create_first_seen = self.text(_CREATE_FIRST_SEEN, every_column=every).columns(*columns)
        self.move_last_seen = self.text(
            _MOVE_LAST_SEEN, every_column=every, skip_locked=skip_locked
        ).columns(*columns)
        self.set_presence = self.text(_SET_PRESENCE, every_column=every).columns(*columns)

    def create(
        self, connection: sa.Connection, user_id: str, now: datetime
    ) -> Sequence[sa.Row[Any]]:
        """Create the row of a user whose call came before any event. Return it if it is new."""
        row = {"id": user_id, "name": NEW_USER, "now": now}
        created = connection.execute(self.create_first_seen, row).all()
        if self.changes is not None and created:
            after = dict.fromkeys(self.state) | {"id": user_id, "name": NEW_USER}
            self.changes.record(self, connection, [(None, after)])
        return created

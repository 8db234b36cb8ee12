"""
Memberships whose organization or user was deleted.

A deletion ends memberships, and a membership that arrives after the deletion is ended as well. Two
concurrent transactions could each miss the other's rows: the deletion would not see the new
membership, and the membership would not see the deletion. On PostgreSQL, both therefore take an
advisory lock on the ids of the organization and the user, which need not have rows. SQLite has one
writer at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from zlib import crc32

import sqlalchemy as sa

from clerkhooks.clerk.events import ReceivedEvent
from clerkhooks.clerk.kinds import MEMBERSHIP, ORGANIZATION, USER, Kind
from clerkhooks.store.columns import to_json
from clerkhooks.store.postgresql import LOCK_TIMEOUT
from clerkhooks.store.statements import Statements

# Ids share locks, because a page of a sync has up to a thousand ids, and the server's memory for
# locks may have space for only a few thousand.
LOCKS = 64
_LOCK_CLASS = "72331902"  # arbitrary, but the same in every release
MAX_ENDED = 5000  # memberships per statement, because a statement may take 3 s
_IS_NOT_FINAL = "t.deleted_at IS NULL OR t.version_updated_at IS NOT NULL"

_LOCK = """
SELECT {lock}({lock_class}, number)
FROM (SELECT set_config('lock_timeout', :lock_timeout, true) OFFSET 0) AS limits,
    (SELECT r.number FROM json_to_recordset(CAST(:rows AS json)) AS r (number integer)
     ORDER BY r.number OFFSET 0) AS numbers  -- one order, so that two writers never deadlock
"""

_FIND_MEMBERS = """
SELECT t.id FROM ({id_rows}) AS r JOIN {members_of_r} ON t.{key} = r.id
WHERE {condition}
ORDER BY t.id LIMIT :most
"""

_FIND_ORPHANS = """
SELECT t.id, t.version_updated_at, t.deleted_at IS NULL AS is_live,
    u.deleted_at IS NOT NULL AS user_deleted, u.version_updated_at AS user_version,
    o.deleted_at IS NOT NULL AS organization_deleted, o.version_updated_at AS organization_version
FROM ({id_rows}) AS r
    JOIN {table_of_r} ON t.id = r.id
    LEFT JOIN {users} ON u.id = t.user_id
    LEFT JOIN {organizations} ON o.id = t.organization_id
WHERE ({is_not_final}) AND (u.deleted_at IS NOT NULL OR o.deleted_at IS NOT NULL)
"""


class Endings:
    """Ends the memberships of deleted organizations and users, in the caller's transaction."""

    def __init__(self, memberships: Statements, users: sa.Table, organizations: sa.Table) -> None:
        self._memberships = memberships
        text, lookup = memberships.text, memberships.lookup
        self._locks = {
            is_exclusive: text(_LOCK, lock=lock, lock_class=_LOCK_CLASS)
            for is_exclusive, lock in (
                (True, "pg_advisory_xact_lock"),
                (False, "pg_advisory_xact_lock_shared"),
            )
        }
        found_gone = "t.deleted_at IS NULL AND t.version_updated_at <= :found_at"
        self._find_members = {
            (kind, is_final): text(
                _FIND_MEMBERS,
                key=key,
                members_of_r=lookup("t", memberships.table, "r.id", key),
                condition=_IS_NOT_FINAL if is_final else found_gone,
            )
            for kind, key in ((USER, "user_id"), (ORGANIZATION, "organization_id"))
            for is_final in (True, False)
        }
        self._find_orphans = text(
            _FIND_ORPHANS,
            users=lookup("u", users, "t.user_id"),
            organizations=lookup("o", organizations, "t.organization_id"),
            is_not_final=_IS_NOT_FINAL,
        )

    def concerns(self, event: ReceivedEvent) -> bool:
        """Return whether *event* may end memberships, or is about one that may have to end."""
        return event.kind is not None and event.is_deletion == (event.kind is not MEMBERSHIP)

    def lock(
        self, connection: sa.Connection, events: Iterable[ReceivedEvent], lock_timeout: str
    ) -> None:
        """Lock the organizations and users of *events*, which are of one kind."""
        concerned = [event for event in events if self.concerns(event)]
        if concerned and concerned[0].is_deletion:
            ids = [str(event.id) for event in concerned]
            self.lock_deleted(connection, ids, lock_timeout)
        elif concerned:
            self.lock_parents(connection, [event.values for event in concerned], lock_timeout)

    def lock_deleted(
        self, connection: sa.Connection, ids: Iterable[str], lock_timeout: str = LOCK_TIMEOUT
    ) -> None:
        """Lock deleted organizations or users. Memberships of others may be written meanwhile."""
        self._lock(connection, ids, lock_timeout, is_exclusive=True)

    def lock_parents(
        self,
        connection: sa.Connection,
        memberships: Iterable[Mapping[str, Any]],
        lock_timeout: str = LOCK_TIMEOUT,
    ) -> None:
        """Lock the organizations and users of *memberships*, which are column values."""
        ids = (values[name] for values in memberships for name in MEMBERSHIP.fixed)
        self._lock(connection, filter(None, ids), lock_timeout, is_exclusive=False)

    def end_after(
        self, connection: sa.Connection, events: Iterable[ReceivedEvent], now: datetime
    ) -> None:
        """End the memberships that must end after *events*, which are of one kind and applied."""
        concerned = [event for event in events if self.concerns(event)]
        if not concerned:
            return
        kind, ids = concerned[0].kind, [str(event.id) for event in concerned]
        if kind is MEMBERSHIP:
            self.end_orphans(connection, ids, now)
        elif kind is not None:
            self.end_members(connection, kind, ids, now)

    def end_members(
        self,
        connection: sa.Connection,
        kind: Kind,
        ids: Sequence[str],
        now: datetime,
        found_at: int | None = None,
    ) -> None:
        """
        End the memberships of deleted organizations or users.

        If a sync did not find the objects at *found_at* (milliseconds), memberships with a later
        version are left, and later evidence restores the others.
        """
        find = self._find_members[kind, found_at is None]
        rows = {"rows": to_json([{"id": each} for each in ids]), "found_at": found_at}
        is_done = False
        while not is_done and (
            found := connection.scalars(find, {**rows, "most": MAX_ENDED}).all()
        ):
            # The statement leaves rows that seem to be from the future.
            is_done = self._end(connection, found, now, found_at) < len(found)

    def end_orphans(
        self,
        connection: sa.Connection,
        ids: Iterable[str],
        now: datetime,
        *,
        by_sync: bool = False,
    ) -> None:
        """
        End the memberships with these *ids* whose organization or user was deleted.

        With *by_sync*, Clerk has just listed the memberships. Then only final tombstones count,
        because an earlier sync may have missed the organization or user.
        """
        rows = to_json([{"id": each} for each in ids])
        ended: dict[int | None, list[str]] = defaultdict(list)
        for row in connection.execute(self._find_orphans, {"rows": rows}).all():
            tombstones = [
                version
                for is_deleted, version in (
                    (row.user_deleted, row.user_version),
                    (row.organization_deleted, row.organization_version),
                )
                if is_deleted
            ]
            if None in tombstones:
                ended[None].append(row.id)
            elif not by_sync and row.is_live and row.version_updated_at <= max(tombstones):
                ended[max(tombstones)].append(row.id)
        for found_at, found in ended.items():
            self._end(connection, found, now, found_at)

    def _end(
        self, connection: sa.Connection, ids: Sequence[str], now: datetime, found_at: int | None
    ) -> int:
        """End the memberships with these *ids*, and return how many were ended."""
        rows = {"rows": to_json([{"id": each} for each in ids]), "now": now}
        write, memberships = self._memberships.write, self._memberships
        if found_at is None:
            return len(write(connection, memberships.end, rows))
        inferred = {"found_at": found_at, "created_before": now + timedelta(days=1)}
        return len(write(connection, memberships.tombstone, rows | inferred))

    def _lock(
        self,
        connection: sa.Connection,
        ids: Iterable[str],
        lock_timeout: str,
        *,
        is_exclusive: bool,
    ) -> None:
        if connection.dialect.name != "postgresql":
            return
        numbers = sorted({crc32(each.encode()) % LOCKS for each in ids})
        rows = to_json([{"number": number} for number in numbers])
        given = {"rows": rows, "lock_timeout": lock_timeout}
        connection.execute(self._locks[is_exclusive], given).all()

"""The changes at Clerk that were found before their webhooks arrived."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple, cast

import sqlalchemy as sa

from clerkhooks.clerk.kinds import Kind
from clerkhooks.store.columns import to_json
from clerkhooks.store.database import Database

AWAITED = "clerk_awaited_webhooks"
MAX_AWAITED = 10_000  # rows; more changes are not recorded
DAY = 86_400_000  # in milliseconds
CLOCK_TOLERANCE = 2000  # in milliseconds; the time of an event may be in whole seconds

_ADD = """
INSERT INTO {awaited} (object_id, changed_at, is_deletion, due_at)
SELECT object_id, changed_at, is_deletion, due_at FROM ({rows}) AS r
WHERE (SELECT count(*) FROM {awaited}) < {max_awaited}
ON CONFLICT (object_id, changed_at) DO NOTHING
RETURNING object_id
"""

# A message about the user, from the time of the change or later, shows that deliveries arrive. It
# may have failed here, or may have come too late to change the row.
_HAS_ARRIVED = """
EXISTS (
    SELECT 1 FROM {messages} AS m
    WHERE m.clerk_user_id = a.object_id AND (
        m.event_type = 'user.deleted'
        OR (m.event_type LIKE 'user.%' AND NOT a.is_deletion
            AND {occurred_at} >= a.changed_at - {tolerance})))
"""

# The log has no index for organizations and memberships, but the row has the id of the message that
# wrote it. A final tombstone has no version. A failed message counts as arrived.
_HAS_ARRIVED_BY_ROW = """
(a.object_id LIKE '{prefix}!_%' ESCAPE '!' AND (
    EXISTS (
        SELECT 1 FROM {table} AS t
        WHERE t.id = a.object_id AND (
            (NOT a.is_deletion AND t.version_message_id <> ''
                AND t.version_updated_at >= a.changed_at)
            OR (t.deleted_at IS NOT NULL AND t.version_updated_at IS NULL)))
    OR EXISTS (
        SELECT 1 FROM {messages} AS m
        WHERE m.outcome = 'failed' AND m.clerk_object_id = a.object_id)))
"""

_DELETE = """
DELETE FROM {awaited} AS a WHERE a.due_at <= :now - {day} OR {has_arrived} RETURNING object_id
"""

# After an outage, Svix's next attempt may be a long time away. No pause of its schedule is longer
# than five times the time since the first attempt, plus the grace.
_POSTPONE = """
UPDATE {awaited} SET due_at = {greatest}(
    due_at, {least}(:now + 5 * (:now - changed_at) + :grace, changed_at + {day}))
WHERE due_at > :since
RETURNING object_id
"""

# A webhook may have arrived since the last round deleted the rows of those that had arrived.
_COUNT = """
SELECT count(*), count(missed_at), min(missed_at), max(missed_at) FROM (
    SELECT CASE WHEN due_at > :now - {day} AND due_at <= :now THEN
        CASE WHEN {has_arrived} THEN NULL ELSE changed_at END END AS missed_at
    FROM {awaited} AS a) AS counted
"""

_POSTGRESQL = {
    "occurred_at": "extract(epoch FROM coalesce(m.occurred_at, m.received_at)) * 1000",
    "least": "least",
    "greatest": "greatest",
    "rows": """
    SELECT * FROM json_to_recordset(CAST(:rows AS json))
    AS r (object_id text, changed_at bigint, is_deletion boolean, due_at bigint)""",
}
_SQLITE = {
    "occurred_at": "(julianday(coalesce(m.occurred_at, m.received_at)) - 2440587.5) * 86400000",
    "least": "min",
    "greatest": "max",
    "rows": """
    SELECT json_extract(value, '$.object_id') AS object_id,
        json_extract(value, '$.changed_at') AS changed_at,
        json_extract(value, '$.is_deletion') AS is_deletion,
        json_extract(value, '$.due_at') AS due_at
    FROM json_each(:rows)""",
}


class Missed(NamedTuple):
    """
    The recorded changes, and those *missed*: their webhooks became overdue in the last day.

    The first and the last of these changes were made at *since* and *last*.
    """

    recorded: int
    missed: int
    since: datetime | None
    last: datetime | None


def make_awaited_table(metadata: sa.MetaData, schema: str | None) -> sa.Table:
    """Return the table of awaited webhooks. It contains ids and times, but no profile data."""
    return sa.Table(
        AWAITED,
        metadata,
        sa.Column("object_id", sa.Text, primary_key=True),
        sa.Column("changed_at", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("is_deletion", sa.Boolean, nullable=False),
        sa.Column("due_at", sa.BigInteger, nullable=False),
        schema=schema,
    )


class AwaitedWebhooks:
    """The statements on the table of awaited webhooks. Times are in milliseconds."""

    def __init__(
        self,
        database: Database,
        table: sa.Table,
        messages: sa.Table,
        others: Mapping[Kind, sa.Table],
    ) -> None:
        """Use the log of *messages*. *others* are the tables of kinds other than users."""
        self._database, self.table = database, table
        format_table = database.dialect.identifier_preparer.format_table
        self._names = {
            **(_SQLITE if database.dialect_name == "sqlite" else _POSTGRESQL),
            "awaited": format_table(table),
            "messages": format_table(messages),
            "max_awaited": str(MAX_AWAITED),
            "day": str(DAY),
            "tolerance": str(CLOCK_TOLERANCE),
        }
        arrived = [_HAS_ARRIVED.format(**self._names)] + [
            _HAS_ARRIVED_BY_ROW.format(
                **self._names, table=format_table(other), prefix=kind.id_prefix
            )
            for kind, other in others.items()
        ]
        self._names["has_arrived"] = f"({' OR '.join(arrived)})"

    def add(self, changes: Iterable[Mapping[str, Any]]) -> None:
        """Record *changes*, which have the columns of the table as keys."""
        self._write(_ADD, {"rows": to_json(list(changes))})

    def delete_arrived(self) -> None:
        """Forget the changes that messages have announced, and those from over a day ago."""
        self._write(_DELETE, {"now": now_ms()})

    def postpone(self, grace: int, since: int) -> None:
        """Give more time to webhooks that were due at *since* or later."""
        self._write(_POSTPONE, {"now": now_ms(), "grace": grace, "since": since})

    def count(self) -> Missed:
        """Count the recorded changes, and those whose webhooks are missed."""
        rows = self._database.execute(self._text(_COUNT), {"now": now_ms()})
        recorded, missed, since, last = cast("tuple[int, int, int | None, int | None]", rows[0])
        return Missed(recorded, missed, _moment(since), _moment(last))

    def _write(self, template: str, parameters: Mapping[str, Any]) -> None:
        self._database.write(self._text(template), parameters)

    def _text(self, template: str) -> sa.TextClause:
        return sa.text(template.format(**self._names))


def now_ms() -> int:
    """Return this machine's time in milliseconds."""
    return int(time.time() * 1000)


def _moment(milliseconds: int | None) -> datetime | None:
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)

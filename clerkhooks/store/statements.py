"""
The SQL that reads and writes users, and decides which of two versions wins.

The comparison is part of the statement, so there is no race between reading and writing. SQLite
and PostgreSQL share most of the SQL, but read rows from a JSON parameter in different ways.
Placeholders such as ``{users}`` are replaced once for each application. The names are quoted for
the application's dialect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from clerkhooks.clerk.account import ACCOUNT, AccountState
from clerkhooks.clerk.events import LAST_MILLISECOND, Profile
from clerkhooks.clerk.fields import Field
from clerkhooks.store.columns import make_encoder, to_json
from clerkhooks.store.models import VERSION_COLUMNS, UTCDateTime

DELETED_USER = Profile("Deleted User")
PROFILE = ("email", "name", "image_url")
_MESSAGE = ("message_id", "event_type", "outcome", "occurred_at")
_TIMES = ("now", "before", "occurred_at", "created_before")

# Clerk never reuses an id, so a tombstone from user.deleted is final. A tombstone from a sync has a
# version, which contains the time of the sync. Newer data from Clerk restores the user.
_UPSERT_USERS = """
INSERT INTO {users} AS u
    (id, {kept}, is_online, last_seen, created_at, updated_at, deleted_at, {version})
SELECT id, {kept}, false, :now, :now, :now, deleted_at, {version}
FROM r
WHERE {is_new}
ORDER BY id  -- one order in every transaction, so that two writers never deadlock
ON CONFLICT (id) DO UPDATE SET
    {kept_from_excluded},
    is_online = u.is_online AND excluded.deleted_at IS NULL,
    updated_at = excluded.updated_at,
    deleted_at = excluded.deleted_at,
    {version_from_excluded}
WHERE (u.deleted_at IS NULL OR u.version_updated_at IS NOT NULL) AND ({wins})
RETURNING id
"""

# A redelivered message neither waits for the user's row nor locks it. This condition uses count(*),
# because PostgreSQL might turn EXISTS into a join that reads the whole log.
_IS_NEW = """id IS NOT NULL AND (
        SELECT count(*) FROM {messages} AS m
        WHERE m.message_id = r.message_id AND m.outcome <> 'failed') = 0"""

_EVENT_WINS = """
        excluded.deleted_at IS NOT NULL
        OR u.version_updated_at IS NULL
        OR (u.version_updated_at, u.version_timestamp, u.version_message_id)
         < (excluded.version_updated_at, excluded.version_timestamp, excluded.version_message_id)"""

# If the Backend API returns a user, the user exists, even if an earlier sync wrote a tombstone. A
# change of which handlers must be told is written only with :may_bar, which the caller sets.
_SNAPSHOT_WINS = f"""(u.deleted_at IS NOT NULL OR {_EVENT_WINS})
        AND (:may_bar OR (u.banned_at IS NULL AND u.deprovisioned_at IS NULL)
          = (excluded.banned_at IS NULL AND excluded.deprovisioned_at IS NULL))"""

# Each message is processed once. The retry of a failed message updates its row.
_RECORD_MESSAGES = """
INSERT INTO {messages} AS m
    (message_id, event_type, clerk_user_id, outcome, attempts,
     occurred_at, received_at, processed_at)
SELECT message_id, event_type, id, {outcome}, 1, occurred_at, :now, :now
FROM r
WHERE true
ORDER BY message_id
ON CONFLICT (message_id) DO UPDATE SET
    outcome = excluded.outcome, attempts = m.attempts + 1, processed_at = excluded.processed_at,
    error = NULL
WHERE m.outcome = 'failed'
RETURNING message_id, outcome
"""

_APPLY_ON_POSTGRESQL = """
WITH r AS (
    -- The lock timeout is set here, for this transaction only, without another round trip.
    SELECT r.* FROM (SELECT set_config('lock_timeout', :lock_timeout, true)) AS limits,
        json_to_recordset(CAST(:rows AS json)) AS r ({typed_columns})),
changed AS ({upsert_users})
{record_messages}
"""

_RECORD_FAILURE = """
INSERT INTO {messages} AS m
    (message_id, event_type, clerk_user_id, outcome, attempts, occurred_at, received_at, error)
VALUES (:message_id, :event_type, :user_id, 'failed', 1, :occurred_at, :now, :error)
ON CONFLICT (message_id) DO UPDATE SET attempts = m.attempts + 1, error = excluded.error
WHERE m.outcome = 'failed'
RETURNING message_id
"""

_CREATE_FIRST_SEEN = """
INSERT INTO {users} (id, name, is_online, last_seen, created_at, updated_at)
VALUES (:id, :name, false, :now, :now, :now)
ON CONFLICT (id) DO NOTHING
RETURNING {every_column}
"""

# A locked row is skipped, because an update of last_seen can wait for the next call.
_MOVE_LAST_SEEN = """
UPDATE {users} SET last_seen = :now
WHERE id = (
    SELECT id FROM {users}
    WHERE id = :id AND deleted_at IS NULL AND last_seen <= :before {skip_locked})
RETURNING {every_column}
"""

_SET_PRESENCE = """
UPDATE {users} SET is_online = :is_online
WHERE id = :id AND deleted_at IS NULL
RETURNING {every_column}
"""

_SELECT = """
SELECT {every_column_of_u} FROM ({id_rows}) AS r JOIN {users_of_r} ON u.id = r.id
"""

# Rows that already have Clerk's newest version are left out, unless a declared column is NULL, or
# the account state differs: Clerk does not document that every change of it moves updated_at.
_COMPARE = """
SELECT r.id AS sought, {state_of_u}
FROM ({version_rows}) AS r LEFT JOIN {users_of_r} ON u.id = r.id
WHERE (u.version_updated_at = r.version_updated_at) IS NOT TRUE
    OR u.deleted_at IS NOT NULL
    OR (u.banned_at IS NULL) <> (r.banned_at IS NULL)
    OR (u.deprovisioned_at IS NULL) <> (r.deprovisioned_at IS NULL)
    OR coalesce(u.locked_until > :now, false) <> coalesce(r.locked_until > :now, false)
    {or_declared_is_null}
"""
# The subquery looks up each id in the index. Without OFFSET, a connection might keep a query plan
# that was made for a small table, and scan the whole table after it has grown.
_USERS_OF_R_ON_POSTGRESQL = "LATERAL (SELECT * FROM {users} AS u WHERE u.id = r.id OFFSET 0) AS u"

# A newly declared column is NULL even in rows that already have Clerk's newest version.
_FILL_DECLARED = """
WITH r AS ({snapshot_rows})
UPDATE {users} AS u SET {declared_from_r}, updated_at = :now
FROM r
WHERE u.id = r.id AND u.deleted_at IS NULL AND u.version_updated_at = r.version_updated_at
    AND ({declared_is_missing})
RETURNING {updated}
"""

# The tombstone ranks above every update before the sync. A later event restores the user.
_TOMBSTONE = """
UPDATE {users} SET
    {erased}, name = '{deleted_user}', is_online = false, deleted_at = :now, updated_at = :now,
    version_updated_at = :found_at, version_timestamp = {last_millisecond}, version_message_id = ''
WHERE id IN (
    SELECT id FROM {users}
    WHERE id IN (SELECT id FROM ({id_rows}) AS r)
        AND deleted_at IS NULL AND created_at < :created_before
        AND (version_updated_at IS NULL OR version_updated_at <= :found_at)
    ORDER BY id {for_update})
RETURNING id
"""


class Statements:
    """
    The statements for one application's tables, in one dialect.

    *columns* are the columns that statements return for a user. The parameter ``rows`` is a JSON
    array of objects. Their keys are column names. The array contains each user and each message at
    most once. Times must be timezone-aware.
    """

    def __init__(
        self,
        users: sa.Table,
        messages: sa.Table,
        fields: Mapping[sa.Column[Any], Field],
        dialect: sa.Dialect,
        columns: Sequence[sa.Column[Any]],
    ) -> None:
        self.users, self.fields, self.dialect, self.columns = users, fields, dialect, columns
        self.kept = (*PROFILE, *ACCOUNT, *(column.name for column in fields))
        self._types = {column.name: column.type for column in (*messages.c, *users.c)}
        written = (*self._state, *_MESSAGE)
        encoders = {name: make_encoder(self._types[name], dialect) for name in written}
        self._encoders = {name: encoder for name, encoder in encoders.items() if encoder}
        self._is_postgresql = dialect.name == "postgresql"
        names = self._names(messages)
        became = "CASE WHEN id IN (SELECT id FROM changed) THEN 'applied' ELSE 'stale' END"
        outcome = f"coalesce(outcome, {became})" if self._is_postgresql else "outcome"
        upsert = _UPSERT_USERS.format(**names, is_new=_IS_NEW.format(**names), wins=_EVENT_WINS)
        merge = _UPSERT_USERS.format(**names, is_new="true", wins=_SNAPSHOT_WINS)
        record = _RECORD_MESSAGES.format(**names, outcome=outcome)

        self.apply = self._text(
            _APPLY_ON_POSTGRESQL, names, upsert_users=upsert, record_messages=record
        )
        """Apply events and record messages, with a ``lock_timeout``. PostgreSQL only."""
        self.upsert_users = self._text("WITH r AS ({event_rows})" + upsert, names)
        self.record_messages = self._text("WITH r AS ({event_rows})" + record, names)
        """The same in two steps, for SQLite, which has no data-modifying CTEs."""
        self.merge_snapshots = self._text("WITH r AS ({snapshot_rows})" + merge, names)
        state = (sa.column("sought", sa.Text), *(users.c[name] for name in self._state))
        self.compare = self._text(_COMPARE, names).columns(*state)
        """
        Return the state of each row that is missing or may differ from its snapshot.

        The column ``sought`` has the id; ``id`` is NULL if the row is missing.
        """
        self.fill_declared = self._text(_FILL_DECLARED, names) if fields else None
        self.tombstone = self._text(_TOMBSTONE, names)
        self.record_failure = self._text(_RECORD_FAILURE, names)
        self.create_first_seen = self._text(_CREATE_FIRST_SEEN, names).columns(*columns)
        self.select = self._text(_SELECT, names).columns(*columns)
        self.move_last_seen = self._text(_MOVE_LAST_SEEN, names).columns(*columns)
        self.set_presence = self._text(_SET_PRESENCE, names).columns(*columns)

    def encode(self, rows: Iterable[Mapping[str, Any]]) -> str:
        """Encode *rows*, which map column names to values, for the parameter ``rows``."""
        encoded = [dict(row) for row in rows]
        for row in encoded:
            for name, encoder in self._encoders.items():
                if row.get(name) is not None:
                    row[name] = encoder(row[name])
        return to_json(encoded)

    def _names(self, messages: sa.Table) -> dict[str, str]:
        """Return the values of the templates' placeholders."""
        quote = self.dialect.identifier_preparer.quote
        table = self.dialect.identifier_preparer.format_table
        kept = [quote(name) for name in self.kept]
        declared = [quote(column.name) for column in self.fields]
        columns = [quote(column.name) for column in self.columns]
        return {
            "users": table(self.users),
            "messages": table(messages),
            "kept": ", ".join(kept),
            "kept_from_excluded": _assign(kept, "excluded.{}"),
            "erased": _assign([name for name in kept if name != "name"], "NULL"),
            "version": ", ".join(VERSION_COLUMNS),
            "version_from_excluded": _assign(VERSION_COLUMNS, "excluded.{}"),
            "declared_from_r": _assign(declared, "coalesce(u.{0}, r.{0})"),
            "declared_is_missing": " OR ".join(
                f"(u.{name} IS NULL AND r.{name} IS NOT NULL)" for name in declared
            ),
            "every_column": ", ".join(columns),
            "every_column_of_u": ", ".join(f"u.{name}" for name in columns),
            "state_of_u": ", ".join(f"u.{quote(name)}" for name in self._state),
            "users_of_r": self._users_of_r(table(self.users)),
            "or_declared_is_null": "".join(f" OR u.{name} IS NULL" for name in declared),
            "version_rows": self._rows(("id", "version_updated_at", *ACCOUNT)),
            "event_rows": self._rows(self._state + _MESSAGE),
            "typed_columns": self._typed(self._state + _MESSAGE),
            "snapshot_rows": self._rows(self._state),
            "id_rows": self._rows(("id",)),
            "deleted_user": DELETED_USER.name,
            "last_millisecond": str(LAST_MILLISECOND),
            "for_update": "FOR UPDATE" if self._is_postgresql else "",
            "skip_locked": "FOR UPDATE SKIP LOCKED" if self._is_postgresql else "",
            "updated": "u.id" if self._is_postgresql else "id",
        }

    def _users_of_r(self, users: str) -> str:
        """Return the table expression that is joined to ``r``: the users table as ``u``."""
        template = _USERS_OF_R_ON_POSTGRESQL if self._is_postgresql else "{users} AS u"
        return template.format(users=users)

    @property
    def _state(self) -> tuple[str, ...]:
        return ("id", *self.kept, "deleted_at", *VERSION_COLUMNS)

    def _rows(self, names: Iterable[str]) -> str:
        """Return a query that reads rows with these columns from the parameter ``rows``."""
        quote = self.dialect.identifier_preparer.quote
        if not self._is_postgresql:
            each = (f"json_extract(value, '$.\"{name}\"') AS {quote(name)}" for name in names)
            return f"SELECT {', '.join(each)} FROM json_each(:rows)"
        return f"SELECT r.* FROM json_to_recordset(CAST(:rows AS json)) AS r ({self._typed(names)})"

    def _typed(self, names: Iterable[str]) -> str:
        quote = self.dialect.identifier_preparer.quote
        return ", ".join(f"{quote(one)} {self._types[one].compile(self.dialect)}" for one in names)

    def _text(self, template: str, names: Mapping[str, str], **more: str) -> sa.TextClause:
        text = sa.text(template.format(**names, **more))
        times = [name for name in _TIMES if name in text._bindparams]
        return text.bindparams(*(sa.bindparam(name, type_=UTCDateTime) for name in times))


def user_columns(profile: Profile, account: AccountState) -> dict[str, Any]:
    """Return the values of the profile and the account state by column name."""
    return {name: getattr(profile, name) for name in PROFILE} | account.columns


def _assign(names: Iterable[str], value: str) -> str:
    """Return the assignments of a SET clause. *value* is a format string for a column name."""
    return ", ".join(f"{name} = {value.format(name)}" for name in names)

"""
The SQL that writes objects from Clerk, and decides which of two versions wins.

The comparison is part of the statement, so there is no race between reading and writing. SQLite
and PostgreSQL share most of the SQL, but read rows from a JSON parameter in different ways.
Placeholders such as ``{table}`` are replaced once for each table. The names are quoted for the
application's dialect.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from clerkhooks.clerk.fields import Field
from clerkhooks.clerk.kinds import MEMBERSHIP, USER, Kind
from clerkhooks.store import sql
from clerkhooks.store.changes import ChangeWriter
from clerkhooks.store.columns import make_encoder, to_json
from clerkhooks.store.database import sqlite_transaction, transaction
from clerkhooks.store.direct import DirectStatement
from clerkhooks.store.models import VERSION_COLUMNS, UTCDateTime

_MESSAGE = ("message_id", "event_type", "outcome", "occurred_at")
_TIMES = ("now", "before", "occurred_at", "created_before")


@dataclass(frozen=True)
class OwnSql:
    """
    The parts of the SQL that only one table needs.

    *values*, *changes* and *erased* map columns that do not come from Clerk to their values in new
    rows, in updated rows and in tombstones. *differs* is the condition that the state of a row
    differs from a snapshot, and *may_merge* a condition for storing a snapshot.
    """

    values: dict[str, str] = field(default_factory=dict)
    changes: dict[str, str] = field(default_factory=dict)
    erased: dict[str, str] = field(default_factory=dict)
    differs: str | None = None
    may_merge: str = "true"


class Statements:
    """
    The statements for one table, in one dialect. *kind* is the kind of its objects.

    *fields* are the declared columns. The parameter ``rows`` is a JSON array of objects. Their keys
    are column names. The array contains each object and each message at most once. Times must be
    timezone-aware. With *changes*, ``write`` and ``transaction`` must be used.
    """

    own = OwnSql()

    def __init__(
        self,
        kind: Kind,
        table: sa.Table,
        messages: sa.Table,
        fields: Mapping[sa.Column[Any], Field],
        dialect: sa.Dialect,
        changes: ChangeWriter | None = None,
    ) -> None:
        self.kind, self.table, self.fields, self.dialect = kind, table, fields, dialect
        self.changes = changes
        self.profile = (*kind.tombstone, *(column.name for column in fields))
        """The columns whose changes the change feed records."""
        self.state = ("id", *self.profile, "deleted_at", *VERSION_COLUMNS)
        self._types = {column.name: column.type for column in (*messages.c, *table.c)}
        encoders = {
            name: make_encoder(self._types[name], dialect) for name in (*self.state, *_MESSAGE)
        }
        self._encoders = {name: encoder for name, encoder in encoders.items() if encoder}
        self._is_postgresql = dialect.name == "postgresql"
        names = self._names = self._make_names(messages)
        became = "CASE WHEN id IN (SELECT id FROM changed) THEN 'applied' ELSE 'stale' END"
        outcome = f"coalesce(outcome, {became})" if self._is_postgresql else "outcome"
        upsert = self._make_upsert(sql.IS_NEW.format(**names), sql.EVENT_WINS)
        snapshot_wins = f"({sql.SNAPSHOT_WINS}) AND {self.own.may_merge}"
        merge = self._make_upsert("true", snapshot_wins, corrects=True)
        record = sql.RECORD_MESSAGES.format(**names, outcome=outcome)
        record_alone = sql.RECORD_MESSAGES.format(**names, outcome="outcome")

        apply = self.text(sql.APPLY_ON_POSTGRESQL, upsert=upsert, record_messages=record)
        self.apply = DirectStatement(apply, dialect)
        """Apply events and record messages, with a ``lock_timeout``. PostgreSQL only."""
        self.upsert = self.text("WITH r AS ({event_rows})" + upsert)
        self.record_messages = self.text("WITH r AS ({event_rows})" + record_alone)
        """
        The same in two steps.

        SQLite has no data-modifying CTEs, and a change feed needs the rows of the first step.
        """
        self.merge_snapshots = self.text("WITH r AS ({snapshot_rows})" + merge)
        compared = (sa.column("sought", sa.Text), *(table.c[name] for name in self.state))
        self.compare = self.text(sql.COMPARE).columns(*compared)
        """
        Return the state of each row that is missing or may differ from its snapshot.

        The column ``sought`` has the id; ``id`` is NULL if the row is missing.
        """
        self.fill_declared = self.text(sql.FILL_DECLARED) if fields else None
        self.tombstone = self.text(sql.TOMBSTONE, **sql.INFERRED)
        """Write tombstones for objects that a sync did not find at the time ``found_at``."""
        self.end = self.text(sql.TOMBSTONE, **sql.FINAL)
        """Write final tombstones, like those of deletion events."""
        self.record_failure = self.text(sql.RECORD_FAILURE)
        is_new = sql.IS_NEW.format(**names)
        self._lock = self.text(sql.LOCK)
        self._lock_for_events = self.text(sql.LOCK_FOR_EVENTS, is_new=is_new)

    @property
    def is_atomic(self) -> bool:
        """Whether PostgreSQL applies events in one statement, with ``apply``."""
        return self._is_postgresql and self.changes is None

    def transaction(self, connection: sa.Connection) -> AbstractContextManager[None]:
        """Begin a transaction if a write needs several statements."""
        return (sqlite_transaction if self.changes is None else transaction)(connection)

    def write(
        self,
        connection: sa.Connection,
        statement: sa.TextClause,
        parameters: Mapping[str, Any],
        created: Collection[str] = (),
    ) -> Sequence[sa.Row[Any]]:
        """
        Execute *statement*, record its changes if there is a change feed, and return its rows.

        The id is the first column. *created* are rows that this transaction inserted before.
        """
        if self.changes is None:
            return connection.execute(statement, parameters).all()
        return self.changes.write(self, connection, statement, parameters, created)

    def lock_for(self, statement: sa.TextClause) -> sa.TextClause:
        """Return the query that locks and returns the rows that *statement* may write."""
        return self._lock_for_events if statement is self.upsert else self._lock

    def inserts(self, statement: sa.TextClause) -> bool:
        """Return whether *statement* inserts missing rows."""
        return statement in (self.upsert, self.merge_snapshots)

    def encode(self, rows: Iterable[Mapping[str, Any]]) -> str:
        """Encode *rows*, which map column names to values, for the parameter ``rows``."""
        encoded = [dict(row) for row in rows]
        for row in encoded:
            for name, encoder in self._encoders.items():
                if row.get(name) is not None:
                    row[name] = encoder(row[name])
        return to_json(encoded)

    def text(self, template: str, **more: str) -> sa.TextClause:
        """Return the statement that *template* describes. *more* are additional placeholders."""
        text = sa.text(template.format(**self._names, **more))
        times = [name for name in _TIMES if name in text._bindparams]
        return text.bindparams(*(sa.bindparam(name, type_=UTCDateTime) for name in times))

    def lookup(
        self, alias: str, table: sa.Table, key: str, column: str = "id", end: str | None = None
    ) -> str:
        """
        Return the table expression to join as *alias*, ``ON {alias}.{column} = {key}``.

        On PostgreSQL, the subquery looks up each id in the index. Without OFFSET, a connection
        might keep a query plan that was made for a small table, and scan the whole table after it
        has grown.
        """
        name = self.dialect.identifier_preparer.format_table(table)
        if not self._is_postgresql:
            return f"{name} AS {alias}"
        end = end or "OFFSET 0"
        rows = f"SELECT * FROM {name} AS {alias} WHERE {alias}.{column} = {key} {end}"
        return f"LATERAL ({rows}) AS {alias}"

    def _make_names(self, messages: sa.Table) -> dict[str, str]:
        """Return the values of the templates' placeholders."""
        format_table, own = self.dialect.identifier_preparer.format_table, self.own
        declared = [self._quote(column.name) for column in self.fields]
        null = "CAST(NULL AS TEXT)"
        return {
            "table": format_table(self.table),
            "messages": format_table(messages),
            "columns": ", ".join(map(self._quote, self.state)),
            "own_columns": "".join(f", {name}" for name in own.values),
            "own_values": "".join(f", {value}" for value in own.values.values()),
            "erased": _assign(self._erased() | own.erased),
            "user_id": {USER: "id", MEMBERSHIP: "user_id"}.get(self.kind, null),
            "object_id": null if self.kind is USER else "id",
            "state_differs": own.differs or self._state_differs(),
            "declared_from_r": _assign(
                {each: f"coalesce(t.{each}, r.{each})" for each in declared}
            ),
            "declared_is_missing": " OR ".join(
                f"(t.{name} IS NULL AND r.{name} IS NOT NULL)" for name in declared
            ),
            "or_declared_is_null": "".join(f" OR t.{name} IS NULL" for name in declared),
            "state_of_t": ", ".join(f"t.{self._quote(name)}" for name in self.state),
            "table_of_r": self.lookup("t", self.table, "r.id"),
            "compared_rows": self._rows(("id", "version_updated_at", *self.kind.state)),
            "event_rows": self._rows(self.state + _MESSAGE),
            "typed_columns": self._typed(self.state + _MESSAGE),
            "snapshot_rows": self._rows(self.state),
            "id_rows": self._rows(("id",)),
            "for_update": "FOR UPDATE" if self._is_postgresql else "",
            **self._make_names_of_feed(),
        }

    def _make_names_of_feed(self) -> dict[str, str]:
        """Return the placeholders that depend on whether there is a change feed."""
        is_guarded = self._is_postgresql and self.changes is not None
        returned = ("id",) if self.changes is None else self.state
        quoted = [self._quote(name) for name in returned]
        prefix = "t." if self._is_postgresql else ""
        lock = "FOR NO KEY UPDATE" if self._is_postgresql else None
        return {
            "returned": ", ".join(quoted),
            "updated": ", ".join(f"{prefix}{name}" for name in quoted),
            "if_known": sql.IS_KNOWN if is_guarded else "",
            "end_if": ")" if is_guarded else "",
            "message_rows": self._limited(self._rows(("id", "message_id"))),
            "locked_table_of_r": self.lookup("t", self.table, "r.id", end=lock),
            "offset": "OFFSET 0" if self._is_postgresql else "",
        }

    def _make_upsert(self, is_new: str, wins: str, *, corrects: bool = False) -> str:
        """
        Return the statement that inserts rows, or updates them if the condition *wins* holds.

        At Clerk, fixed columns never change, but an event may lack some of them. If events
        disagree, the greatest values are kept, so the result does not depend on the order of the
        events. If the statement *corrects* them, the values of a winning row replace them.
        """
        may_change = has_won = f"(NOT ({sql.IS_FINAL}) AND ({wins}))"
        changes = {name: f"excluded.{name}" for name in map(self._quote, self.state[1:])}
        if self.kind.fixed:
            may_fix = self._make_may_fix(has_won if corrects else "false")
            changes = {
                name: f"CASE WHEN {may_fix if name in self.kind.fixed else has_won} "
                f"THEN {value} ELSE t.{name} END"
                for name, value in changes.items()
            }
            may_change = f"({has_won} OR {may_fix})"
        changes |= self.own.changes
        rest = {"changes": _assign(changes), "may_change": may_change}
        return sql.UPSERT.format(**self._names, is_new=is_new, **rest)

    def _make_may_fix(self, corrects: str) -> str:
        """Return the condition for writing fixed columns. *corrects* is another condition."""
        collation = 'COLLATE "C"' if self._is_postgresql else ""
        new, old = (
            ", ".join(f"coalesce({alias}.{name}, '') {collation}" for name in self.kind.fixed)
            for alias in ("excluded", "t")
        )
        are_known = " AND ".join(f"excluded.{name} IS NOT NULL" for name in self.kind.fixed)
        return f"(({new}) > ({old}) OR ({corrects} AND {are_known}))"

    def _erased(self) -> dict[str, str]:
        """Return the values of a tombstone, except fixed columns."""
        declared = dict.fromkeys(self._quote(column.name) for column in self.fields)
        values = {**self.kind.tombstone, **declared}
        return {
            name: "NULL" if value is None else f"'{value}'"
            for name, value in values.items()
            if name not in self.kind.fixed
        }

    def _state_differs(self) -> str:
        differs = "IS DISTINCT FROM" if self._is_postgresql else "IS NOT"
        return " OR ".join(f"t.{name} {differs} r.{name}" for name in self.kind.state)

    def _quote(self, name: str) -> str:
        return str(self.dialect.identifier_preparer.quote(name))

    def _rows(self, names: Iterable[str]) -> str:
        """Return a query that reads rows with these columns from the parameter ``rows``."""
        if not self._is_postgresql:
            each = (f"json_extract(value, '$.\"{name}\"') AS {self._quote(name)}" for name in names)
            return f"SELECT {', '.join(each)} FROM json_each(:rows)"
        return f"SELECT r.* FROM json_to_recordset(CAST(:rows AS json)) AS r ({self._typed(names)})"

    def _limited(self, rows: str) -> str:
        """Make the query *rows* set the lock timeout of its transaction, as ``apply`` does."""
        limits = "(SELECT set_config('lock_timeout', :lock_timeout, true)) AS limits"
        return rows.replace(" FROM ", f" FROM {limits}, ") if self._is_postgresql else rows

    def _typed(self, names: Iterable[str]) -> str:
        """Return the definitions of these columns."""
        types = {name: self._types[name].compile(self.dialect) for name in names}
        return ", ".join(f"{self._quote(name)} {type_}" for name, type_ in types.items())


def _assign(values: Mapping[str, str]) -> str:
    """Return the assignments of a SET clause, by column."""
    return ", ".join(f"{name} = {value}" for name, value in values.items())

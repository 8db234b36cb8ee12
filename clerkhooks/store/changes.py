"""
The change feed: one row for each change of a user, an organization or a membership.

A change and its row are in one transaction. Before a statement writes, its rows are locked and
read, so the old values are those that it replaces.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import sqlalchemy as sa

from clerkhooks.clerk.account import is_barred
from clerkhooks.store.columns import to_json
from clerkhooks.store.models import UTCDateTime
from clerkhooks.store.postgresql import LOCK_TIMEOUT

if TYPE_CHECKING:
    from clerkhooks.store.statements import Statements

CHANGES = "user_changes"
CHANNEL = "clerkhooks_changes"
"""The name for PostgreSQL's LISTEN."""
ChangeKind = Literal["created", "filled", "updated", "deleted", "barred", "restored", "revived"]
PRUNED = "pruned"
"""The kind of the row that replaces all pruned rows. It is the last of them."""
Values = Mapping[str, Any]
MAX_TRIES = 3

# A transaction may have a smaller id than one that changed the same object before it. Its rows then
# take the other's id, so that the changes of an object stay in order. OFFSET prevents a scan of the
# other index, which would read the whole table.
_TRANSACTION_ID = """greatest(
        CAST(CAST(pg_current_xact_id() AS TEXT) AS BIGINT),
        (SELECT max(id) FROM (
            SELECT c.transaction_id AS id FROM {changes} AS c
            WHERE c.object_id = r.object_id OFFSET 0) AS earlier))"""
_INSERT = """
INSERT INTO {changes}
    (transaction_id, object_type, object_id, kind, fields, version, changed_at)
SELECT {transaction_id}, :object_type, r.object_id, r.kind, r.fields, r.version, :now
FROM ({rows}) AS r
ORDER BY r.object_id
"""
_ROWS = """SELECT json_extract(value, '$.object_id') AS object_id,
    json_extract(value, '$.kind') AS kind, json_extract(value, '$.fields') AS fields,
    json_extract(value, '$.version') AS version
    FROM json_each(:rows)"""
_ROWS_ON_POSTGRESQL = """SELECT * FROM json_to_recordset(CAST(:rows AS json))
    AS r (object_id text, kind text, fields json, version bigint)"""
# All rows that a transaction announces are one notification.
_INSERT_AND_NOTIFY = "WITH added AS ({insert}) SELECT pg_notify('{channel}', '')"
_SET_LOCK_TIMEOUT = sa.text("SELECT set_config('lock_timeout', :lock_timeout, true)")


class Difference(NamedTuple):
    """What a write changed in a row: the kind of the change, and the names of the columns."""

    kind: ChangeKind
    fields: list[str]


def make_changes_table(metadata: sa.MetaData, schema: str | None) -> sa.Table:
    """
    Return the table of the change feed. It contains names of columns, but no values.

    Raises:
        ValueError: *metadata* already has a table with that name.
    """
    key = CHANGES if schema is None else f"{schema}.{CHANGES}"
    if key in metadata.tables:
        raise ValueError(f"A table {key!r} already exists. Give the other table another name.")
    sequence = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    return sa.Table(
        CHANGES,
        metadata,
        sa.Column("sequence", sequence, sa.Identity(), primary_key=True),
        sa.Column("transaction_id", sa.BigInteger, nullable=False),
        sa.Column("object_type", sa.Text, nullable=False),
        sa.Column("object_id", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("fields", sa.JSON, nullable=False),
        sa.Column("version", sa.BigInteger),
        sa.Column("changed_at", UTCDateTime, nullable=False),
        sa.Index(f"ix_{CHANGES}_transaction_id_sequence", "transaction_id", "sequence"),
        sa.Index(f"ix_{CHANGES}_object_id", "object_id"),
        schema=schema,
        sqlite_autoincrement=True,  # otherwise SQLite might reuse the last row's number
    )


class ChangeWriter:
    """Records changes in the table *changes*, in the transaction that makes them."""

    def __init__(self, changes: sa.Table, dialect: sa.Dialect) -> None:
        self.table = changes
        name = dialect.identifier_preparer.format_table(changes)
        self._is_postgresql = is_postgresql = dialect.name == "postgresql"
        insert = _INSERT.format(
            changes=name,
            transaction_id=_TRANSACTION_ID.format(changes=name) if is_postgresql else "0",
            rows=_ROWS_ON_POSTGRESQL if is_postgresql else _ROWS,
        )
        now = sa.bindparam("now", type_=UTCDateTime)
        self._insert = self._insert_silently = sa.text(insert).bindparams(now)
        if is_postgresql:
            insert = _INSERT_AND_NOTIFY.format(insert=insert, channel=CHANNEL)
            self._insert = sa.text(insert).bindparams(now)

    def write(
        self,
        statements: Statements,
        connection: sa.Connection,
        statement: sa.TextClause,
        parameters: Values,
        created: Collection[str] = (),
    ) -> list[sa.Row[Any]]:
        """
        Execute *statement*, record its changes, and return its rows.

        Another transaction may insert a missing row after the others were locked. *statement* then
        leaves that row, and is executed again. Rows in *created* were inserted by this transaction
        before.

        Raises:
            RuntimeError: a row was inserted and removed again each time.
        """
        written: list[sa.Row[Any]] = []
        for _ in range(MAX_TRIES):
            found = connection.execute(statements.lock_for(statement), parameters).all()
            known = [row.id for row in found if row.id is not None]
            rows = connection.execute(statement, {**parameters, "known": to_json(known)}).all()
            before = {row.id: row._asdict() for row in found if row.id not in created}
            changes = ((before.get(row.id), row._asdict()) for row in rows)
            self.record(statements, connection, changes)
            written += rows
            missing = {row.sought for row in found}.difference(known, (row.id for row in rows))
            if not (missing and statements.inserts(statement)):
                return written
        raise RuntimeError("A row was missing, and could not be inserted either.")

    def record(
        self,
        statements: Statements,
        connection: sa.Connection,
        changes: Iterable[tuple[Values | None, Values]],
    ) -> None:
        """Record *changes*, which are the old values of rows, or None, and the new values."""
        rows = [
            {
                "object_id": after["id"],
                "kind": difference.kind,
                "fields": difference.fields,
                "version": after["version_updated_at"],
            }
            for before, after in changes
            if (difference := find_difference(statements.profile, before, after)) is not None
        ]
        if rows:
            given = {"rows": to_json(rows), "now": datetime.now(UTC)}
            # PostgreSQL cannot prepare a transaction that has notified. Readers also poll.
            is_two_phase = isinstance(connection.get_transaction(), sa.TwoPhaseTransaction)
            insert = self._insert_silently if is_two_phase else self._insert
            connection.execute(insert, {**given, "object_type": statements.kind.family})

    def prepare_commit(self, connection: sa.Connection) -> None:
        """
        Set the usual lock timeout for the commit of the transaction.

        On PostgreSQL, transactions with notifications commit one after another, in all databases of
        the cluster. With the shorter timeout for row locks, a commit that waits longer would fail.
        """
        if self._is_postgresql:
            connection.execute(_SET_LOCK_TIMEOUT, {"lock_timeout": LOCK_TIMEOUT})


def find_difference(
    names: Sequence[str], before: Values | None, after: Values
) -> Difference | None:
    """Return the difference of two states of a row, or None. *names* are the columns."""
    fields = [name for name in names if _differ(before and before[name], after[name])]
    kind = _find_kind(before, after)
    if kind is None and not fields:
        return None
    return Difference(kind or "updated", fields)


def _differ(old: Any, new: Any) -> bool:
    """Return whether two values of a column differ."""
    if old != new:
        return True
    # In Python, 1 equals True, but not in JSON.
    return isinstance(new, bool | int | dict | list) and _to_text(old) != _to_text(new)


def _to_text(value: Any) -> str:
    # The application may have told its driver to decode numbers as Decimal.
    return json.dumps(value, sort_keys=True, default=str)


def _find_kind(before: Values | None, after: Values) -> ChangeKind | None:
    was_deleted = before is not None and before["deleted_at"] is not None
    is_deleted = after["deleted_at"] is not None
    if is_deleted:
        return None if was_deleted else "deleted"
    if before is None:
        return "created"
    if was_deleted:
        return "revived"
    if before["version_updated_at"] is None and after["version_updated_at"] is not None:
        return "filled"
    if is_barred(before) == is_barred(after):
        return None
    return "barred" if is_barred(after) else "restored"

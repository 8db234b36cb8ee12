"""
The SQL that writes users, on SQLite and PostgreSQL alike: which of two states wins is decided here, inside the statement.

So two workers cannot interleave between reading and writing.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any, cast

import sqlalchemy as sa

from clerkhooks import messages
from clerkhooks.clerk.events import LAST_MILLISECOND, Profile
from clerkhooks.models import VERSION_COLUMNS, Insert, Outcome, User, insert_into, version_columns


@dataclass(frozen=True, slots=True)
class UserSnapshot:
    """A user's row as it was read, tied to no database session. Times are aware and in UTC."""

    id: str
    email: str | None
    name: str
    image_url: str | None
    is_online: bool
    last_seen: datetime
    created_at: datetime
    updated_at: datetime
    deleted_at: datetime | None


users = cast("sa.Table", User.__table__)
_COLUMNS = tuple(users.c[name] for name in UserSnapshot.__dataclass_fields__)
DELETED_USER = Profile("Deleted User")
PROFILE = tuple(Profile.__dataclass_fields__)
_STATE = (*PROFILE, "updated_at", "deleted_at", *VERSION_COLUMNS)

# A tombstone of user.deleted wins over every version: Clerk never gives an id to a second user.
# One that a sync left has a version; it is no proof, and gives way to what Clerk says after it.
_NOT_FINAL = sa.or_(users.c.deleted_at.is_(None), users.c.version_updated_at.is_not(None))


def new_row(now: datetime, profile: Profile) -> dict[str, Any]:
    """A new row's values, but for its id and its version."""
    times = {"last_seen": now, "created_at": now, "updated_at": now, "deleted_at": None}
    return profile_columns(profile) | times | version_columns(None) | {"is_online": False}


def profile_columns(profile: Profile) -> dict[str, Any]:
    """The values of the columns of a profile, each named as its field."""
    return {name: getattr(profile, name) for name in PROFILE}


@cache
def profile_statement(dialect: str) -> sa.Executable:
    """Create the user, or bring an older version up to this one. Gives a row if it did either."""
    insert = _insert_unless_done(dialect)
    return _on_conflict(insert, _STATE, sa.and_(_NOT_FINAL, User.is_older_than(insert.excluded)))


@cache
def tombstone_statement(dialect: str) -> sa.Executable:
    """Erase the user for good, also before their first event has arrived. Gives a row if it did."""
    return _on_conflict(_insert_unless_done(dialect), (*_STATE, "is_online"), _NOT_FINAL)


@cache
def event_statement(dialect: str, *, is_deletion: bool) -> sa.Executable:
    """Bring the user up to an event, and record its message, in one statement: PostgreSQL only. Gives the outcome, unless it was done."""
    user = tombstone_statement(dialect) if is_deletion else profile_statement(dialect)
    written = cast("sa.Insert", user).cte("written")
    applied = sa.exists(sa.select(written.c.id))
    return messages.record_statement(dialect, sa.case((applied, sa.literal(Outcome.APPLIED.value)), else_=sa.literal(Outcome.STALE.value)))


@cache
def snapshots_statement(dialect: str) -> sa.Executable:
    """
    Bring the users of ``rows``, a JSON array, up to what the Backend API says of them. Gives the ids of those it changed.

    Whom it says to exist was not deleted, whatever an earlier sync has found.
    """
    # One parameter, however many users: a VALUES list as long takes four times as long to be compiled and bound.
    rows = _rows_of_json(dialect)
    same = {"is_online": False, "deleted_at": None, "version_timestamp": 0, "version_message_id": ""}
    now = sa.bindparam("now", type_=users.c.created_at.type)
    given: dict[str, sa.ColumnElement[Any]] = {name: sa.literal(value, users.c[name].type) for name, value in same.items()}
    given |= dict.fromkeys(("last_seen", "created_at", "updated_at"), now) | rows
    # In one order, so that two writers wait for each other, and never in a circle.
    values = sa.select(*(given[column.name].label(column.name) for column in users.c)).where(sa.true()).order_by(rows["id"])
    insert = insert_into(users, dialect).from_select(list(users.c), values)
    newer = sa.or_(users.c.deleted_at.is_not(None), User.is_older_than(insert.excluded))
    return _on_conflict(insert, _STATE, sa.and_(_NOT_FINAL, newer))


def _rows_of_json(dialect: str) -> dict[str, sa.ColumnElement[Any]]:
    """The columns of the users in the parameter ``rows``."""
    columns = [users.c[name] for name in ("id", *PROFILE, "version_updated_at")]
    rows = sa.bindparam("rows", type_=sa.Text)
    if dialect == "postgresql":
        function = sa.func.json_to_recordset(sa.cast(rows, sa.JSON))
        table = function.table_valued(*(sa.column(column.name, column.type) for column in columns), name="r")
        table = table.render_derived(with_types=True)
        return {column.name: table.c[column.name] for column in columns}
    each = sa.func.json_each(rows).table_valued("value")
    return {column.name: sa.func.json_extract(each.c.value, f"$.{column.name}", type_=column.type) for column in columns}


@cache
def fallback_statement(dialect: str) -> sa.Executable:
    """Create the minimal user of a call that overtook its webhook, unless somebody just did. Gives a row if it did."""
    return insert_into(users, dialect).on_conflict_do_nothing().returning(users.c.id)


def _insert_unless_done(dialect: str) -> Insert:
    """Insert a whole row, unless the message was done before: a repetition neither waits for the user nor locks it."""
    values = sa.select(*(sa.bindparam(column.name, type_=column.type) for column in users.c))
    return insert_into(users, dialect).from_select(
        list(users.c), values.where(~messages.is_done(sa.bindparam("done_message_id", type_=sa.Text)))
    )


def _on_conflict(insert: Insert, changed: tuple[str, ...], where: sa.ColumnElement[bool]) -> sa.Executable:
    changes = {name: insert.excluded[name] for name in changed}
    return insert.on_conflict_do_update(index_elements=[users.c.id], set_=changes, where=where).returning(users.c.id)


SELECT = sa.select(*_COLUMNS).where(users.c.id == sa.bindparam("user_id"))
_LIVE = sa.and_(users.c.id == sa.bindparam("user_id"), users.c.deleted_at.is_(None))
MOVE_LAST_SEEN = (
    sa.update(users)
    .where(_LIVE, users.c.last_seen <= sa.bindparam("before", type_=users.c.last_seen.type))
    .values(last_seen=sa.bindparam("now", type_=users.c.last_seen.type))
    .returning(*_COLUMNS)
)
SET_PRESENCE = sa.update(users).where(_LIVE).values(is_online=sa.bindparam("online")).returning(*_COLUMNS)

SELECT_STATES = sa.select(*(users.c[name] for name in ("id", *_STATE))).where(users.c.id.in_(sa.bindparam("ids", expanding=True)))
LIVE_IDS = (
    sa.select(users.c.id)
    .where(users.c.deleted_at.is_(None), users.c.id > sa.bindparam("after"))
    .where(users.c.created_at < sa.bindparam("created_before", type_=users.c.created_at.type))
    .order_by(users.c.id)
    .limit(sa.bindparam("limit"))
)
UNFILLED_IDS = LIVE_IDS.where(users.c.version_updated_at.is_(None))
COUNT_LIVE = sa.select(sa.func.count()).select_from(users).where(users.c.deleted_at.is_(None))
_found_at = sa.bindparam("found_at", type_=users.c.version_updated_at.type)
_now = sa.bindparam("now", type_=users.c.created_at.type)
_GONE = (
    sa.select(users.c.id)
    .where(users.c.id.in_(sa.bindparam("ids", expanding=True)), users.c.deleted_at.is_(None))
    .where(users.c.created_at < sa.bindparam("created_before", type_=users.c.created_at.type))
    .where(sa.or_(users.c.version_updated_at.is_(None), users.c.version_updated_at <= _found_at))
    .order_by(users.c.id)
    .with_for_update()
)
_ERASED = profile_columns(DELETED_USER) | {"is_online": False, "deleted_at": _now, "updated_at": _now}
_FOUND_AT = dict(zip(VERSION_COLUMNS, (_found_at, LAST_MILLISECOND, ""), strict=True))
# Among all that was updated by then it is the newest; an event of a later update revives the user.
MARK_GONE = sa.update(users).where(users.c.id.in_(_GONE)).values(_ERASED | _FOUND_AT).returning(users.c.id)

"""
The SQL that writes users, on SQLite and PostgreSQL alike: which of two states wins is decided here, inside the statement.

So two workers cannot interleave between reading and writing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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

# What the parameter ``rows`` holds of an event; a row without an id is of an event that is about no user.
_EVENT = ("id", *PROFILE, *VERSION_COLUMNS, "is_deletion", "message_id", "event_type", "outcome", "occurred_at")

_TYPES = {column.name: column.type for column in (*messages.table.c, *users.c)} | {"is_deletion": sa.Boolean()}
_now = sa.bindparam("now", type_=users.c.created_at.type)

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
def events_statement() -> sa.Executable:
    """
    Bring the users of ``rows`` up to its events, and record its messages, in one statement: PostgreSQL only.

    Gives id and outcome of each message, unless it was done before. ``rows`` names each user and each message once.
    """
    rows = sa.select(*_rows_of_json("postgresql", _EVENT).values()).cte("rows")
    written = cast("sa.Insert", _users_of("postgresql", dict(rows.c))).cte("written")
    became = sa.case((rows.c.id.in_(sa.select(written.c.id)), Outcome.APPLIED), else_=Outcome.STALE)
    return messages.record_statement(
        "postgresql", {**rows.c, "clerk_user_id": rows.c.id, "outcome": sa.func.coalesce(rows.c.outcome, became)}
    )


@cache
def event_statements_in_turn() -> tuple[sa.Executable, sa.Executable]:
    """The same on SQLite, which writes to one table at a time: the first gives the ids of users that it changed, the second as above."""
    rows = _rows_of_json("sqlite", _EVENT)
    return _users_of("sqlite", rows), messages.record_statement("sqlite", rows | {"clerk_user_id": rows["id"]})


def _users_of(dialect: str, rows: dict[str, sa.ColumnElement[Any]]) -> sa.Executable:
    """Create users, bring older versions up to these, and erase for good who was deleted, also where that comes first."""
    # A repetition neither waits for the user nor locks it.
    is_new = sa.and_(rows["id"].is_not(None), ~messages.is_done(rows["message_id"]))
    deleted_at = sa.case((rows["is_deletion"], _now))
    insert = _insert_rows(dialect, rows | {"is_online": sa.false(), "deleted_at": deleted_at}, is_new)
    wins = sa.or_(insert.excluded.deleted_at.is_not(None), User.is_older_than(insert.excluded))
    is_online = sa.and_(users.c.is_online, insert.excluded.deleted_at.is_(None))
    return _on_conflict(insert, sa.and_(_NOT_FINAL, wins), is_online=is_online)


@cache
def snapshots_statement(dialect: str) -> sa.Executable:
    """
    Bring the users of ``rows``, a JSON array, up to what the Backend API says of them. Gives the ids of those it changed.

    Whom it says to exist was not deleted, whatever an earlier sync has found.
    """
    rows = _rows_of_json(dialect, ("id", *PROFILE, "version_updated_at"))
    same = {"is_online": False, "deleted_at": None, "version_timestamp": 0, "version_message_id": ""}
    insert = _insert_rows(dialect, rows | {name: sa.literal(value, users.c[name].type) for name, value in same.items()}, sa.true())
    newer = sa.or_(users.c.deleted_at.is_not(None), User.is_older_than(insert.excluded))
    return _on_conflict(insert, sa.and_(_NOT_FINAL, newer))


def _rows_of_json(dialect: str, names: Iterable[str]) -> dict[str, sa.ColumnElement[Any]]:
    """The columns of so many rows in one parameter, a JSON array: as a VALUES list they would be compiled anew for each length."""
    columns = [sa.column(name, _TYPES[name]) for name in names]
    rows = sa.bindparam("rows", type_=sa.Text)
    if dialect == "postgresql":
        table = sa.func.json_to_recordset(sa.cast(rows, sa.JSON)).table_valued(*columns, name="r").render_derived(with_types=True)
        return dict(table.c)
    each = sa.func.json_each(rows).table_valued("value")
    return {column.name: sa.func.json_extract(each.c.value, f"$.{column.name}", type_=column.type) for column in columns}


def _insert_rows(dialect: str, given: Mapping[str, sa.ColumnElement[Any]], where: sa.ColumnElement[bool]) -> Insert:
    """Insert users, those of whose columns that are not *given* are times."""
    # In one order, so that two writers wait for each other, and never in a circle.
    values = sa.select(*(given.get(column.name, _now).label(column.name) for column in users.c)).where(where).order_by(given["id"])
    return insert_into(users, dialect).from_select(list(users.c), values)


@cache
def fallback_statement(dialect: str) -> sa.Executable:
    """Create the minimal user of a call that overtook its webhook, unless somebody just did. Gives a row if it did."""
    return insert_into(users, dialect).on_conflict_do_nothing().returning(users.c.id)


def _on_conflict(insert: Insert, where: sa.ColumnElement[bool], **others: sa.ColumnElement[Any]) -> sa.Executable:
    changes = {name: insert.excluded[name] for name in _STATE} | others
    return insert.on_conflict_do_update(index_elements=[users.c.id], set_=changes, where=where).returning(users.c.id)


@cache
def select_statement(dialect: str) -> sa.Executable:
    """The users whose ids are in ``rows``."""
    user_id = _rows_of_json(dialect, ("id",))["id"]
    found = sa.select(*_COLUMNS).where(users.c.id == user_id)
    if dialect == "sqlite":
        return found
    # One look into the index for each, which OFFSET insists on: a plan that was made while the table was small
    # may go on for as long as a connection, and would read all of a large one.
    each = found.correlate(user_id.table).offset(0).lateral("found")
    return sa.select(*each.c).select_from(user_id.table.join(each, sa.true()))


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

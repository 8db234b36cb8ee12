"""The account state in a user's row, read in the transaction that may change it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import NamedTuple

import sqlalchemy as sa

from clerkhooks.clerk.kinds import NEW_USER
from clerkhooks.events import Version
from clerkhooks.store import Store
from clerkhooks.store.models import VERSION_COLUMNS
from clerkhooks.store.queries import is_barred, is_live


class Account(NamedTuple):
    """Whether a user is barred, and whether the row was missing."""

    is_barred: bool
    is_new: bool


def lock_account(store: Store, connection: sa.Connection, user_id: str) -> Account:
    """
    Lock the user's row until the transaction ends, and return the account.

    A missing row is created first, as by the user's first call. Otherwise, there would be nothing
    to lock, and two concurrent events could both find that the user was not barred before.
    """
    users = store.users
    query = sa.select(is_barred(users)).where(users.c.id == user_id).with_for_update()
    found, is_new = connection.scalar(query), False
    if found is None:
        row = {"id": user_id, "name": NEW_USER, "now": datetime.now(UTC)}
        is_new = bool(connection.execute(store.statements.create_first_seen, row).all())
        found = connection.scalar(query)
    return Account(bool(found), is_new)


def holds_version(
    store: Store,
    execute: Callable[[sa.Executable], Iterable[object]],
    user_id: str,
    version: Version,
) -> bool:
    """Return whether the user's row has *version* or a newer one, or is a tombstone."""
    columns = store.users.c
    own = sa.tuple_(*(columns[name] for name in VERSION_COLUMNS))
    least = (
        sa.literal(value, columns[name].type)
        for name, value in zip(VERSION_COLUMNS, version, strict=True)
    )
    is_newer = sa.or_(sa.not_(is_live(store.users)), own >= sa.tuple_(*least))
    return any(True for _ in execute(sa.select(columns.id).where(columns.id == user_id, is_newer)))

"""The users service, which reads and writes users for API calls."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from clerkhooks.errors import Unauthenticated
from clerkhooks.store import Store
from clerkhooks.store.batching import Batcher
from clerkhooks.store.columns import to_json
from clerkhooks.store.messages import is_unanswered
from clerkhooks.store.models import ClerkUser
from clerkhooks.store.pool import Slots

MAX_CALLS = 1000  # concurrent calls in a process
LAST_SEEN_INTERVAL = timedelta(minutes=1)
PRESENCE_TIMEOUT = timedelta(minutes=5)


class Users:
    """The users of one application. Threads and greenlets may share an instance."""

    def __init__(self, store: Store) -> None:
        self._store, self._database, self._statements = store, store.database, store.statements
        self._read = Batcher(self._read_all, concerns_all=is_unanswered)
        self._slots = Slots(MAX_CALLS, 0)

    def get_authenticated(self, user_id: str, *, impersonated: bool) -> tuple[ClerkUser, bool]:
        """
        Return the user of a verified session token, and whether this call created the row.

        Also update ``last_seen``, at most once a minute. Do not update it if the caller is
        impersonating the user.

        Raises:
            Unauthenticated: ``user_deleted``, ``user_banned`` or ``user_deprovisioned``; a token
                can be valid for a minute after that.
        """
        now = datetime.now(UTC)
        began_at = self._slots.begin()
        try:
            user, created = self._read(user_id), None
            if user is None:
                created = self._create(user_id, now)
                user = created or self._read(user_id)
            elif not impersonated and _is_seen_long_ago(user, now):
                row = {"id": user_id, "now": now, "before": now - LAST_SEEN_INTERVAL}
                moved = self._write_user(self._statements.move_last_seen, row)
                user = moved or self._read(user_id)
        finally:
            self._slots.end(began_at)
        if user is None:  # rows are never removed, so a lagging replica responded
            raise RuntimeError("A user's row was not found although it exists.")
        reason = _find_refusal(user)
        if reason is not None:
            raise Unauthenticated(reason)
        return user, created is not None

    def set_presence(self, user_id: str, is_online: bool) -> ClerkUser:
        """
        Set whether the user is online.

        The user counts as offline after five minutes without a call.

        Raises:
            Unauthenticated: ``user_deleted``.
        """
        row = {"id": user_id, "is_online": is_online}
        user = self._write_user(self._statements.set_presence, row)
        if user is None:
            raise Unauthenticated("user_deleted")
        return user

    def _create(self, user_id: str, now: datetime) -> ClerkUser | None:
        """Create the row of a user, and return it, or None if the row exists."""
        with self._database.connect() as connection, self._statements.transaction(connection):
            rows = self._statements.create(connection, user_id, now)
        return self._store.make_snapshot(rows[0]) if rows else None

    def _write_user(self, statement: sa.Executable, row: dict[str, Any]) -> ClerkUser | None:
        """
        Execute *statement* and return the user, or None if no row was written.

        If calls concurrently update ``last_seen``, only one writes the row.
        """
        rows = self._database.write(statement, row)
        return self._store.make_snapshot(rows[0]) if rows else None

    def _read_all(self, user_ids: Sequence[str]) -> list[ClerkUser | None]:
        rows = to_json([{"id": user_id} for user_id in dict.fromkeys(user_ids)])
        with self._database.connect() as connection:
            found = self._statements.select.execute(connection, {"rows": rows})
        users = {user.id: user for user in map(self._store.make_snapshot, found)}
        return [users.get(user_id) for user_id in user_ids]


def is_present(user: Any) -> bool:
    """Return whether *user* is marked as online and was seen in the last five minutes."""
    return bool(user.is_online) and datetime.now(UTC) - user.last_seen <= PRESENCE_TIMEOUT


def _find_refusal(user: ClerkUser) -> str | None:
    """Return the reason why the user's calls are refused, or None if they are not."""
    if user.deleted_at is not None:
        return "user_deleted"
    if user.banned_at is not None:
        return "user_banned"
    return None if user.deprovisioned_at is None else "user_deprovisioned"


def _is_seen_long_ago(user: ClerkUser, now: datetime) -> bool:
    return _find_refusal(user) is None and user.last_seen <= now - LAST_SEEN_INTERVAL

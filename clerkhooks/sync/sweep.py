"""The sweep: it asks Clerk for every user in turn, within a day, and finds deletions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import sqlalchemy as sa

from clerkhooks.clerk.backend_api import IDS
from clerkhooks.clerk.kinds import USER
from clerkhooks.store.awaited import DAY, now_ms
from clerkhooks.store.queries import is_live
from clerkhooks.sync.leased import LeasedSync
from clerkhooks.sync.progress import Progress
from clerkhooks.sync.tables import MAX_DELETED, MAX_DELETED_SHARE, MIN_AGE
from clerkhooks.sync.watch import Watch

MAX_DOUBT = timedelta(days=7)


class Sweep:
    """
    Compares a hundred users at a time with Clerk's data. *interval* of a round is in seconds.

    Each missing user is confirmed by Clerk's own error code. Within a day, at most 20 users or a
    tenth of all users are deleted, whichever is more. Beyond that, the secret key is probably
    wrong, or an operator must decide.
    """

    def __init__(self, leased: LeasedSync, watch: Watch, interval: float) -> None:
        self._leased, self._watch, self._interval = leased, watch, interval

    def count_steps(self, progress: Progress) -> int:
        """Return the number of steps for each round: one, or more to be done within a day."""
        return 1 + int(progress.users / IDS * self._interval * 1000 / DAY)

    def run(self, progress: Progress) -> Progress:
        """
        Compare the next users, and return the new progress.

        Raises:
            WrongInstance: Clerk knows none of the users.
        """
        if progress.swept_to is None:
            users = self._leased.ask(self._leased.api.count_users)
            progress = replace(progress, users=users)
        rows = self._read_rows(progress.swept_to or "")
        progress = self._compare(rows, progress)
        if len(rows) == IDS:
            return replace(progress, swept_to=rows[-1].id)
        return replace(progress, swept_to=None, withheld=progress.withholds, withholds=False)

    def _compare(self, rows: Sequence[Any], progress: Progress) -> Progress:
        if not rows:
            return progress
        found = self._leased.ask(lambda: self._leased.api.find_users([row.id for row in rows]))
        if not found:
            self._leased.check_instance()
        self._leased.apply(found)
        known = set(map(USER.find_id, found))
        absent = [row.id for row in rows if row.is_live and row.id not in known]
        return self._delete(absent, progress)

    def _read_rows(self, after: str) -> Sequence[Any]:
        """
        Return the next ids, and whether each user is live.

        Recent tombstones that a sync or a sweep wrote are included: the user may exist after all.
        """
        users, now = self._leased.store.users, datetime.now(UTC)
        is_inferred = sa.and_(
            users.c.version_updated_at.is_not(None), users.c.deleted_at > now - MAX_DOUBT
        )
        query = (
            sa.select(users.c.id, is_live(users).label("is_live"))
            .where(users.c.id > after, sa.or_(is_live(users), is_inferred))
            .where(users.c.created_at < now - MIN_AGE)
        )
        return self._leased.store.database.execute(query.order_by(users.c.id).limit(IDS))

    def _delete(self, absent: Sequence[str], progress: Progress) -> Progress:
        """Tombstone the users of *absent* that are deleted at Clerk, unless there are too many."""
        if now_ms() - progress.deleted_since > DAY:
            progress = replace(progress, deleted_since=now_ms(), deleted=0)
        most = max(MAX_DELETED, progress.users // MAX_DELETED_SHARE) - progress.deleted
        gone = self._confirm(absent, most)
        if len(gone) > most:
            if not progress.withholds:
                self._leased.tell(
                    "deletions_withheld", {"users": len(gone), "deleted": progress.deleted}
                )
            return replace(progress, withholds=True)
        self._leased.tombstone(gone)
        self._watch.add_deletions(gone, progress.troubled_at)
        return replace(progress, deleted=progress.deleted + len(gone))

    def _confirm(self, absent: Sequence[str], most: int) -> list[str]:
        """Return the users that Clerk does not know, until there are more than *most*."""
        gone: list[str] = []
        for user_id in absent:
            if self._leased.ask(partial(self._leased.api.is_gone, user_id)):
                gone.append(user_id)
                if len(gone) > most:
                    break
        return gone

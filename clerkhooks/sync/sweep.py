"""The sweep: it asks Clerk for every user in turn, within a day, and finds deletions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from clerkhooks.clerk.backend_api import IDS
from clerkhooks.clerk.kinds import USER
from clerkhooks.store.awaited import DAY
from clerkhooks.store.queries import is_live
from clerkhooks.sync.deleting import Deleter
from clerkhooks.sync.leased import LeasedSync
from clerkhooks.sync.progress import Progress
from clerkhooks.sync.tables import MIN_AGE

MAX_DOUBT = timedelta(days=7)


class Sweep:
    """Compares a hundred users at a time with Clerk's data. *interval* is in seconds."""

    def __init__(self, leased: LeasedSync, deleter: Deleter, interval: float) -> None:
        self._leased, self._deleter, self._interval = leased, deleter, interval

    def count_steps(self, progress: Progress) -> int:
        """Return the steps for each round: one, or as many as a sweep within a day needs."""
        return 1 + int(progress.users / IDS * self._interval * 1000 / DAY)

    def run(self, progress: Progress) -> Progress:
        """Compare the next users, and return the new progress."""
        rows = self._read_rows(progress.swept_to or "")
        is_last = len(rows) < IDS
        if progress.swept_to is None:
            count = self._leased.api.count_users
            progress = replace(progress, users=len(rows) if is_last else self._leased.ask(count))
        progress = self._compare(rows, progress)
        if is_last:
            return replace(self._deleter.end_pass(progress), swept_to=None)
        return replace(progress, swept_to=rows[-1].id)

    def _compare(self, rows: Sequence[Any], progress: Progress) -> Progress:
        if not rows:
            return progress
        found = self._leased.ask(lambda: self._leased.api.find_users([row.id for row in rows]))
        self._leased.apply(USER, found)
        known = set(map(USER.find_id, found))
        absent = [row.id for row in rows if row.is_live and row.id not in known]
        if not absent:
            return progress
        return self._deleter.delete(self._leased.look_up(USER, absent), progress.users, progress)

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

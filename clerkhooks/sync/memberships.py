"""The reconciliation of memberships, which end with their organizations and users."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from multiprocessing.pool import ThreadPool
from typing import Any

import sqlalchemy as sa

from clerkhooks.clerk.backend_api import IDS
from clerkhooks.clerk.events import Snapshot
from clerkhooks.store.database import transaction
from clerkhooks.store.endings import Endings
from clerkhooks.sync.comparison import Comparison, Result
from clerkhooks.sync.run import Advance, Run
from clerkhooks.sync.sources import Memberships
from clerkhooks.sync.tables import THREADS, TableSync, batched

ROWS = 1000  # memberships whose organizations are asked about at a time


class MembershipSync(TableSync):
    """The sync of the table of memberships. Clerk has no lookup of memberships by id."""

    def __init__(self, run: Run, memberships: Memberships, endings: Endings) -> None:
        super().__init__(run, memberships)
        self._memberships, self._endings = memberships, endings

    def _write(self, snapshots: Mapping[str, Snapshot]) -> tuple[Counter[Result], list[Comparison]]:
        connection = self.run.connection
        with transaction(connection):
            self._endings.lock_parents(connection, (each.state for each in snapshots.values()))
            merged = self._merge(snapshots)
            self._endings.end_orphans(connection, snapshots, datetime.now(UTC), by_sync=True)
        return merged

    def _find_deleted(self, ids: Iterable[str], advance: Advance) -> Iterator[str]:
        """
        Yield the ids that do not exist at Clerk.

        A membership is deleted if the complete list of its
        user's memberships in its organization does not contain it, or if a 404 in Clerk's words
        confirms that the organization does not exist.
        """
        with ThreadPool(THREADS) as pool:
            for some in batched(ids, ROWS):
                for group in batched(self._group(some), THREADS):
                    yield from (each for gone in pool.map(self._ask, group) for each in gone)
                advance(len(some))

    def _group(self, ids: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
        """Yield organizations, each with some of these memberships: ids and users."""
        columns = self.table.c
        query = (
            sa.select(columns.id, columns.user_id, columns.organization_id)
            .where(columns.id.in_(ids))
            .order_by(columns.organization_id)
        )
        rows = self.run.connection.execute(query).all()
        for organization_id, members in groupby(rows, lambda row: row.organization_id):
            for some in batched(members, IDS):
                yield organization_id, some

    def _ask(self, group: tuple[str, list[Any]]) -> list[str]:
        """Return the ids of the memberships of an organization that do not exist at Clerk."""
        organization_id, members = group
        user_ids = dict.fromkeys(member.user_id for member in members)
        known = self._memberships.find_of(organization_id, list(user_ids))
        return [member.id for member in members if member.id not in known]

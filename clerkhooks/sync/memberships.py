"""The reconciliation of memberships, which end with their organizations and users."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import groupby
from multiprocessing.pool import ThreadPool
from typing import Any

import sqlalchemy as sa

from clerkhooks.clerk.backend_api import IDS
from clerkhooks.clerk.events import Snapshot
from clerkhooks.clerk.kinds import MEMBERSHIP
from clerkhooks.errors import Unconfirmed
from clerkhooks.store.awaited import now_ms
from clerkhooks.store.database import transaction
from clerkhooks.store.endings import Endings
from clerkhooks.sync.comparison import Comparison, Result
from clerkhooks.sync.listing import IdSet
from clerkhooks.sync.run import Advance, Run
from clerkhooks.sync.sources import Memberships
from clerkhooks.sync.tables import THREADS, TableSync, batched, or_unconfirmed

Group = tuple[str, list[Any]]
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

    def sync_ids(self, ids: Iterable[str], total: int | None, *, is_trusted: bool) -> None:
        """
        Sync the memberships with these *ids*. *total* is their number if known.

        Clerk has no lookup by id. Without a row, the organization is unknown, so the membership is
        searched for in the list of all memberships.
        """
        sought, advance = set(ids), self.run.begin(self.noun, total)
        gone = self._find_deleted(sorted(self._find_here(sought)), advance, apply=True)
        self._tombstone_limited(gone, is_trusted=is_trusted)
        self._search(sought - self._find_here(sought), advance)

    def _find_here(self, ids: Iterable[str]) -> set[str]:
        """Return those of *ids* that have a row."""
        column = self.table.c.id
        queries = (sa.select(column).where(column.in_(some)) for some in batched(ids, ROWS))
        return {each for query in queries for each in self.run.connection.scalars(query)}

    def _search(self, sought: set[str], advance: Advance) -> None:
        """Read the list of all memberships until all *sought* ones are found and updated."""
        pages, read_at = self.source.read_all(IdSet()), now_ms()
        while sought and (page := next(pages, None)):
            found = {MEMBERSHIP.find_id(data): data for data in page}.items()
            own = {object_id: data for object_id, data in found if object_id in sought}
            self.apply(own.values(), read_at)
            sought -= own.keys()
            advance(len(own))
            read_at = now_ms()
        self.counts[Result.UNKNOWN] += len(sought)

    def _find_deleted(
        self, ids: Iterable[str], advance: Advance, *, apply: bool = False
    ) -> Iterator[str]:
        """
        Yield the ids that do not exist at Clerk. With *apply*, update the other memberships.

        A membership is deleted if the complete list of its user's memberships in its organization
        does not contain it, or if a 404 in Clerk's words confirms that the organization does not
        exist.
        """
        with ThreadPool(THREADS) as pool:
            for some in batched(ids, ROWS):
                for group in batched(self._group(some), THREADS):
                    read_at, answers = now_ms(), pool.map(or_unconfirmed(self._ask), group)
                    for (_, members), listed in zip(group, answers, strict=True):
                        yield from self._judge(members, listed, read_at if apply else None)
                advance(len(some))

    def _judge(
        self, members: Sequence[Any], listed: list[Any] | Unconfirmed, read_at: int | None
    ) -> Iterator[str]:
        """Yield the ids of *members* that are not *listed*. With *read_at*, update the others."""
        if isinstance(listed, Unconfirmed):
            for member in members:
                self.tell_unconfirmed(member.id, listed)
            return
        if read_at is not None:
            self.apply(listed, read_at)
        yield from _find_missing(members, listed)

    def look_up(self, ids: Sequence[str]) -> Iterator[Callable[[], list[str]]]:
        """Yield a function for each organization, or for each hundred of its memberships."""
        return (partial(self._find_gone, group) for group in self._group(ids))

    def _find_gone(self, group: Group) -> list[str]:
        return _find_missing(group[1], self._ask(group))

    def _group(self, ids: Sequence[str]) -> Iterator[Group]:
        """Yield organizations, each with some of these memberships: ids and users."""
        columns = self.table.c
        query = (
            sa.select(columns.id, columns.user_id, columns.organization_id)
            .where(columns.id.in_(ids), columns.organization_id.is_not(None))
            .order_by(columns.organization_id)
        )
        rows = self.run.connection.execute(query).all()
        for organization_id, members in groupby(rows, lambda row: row.organization_id):
            for some in batched(members, IDS):
                yield organization_id, some

    def _ask(self, group: Group) -> list[Any]:
        """Return all memberships of the *group*'s users in its organization."""
        organization_id, members = group
        user_ids = list(dict.fromkeys(member.user_id for member in members))
        return self._memberships.find_of(organization_id, [] if None in user_ids else user_ids)


def _find_missing(members: Iterable[Any], listed: Iterable[Any]) -> list[str]:
    """Return the ids of *members* that Clerk has not *listed*."""
    known = set(map(MEMBERSHIP.find_id, listed))
    return [member.id for member in members if member.id not in known]

"""Reconcile the tables with Clerk's Backend API, even while events are arriving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from clerkhooks.clerk.backend_api import IDS
from clerkhooks.clerk.kinds import Kind
from clerkhooks.store import Store
from clerkhooks.store.messages import is_failed
from clerkhooks.store.queries import is_live, is_unfilled
from clerkhooks.sync.comparison import Result
from clerkhooks.sync.lookups import LookupSync
from clerkhooks.sync.memberships import MembershipSync
from clerkhooks.sync.run import Run
from clerkhooks.sync.sources import Memberships, Organizations, Users
from clerkhooks.sync.tables import TableSync


@dataclass
class Reconciliation(Run):
    """
    One sync. With *check*, nothing is changed. *force* permits any number of deletions.

    *connection* is from ``sole_writer()``, or from ``reader()`` for a check. *tell* receives each
    finding: a difference that a check found, or a failure. *begin* is called before each part of
    the sync, with the name of the part and the number of objects (None if unknown). *begin* returns
    a function that is called with the number of objects processed since the last call. With
    *handled*, handlers are told of changes of the account state. *written* receives the written
    objects, except those that handlers are told of.
    """

    def __post_init__(self) -> None:
        """Prepare the sync of each table."""
        self.users = LookupSync(self, Users(self.api))
        self.tables: list[TableSync] = [self.users]
        endings = self.store.endings
        if endings is not None:
            self.tables.append(LookupSync(self, Organizations(self.api)))
            self.tables.append(MembershipSync(self, Memberships(self.api), endings))

    @property
    def unknown(self) -> int:
        """The number of given objects that exist neither in the tables nor at Clerk."""
        return sum(table.counts[Result.UNKNOWN] for table in self.tables)

    def table_of(self, kind: Kind) -> TableSync:
        """Return the sync of the table of objects of *kind*."""
        [table] = (table for table in self.tables if table.source.kind is kind)
        return table

    @property
    def drifted(self) -> int:
        """The number of differences that a check found, in all tables."""
        return sum(table.drifted for table in self.tables)

    @property
    def ok(self) -> bool:
        """Whether the tables match Clerk's data after the sync, or matched it in a check."""
        return all(table.ok for table in self.tables)

    def sync_all(self) -> None:
        """Sync all objects at Clerk, then tombstone objects that exist only in the tables."""
        is_trusted = self._knows_instance()
        for table in self.tables:  # the users and organizations of memberships come first
            table.sync_all(is_trusted=is_trusted)

    def sync_some(self, ids: Sequence[str]) -> None:
        """Sync the users, organizations and memberships with these ids."""
        for table in self.tables:
            if own := list(dict.fromkeys(filter(table.source.kind.is_id, ids))):
                table.sync_ids(own, len(own), is_trusted=True)

    def sync_missing(self) -> None:
        """Sync the users that have no profile yet."""
        users = self.store.users
        ids = self.users.read_ids(users.c.id, is_unfilled(users))
        self.users.sync_ids(ids, None, is_trusted=self._knows_instance())

    def sync_failed(self) -> None:
        """Sync the objects of failed messages that no retry has processed."""
        messages, is_trusted = self.store.messages, self._knows_instance()
        for table in self.tables:
            column = messages.c.clerk_user_id if table is self.users else messages.c.clerk_object_id
            ids = table.read_ids(column, is_failed(messages))
            own = filter(table.source.kind.is_id, ids)
            table.sync_ids(own, None, is_trusted=is_trusted)

    def _knows_instance(self) -> bool:
        """Return whether Clerk has any of the newest stored users. If not, the key may be wrong."""
        newest = self.connection.scalars(newest_ids(self.store)).all()
        return bool(self.api.find_users(newest))


def newest_ids(store: Store) -> sa.Select[Any]:
    """Return the query for the newest stored users that have a profile, at most 100."""
    return _select_filled(store).order_by(store.users.c.created_at.desc()).limit(IDS)


def oldest_ids(store: Store) -> sa.Select[Any]:
    """Return the query for the oldest stored users that have a profile, at most 100."""
    return _select_filled(store).order_by(store.users.c.created_at).limit(IDS)


def _select_filled(store: Store) -> sa.Select[Any]:
    return sa.select(store.users.c.id).where(is_live(store.users), ~is_unfilled(store.users))

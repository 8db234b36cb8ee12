"""Requests to Clerk and writes, while a process holds the follower's lease."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from clerkhooks.clerk.backend_api import BackendApi
from clerkhooks.errors import ClerkhooksError
from clerkhooks.handled_writes import HandledWrites
from clerkhooks.store import Store
from clerkhooks.store.awaited import now_ms
from clerkhooks.sync.comparison import Comparison, Finding, Result
from clerkhooks.sync.lease import Lease, Tell
from clerkhooks.sync.reconcile import Reconciliation, newest_ids

T = TypeVar("T")
CHUNK = 20  # users to write at a time; meanwhile, other requests of this process wait
PAUSE = 1e-5  # seconds; enough for gevent to serve every request that has arrived


class WrongInstance(ClerkhooksError):
    """Clerk knows none of the newest users in the table."""


class LeasedSync:
    """
    Reads users from Clerk and writes them, in small steps, as long as *lease* is held.

    *tell* receives the name and the fields of each event to log. *counts* has the users by result,
    and *written* has those whose changes a webhook must have announced.
    """

    def __init__(
        self, api: BackendApi, store: Store, lease: Lease, handled: HandledWrites, tell: Tell
    ) -> None:
        self.api, self.store, self.lease, self.tell = api, store, lease, tell
        self._handled = handled
        self._read_at = 0
        self.counts: Counter[Result] = Counter()
        self.written: list[Comparison] = []

    def ask(self, request: Callable[[], T]) -> T:
        """
        Return the result of *request* to Clerk.

        Raises:
            LeaseLost: another process has taken over.
            BackendApiError: the request failed.
        """
        self.lease.check()
        self._read_at = now_ms()
        return request()

    def apply(self, users: Sequence[Any]) -> None:
        """Write the users that the last request returned, unless the rows are newer."""
        for start in range(0, len(users), CHUNK):
            self.lease.check()
            with self._open_run() as run:
                run.users.apply(users[start : start + CHUNK], self._read_at)
            time.sleep(PAUSE)

    def tombstone(self, user_ids: Sequence[str]) -> None:
        """Write tombstones for users that Clerk has confirmed to be deleted."""
        for user_id in user_ids:
            self.lease.check()
            with self._open_run() as run:
                run.users.tombstone([user_id])

    def check_instance(self) -> None:
        """
        Check that Clerk knows any of the newest users in the table, if there are any.

        Raises:
            WrongInstance: it knows none, so the secret key is probably wrong.
        """
        newest = [user_id for (user_id,) in self.store.database.execute(newest_ids(self.store))]
        if newest and not self.ask(lambda: self.api.find_users(newest)):
            raise WrongInstance("wrong_instance")

    @contextmanager
    def _open_run(self) -> Iterator[Reconciliation]:
        """Yield a reconciliation on a connection for requests, and collect its results."""
        with self.store.database.connect() as connection:
            run = Reconciliation(
                self.api,
                self.store,
                connection,
                lambda _label, _total: lambda _count: None,
                self._tell_failure,
                handled=self._handled,
                written=[],
            )
            yield run
        self.counts += run.users.counts
        self.written += (each for each in run.written or () if each.expects_webhook)

    def _tell_failure(self, finding: Finding) -> None:
        self.tell("object_not_followed", {"id": finding.id, "reason": finding.reason})

"""Requests to Clerk and writes, while a process holds the follower's lease."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DataError, IntegrityError, OperationalError, SQLAlchemyError

from clerkhooks.clerk.backend_api import BackendApi
from clerkhooks.clerk.kinds import USER, Kind
from clerkhooks.errors import ClerkhooksError, describe
from clerkhooks.handled_writes import HandledWrites
from clerkhooks.store import Store
from clerkhooks.store.awaited import now_ms
from clerkhooks.sync.comparison import Comparison, Finding, Result
from clerkhooks.sync.connections import is_locked, retry_briefly
from clerkhooks.sync.lease import Lease, Tell
from clerkhooks.sync.reconcile import Reconciliation, newest_ids, oldest_ids

T = TypeVar("T")
CHUNK = 20  # objects to write at a time; meanwhile, other requests of this process wait
MAX_FAILED = 100  # users; more are not a matter of single users, so the round fails
MAX_LOCKED = 3  # rows in a round; more are not a matter of single rows
PAUSE = 1e-5  # seconds; enough for gevent to serve every request that has arrived


class WrongInstance(ClerkhooksError):
    """Clerk knows none of the newest and oldest users in the table."""


class TooManyRefused(ClerkhooksError):
    """The application's handlers or constraints refuse too many users to remember them."""


class LeasedSync:
    """
    Reads objects from Clerk and writes them, in small steps, as long as *lease* is held.

    *tell* receives the name and the fields of each event to log. *counts* has the objects by table
    and result, and *written* has those whose changes a webhook must have announced. *failed* has
    the ids of users that a handler or a constraint of the application has refused, or whose rows
    were locked. *locked* is the number of locked rows in this round.
    """

    def __init__(
        self, api: BackendApi, store: Store, lease: Lease, handled: HandledWrites, tell: Tell
    ) -> None:
        self.api, self.store, self.lease, self.tell = api, store, lease, tell
        self._handled = handled
        self._read_at = 0
        self.counts: Counter[tuple[str, Result]] = Counter()
        self.written: list[Comparison] = []
        self.failed: set[str] = set()
        self.locked = 0

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

    def apply(self, kind: Kind, objects: Sequence[Any], *, is_import: bool = False) -> None:
        """
        Write the objects that the last request returned, unless the rows are newer.

        In an import, no webhooks are expected, because the objects existed before the installation.
        If an object is refused or its row is locked, the others are written nevertheless.

        Raises:
            LeaseLost: another process has taken over.
            TooManyRefused: more than a hundred users could not be written.
        """
        before = len(self.written)
        for start in range(0, len(objects), CHUNK):
            some = objects[start : start + CHUNK]
            try:
                self._apply(kind, some)
            except (IntegrityError, DataError, OperationalError) as error:
                self._check_refusal(error)
                for data in some:
                    self._apply_or_tell(kind, data)
            if len(self.failed) > MAX_FAILED:
                raise TooManyRefused("users_refused")
            time.sleep(PAUSE)
        if is_import:
            del self.written[before:]

    def _apply(self, kind: Kind, objects: Sequence[Any]) -> None:
        self.lease.check()
        with self.open_run() as run:
            run.table_of(kind).apply(objects, self._read_at)

    def _apply_or_tell(self, kind: Kind, data: Any) -> None:
        try:
            self._apply(kind, [data])
        except (IntegrityError, DataError, OperationalError) as error:
            self._check_refusal(error)
            self.locked += is_locked(error)
            object_id = kind.find_id(data)
            if kind is USER and object_id is not None:
                self.failed.add(object_id)
            self._tell_failure(Finding("failed", object_id, describe(error)))

    def _check_refusal(self, error: SQLAlchemyError) -> None:
        """Raise *error* again if it is not a matter of single rows."""
        if isinstance(error, OperationalError) and (
            not is_locked(error) or self.locked >= MAX_LOCKED
        ):
            raise error

    def look_up(self, kind: Kind, ids: Sequence[str]) -> list[Callable[[], list[str]]]:
        """Return functions that each send a request, and return the ids unknown to Clerk."""
        with self.open_run() as run:
            return list(run.table_of(kind).look_up(ids))

    def tombstone(self, kind: Kind, ids: Sequence[str]) -> None:
        """Write tombstones for objects that Clerk has confirmed to be deleted."""
        for object_id in ids:
            self.lease.check()
            with self.open_run() as run:
                run.table_of(kind).tombstone([object_id])

    def check_instance(self) -> None:
        """
        Check that Clerk knows any of the newest or oldest users in the table, if there are any.

        Raises:
            WrongInstance: it knows none, so the secret key is probably wrong.
        """
        if not (self._knows_any(newest_ids) or self._knows_any(oldest_ids)):
            raise WrongInstance("wrong_instance")

    def _knows_any(self, select: Callable[[Store], sa.Select[Any]]) -> bool:
        """Return whether Clerk knows any of the selected users, or none is selected."""
        ids = [user_id for (user_id,) in self.store.database.execute(select(self.store))]
        return not ids or bool(self.ask(lambda: self.api.find_users(ids)))

    @contextmanager
    def open_run(self) -> Iterator[Reconciliation]:
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
                retry=retry_briefly,
            )
            yield run
        for table in run.tables:
            self.counts.update({(table.noun, result): n for result, n in table.counts.items()})
        self.written += (each for each in run.written or () if each.expects_webhook)

    def _tell_failure(self, finding: Finding) -> None:
        if finding.kind == "handler_failed" and finding.id is not None:
            self.failed.add(finding.id)
        self.tell("object_not_followed", {"id": finding.id, "reason": finding.reason})

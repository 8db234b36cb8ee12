"""One round of the follower: the latest changes, some objects in turn, and the watch."""

from __future__ import annotations

from dataclasses import replace

from clerkhooks.clerk.kinds import USER
from clerkhooks.errors import BackendApiError
from clerkhooks.store.awaited import now_ms
from clerkhooks.store.leases import Held
from clerkhooks.sync.comparison import Result
from clerkhooks.sync.deleting import Deleter
from clerkhooks.sync.leased import MAX_FAILED, LeasedSync
from clerkhooks.sync.listing import IdSet, read_all
from clerkhooks.sync.newest import OVERLAP, find_latest, read_newest
from clerkhooks.sync.passes import Passes
from clerkhooks.sync.progress import Progress
from clerkhooks.sync.sources import Memberships, Organizations
from clerkhooks.sync.sweep import Sweep
from clerkhooks.sync.watch import Watch

MAX_LISTINGS = 3  # per round; each one reads the changes since the previous one began
MAX_GAP = 120_000  # in milliseconds; a longer time between two rounds is an outage
# If reading the latest changes fails after this many pages, read all users instead, which can be
# interrupted. If there are many users, this is worthwhile only after more pages.
MANY_PAGES, USERS_PER_PAGE = 20, 5000
HEALED = (Result.CREATED, Result.UPDATED, Result.TOMBSTONED)
SETTLED_AFTER = 5 * OVERLAP  # no change before the position can become visible later
UPDATED_AT = "updated_at"


class Round:
    """
    The rounds of a process that holds the lease, one every *interval* seconds.

    Progress is stored only after everything before it has been written, so an interrupted round is
    repeated by the same process or by the next one.
    """

    def __init__(self, leased: LeasedSync, interval: float) -> None:
        self._leased, self._interval = leased, interval
        watch = self._watch = Watch(leased.store)
        self._sweep = Sweep(leased, Deleter(leased, watch, USER), interval)
        sources = (Organizations(leased.api), Memberships(leased.api))
        self._passes = [
            Passes(leased, Deleter(leased, watch, source.kind), source, interval)
            for source in sources
            if source.kind in leased.store.by_kind
        ]
        self._is_trusted = False
        self._is_first, self._now = False, 0
        self._position, self._pages = 0, 0  # what this round has read of the latest changes
        self._missed = 0
        self.progress = Progress()
        """The progress of the current round, or of the last one."""

    def run(self, held: Held) -> None:
        """
        Do one round.

        Raises:
            LeaseLost: another process has taken over.
            WrongInstance: the secret key is probably wrong. Nothing was deleted.
            TooManyRefused: the application refuses too many users.
            BackendApiError, SQLAlchemyError: Clerk or the database failed.
        """
        self._begin(held)
        try:
            if self.progress.position is None:
                self._import()
            self._retry_failed()
            unusable = self._follow()
            self._watch_webhooks()
            for _ in range(self._sweep.count_steps(self.progress)):
                self._store(self._sweep.run(self.progress))
            for passes in self._passes:
                self._store(passes.run(self.progress))
            if unusable is not None:
                raise unusable
            self._store(replace(self.progress, error=None), completed=True)
        finally:
            self._report()

    def fail(self, reason: str) -> None:
        """Store the *reason* why the last round is incomplete, for operators."""
        self._store(replace(self.progress, error=reason))

    def _begin(self, held: Held) -> None:
        """Load the progress, check the instance, and after an outage, postpone overdue webhooks."""
        self._leased.counts.clear()
        self._leased.written.clear()
        self.progress, self._is_first = Progress.of(held), held.completed_at is None
        self._leased.failed, self._leased.locked = set(self.progress.failed), 0
        self._now = held.now
        if not self._is_trusted:
            self._leased.check_instance()
            self._is_trusted = True
        if held.completed_at is not None:
            gap = held.now - max(held.completed_at, self.progress.watched_at)
            if gap > max(MAX_GAP, 3000 * self._interval):
                troubled_at = self._watch.postpone(now_ms() - gap)
                self.progress = replace(self.progress, troubled_at=troubled_at)

    def _import(self) -> None:
        """
        Write all users who exist now. An interrupted import continues with the next page.

        Then users are followed from the time at which it began, because the users on earlier pages
        may have changed meanwhile.
        """
        api, position = self._leased.api, self.progress.imported_at
        if position is None:
            position = find_latest(self._leased.ask(lambda: api.list_updated(1, 0)), UPDATED_AT)
            self._store(replace(self.progress, imported_at=position))
        pages = read_all(api, IdSet(), self.progress.imported_to)
        while page := self._leased.ask(lambda: next(pages, None)):
            self._leased.apply(USER, page, is_import=self._is_first)
            self._store(replace(self.progress, imported_to=USER.find_id(page[-1])))
        ended = replace(self.progress, position=position, imported_to=None, imported_at=None)
        self._store(ended)

    def _retry_failed(self) -> None:
        """Write the users that a handler or the database has refused, if it accepts them now."""
        if failed := self.progress.failed:
            found = self._leased.ask(lambda: self._leased.api.find_users(failed))
            self._leased.failed.clear()
            self._leased.apply(USER, found)
            self._store(self.progress)

    def _follow(self) -> BackendApiError | None:
        """
        Write what has changed at Clerk since the last round.

        Return the error if Clerk does not list users by their latest change. Then the sweep still
        compares every user.
        """
        self._position, self._pages = self.progress.position or 0, 0
        until = self._position - (0 if self.progress.is_settled else OVERLAP)
        try:
            for _ in range(MAX_LISTINGS):
                if self._read_updated(until):
                    break
                until = self._position
        except BackendApiError as error:
            if error.reason == "answer_unusable":
                return error
            if self._pages > max(MANY_PAGES, self.progress.users // USERS_PER_PAGE):
                self._store(replace(self.progress, position=None, imported_at=self._position))
            raise
        self._move_to(self._position)
        return None

    def _move_to(self, position: int) -> None:
        """Store that the changes until *position* have been read."""
        progress = replace(self.progress, position=position)
        if position != self.progress.position:
            progress = replace(progress, moved_at=self._now, is_settled=False)
        elif self._now - progress.moved_at > SETTLED_AFTER:
            progress = replace(progress, is_settled=True)
        self._store(progress)

    def _read_updated(self, until: int) -> bool:
        """
        Write the users that changed at *until* or later.

        Return whether the list was a single page. Otherwise, a user may have moved from a later
        page to the first one meanwhile.
        """
        before = self._pages
        pages = read_newest(self._leased.api.list_updated, USER, UPDATED_AT, until)
        while page := self._leased.ask(lambda: next(pages, None)):
            self._position = max(self._position, find_latest(page, UPDATED_AT))
            self._leased.apply(USER, page)
            self._expect_webhooks()
            self._pages += 1
        return self._pages - before <= 1

    def _watch_webhooks(self) -> None:
        """Find overdue webhooks, even if the rest of the round fails."""
        troubled_at, before = self._watch.update(), self._missed
        self._missed = self._watch.missed
        if self._missed and not before:
            self._leased.tell("deliveries_missed", {"changes": self._missed})
        troubled_at = troubled_at or self.progress.troubled_at
        self._store(replace(self.progress, watched_at=self._now, troubled_at=troubled_at))

    def _expect_webhooks(self) -> None:
        self._watch.add(self._leased.written, self.progress.troubled_at)
        self._leased.written.clear()

    def _store(self, progress: Progress, *, completed: bool = False) -> None:
        self._expect_webhooks()
        progress = replace(progress, failed=sorted(self._leased.failed)[:MAX_FAILED])
        self._leased.lease.save(progress.state, completed=completed)
        self.progress = progress

    def _report(self) -> None:
        counts = self._leased.counts.items()
        healed = {
            f"{noun}_{result.value}": number
            for (noun, result), number in counts
            if number and result in HEALED
        }
        if healed:
            self._leased.tell("objects_healed", healed)

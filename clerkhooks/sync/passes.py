"""Passes over the lists of organizations and of memberships."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice

from clerkhooks.clerk.backend_api import PAGE
from clerkhooks.store.awaited import now_ms
from clerkhooks.store.queries import is_live
from clerkhooks.sync.deleting import Deleter
from clerkhooks.sync.leased import PAUSE, LeasedSync
from clerkhooks.sync.listing import IdSet
from clerkhooks.sync.newest import OVERLAP, find_latest, read_newest
from clerkhooks.sync.progress import Progress
from clerkhooks.sync.sources import PagedSource
from clerkhooks.sync.tables import MIN_AGE

HOUR = 3600.0  # seconds; a pass over a long list takes about an hour
SHARED = 10  # objects on two pages, because a deletion moves the rest of the list
MAX_LOOKUPS = 1000  # objects that are looked up after each pass
ROWS = 1000  # ids that are compared at a time; meanwhile, other requests of this process wait
MAX_SKEW = 600_000  # milliseconds by which the clocks may differ
CREATED_AT = "created_at"


class Passes:
    """
    Reads one of Clerk's lists page by page, again and again. *interval* is in seconds.

    Clerk does not list these objects by their latest change. A list of up to 500 objects is read in
    each round. Of a longer list, each round reads some pages, and the objects that were created
    since the last round. After each pass, up to 1000 rows that were not listed are looked up. Which
    objects were listed is kept in memory, so no rows are looked up after a pass that another
    process began.
    """

    def __init__(
        self, leased: LeasedSync, deleter: Deleter, source: PagedSource, interval: float
    ) -> None:
        self._leased, self._deleter, self._source = leased, deleter, source
        self._interval, self._kind = interval, source.kind
        self._begin()
        self._is_resumed: bool | None = None

    def _begin(self) -> None:
        self._offset, self._total, self._seen = 0, 0, IdSet()
        self._began_at = datetime.now(UTC)
        self._created_since = now_ms() - MAX_SKEW

    def run(self, progress: Progress) -> Progress:
        """Read the next pages, and return the new progress."""
        family = self._kind.family
        is_import = family not in progress.passed
        if self._is_resumed is None:
            # Step back, because deletions may have moved the rest of the list meanwhile.
            self._offset = max(0, progress.offsets.get(family, 0) - PAGE // 2)
            self._is_resumed = self._offset > 0
        if self._offset:
            self._read_created(is_import=is_import)
        else:
            self._begin()
        steps = 1 + int(self._total / PAGE * self._interval / HOUR)
        for _ in range(steps):
            if self._read_page(is_import=is_import):
                progress = self._end(progress)
                break
        return replace(progress, offsets={**progress.offsets, family: self._offset})

    def _read_created(self, *, is_import: bool) -> None:
        """Write the objects that were created since the last round."""
        leased, list_newest = self._leased, self._source.list_newest
        pages = read_newest(list_newest, self._kind, CREATED_AT, self._created_since)
        while page := leased.ask(lambda: next(pages, None)):
            leased.apply(self._kind, page, is_import=is_import)
            latest = find_latest(page, CREATED_AT)
            self._created_since = max(self._created_since, latest - OVERLAP)

    def _read_page(self, *, is_import: bool) -> bool:
        """Write the next page, oldest first, and return whether it is the last one."""
        list_page = self._source.list_page
        page, self._total = self._leased.ask(lambda: list_page("+created_at", PAGE, self._offset))
        self._leased.apply(self._kind, page, is_import=is_import)
        for data in page:
            self._seen.add(self._kind.find_id(data) or "")
        is_last = not page or self._offset + len(page) >= self._total
        self._offset += max(1, len(page) - SHARED)
        return is_last

    def _end(self, progress: Progress) -> Progress:
        """Look up the rows that were not listed. The next call begins a new pass."""
        was_resumed, self._offset, self._is_resumed = self._is_resumed, 0, False
        if not was_resumed:
            if unseen := self._find_unseen():
                lookups = self._leased.look_up(self._kind, unseen)
                progress = self._deleter.delete(lookups, self._total, progress)
            progress = self._deleter.end_pass(progress)
        return replace(progress, passed=sorted({*progress.passed, self._kind.family}))

    def _find_unseen(self) -> list[str]:
        """Return the ids of live rows from before the pass that were not listed."""
        with self._leased.open_run() as run:
            table = run.table_of(self._kind)
            is_old = table.table.c.created_at < self._began_at - MIN_AGE
            ids = table.read_ids(table.table.c.id, is_live(table.table), is_old)
            unseen = (each for each in _yielding(ids) if each not in self._seen)
            return list(islice(unseen, MAX_LOOKUPS))


def _yielding(ids: Iterable[str]) -> Iterator[str]:
    """Yield *ids*, with pauses: reads from SQLite do not let gevent switch to requests."""
    for number, each in enumerate(ids):
        if number % ROWS == 0:
            time.sleep(PAUSE)
        yield each

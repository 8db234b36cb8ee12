"""Deletions that the follower finds: confirmed by Clerk, and limited."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from clerkhooks.clerk.kinds import Kind
from clerkhooks.errors import Unconfirmed
from clerkhooks.store.awaited import DAY, now_ms
from clerkhooks.sync.leased import LeasedSync
from clerkhooks.sync.progress import Progress
from clerkhooks.sync.tables import MAX_DELETED, MAX_DELETED_SHARE
from clerkhooks.sync.watch import Watch


class Deleter:
    """
    Tombstones objects of *kind* that do not exist at Clerk.

    Within a day, at most 20 objects or a tenth of all are deleted, whichever is more. If there are
    more, the secret key may be wrong, so an operator must decide.
    """

    def __init__(self, leased: LeasedSync, watch: Watch, kind: Kind) -> None:
        self._leased, self._watch, self._kind = leased, watch, kind

    def delete(
        self, lookups: Iterable[Callable[[], list[str]]], total: int, progress: Progress
    ) -> Progress:
        """
        Delete the objects that *lookups* do not find, unless there are too many of *total*.

        Raises:
            WrongInstance: the secret key is probably wrong.
        """
        deletions = progress.deletions_of(self._kind)
        if not 0 <= now_ms() - deletions.since <= DAY:  # negative if the clock was set back
            deletions = replace(deletions, since=now_ms(), count=0)
        # The total may have decreased since the last deletion.
        most = max(0, max(MAX_DELETED, total // MAX_DELETED_SHARE) - deletions.count)
        gone = self._confirm(lookups, most)
        if gone:
            self._leased.check_instance()
        if len(gone) > most:
            if not deletions.is_withheld:
                fields = {"kind": self._kind.family, "found": len(gone), "deleted": deletions.count}
                self._leased.tell("deletions_withheld", fields)
            return progress.with_deletions(self._kind, replace(deletions, withholds=True))
        self._leased.tombstone(self._kind, gone)
        self._watch.add_deletions(gone, progress.troubled_at)
        deletions = replace(deletions, count=deletions.count + len(gone))
        return progress.with_deletions(self._kind, deletions)

    def end_pass(self, progress: Progress) -> Progress:
        """Record that all objects have been compared since the last call."""
        deletions = progress.deletions_of(self._kind)
        deletions = replace(deletions, withheld=deletions.withholds, withholds=False)
        return progress.with_deletions(self._kind, deletions)

    def _confirm(self, lookups: Iterable[Callable[[], list[str]]], most: int) -> list[str]:
        """Return the ids unknown to Clerk. Stop when there are more than *most*."""
        gone: list[str] = []
        for lookup in lookups:
            gone += self._ask(lookup)
            if len(gone) > most:
                break
        return gone

    def _ask(self, lookup: Callable[[], list[str]]) -> list[str]:
        try:
            return self._leased.ask(lookup)
        except Unconfirmed:  # one odd object must not stop the follower
            return []

"""The reconciliation of users and organizations, which can be looked up by id."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from multiprocessing.pool import ThreadPool

from clerkhooks.clerk.backend_api import IDS
from clerkhooks.errors import Unconfirmed
from clerkhooks.store.awaited import now_ms
from clerkhooks.sync.run import Advance
from clerkhooks.sync.sources import Lookup
from clerkhooks.sync.tables import THREADS, TableSync, batched, or_unconfirmed


@dataclass
class LookupSync(TableSync):
    """The sync of a table of objects that can be looked up by id."""

    source: Lookup

    def sync_ids(self, ids: Iterable[str], total: int | None, *, is_trusted: bool) -> None:
        """Sync the objects with these *ids*. *total* is their number if known."""
        gone = self._find_deleted(ids, self.run.begin(self.noun, total), apply=True)
        self._tombstone_limited(gone, is_trusted=is_trusted)

    def look_up(self, ids: Sequence[str]) -> Iterator[Callable[[], list[str]]]:
        """Yield a function for each id."""
        return (partial(self._ask, object_id) for object_id in ids)

    def _ask(self, object_id: str) -> list[str]:
        return [object_id] if self.source.is_gone(object_id) else []

    def _find_deleted(
        self, ids: Iterable[str], advance: Advance, *, apply: bool = False
    ) -> Iterator[str]:
        """
        Yield the ids that do not exist at Clerk. With *apply*, update the other objects.

        An object's absence from a list does not prove a deletion: pages shift while objects are
        created, and Clerk returns fewer objects if it does not accept the limit.
        """
        with ThreadPool(THREADS) as pool:
            for group in batched(batched(ids, IDS), THREADS):
                read_at = now_ms()
                found = list(chain.from_iterable(pool.map(self.source.find, group)))
                if apply:
                    self.apply(found, read_at)
                known = set(map(self.source.kind.find_id, found))
                asked = list(chain.from_iterable(group))
                absent = [object_id for object_id in asked if object_id not in known]
                for some in batched(absent, THREADS):  # the caller stops if there are too many
                    answers = pool.map(or_unconfirmed(self.source.is_gone), some)
                    yield from self._drop_unconfirmed(some, answers)
                advance(len(asked))

    def _drop_unconfirmed(
        self, ids: Iterable[str], answers: Iterable[bool | Unconfirmed]
    ) -> Iterator[str]:
        for object_id, is_gone in zip(ids, answers, strict=True):
            if isinstance(is_gone, Unconfirmed):
                self.tell_unconfirmed(object_id, is_gone)
            elif is_gone:
                yield object_id

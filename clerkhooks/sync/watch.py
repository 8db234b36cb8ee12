"""The watch: changes that the follower has found although no webhook announced them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

from clerkhooks.store import Store
from clerkhooks.store.activity import find_lag
from clerkhooks.store.awaited import DAY, now_ms
from clerkhooks.sync.comparison import Comparison

# In milliseconds. Svix's third attempt is 5 minutes and 5 seconds after the first one.
GRACE = 360_000
MIN_GRACE = 60_000  # in milliseconds; Clerk's clock may differ from this machine's
MAX_LAG = 60.0  # seconds; webhooks that take longer were delayed by an outage or by overload


class Watch:
    """
    Records the changes that the follower has written, until their webhooks arrive.

    A webhook is overdue GRACE after the change. If webhooks were delayed meanwhile, because this
    program or its database was unavailable or overloaded, Svix's next attempt may come much later.
    Then a webhook has five times as long as the delay, up to a day.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._awaited = store, store.awaited
        self.missed = 0
        """The number of overdue webhooks."""

    def add(self, changes: Iterable[Comparison], troubled_at: int) -> None:
        """Expect the webhooks of *changes*. *troubled_at* is the end of the last delay, in ms."""
        times = ((each.snapshot.id, each.snapshot.updated_at) for each in changes)
        self._add([(*each, False) for each in times], troubled_at)

    def add_deletions(self, object_ids: Iterable[str], troubled_at: int) -> None:
        """Expect the webhooks of deletions, the time of which is not known."""
        self._add([(object_id, now_ms(), True) for object_id in object_ids], troubled_at)

    def _add(self, changes: Sequence[tuple[str, int, bool]], troubled_at: int) -> None:
        if changes:
            self._awaited.add(
                {
                    "object_id": object_id,
                    "changed_at": changed_at,
                    "is_deletion": is_deletion,
                    "due_at": find_due(changed_at, troubled_at),
                }
                for object_id, changed_at, is_deletion in changes
            )

    def postpone(self, since: int) -> int:
        """Give more time to webhooks that were due at *since* or later, and return the time."""
        self._awaited.postpone(GRACE, since)
        return now_ms()

    def update(self) -> int | None:
        """
        Forget the changes that webhooks have announced, and count the others.

        Return the current time if webhooks are being delayed, otherwise None.
        """
        counts, troubled_at = self._awaited.count(), None
        if counts.recorded:
            self._awaited.delete_arrived()
            lag = find_lag(self._store, datetime.now(UTC) - timedelta(milliseconds=GRACE))
            if lag is not None and lag.p99 > MAX_LAG:
                troubled_at = self.postpone(now_ms() - GRACE)
            counts = self._awaited.count()
        self.missed = counts.missed
        return troubled_at


def find_due(changed_at: int, troubled_at: int) -> int:
    """Return when the webhook of a change is overdue. All times are in milliseconds."""
    tried_at = max(changed_at, troubled_at)
    due_at = tried_at + 5 * (tried_at - changed_at) + GRACE
    return max(now_ms() + MIN_GRACE, min(due_at, changed_at + DAY))

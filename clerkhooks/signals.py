"""
What an application may listen to, with blinker, as it does to Flask's own signals.

Both signals send ``sender`` (the event's type), ``event`` and ``outcome``. Subscribe to a type, to all types
of a prefix that ends in a dot, or to everything::

    @event_processing.connect_via("organization.")
    def store_organization(sender: str, *, event: Event, outcome: Outcome) -> None: ...

Events come in any order, so compare ``event.version`` before you overwrite: see ``models.Versioned``.
``connect`` holds a receiver weakly unless it is told ``weak=False``; ``connect_via`` holds it for good.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

from blinker import Signal


class EventSignal(Signal):
    """A signal whose sender is an event's type, and which also reaches those who subscribed to a prefix of it."""

    def receivers_for(self, sender: Any) -> Generator[Callable[..., Any], None, None]:
        """Each receiver of the type, of one of its prefixes or of all events, once. None while the signal is muted."""
        found: list[Callable[..., Any]] = []
        for key in _keys(sender) if self.receivers and not self.is_muted else ():
            # Compared, not identified: a method that is held weakly is another object at each look.
            found += [receiver for receiver in super().receivers_for(key) if receiver not in found]
        yield from found

    def has_receivers_for(self, sender: Any) -> bool:
        """Whether anybody listens to the type. Without any receiver at all this costs nothing."""
        return any(True for _ in self.receivers_for(sender))


def _keys(sender: str) -> Iterator[str]:
    """A type, and its prefixes: ``organization.created`` and ``organization.``."""
    yield sender
    yield from (sender[: at + 1] for at, character in enumerate(sender) if character == "." and at + 1 < len(sender))


event_processing = EventSignal(
    """Sent inside the transaction, once for each message, also for one that is stale.

    What a receiver writes through ``db.session`` is committed or rolled back together with the message. One that
    raises makes it a 500, and Svix's retry starts over. It must neither commit nor roll back, and an error of the
    database may be caught only around a savepoint.
    """
)

user_first_seen = Signal(
    """Sent after an authenticated call has created the row of a user whose webhook has not come, once for each user.

    The sender is the application; ``user_id`` says who.
    """
)

event_processed = EventSignal(
    """Sent after the commit, for mail and the like, at most once for each message.

    What a receiver raises is logged, and changes nothing.
    """
)

"""
Durable handlers: each is called for every change of its types, at least once.

A handler's position in the change feed is stored with its lease, after it returns. One process of
all hosts calls the handler. A handler that fails holds up no other one.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Self

from sqlalchemy.exc import SQLAlchemyError

from clerkhooks.errors import ChangesPruned, ChangesRestored, describe
from clerkhooks.events import DurableHandler, Event, Handler, Outcome, Version
from clerkhooks.store import Store
from clerkhooks.store.change_reader import Change, ChangeReader, Cursor
from clerkhooks.store.leases import Held, known_fields
from clerkhooks.sync.lease import Lease, LeasedLoop, LeaseLost, Tell

PREFIX = "handler:"
LIFETIME = 30.0  # seconds
MAX_CALL = 600.0  # seconds, after which another process may call the handler too
POLL = 1.0  # seconds
PAGE = 100  # changes
STOP_TIMEOUT = 5.0  # seconds for a handler that is running
MAX_PAUSE = 3600.0  # seconds between two attempts; the first pause is a second
_VERBS = {
    "created": ("created",),
    "filled": ("created",),
    "updated": ("updated",),
    "revived": ("updated",),
    "deleted": ("deleted",),
    "barred": ("updated", "barred"),
    "restored": ("updated", "restored"),
}
_BARRING = {"banned_at", "deprovisioned_at"}


@dataclass(frozen=True)
class Position:
    """
    The position of a handler, as stored.

    All changes up to *cursor* are done. The next one has failed *failures* times, last with *error*
    (the class of the exception), and is tried again at *retry_at* (in milliseconds).
    """

    cursor: str | None = None
    failures: int = 0
    error: str | None = None
    retry_at: int = 0

    @classmethod
    def of(cls, held: Held) -> Self:
        """Return the stored position. Ignore what another release has stored."""
        return cls(**known_fields(cls, held.state))


class ChangeHandlerLoop(LeasedLoop):
    """Calls a durable handler, with *call*, for each change."""

    def __init__(
        self,
        store: Store,
        durable: DurableHandler,
        call: Callable[[Handler, Event[Any]], object],
        tell: Tell | None = None,
    ) -> None:
        super().__init__(Lease(store, f"{PREFIX}{durable.name}", LIFETIME), POLL, tell)
        self._reader, self._durable, self._call = ChangeReader(store), durable, call
        self._position = Position()
        self._stop_by = math.inf
        self._unsaved = threading.Lock()  # held until the position is stored

    def begin_stop(self) -> None:
        """Start no more calls. A handler that is running has STOP_TIMEOUT from now on."""
        super().begin_stop()
        self._stop_by = min(self._stop_by, time.monotonic() + STOP_TIMEOUT)

    def stop(self) -> None:
        """End ``run``. A handler that is running may end, so that it is not called again."""
        self.begin_stop()
        if self._unsaved.acquire(timeout=max(0.0, self._stop_by - time.monotonic())):
            self._unsaved.release()
        super().stop()

    def begin(self) -> None:
        """Read the stored position in the next round."""

    def _check(self, held: Held | None) -> None:
        """
        Check that *held*, if given, has the position that this process stored last.

        Raises:
            LeaseLost: another process held the lease meanwhile. Its position must not be replaced.
        """
        if held is not None and Position.of(held) != self._position:
            raise LeaseLost("lease_lost")

    def work(self, held: Held) -> None:
        """Call the handler until the lease must be renewed."""
        self._position = Position.of(held)
        wait = self._position.retry_at - held.now
        if 0 < wait <= MAX_PAUSE * 1000:  # after a longer one, the database's clock was set back
            return
        if self._position.cursor is None:
            self._save(Position(str(self._find_start())))
        ends_at = time.monotonic() + self.lease.interval
        while time.monotonic() < ends_at and not self._stopping.is_set():
            if not self._read_page():
                self._stopping.wait(POLL)

    def find_pause(self, error: Exception) -> float | None:
        """Store a failure of the handler, and return a pause that doubles with each one."""
        is_counted = self.calling is not None or isinstance(error, ChangesPruned | ChangesRestored)
        self.calling = None
        if not is_counted:  # the database is away
            return min(self.lease.interval, POLL * 2.0**self._failures)
        failures = self._position.failures + 1
        pause = min(MAX_PAUSE, 2.0 ** min(failures - 1, 20))
        held = self.lease.acquire()
        self._check(held)
        retry_at = int(held.now + pause * 1000) if held is not None else 0
        cursor = self._position.cursor
        self._save(Position(cursor, failures, describe(error), retry_at))
        return pause

    def _find_start(self) -> Cursor:
        """Return the first position of a new handler. It shows if changes after it are pruned."""
        end = self._reader.find_end()
        oldest = self._reader.read(None, 1) if self._durable.from_start else []
        if not oldest:
            return end
        first = Cursor.parse(oldest[0].cursor)
        return first._replace(sequence=first.sequence - 1)

    def _read_page(self) -> bool:
        """Call the handler for the next changes, and return whether there were any."""
        cursor = self._position.cursor
        found = self._reader.read(Cursor.parse(cursor) if cursor else None, PAGE)
        for change in found:
            events = [event for event in make_events(change) if self._durable.matches(event.type)]
            with self._unsaved:
                if self._stopping.is_set():
                    return False
                self._call_with(events)
                if events or change is found[-1]:
                    self._save(Position(change.cursor))
        return bool(found)

    def _call_with(self, events: Sequence[Event[Any]]) -> None:
        for event in events:
            self._check(self.lease.check())
            self.calling = {"id": event.data["id"], "cursor": event.message_id}
            with self._renewing():
                self._call(self._durable.handler, event)
            self.calling = None

    @contextmanager
    def _renewing(self) -> Iterator[None]:
        """Renew the lease during a call. Otherwise, two processes might take turns for ever."""
        ended, ends_at = threading.Event(), time.monotonic() + MAX_CALL

        def renew() -> None:
            while not ended.wait(self.lease.interval) and time.monotonic() < ends_at:
                with suppress(SQLAlchemyError):
                    self.lease.acquire()

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _save(self, position: Position) -> None:
        self._position = position
        self.lease.save(asdict(position), completed=not position.failures)


@dataclass(frozen=True)
class HandlerReport:
    """A durable handler and its position, for operators."""

    name: str
    position: Position


def find_handlers(store: Store) -> list[HandlerReport]:
    """Return all durable handlers that have ever run."""
    return [
        HandlerReport(name.removeprefix(PREFIX), Position.of(held))
        for name, held in store.leases.find_all().items()
        if name.startswith(PREFIX)
    ]


def make_events(change: Change) -> list[Event[Any]]:
    """
    Return the events of a change.

    The first one is about the object: ``created`` when its profile is known, ``updated`` or
    ``deleted``. A user whose account state changed has a second one.
    """
    if change.kind == "created" and change.version is None:
        return []  # by a first call; the profile follows
    verbs = _VERBS[change.kind]
    if change.kind in ("created", "filled", "revived") and _BARRING.intersection(change.fields):
        verbs = (*verbs, "barred")
    data = {"id": change.object_id, "kind": change.kind, "fields": change.fields}
    version = Version(-1 if change.version is None else change.version, 0, "")
    return [
        Event(
            f"{change.object_type}.{verb}",
            data,
            change.cursor,
            version,
            change.changed_at,
            Outcome.APPLIED,
        )
        for verb in verbs
    ]

"""Work that one process of all hosts does, until it stops and another takes over."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from clerkhooks.errors import ClerkhooksError, describe, frames
from clerkhooks.store import Store
from clerkhooks.store.leases import Held

logger = logging.getLogger(__name__)
Context = Callable[[], AbstractContextManager[object]]
Tell = Callable[[str, Mapping[str, object]], object]
LIFETIME = 15.0  # seconds without a renewal after which another process takes over
RENEWALS = 3  # per lifetime
FIRST_PAUSE = 2.0  # seconds after the first failure; it doubles with each failure


class LeaseLost(ClerkhooksError):
    """Another process holds the lease. Nothing more may be written."""


class Lease:
    """
    The right to do the work *name*, for *lifetime* seconds after each renewal.

    The thread that works also renews the lease, so the lease ends if the thread hangs. Only while a
    durable handler is running, another thread renews it, for a limited time.
    """

    def __init__(self, store: Store, name: str, lifetime: float = LIFETIME) -> None:
        self._leases, self.name, self.lifetime = store.leases, name, lifetime
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._renewed_at = -lifetime
        self._is_released = False

    @property
    def interval(self) -> float:
        """Seconds between two renewals, and between two attempts to take the lease."""
        return self.lifetime / RENEWALS

    def acquire(self) -> Held | None:
        """Take or renew the lease. Return the progress so far, or None if another holds it."""
        if self._is_released:
            return None
        began_at = time.monotonic()
        held = self._leases.acquire(self.name, self.holder, self.lifetime)
        if held is not None:
            self._renewed_at = began_at
        return held

    def check(self) -> Held | None:
        """
        Renew the lease if it is time, and return the stored progress if it was renewed.

        Raises:
            LeaseLost: another process has taken over.
        """
        if not self._is_released and time.monotonic() - self._renewed_at < self.interval:
            return None
        held = self.acquire()
        if held is None:
            raise LeaseLost("lease_lost")
        return held

    def save(self, state: Mapping[str, Any], *, completed: bool = False) -> None:
        """
        Store the progress. *completed* records the time at which a round has ended.

        Raises:
            LeaseLost: another process has taken over.
        """
        if not self._leases.save(self.name, self.holder, state, completed=completed):
            raise LeaseLost("lease_lost")

    def abandon(self) -> None:
        """Neither take nor renew the lease any more."""
        self._is_released = True

    def release(self) -> None:
        """End the lease for good, so that another process can take over at once."""
        self.abandon()
        self._leases.release(self.name, self.holder)


class LeasedLoop(ABC):
    """
    Repeats rounds of work every *interval* seconds, in the process that holds *lease*.

    *tell* receives the name and the fields of each event; by default, they are logged.
    """

    def __init__(self, lease: Lease, interval: float, tell: Tell | None = None) -> None:
        self.lease, self.interval, self.tell = lease, interval, tell or _log
        self._is_leading = False
        self._next_at = 0.0
        self._failures = 0
        self._stopping = threading.Event()
        self._is_interrupted = False
        self._context: Context = nullcontext
        self.calling: Mapping[str, object] | None = None
        """The log fields of the application's function that is running, if there is one."""

    @abstractmethod
    def begin(self) -> None:
        """Forget what is in memory: this process has just taken the lease."""

    @abstractmethod
    def work(self, held: Held) -> None:
        """
        Do a round. Call ``lease.check()`` at least every few seconds, and before each write.

        Raises:
            Exception: the round failed. It is repeated after a pause that grows.
        """

    def find_pause(self, error: Exception) -> float | None:
        """Record a failure, and return the seconds until the next round if they are known."""
        del error
        return None

    def run(self, context: Context = nullcontext) -> None:
        """
        Repeat rounds until ``stop`` is called, each in its own *context*.

        No error ends this function.
        """
        self._context = context
        while not (self._stopping.is_set() or self._is_interrupted):
            self._turn()
            pause = self._next_at - time.monotonic()
            self._stopping.wait(max(0.0, min(pause, self.lease.interval)))

    def interrupt(self) -> None:
        """End ``run`` within a few seconds. A signal handler may call this: it takes no lock."""
        self._is_interrupted = True
        self.lease.abandon()

    def begin_stop(self) -> None:
        """Start no more work."""
        self._stopping.set()

    def stop(self) -> None:
        """End ``run``, and release the lease if this process holds it."""
        self.begin_stop()
        with suppress(SQLAlchemyError):  # then the lease ends by itself
            self.lease.release()

    def _turn(self) -> None:
        """Take or renew the lease. Do a round if it is time."""
        try:
            held = self.lease.acquire()
            if held is None:
                self._stand_by()
            else:
                self._lead(held)
        except LeaseLost:
            self._stand_by()
        except Exception as error:  # noqa: BLE001  # the loop must survive every error
            self._fail(error)

    def _stand_by(self) -> None:
        """Wait until the lease may be free."""
        if self._is_leading and not self._stopping.is_set():
            self.tell("lease_lost", {"lease": self.lease.name})
        self._is_leading, self._failures = False, 0
        self._next_at = time.monotonic() + self.lease.interval

    def _lead(self, held: Held) -> None:
        if not self._is_leading:
            self.begin()
            self._is_leading, self._next_at = True, 0.0
            self.tell("lease_taken", {"lease": self.lease.name, "holder": self.lease.holder})
        began_at = time.monotonic()
        if began_at >= self._next_at:
            with self._context():
                self.work(held)
            self._failures, self._next_at = 0, began_at + self.interval

    def _fail(self, error: Exception) -> None:
        """Log *error*, and try again later. Do not log failed renewals of the lease meanwhile."""
        if self._failures and time.monotonic() < self._next_at:
            return
        pause = min(self.interval, FIRST_PAUSE * 2**self._failures)
        self._failures = min(self._failures + 1, 10)
        about = self.calling
        is_expected = isinstance(error, ClerkhooksError | SQLAlchemyError) and about is None
        with suppress(SQLAlchemyError, LeaseLost):
            pause = self.find_pause(error) or pause
        self._next_at = time.monotonic() + pause
        reason = error.reason if isinstance(error, ClerkhooksError) else describe(error)
        fields: dict[str, object] = {"lease": self.lease.name, **(about or {}), "error": reason}
        if not is_expected:
            fields["frames"] = frames(error)
        self.tell("round_failed", fields | {"retry_in_s": round(pause, 1)})


def stop_all(loops: Sequence[LeasedLoop]) -> None:
    """Stop *loops*. Together, they take no longer than the slowest one."""
    for loop in loops:
        loop.begin_stop()
    for loop in loops:
        loop.stop()


INFORMATION = ("lease_taken", "lease_lost", "objects_healed")


def _log(event: str, fields: Mapping[str, object]) -> None:
    logger.log(logging.INFO if event in INFORMATION else logging.WARNING, event, extra=fields)

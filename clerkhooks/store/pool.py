"""A fair queue for connections. It refuses callers that it cannot serve in time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from time import monotonic
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from clerkhooks.errors import RequestError

RETRY_AFTER = 1  # seconds; short, because users are waiting (Svix retries on its own schedule)
_CHECK_INTERVAL = 0.1  # seconds
_WEIGHT = 0.2  # the weight of the latest duration in the moving average


class Overloaded(RequestError, sa.exc.TimeoutError):
    """The request cannot be served in time. Nothing was changed. The caller can retry."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    retry_after = RETRY_AFTER

    def __init__(self, reason: str = "overloaded") -> None:
        super().__init__(reason)


class Slots:
    """
    A fair semaphore with *size* slots. Callers are served in order of arrival.

    A caller is refused as soon as its expected wait exceeds *timeout* seconds. The expected wait
    depends on the number of callers ahead and on the average time that a slot is occupied. With a
    timeout of 0, no caller waits.
    """

    def __init__(self, size: int, timeout: float) -> None:
        self.size, self.timeout = size, timeout
        self._guard = threading.RLock()  # garbage collection may call end() at any time
        self._free = [None] * size  # pop() and append() of a list are atomic and fast
        self._waiting: deque[threading.Lock] = deque()
        self._duration = 0.0  # the average time in seconds that a slot is occupied
        self._changed_at = monotonic()  # the last time a slot was taken or freed

    @contextmanager
    def use(self) -> Iterator[None]:
        """
        Occupy a slot while the ``with`` block is running.

        Raises:
            Overloaded: the wait would be too long.
        """
        began_at = self.begin()
        try:
            yield
        finally:
            self.end(began_at)

    def begin(self) -> float:
        """
        Wait for a slot, and return the time at which it was taken.

        Raises:
            Overloaded: the wait would be too long.
        """
        if self._waiting or not self._take():
            self._queue()
        self._changed_at = monotonic()
        return self._changed_at

    def end(self, began_at: float) -> None:
        """Free the slot that was taken at *began_at*, and give it to the next caller."""
        self._changed_at = monotonic()
        self._duration += _WEIGHT * (self._changed_at - began_at - self._duration)
        self._free.append(None)
        if self._waiting:
            self._serve()

    def _take(self) -> bool:
        try:
            self._free.pop()
        except IndexError:
            return False
        return True

    def _queue(self) -> None:
        turn = threading.Lock()
        turn.acquire()
        with self._guard:
            if not self._free:
                self._refuse_if_late(len(self._waiting))
            self._waiting.append(turn)
        self._serve()  # a slot may have become free since the first attempt
        try:
            self._wait(turn)
        except BaseException:  # this caller was refused or killed
            self._leave(turn)
            raise

    def _serve(self) -> None:
        with self._guard:
            while self._waiting and self._take():
                self._waiting.popleft().release()

    def _wait(self, turn: threading.Lock) -> None:
        deadline = monotonic() + self.timeout
        while not turn.acquire(timeout=_CHECK_INTERVAL):
            with self._guard:
                if turn in self._waiting:
                    self._refuse_if_late(self._waiting.index(turn), monotonic() > deadline)

    def _leave(self, turn: threading.Lock) -> None:
        with self._guard:
            if turn in self._waiting:
                self._waiting.remove(turn)
                return
        self._free.append(None)  # this caller had already received a slot
        self._serve()

    def _refuse_if_late(self, before: int, is_late: bool = False) -> None:
        # If no slot has been taken or freed for a while, the slots in use have been occupied for at
        # least that long.
        duration = max(self._duration, monotonic() - self._changed_at)
        if is_late or duration * (before + 1) / self.size > self.timeout:
            raise Overloaded


class OrderedPool(QueuePool):
    """A pool with a fair queue that refuses callers that would wait too long."""

    # By default, the pool's logger would be a child of "clerkhooks", and the service would print
    # its records.
    _sqla_logger_namespace = "sqlalchemy.pool.impl.QueuePool"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._slots = Slots(self.size(), self.timeout())  # the pool has no overflow
        self._began_at: dict[ConnectionPoolEntry, float] = {}

    def _do_get(self) -> ConnectionPoolEntry:
        began_at = self._slots.begin()
        try:
            record = super()._do_get()
        except BaseException:
            self._slots.end(began_at)
            raise
        self._began_at[record] = began_at
        return record

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        began_at = self._began_at.pop(record, None)
        try:
            super()._do_return_conn(record)
        finally:
            if began_at is not None:
                self._slots.end(began_at)

"""Balances connections between the workers of one gunicorn, which accept from the same queue."""

from __future__ import annotations

import math
import time
from mmap import mmap
from typing import TYPE_CHECKING, Any

from gevent.server import StreamServer

if TYPE_CHECKING:
    from clerkhooks.web.worker import Worker

REQUESTS_PER_ACCEPT = 8
PAUSE = 0.001  # seconds; meanwhile, a worker with fewer connections can accept the next one
MAX_PAUSES = 5  # then a connection is accepted, because the other worker may be busy
SLOTS = 64  # with more workers, some share a slot, and connections are balanced less evenly
MAX_AGE = 1.0  # seconds; a worker whose number is older hangs or was killed


class OpenConnections:
    """
    The number of open connections of each worker, in memory that all workers share.

    Create the object before the workers are forked. A worker is identified by an integer.
    """

    def __init__(self) -> None:
        self._counts = memoryview(mmap(-1, 8 * SLOTS)).cast("q")
        self._published_at = memoryview(mmap(-1, 8 * SLOTS)).cast("d")

    def publish(self, worker: int, count: int) -> None:
        """Set the number of a worker. It expires after MAX_AGE."""
        self._counts[worker % SLOTS] = count
        self._published_at[worker % SLOTS] = time.monotonic()

    def withdraw(self, worker: int) -> None:
        """Remove the number of a worker."""
        self._published_at[worker % SLOTS] = -math.inf

    def least(self) -> float:
        """Return the lowest number of all workers, or infinity if no worker has published one."""
        since = time.monotonic() - MAX_AGE
        slots = zip(self._counts, self._published_at, strict=True)
        return min((count for count, at in slots if at > since), default=math.inf)


class BalancedServer(StreamServer):  # type: ignore[misc]
    """
    Accepts one connection per event-loop iteration, or several if the worker is busy.

    The iterations of a busy worker take longer. If another worker has fewer connections, it can
    accept the next one first. Otherwise, if eight connections arrive together, one of two workers
    often accepts most of them.
    """

    def __init__(self, listener: Any, handle: Any, spawn: Any, worker: Worker, **tls: Any) -> None:
        self._worker, self._is_pausing = worker, False
        super().__init__(listener, handle=handle, spawn=spawn, **tls)

    @property
    def max_accept(self) -> int:
        """The number of connections to accept in this iteration."""
        return 1 + self._worker.count_requests() // REQUESTS_PER_ACCEPT

    def do_handle(self, *arguments: Any) -> None:
        """Serve an accepted connection."""
        self._worker.count_connection(1)
        super().do_handle(*arguments)

    def do_close(self, *arguments: Any) -> None:
        """Close a connection that has ended, and end a pause that is no longer needed."""
        super().do_close(*arguments)
        self._worker.count_connection(-1)
        if self._is_pausing and not self._worker.should_pause():
            self._start_accepting_if_started()

    def _do_read(self, pauses: int = 0) -> None:
        """Accept connections, or pause again after *pauses*. gevent calls this for each event."""
        self._is_pausing = pauses < MAX_PAUSES and self._worker.should_pause()
        if self._is_pausing:
            self.stop_accepting()
            self._timer = self.loop.timer(PAUSE)
            self._timer.start(self._do_read, pauses + 1)
        else:
            self.start_accepting()
            super()._do_read()

"""
Group commit: calls that arrive at the same time share one statement and one commit.

For reads, this pattern is known as a data loader. Without batching, a service on PostgreSQL with
two workers processed 28% fewer deliveries and 22% fewer calls per second.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Hashable, Sequence
from time import sleep
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")
R = TypeVar("R")
MAX_WAIT = 0.1  # the maximum time in seconds that a batch waits for the previous batch
MAX_BATCH = 64
MAX_IDLE_WAIT = 0.01  # the maximum time in seconds that a batch waits for more callers


class _Batch(Generic[T, R]):
    """A batch of items. The caller that added the first item executes the whole batch."""

    def __init__(self) -> None:
        self.items: list[T] = []
        self.keys: set[Hashable] = set()
        self.results: Sequence[R] | None = None
        self.error: Exception | None = None
        self.done = threading.Lock()  # locked until there are results or an error
        self.done.acquire()


class Batcher(Generic[T, R]):
    """
    Executes an item immediately, and batches the items that arrive during the execution.

    Items of a batch have no *keys* in common. If a batch fails, each caller retries its item alone,
    unless *concerns_all* returns true for the error.
    """

    def __init__(
        self,
        execute: Callable[[Sequence[T]], Sequence[R]],
        *,
        keys: Callable[[T], Sequence[Hashable]] = lambda _: (),
        concerns_all: Callable[[Exception], bool],
    ) -> None:
        self._execute, self._keys, self._concerns_all = execute, keys, concerns_all
        self._guard, self._turn = threading.Lock(), threading.Lock()
        self._open: _Batch[T, R] | None = None
        """The batch that still accepts items."""

    def __call__(self, item: T) -> R:
        """
        Return the result of *execute* for *item*.

        Raises:
            Exception: *execute* failed. Each caller gets a separate exception object.
        """
        batch, place = self._join(item)
        if place == 0:
            self._lead(batch)
        else:
            with batch.done:
                pass
        if batch.results is not None:
            return batch.results[place]
        if batch.error is not None and (len(batch.items) == 1 or self._concerns_all(batch.error)):
            # The traceback of a shared exception would collect the frames of all callers.
            raise batch.error if place == 0 else copy.copy(batch.error)
        [result] = self._execute([item])
        return result

    def _join(self, item: T) -> tuple[_Batch[T, R], int]:
        """Add *item* to the open batch or a new one. Return the batch and the item's index."""
        keys = self._keys(item)
        with self._guard:
            batch = self._open
            if batch is None or len(batch.items) == MAX_BATCH or not batch.keys.isdisjoint(keys):
                batch = self._open = _Batch()
            batch.items.append(item)
            batch.keys.update(keys)
            return batch, len(batch.items) - 1

    def _lead(self, batch: _Batch[T, R]) -> None:
        """
        Execute *batch* after the previous batch has ended, or after MAX_WAIT.

        Until then, more items can be added to *batch*.
        """
        has_turn = False
        try:
            # Try without a timeout first. Under gevent, a timeout needs a timer, and starting a
            # timer takes longer than acquiring the lock.
            has_turn = self._turn.acquire(blocking=False) or self._turn.acquire(timeout=MAX_WAIT)
            _wait_for_callers()
            self._close(batch)
            batch.results = self._execute(batch.items)
        except Exception as error:  # noqa: BLE001  # each caller raises it or retries alone
            batch.error = error
        finally:  # if this caller is killed, the other callers retry alone
            self._close(batch)
            if has_turn:
                self._turn.release()
            batch.done.release()

    def _close(self, batch: _Batch[T, R]) -> None:
        with self._guard:
            if self._open is batch:
                self._open = None


def _wait_for_callers() -> None:
    """
    Let other threads run, so that their calls can join the batch.

    With gevent, all requests that have already arrived are read and parsed first, because one
    statement for all of them takes less time than several statements. Without load, no requests are
    waiting, and this function returns at once.

    If this module was imported before gevent's monkey-patching, as with ``preload_app`` and
    gunicorn's own gevent worker, other greenlets do not run, because the batcher's native locks
    would block the whole process.
    """
    monkey, gevent = sys.modules.get("gevent.monkey"), cast("Any", sys.modules.get("gevent"))
    if monkey is None or not monkey.is_module_patched("threading") or sleep is not gevent.sleep:
        sleep(0)
        return
    with gevent.Timeout(MAX_IDLE_WAIT, exception=False):
        gevent.idle()

"""
Group commit: what many callers ask of the database at once is one statement and one commit.

For readers the same is known as a data loader. Without it a service on PostgreSQL, with two workers
and eight connections, was measured at 0.72 of the deliveries and 0.78 of the calls.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable, Sequence
from time import sleep
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")
MAX_WAIT = 0.1  # seconds that a caller waits for the batch under way before it leads one of its own
MAX_BATCH = 64


class _Call(Generic[T, R]):
    """One caller's item. It gets a result or an error, or its caller becomes the leader."""

    def __init__(self, item: T) -> None:
        self.item, self.leads = item, False
        self.results: list[R] = []
        """The result, once there is one; None may be a result, too."""
        self.error: Exception | None = None
        self._done = threading.Lock()
        self._done.acquire()

    def wait(self, seconds: float = -1) -> bool:
        """Wait until ``wake`` is called, or for *seconds*; return whether it was."""
        return self._done.acquire(timeout=seconds)

    def wake(self) -> None:
        """End the wait, once."""
        self._done.release()


class Batcher(Generic[T, R]):
    """
    Call *execute* for one item at once, and for all items that arrive meanwhile together.

    There is no thread of its own: the first caller leads a batch, and then the next waiting caller
    leads. No two items of a batch share one of their *keys*. If a batch fails, each caller tries
    alone, unless the error is one that *concerns_all*. A batch that is held up delays newcomers by
    MAX_WAIT at most.
    """

    def __init__(
        self,
        execute: Callable[[Sequence[T]], Sequence[R]],
        *,
        keys: Callable[[T], Sequence[Hashable]] = lambda _: (),
        concerns_all: Callable[[Exception], bool],
    ) -> None:
        self._execute, self._keys, self._concerns_all = execute, keys, concerns_all
        self._guard = threading.Lock()
        self._waiting: list[_Call[T, R]] = []
        self._leaders = 0

    def __call__(self, item: T) -> R:
        """
        Return what *execute* gives for *item*.

        Raises:
            Exception: what *execute* raises, a fresh object for each caller.
        """
        call: _Call[T, R] = _Call(item)
        try:
            if not self._enter(call) and not call.wait(MAX_WAIT) and not self._step_forward(call):
                call.wait()
        except BaseException:
            self._leave(call)
            raise
        if call.leads:
            self._lead(call)
        if call.error is not None:
            raise call.error
        if not call.results:  # the batch failed because of one of its items
            call.results = list(self._execute([call.item]))
        [result] = call.results
        return result

    def _enter(self, call: _Call[T, R]) -> bool:
        """Take the lead if nobody has it, else wait in line."""
        with self._guard:
            call.leads = not self._leaders
            if call.leads:
                self._leaders += 1
            else:
                self._waiting.append(call)
            return call.leads

    def _step_forward(self, call: _Call[T, R]) -> bool:
        """Lead a batch beside the one under way, unless that one already has *call* in it."""
        with self._guard:
            if call in self._waiting:
                self._waiting.remove(call)
                self._leaders += 1
                call.leads = True
            return call.leads

    def _leave(self, call: _Call[T, R]) -> None:
        """Withdraw a call whose caller was killed."""
        with self._guard:
            if call in self._waiting:
                self._waiting.remove(call)
        if call.leads:
            self._hand_over()

    def _lead(self, call: _Call[T, R]) -> None:
        batch = [call]
        try:
            sleep(0)  # let callers that are about to arrive join
            batch += self._gather(call)
            results = self._execute([one.item for one in batch])
            for one, result in zip(batch, results, strict=True):
                one.results = [result]
        except Exception as error:  # noqa: BLE001  # each caller raises it, or tries alone
            if len(batch) == 1 or self._concerns_all(error):
                for one in batch:
                    # One object raised in many callers would collect the frames of all of them.
                    one.error = error if one is call else copy.copy(error)
        finally:
            self._hand_over()
            for one in batch[1:]:
                one.wake()

    def _gather(self, call: _Call[T, R]) -> list[_Call[T, R]]:
        """Take from the line all calls that can share a batch with *call*."""
        found: list[_Call[T, R]] = []
        keys = set(self._keys(call.item))
        with self._guard:
            for one in self._waiting[: MAX_BATCH - 1]:
                own = self._keys(one.item)
                if keys.isdisjoint(own):
                    keys.update(own)
                    found.append(one)
            self._waiting = [one for one in self._waiting if one not in found]
        return found

    def _hand_over(self) -> None:
        """Let the next waiting call lead."""
        with self._guard:
            if not self._waiting:
                self._leaders -= 1
                return
            successor = self._waiting.pop(0)
            successor.leads = True
        successor.wake()

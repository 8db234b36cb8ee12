"""
What many callers ask of the database at one time is asked once: one round trip, and for writers one commit.

Databases call this group commit, and readers a data loader.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from time import sleep
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")
PATIENCE = 0.1  # seconds that a caller waits behind others before it leads beside them
LARGEST = 64


class _Place(Generic[T, R]):
    """A caller's place in the queue: it ends with a result, with an error, or in the lead."""

    def __init__(self, item: T) -> None:
        self.item, self.leads = item, False
        self.result: R | None = None
        self.error: Exception | None = None
        self._bell = threading.Lock()
        self._bell.acquire()

    def wait(self, seconds: float = -1) -> bool:
        """Whether the bell rang within *seconds*; without any, it will."""
        return self._bell.acquire(timeout=seconds)

    def wake(self) -> None:
        """Ring the bell, once."""
        self._bell.release()


class Coalescer(Generic[T, R]):
    """
    Calls *do* for one item as it comes, and for all that come meanwhile together.

    There is no thread of its own: the first caller leads, and does what those who wait behind it want; then the next
    one leads. Nobody waits while nobody leads. A group that is held up, as behind a row that somebody keeps locked,
    holds up nobody else for longer than PATIENCE. No two items of a group share one of their *keys*.
    When a group fails each of its callers tries alone, unless it *failed_for_all* alike.
    """

    def __init__(
        self,
        do: Callable[[Sequence[T]], Sequence[R]],
        *,
        keys: Callable[[T], Sequence[Hashable]],
        failed_for_all: Callable[[Exception], bool],
    ) -> None:
        self._do, self._keys, self._failed_for_all = do, keys, failed_for_all
        self._guard = threading.Lock()
        self._waiting: list[_Place[T, R]] = []
        self._leaders = 0

    def __call__(self, item: T) -> R:
        """
        What *do* gives for *item*.

        Raises:
            Exception: what it raises.
        """
        place: _Place[T, R] = _Place(item)
        try:
            if not self._enter(place) and not place.wait(PATIENCE) and not self._step_forward(place):
                place.wait()
        except BaseException:
            self._leave(place)
            raise
        if place.leads:
            self._lead(place)
        return self._settle(place)

    def _enter(self, place: _Place[T, R]) -> bool:
        """Take the lead, or a place behind who has it."""
        with self._guard:
            place.leads = not self._leaders
            if place.leads:
                self._leaders += 1
            else:
                self._waiting.append(place)
            return place.leads

    def _step_forward(self, place: _Place[T, R]) -> bool:
        """Lead a group beside the one under way, unless that has *place* in it."""
        with self._guard:
            if place in self._waiting:
                self._waiting.remove(place)
                self._leaders += 1
                place.leads = True
            return place.leads

    def _leave(self, place: _Place[T, R]) -> None:
        """Give up *place*, whose caller was killed."""
        with self._guard:
            if place in self._waiting:
                self._waiting.remove(place)
        if place.leads:
            self._hand_over()

    def _lead(self, place: _Place[T, R]) -> None:
        group = [place]
        try:
            sleep(0)  # whoever is at the door comes along
            group += self._gather(place)
            for one, result in zip(group, self._do([one.item for one in group]), strict=True):
                one.result = result
        except Exception as error:  # noqa: BLE001  # each caller raises it, or tries alone
            if len(group) == 1 or self._failed_for_all(error):
                for one in group:
                    one.error = error
        finally:
            self._hand_over()
            for one in group[1:]:
                one.wake()

    def _gather(self, place: _Place[T, R]) -> list[_Place[T, R]]:
        """Those who wait and go along with *place*: all but who would meet their like."""
        found: list[_Place[T, R]] = []
        keys = set(self._keys(place.item))
        with self._guard:
            for one in self._waiting[: LARGEST - 1]:
                own = self._keys(one.item)
                if keys.isdisjoint(own):
                    keys.update(own)
                    found.append(one)
            self._waiting = [one for one in self._waiting if one not in found]
        return found

    def _hand_over(self) -> None:
        """Let the next one lead, if there is one."""
        with self._guard:
            if not self._waiting:
                self._leaders -= 1
                return
            successor = self._waiting.pop(0)
            successor.leads = True
        successor.wake()

    def _settle(self, place: _Place[T, R]) -> R:
        if place.error is not None:
            raise place.error
        if place.result is None:  # the group failed, and nobody knows for whose sake
            [place.result] = self._do([place.item])
        return place.result

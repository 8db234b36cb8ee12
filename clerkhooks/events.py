"""The event that handlers receive, and the registry of handlers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple


class Outcome(StrEnum):
    """The result of a delivery. ``duplicate`` is returned to the sender and never stored."""

    APPLIED = "applied"
    STALE = "stale"
    IGNORED = "ignored"
    FAILED = "failed"
    DUPLICATE = "duplicate"


class Version(NamedTuple):
    """
    The version of an object's state, compared from left to right. Times are in ms.

    An event without times has ``updated_at`` -1, which ranks below all others, and the time of the
    delivery attempt as ``timestamp``.
    """

    updated_at: int
    timestamp: int
    message_id: str


@dataclass(frozen=True, slots=True)
class Event:
    """
    A verified event from Clerk, as handlers receive it.

    *data* is the object as Clerk sent it. It may contain profile data and one-time codes: do not
    log it. *occurred_at* is in UTC, or None if the event has no time. *outcome* is ``applied`` or
    ``stale``. It is always ``applied`` for event types that only handlers process.
    """

    type: str
    data: Mapping[str, Any] = field(repr=False)
    message_id: str
    version: Version
    occurred_at: datetime | None
    outcome: Outcome


Handler = Callable[[Event], object]
NOT_PLAIN = "A handler must be a plain function: nothing would await its result."
_PATTERN = re.compile(r"\*|[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*(\.\*)?")


class Handlers:
    """
    The handlers of one ``ClerkHooks``, in the order of their registration.

    A pattern is an event type (``user.created``), a family (``organization.*``) or ``*``.
    """

    def __init__(self) -> None:
        self._registered: list[tuple[str, bool, Handler]] = []

    def add(self, pattern: str, handler: Handler, *, after_commit: bool) -> None:
        """
        Register *handler*. Registering it again for the same pattern has no effect.

        Raises:
            ValueError: *pattern* is not an event type, a family or ``*``.
            TypeError: *handler* is asynchronous or a generator, which nothing would run.
        """
        if not _PATTERN.fullmatch(pattern):
            raise ValueError(
                f"{pattern!r} is not an event type. Use a type such as 'user.created', "
                "a family such as 'organization.*', or '*'."
            )
        if not callable(handler):
            raise TypeError(f"A handler must be callable; {handler!r} is not.")
        if _is_deferred(handler) or _is_deferred(type(handler).__call__):
            raise TypeError(NOT_PLAIN)
        entry = (pattern, after_commit, handler)
        if entry not in self._registered:
            self._registered.append(entry)

    def find(self, event_type: str, *, after_commit: bool) -> list[Handler]:
        """Return the handlers of *event_type*, each once."""
        found: list[Handler] = []
        for pattern, when, handler in self._registered:
            if when is after_commit and handler not in found and _matches(pattern, event_type):
                found.append(handler)
        return found

    def handles(self, event_type: str) -> bool:
        """Return whether any handler is registered for *event_type*."""
        return any(_matches(pattern, event_type) for pattern, _, _ in self._registered)


def _is_deferred(function: object) -> bool:
    """Return whether calling *function* only creates a coroutine or a generator."""
    kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    return any(is_kind(function) for is_kind in kinds)


def _matches(pattern: str, event_type: str) -> bool:
    if pattern.endswith("*"):
        return event_type.startswith(pattern[:-1])
    return pattern == event_type

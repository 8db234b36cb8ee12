"""The events that handlers receive, and the registry of handlers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

from clerkhooks.errors import Fault, SettingsError
from clerkhooks.settings import VARIABLES

if TYPE_CHECKING:  # Python 3.13 has the default of a type variable
    from typing_extensions import TypeVar

    D = TypeVar("D", bound=Mapping[str, object], covariant=True, default=Mapping[str, Any])
else:
    from typing import TypeVar

    D = TypeVar("D", covariant=True)


class Outcome(StrEnum):
    """The result of a delivery. ``duplicate`` is returned to the sender and never stored."""

    APPLIED = "applied"
    STALE = "stale"
    IGNORED = "ignored"
    FAILED = "failed"
    DUPLICATE = "duplicate"


BARRED, RESTORED = "user.barred", "user.restored"
CHANGES = (BARRED, RESTORED)
"""Types of the events that report a change of the account state. Clerk sends no such events."""


class Version(NamedTuple):
    """
    The version of an object. The fields are compared in the order of their declaration.

    Times are in milliseconds. If an event has neither time, ``updated_at`` is -1, which ranks below
    all other versions, and ``timestamp`` is the time of the delivery attempt.
    """

    updated_at: int
    timestamp: int
    message_id: str


@dataclass(frozen=True, slots=True)
class Event(Generic[D]):
    """
    An event, as handlers receive it: a verified message from Clerk, or a change of a row.

    *data* is the object as Clerk sent it. Its type is the parameter of ``Event``, for example
    ``Event[payloads.OrganizationMembership]``, by default a mapping. Do not log *data*: it may
    contain profile data and one-time passcodes. *occurred_at* is in UTC, or None if the event has
    no time. *outcome* is ``applied`` or ``stale``. For event types that only handlers process,
    *outcome* is always ``applied``.

    For ``user.barred`` and ``user.restored``, *data* is the user object of the message that changed
    the account state. If a sync changed it, *message_id* is empty.

    For a handler with ``durable=True``, *data* is a ``payloads.Change``, *message_id* is the cursor
    of the change, and *occurred_at* is the time at which the change was recorded. *version* has
    only ``updated_at``, which is -1 if the row has no version.
    """

    type: str
    data: D = field(repr=False)
    message_id: str
    version: Version
    occurred_at: datetime | None
    outcome: Outcome


Handler = Callable[[Event[Any]], object]
NOT_PLAIN = "A handler must be a plain function: nothing would await its result."
_NO_FEED = Fault(
    "CLERK_TABLES",
    "does not contain changes, which handlers with durable=True need.",
    VARIABLES["CLERK_TABLES"],
)
_ROW_CHANGES = [
    f"{family}.{verb}"
    for family in ("user", "organization", "organizationMembership")
    for verb in ("created", "updated", "deleted")
]
_PATTERN = re.compile(r"\*|[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*(\.\*)?")


@dataclass(frozen=True)
class DurableHandler:
    """
    A handler whose position in the change feed is stored under *name*.

    With *from_start*, a new handler begins with the oldest change that is kept.
    """

    name: str
    handler: Handler
    patterns: tuple[str, ...]
    from_start: bool = False

    def matches(self, event_type: str) -> bool:
        """Return whether the handler is called for changes of *event_type*."""
        return event_type in self.patterns or any(
            _matches(pattern, event_type) for pattern in self.patterns if event_type not in CHANGES
        )


class Handlers:
    """
    The handlers of one ``ClerkHooks``, in the order of their registration.

    A pattern is an event type (``user.created``), a family (``organization.*``) or ``*``. A change
    of the account state is not a message, so only ``user.barred`` and ``user.restored`` match it.
    """

    def __init__(self) -> None:
        self._registered: list[tuple[str, bool, Handler]] = []
        self.durable: dict[str, DurableHandler] = {}
        """The durable handlers by name."""
        self._refuses_durable = False

    def add(self, pattern: str, handler: Handler, *, after_commit: bool) -> None:
        """
        Register *handler*. Registering it again for the same pattern has no effect.

        Raises:
            ValueError: *pattern* is not an event type, a family or ``*``.
            TypeError: *handler* is not callable, is asynchronous, or is a generator function.
        """
        _check(pattern, handler)
        entry = (pattern, after_commit, handler)
        if entry not in self._registered:
            self._registered.append(entry)

    def add_durable(
        self, pattern: str, handler: Handler, name: str | None, *, from_start: bool
    ) -> None:
        """
        Register a durable *handler*. Several patterns of one handler share its position.

        Raises:
            ValueError: *pattern* is not an event type, a family or ``*``, no change has such a
                type, or another handler has the same name.
            TypeError: *handler* is not callable, is asynchronous, or is a generator function.
            SettingsError: an application has no change feed.
        """
        _check(pattern, handler)
        if self._refuses_durable:
            raise SettingsError([_NO_FEED])
        if name is None:
            where = handler if hasattr(handler, "__qualname__") else type(handler)
            name = f"{where.__module__}.{where.__qualname__}"
        before = self.durable.get(name)
        if before is not None and before.handler != handler:
            raise ValueError(f"Another durable handler has the name {name!r}. Pass name=… to one.")
        patterns = (*before.patterns, pattern) if before is not None else (pattern,)
        from_start = from_start or (before is not None and before.from_start)
        if not any(_matches(pattern, each) for each in _ROW_CHANGES) and pattern not in CHANGES:
            raise ValueError(
                f"No change has the type {pattern!r}. With durable=True, use 'created', 'updated' "
                "or 'deleted' of 'user', 'organization' or 'organizationMembership', "
                "'user.barred' or 'user.restored', a family, or '*'."
            )
        self.durable[name] = DurableHandler(name, handler, patterns, from_start)

    def refuse_durable(self) -> None:
        """
        Accept no durable handlers, because an application has no change feed.

        Raises:
            SettingsError: a durable handler is registered. Later, ``add_durable`` raises it.
        """
        self._refuses_durable = True
        if self.durable:
            raise SettingsError([_NO_FEED])

    def find(self, event_type: str, *, after_commit: bool) -> list[Handler]:
        """Return the handlers for messages of *event_type*, without duplicates."""
        found: list[Handler] = []
        for pattern, when, handler in self._registered:
            if when is after_commit and handler not in found and _matches(pattern, event_type):
                found.append(handler)
        return found

    def find_for_change(self, change: str | None, *, after_commit: bool) -> list[Handler]:
        """Return the handlers for *change*, which is one of CHANGES or None."""
        entries = self._registered
        return [one for name, when, one in entries if (name, when) == (change, after_commit)]

    def handles(self, event_type: str) -> bool:
        """Return whether any handler is registered for messages of *event_type*."""
        return any(_matches(pattern, event_type) for pattern, _, _ in self._registered)

    @property
    def follows_changes(self) -> bool:
        """Whether any handler is registered for changes of the account state."""
        return any(pattern in CHANGES for pattern, _, _ in self._registered)


def _check(pattern: str, handler: object) -> None:
    """Raise ValueError or TypeError unless *pattern* and *handler* can be registered."""
    if not _PATTERN.fullmatch(pattern):
        raise ValueError(
            f"{pattern!r} is not an event type. Use a type such as 'user.created', "
            "a family such as 'organization.*', or '*'."
        )
    if not callable(handler):
        raise TypeError(f"A handler must be callable; {handler!r} is not.")
    if _is_deferred(handler) or _is_deferred(type(handler).__call__):
        raise TypeError(NOT_PLAIN)


def _is_deferred(function: object) -> bool:
    """Return whether calling *function* only creates a coroutine or a generator."""
    kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    return any(is_kind(function) for is_kind in kinds)


def _matches(pattern: str, event_type: str) -> bool:
    if pattern in CHANGES:
        return False
    if pattern.endswith("*"):
        return event_type.startswith(pattern[:-1])
    return pattern == event_type

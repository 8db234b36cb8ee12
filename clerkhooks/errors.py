"""
The exceptions, grouped by what the caller can do about them.

Each carries a ``reason``: a stable snake_case code that tests, logs and clients may rely on.
None carries what a stranger sent, a secret or profile data, so that all of them may be logged.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path


class ClerkhooksError(Exception):
    """The base of all that clerkhooks raises on purpose."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class SignatureError(ClerkhooksError):
    """A webhook that is not proven to come from Clerk: answered 401."""


class EventError(ClerkhooksError):
    """A proven webhook that is not an event: answered 400, so that Svix goes on retrying."""


class Unauthenticated(ClerkhooksError):
    """A request without a session that holds: answered 401."""


class BadRequest(ClerkhooksError):
    """A request whose body is not what the route takes: answered 400."""


class Forbidden(ClerkhooksError):
    """
    A session that holds, and is not enough: answered 403.

    *reverification* is what was asked for, where a fresher verification of the user's factors would do.
    """

    def __init__(self, reason: str, reverification: object = None) -> None:
        super().__init__(reason)
        self.reverification = reverification


class KeysUnavailable(ClerkhooksError):
    """No key to verify a session token with: answered 503. *retry_after* is in seconds."""

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Fault:
    """One wrong variable: what is wrong with it, never its value, and where the right one is to be found."""

    variable: str
    problem: str
    remedy: str


class SettingsError(ClerkhooksError):
    """The configuration cannot work. Its text lists every fault at once and shows no value."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("invalid_settings")
        self.faults = tuple(faults)

    def __str__(self) -> str:
        lines = ["clerkhooks cannot start. Please correct:"]
        for fault in self.faults:
            lines += ["", f"  {fault.variable} {fault.problem}", f"      {fault.remedy}"]
        return "\n".join([*lines, "", "To see it work without any configuration: clerkhooks dev"])


def describe(error: BaseException) -> str:
    """Class and SQLSTATE of *error*. Never its text: a database's message quotes the row that it refused."""
    cause = getattr(error, "orig", None)
    sqlstate = getattr(cause, "sqlstate", None) or getattr(cause, "sqlite_errorname", None)
    return f"{type(error).__name__} {sqlstate}" if sqlstate else type(error).__name__


def frames(error: BaseException) -> list[str]:
    """The places that *error* came through, each by the last two parts of its file, its line and its function."""
    summary = traceback.extract_tb(error.__traceback__)
    return [f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} {frame.name}" for frame in summary]

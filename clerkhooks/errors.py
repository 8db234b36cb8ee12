"""
The exceptions, grouped by what the caller can do about them.

Each carries a ``reason``: a stable snake_case code that tests, logs and clients may rely on.
None carries what a stranger sent, a secret or profile data, so that all of them may be logged.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click


class ClerkhooksError(Exception):
    """The base of all that clerkhooks raises on purpose."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class RequestError(ClerkhooksError):
    """The base of all that is answered to a client, in ``web/problems.py``."""


class SignatureError(RequestError):
    """A webhook that is not proven to come from Clerk: answered 401."""


class EventError(RequestError):
    """A verified webhook that is not an event: answered 400, so that Svix goes on retrying."""


class Unauthenticated(RequestError):
    """A request without a valid session: answered 401."""


class BadRequest(RequestError):
    """A request whose body is not what the route expects: answered 400."""


class BodyTooLarge(RequestError):
    """A request body of more than 1 MiB: answered 413."""


class Forbidden(RequestError):
    """
    A valid session that is not sufficient: answered 403.

    *reverification* is the level that was asked for, if verifying the factors again would help.
    """

    def __init__(self, reason: str, reverification: object = None) -> None:
        super().__init__(reason)
        self.reverification = reverification


class KeysUnavailable(RequestError):
    """No key to verify a session token with: answered 503. *retry_after* is in seconds."""

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class BackendApiError(ClerkhooksError):
    """
    Clerk's Backend API failed. The text says what happened and what to do, and quotes nothing.

    *reason* is ``secret_key_refused``, ``secret_key_forbidden``, ``rate_limited``,
    ``api_unreachable``, ``answer_unusable`` or ``proxy_invalid``.
    """

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(reason)
        self.what = what

    def __str__(self) -> str:
        return f"Clerk's Backend API {self.what}.\n{_BACKEND_API_REMEDIES[self.reason]}"


PROXY_REMEDY = (
    "Use a URL such as http://proxy.example.com:3128 or socks5://proxy.example.com:1080. In "
    "NO_PROXY, separate the hosts by commas."
)
_BACKEND_API_REMEDIES = {
    "secret_key_refused": "CLERK_SECRET_KEY is not of this instance, or was revoked: "
    "Clerk Dashboard, API keys, Secret keys. Look at CLERK_API_URL as well, if it is set.",
    "secret_key_forbidden": "CLERK_SECRET_KEY may not read users, or something in between forbids it: "
    "Clerk Dashboard, API keys, Secret keys; then proxies and firewalls.",
    "rate_limited": "Something else uses up what Clerk allows the instance: 1,000 requests in 10 s in production, 100 in development. "
    "Try again later, when that is over.",
    "api_unreachable": "Look at https://status.clerk.com, at the network from here and, if it is set, at CLERK_API_URL; then try again.",
    "answer_unusable": "That is not how Clerk answers. Leave CLERK_API_URL unset for https://api.clerk.com, "
    "and look for a proxy that answers in its stead.",
    "proxy_invalid": PROXY_REMEDY,
}


class ProxyUrlError(ClerkhooksError):
    """
    A proxy variable of the environment is invalid: ``proxy_invalid``.

    The text names the variables in question. It does not quote them, as they may hold passwords.
    """

    def __init__(self, variables: Sequence[str]) -> None:
        super().__init__("proxy_invalid")
        self.what = f"{' or '.join(variables)} is invalid"

    def __str__(self) -> str:
        return f"{self.what}.\n{PROXY_REMEDY}"


@dataclass(frozen=True)
class Fault:
    """One wrong variable: what is wrong with it, never its value, and where the right one is to be found."""

    variable: str
    problem: str
    remedy: str


class SettingsError(ClerkhooksError, click.ClickException):
    """
    Invalid configuration. The text lists every problem and shows no value.

    Commands of an application, such as ``flask clerk users``, print the text and exit with
    status 2. Flask shows a traceback for every other exception of an application's factory.
    """

    exit_code = 2

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("invalid_settings")
        self.faults = tuple(faults)

    def __str__(self) -> str:
        lines = ["clerkhooks cannot start. Please correct:"]
        for fault in self.faults:
            lines += ["", f"  {fault.variable} {fault.problem}", f"      {fault.remedy}"]
        return "\n".join([*lines, "", "To see it work without any configuration: clerkhooks dev"])

    def format_message(self) -> str:
        """Return what click prints."""
        return str(self)


def describe(error: BaseException) -> str:
    """Class and SQLSTATE of *error*. Never its text: a database's message quotes the row that it refused."""
    cause = getattr(error, "orig", None)
    sqlstate = getattr(cause, "sqlstate", None) or getattr(cause, "sqlite_errorname", None)
    return f"{type(error).__name__} {sqlstate}" if sqlstate else type(error).__name__


def frames(error: BaseException) -> list[str]:
    """The places that *error* came through, each by the last two parts of its file, its line and its function."""
    summary = traceback.extract_tb(error.__traceback__)
    return [
        f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} {frame.name}"
        for frame in summary
    ]

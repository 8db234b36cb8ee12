"""
The exceptions that clerkhooks raises.

Each exception has a ``reason``: a stable snake_case code for tests, logs and clients. Exceptions
never contain input, secrets or profile data, so all of them may be logged.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import click


class ClerkhooksError(Exception):
    """The base class of clerkhooks' exceptions. By default, the message is the reason."""

    def __init__(self, reason: str, text: str | None = None) -> None:
        super().__init__(text or reason)
        self.reason = reason


class RequestError(ClerkhooksError):
    """The base class of errors that ``web/problems.py`` turns into HTTP error responses."""

    status: HTTPStatus
    retry_after: int | None = None  # seconds


class SignatureError(RequestError):
    """The webhook's signature cannot be verified. The response is 401."""

    status = HTTPStatus.UNAUTHORIZED


class EventError(RequestError):
    """A verified webhook is not a valid event. The response is 400, so Svix retries."""

    status = HTTPStatus.BAD_REQUEST


class Unauthenticated(RequestError):
    """The request has no valid session. The response is 401."""

    status = HTTPStatus.UNAUTHORIZED


class BadRequest(RequestError):
    """The request is not valid. The response is 400."""

    status = HTTPStatus.BAD_REQUEST


class BodyTooLarge(RequestError):
    """The request body is larger than 1 MiB. The response is 413."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class Forbidden(RequestError):
    """
    The session is valid, but not sufficient. The response is 403.

    If the user can gain access by verifying factors again, *reverification* is the required level.
    """

    status = HTTPStatus.FORBIDDEN

    def __init__(self, reason: str, reverification: object = None) -> None:
        super().__init__(reason)
        self.reverification = reverification


class ChangesPruned(RequestError):
    """Changes after the reader's cursor were pruned. The response is 410."""

    status = HTTPStatus.GONE

    def __str__(self) -> str:
        return (
            "Changes after this cursor were pruned. Read the cursor 'end', copy the tables, and "
            "continue after that cursor."
        )


class ChangesRestored(RequestError):
    """The change feed or the cursor comes from another database. The response is 503."""

    status = HTTPStatus.SERVICE_UNAVAILABLE

    def __str__(self) -> str:
        return (
            "The change feed or the cursor comes from another database, as after the restoration "
            "of a backup, so its order is lost. Run DELETE FROM user_changes, and let "
            "each reader start again: read the cursor 'end', then copy the tables."
        )


class KeysUnavailable(RequestError):
    """No key is available to verify a session token. The response is 503."""

    status = HTTPStatus.SERVICE_UNAVAILABLE

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class BackendApiError(ClerkhooksError):
    """
    A call to Clerk's Backend API failed. The message never quotes the request or response.

    *reason* is ``secret_key_refused``, ``secret_key_forbidden``, ``rate_limited``,
    ``api_unreachable``, ``answer_unusable`` or ``proxy_invalid``. *retry_after* is in seconds, or
    None if unknown.
    """

    def __init__(self, reason: str, what: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.what, self.retry_after = what, retry_after

    def __str__(self) -> str:
        return f"Clerk's Backend API {self.what}.\n{_BACKEND_API_REMEDIES[self.reason]}"


class Unconfirmed(BackendApiError):
    """The response does not prove whether one object exists. Requests for others may succeed."""


PROXY_REMEDY = (
    "Use a URL such as http://proxy.example.com:3128 or socks5://proxy.example.com:1080. In "
    "NO_PROXY, separate the hosts with commas."
)
_BACKEND_API_REMEDIES = {
    "secret_key_refused": "CLERK_SECRET_KEY is not a key of this instance, or was revoked. See "
    "Clerk Dashboard → API keys → Secret keys. If CLERK_API_URL is set, check it too.",
    "secret_key_forbidden": "CLERK_SECRET_KEY is not allowed to read users, or a proxy or firewall "
    "blocks the request. See Clerk Dashboard → API keys → Secret keys.",
    "rate_limited": "Other programs are using up the instance's rate limit: 1,000 requests in 10 s "
    "in production, 100 in development. Try again later.",
    "api_unreachable": "Check https://status.clerk.com, this machine's network, and "
    "CLERK_API_URL if it is set. Then try again.",
    "answer_unusable": "The response is not in Clerk's format. Leave CLERK_API_URL unset to use "
    "https://api.clerk.com, and check for a proxy that responds instead of Clerk. If Clerk "
    "has retired the API version that this release uses, the doctor command reports it.",
    "proxy_invalid": PROXY_REMEDY,
}


class ProxyUrlError(ClerkhooksError):
    """
    A proxy variable in the environment is invalid. *reason* is ``proxy_invalid``.

    The message names the variables. It does not quote their values, which may contain passwords.
    """

    def __init__(self, variables: Sequence[str]) -> None:
        super().__init__("proxy_invalid")
        self.what = f"{' or '.join(variables)} is invalid"

    def __str__(self) -> str:
        return f"{self.what}.\n{PROXY_REMEDY}"


@dataclass(frozen=True)
class Fault:
    """A problem with a variable, and a remedy. The current value is never quoted."""

    variable: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"  {self.variable} {self.problem}\n      {self.remedy}"


class SettingsError(ClerkhooksError, click.ClickException):
    """
    The configuration is invalid. The message lists every problem without the values.

    Commands of an application, such as ``flask clerk users``, print the message and exit with
    status 2. For any other exception in an application's factory, Flask shows a traceback.
    """

    exit_code = 2

    def __init__(self, faults: list[Fault]) -> None:
        heading = "clerkhooks cannot start. Please correct:"
        advice = "To try clerkhooks without any configuration, run: clerkhooks dev"
        text = "\n\n".join([heading, *map(str, faults), advice])
        super().__init__("invalid_settings", text)
        self.faults = tuple(faults)


def describe(error: BaseException) -> str:
    """Return the class and SQLSTATE of *error*, but not its message, which may quote a row."""
    cause = getattr(error, "orig", None)
    sqlstate = getattr(cause, "sqlstate", None) or getattr(cause, "sqlite_errorname", None)
    return f"{type(error).__name__} {sqlstate}" if sqlstate else type(error).__name__


def frames(error: BaseException) -> list[str]:
    """Return the stack frames of *error*: the end of the path, the line, and the function."""
    return [
        f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
    ]

"""A client for the parts of Clerk's Backend API that reconciliation needs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Self
from urllib.parse import quote

import httpx
import stamina

from clerkhooks.clerk import strict_json
from clerkhooks.clerk.download import Answer, Connection, TooLong, UnusableAnswer, load_certificates
from clerkhooks.errors import BackendApiError, ProxyUrlError, Unconfirmed

API_VERSION = "2026-05-12"  # the version whose requests and responses this module knows
PAGE = 500  # users per page; for a higher limit, Clerk silently returns only ten
IDS = 100  # the maximum number of ids that Clerk accepts in one request
# Requests per second. Clerk allows 100 in production and 10 in development. The remainder is
# available to the application.
LIVE_RATE, TEST_RATE = 90, 9
TIMEOUT = 60.0  # the timeout of a whole exchange, in seconds
RETRY_TIMEOUT = 120.0  # a call gives up after this many seconds
MAX_PAUSE = 60.0  # the longest pause in seconds, even if Retry-After is longer
MAX_ANSWER = 64 * 1024 * 1024  # in bytes: twice the size of a page with the maximum metadata
# Without a handler, Python would print each retry to stderr.
logging.getLogger("stamina").addHandler(logging.NullHandler())


class RateLimit:
    """Limits all threads together to one new request every *interval* seconds."""

    def __init__(self, interval: float) -> None:
        self._interval, self._free_at, self._held_until = interval, 0.0, 0.0
        self._guard = threading.Lock()

    def wait(self) -> None:
        """Wait until another request may begin."""
        # It is safe to sleep with the lock held: no other thread may begin before this one.
        with self._guard:
            while (pause := max(self._free_at, self._held_until) - time.monotonic()) > 0:
                time.sleep(pause)
            self._free_at = time.monotonic() + self._interval

    def hold(self, seconds: float) -> None:
        """Pause all threads, because Retry-After applies to the secret key, not to a thread."""
        self._held_until = max(self._held_until, time.monotonic() + seconds)


class _Temporary(BackendApiError):
    """An error that calls for a retry."""


class BackendApi:
    """
    A client that retries requests and respects rate limits. Threads may share it.

    Every method raises BackendApiError on failure, after at most *patience* seconds of retries.
    Without patience, nothing is retried. *share* is the part of the rate limit to use. *pace*
    scales *patience* and all pauses; a small value makes tests faster. *timeout* is in seconds.
    *version* is the requested version of the API; None requests the instance's default. *on_retry*
    is called with a description of each error that calls for a retry.

    Source: Clerk, "Backend API", users; "System limits", Backend API requests; "Versioning".
    """

    def __init__(
        self,
        api_url: str,
        secret_key: str,
        *,
        patience: float = RETRY_TIMEOUT,
        pace: float = 1.0,
        timeout: float = TIMEOUT,
        share: float = 1.0,
        version: str | None = API_VERSION,
        on_retry: Callable[[str], object] | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {secret_key}"}
        if version is not None:
            headers["Clerk-API-Version"] = version
        certificates = load_certificates(api_url)  # loaded once and shared by all connections
        self._connect: Callable[[], Connection] = lambda: Connection(
            api_url,
            headers,
            timeout=timeout,
            max_size=MAX_ANSWER,
            compressed=True,
            certificates=certificates,
        )
        self._idle: list[Connection] = []
        self._is_closed = False
        rate = LIVE_RATE if secret_key.startswith("sk_live_") else TEST_RATE
        self._rate_limit = RateLimit(pace / (rate * share))
        self._url, self._patience, self._pace = f"{api_url}/v1", patience, pace
        self._on_retry = on_retry
        self._retry = stamina.RetryingCaller(
            attempts=None if patience else 1,
            timeout=patience * pace or None,
            wait_initial=0.5 * pace,
            wait_max=min(15.0, patience) * pace,
            wait_jitter=0.5 * pace,
        ).on(self._pause_after)

    def __enter__(self) -> Self:
        """Return the client. Connections are opened when they are needed."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all connections. Those in use are closed when their exchanges end."""
        self._is_closed = True
        self.close_idle()

    def count_users(self) -> int:
        """Return the number of users."""
        counted = self.get("/users/count")
        count = counted.get("total_count") if isinstance(counted, dict) else None
        if type(count) is not int:
            raise BackendApiError("answer_unusable", "did not answer with a number of users")
        return count

    def list_users(self, starting_after: str | None = None) -> list[Any]:
        """
        Return a page of user objects as Clerk sent them, oldest first.

        The page begins after the user with the id *starting_after*, by default with the oldest
        user. Clerk does not document the response if that user does not exist.
        """
        cursor = {} if starting_after is None else {"starting_after": starting_after}
        return self._list(limit=PAGE, order_by="+created_at", **cursor)

    def list_newest(self, limit: int) -> list[Any]:
        """Return the newest user objects as Clerk sent them: at most *limit*, newest first."""
        return self._list(limit=limit, order_by="-created_at")

    def list_updated(self, limit: int, offset: int) -> list[Any]:
        """Return at most *limit* users as Clerk sent them, latest change first."""
        return self._list(limit=limit, offset=offset, order_by="-updated_at")

    def find_users(self, user_ids: Sequence[str]) -> list[Any]:
        """Return the users with these ids (at most 100). Omit users that do not exist."""
        if len(user_ids) > IDS:
            raise ValueError(f"Clerk accepts at most {IDS} ids in one request.")
        # Without ids, Clerk lists all users. Without a limit, it returns at most ten users.
        return self._list(limit=IDS, user_id=list(user_ids)) if user_ids else []

    def is_gone(self, object_id: str, path: str = "/users") -> bool:
        """
        Return whether Clerk's own error code confirms that an object does not exist.

        *path* is the path of the list of such objects, by default of users. The status 404 is not
        sufficient, because a proxy or a wrong URL can also cause it.

        Raises:
            Unconfirmed: the response proves neither that the object exists nor that it does not.
        """
        path = f"{path}/{quote(object_id, safe='')}"
        return self._retry(lambda: _judge_object(self._send(path), object_id))

    def find(self, path: str, **parameters: Any) -> Any:
        """Return the parsed response, or None if Clerk confirms that the path's object is gone."""
        return self._retry(lambda: _judge_or_none(self._send(path, **parameters)))

    def get(self, path: str, **parameters: Any) -> Any:
        """Return the parsed response."""
        return self._retry(lambda: _judge(self._send(path, **parameters)))

    def _list(self, **parameters: Any) -> list[Any]:
        users = self.get("/users", **parameters)
        if not isinstance(users, list):
            raise BackendApiError("answer_unusable", "did not answer with a list of users")
        return users

    def _pause_after(self, error: Exception) -> bool | float:
        """Return False to give up, True to retry with backoff, or the seconds to wait."""
        if not isinstance(error, _Temporary):
            return False
        if self._on_retry is not None:
            self._on_retry(error.what)
        if not error.retry_after:
            return True
        pause = min(error.retry_after, MAX_PAUSE, self._patience) * self._pace
        self._rate_limit.hold(pause)
        return pause

    def _send(self, path: str, **parameters: Any) -> Answer:
        self._rate_limit.wait()
        try:
            with self._borrow_connection() as connection:
                return connection.get(f"{self._url}{path}", parameters)
        except ProxyUrlError as error:
            raise BackendApiError("proxy_invalid", f"was not called: {error.what}") from None
        except TooLong as error:
            raise BackendApiError("answer_unusable", str(error)) from None
        except UnusableAnswer as error:
            raise _Temporary("answer_unusable", str(error)) from None
        except TimeoutError as error:
            raise _Temporary("api_unreachable", str(error)) from None
        except (httpx.InvalidURL, UnicodeError):
            raise BackendApiError("api_unreachable", "has a URL that cannot be used") from None
        # httpx's error message is omitted, because it may quote the request or the response.
        except httpx.HTTPError as error:
            what = f"did not answer ({type(error).__name__})"
            raise _Temporary("api_unreachable", what) from None

    @contextmanager
    def _borrow_connection(self) -> Iterator[Connection]:
        """Yield an idle connection or a new one, for one thread at a time."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        try:
            yield connection
        finally:
            self._idle.append(connection)
            if self._is_closed:  # during this exchange, for example after Ctrl-C
                self.close_idle()

    def close_idle(self) -> None:
        """Close the connections that are not in use. The client stays usable."""
        with suppress(IndexError):  # several threads may close connections at once
            while True:
                self._idle.pop().close()


def _judge(answer: Answer) -> Any:
    """Return the parsed JSON of a successful response."""
    status, what = answer.status, f"answered {answer.status}"
    if status == 200:
        try:
            return strict_json.parse(answer.body)
        except ValueError:
            raise _Temporary("answer_unusable", f"{what} without valid JSON") from None
    if status == 429 or status >= 500:
        reason = "rate_limited" if status == 429 else "api_unreachable"
        raise _Temporary(reason, what, _parse_retry_after(answer.headers))
    reasons = {401: "secret_key_refused", 403: "secret_key_forbidden"}
    raise BackendApiError(reasons.get(status, "answer_unusable"), what)


def _judge_or_none(answer: Answer) -> Any:
    """Return the parsed JSON, or None if *answer* proves that the object does not exist."""
    if answer.status != 404:
        return _judge(answer)
    if not _is_not_found(answer.body):
        raise Unconfirmed("answer_unusable", "answered 404")
    return None


def _judge_object(answer: Answer, object_id: str) -> bool:
    """Return True if *answer* proves that the object does not exist, False if it exists."""
    found = _judge_or_none(answer)
    if found is None:
        return True
    if not isinstance(found, dict) or found.get("id") != object_id:
        raise Unconfirmed("answer_unusable", "did not answer with the requested object")
    return False


def _is_not_found(body: bytes) -> bool:
    try:
        errors = strict_json.parse(body)["errors"]
        return any(error["code"] == "resource_not_found" for error in errors)
    except (ValueError, TypeError, KeyError):
        return False


def _parse_retry_after(headers: httpx.Headers) -> float | None:
    """Return the seconds to wait, or None if the header is missing or not a number."""
    text = headers.get("Retry-After", "").strip()
    return float(text[:9]) if text.isascii() and text.isdigit() else None

"""Clerk's Backend API, as far as reconciliation needs it: users by time, by ids, and whether one is gone."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar
from urllib.parse import quote

import httpx
import stamina

from clerkhooks.clerk import strict_json
from clerkhooks.errors import BackendApiError

T = TypeVar("T")
PAGE = 500  # the most users of a page: a higher limit is silently answered with ten
IDS = 100  # the most ids of a question
ALLOWED = {
    "sk_live_": 900,
    "sk_test_": 90,
}  # of 1,000 and 100 in ten seconds: the rest is the application's own
WINDOW = 11.0  # seconds; Clerk counts in ten, but not every request is as long on its way
PATIENCE = 120.0  # seconds until a call is given up
LONGEST_PAUSE = 60.0  # seconds, also where Retry-After says more
LARGEST_ANSWER = (
    64 * 1024 * 1024
)  # bytes; a page of 500 users with all the metadata that Clerk lets them have is half of it
_CONNECT_TIMEOUT, _TIMEOUT = 5.0, 30.0
_NO_PARAMETERS: Mapping[str, Any] = {}
# A retry that helps is no news: without any handler Python would print each to stderr.
logging.getLogger("stamina").addHandler(logging.NullHandler())


class RateLimit:
    """Lets at most *allowed* requests begin in any *window* seconds, from however many threads."""

    def __init__(
        self,
        allowed: int,
        window: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._begun: deque[float] = deque(maxlen=allowed)
        self._held_until = 0.0
        self._window, self._clock, self._sleep = window, clock, sleep
        self._guard = threading.Lock()

    def wait(self) -> None:
        """Return once one more may begin."""
        with self._guard:  # who waits holds it: nobody else could begin any sooner
            while (pause := self._free_at() - self._clock()) > 0:
                self._sleep(pause)
            self._begun.append(self._clock())

    def hold(self, seconds: float) -> None:
        """Let none begin for so long: what one thread was told is true for all of them."""
        self._held_until = max(self._held_until, self._clock() + seconds)

    def _free_at(self) -> float:
        is_full = len(self._begun) == self._begun.maxlen
        return max(self._held_until, self._begun[0] + self._window) if is_full else self._held_until


class _Answer(NamedTuple):
    status: int
    headers: httpx.Headers
    body: bytes


class _Passing(BackendApiError):
    """What may be over soon. *retry_after* is in seconds, where Clerk said it."""

    def __init__(self, reason: str, what: str, retry_after: float | None = None) -> None:
        super().__init__(reason, what)
        self.retry_after = retry_after


class BackendApi:
    """
    A client that keeps within Clerk's rate limits and retries. Threads may share it.

    Every method raises BackendApiError, at the latest some *patience* seconds later. *pace* scales
    patience and all pauses, for tests, which are in a hurry; *timeout* (seconds) is how long the
    API may be silent.

    Source: Clerk, "Backend API", users; "System limits", Backend API requests.
    """

    def __init__(
        self,
        api_url: str,
        secret_key: str,
        *,
        patience: float = PATIENCE,
        pace: float = 1.0,
        timeout: float = _TIMEOUT,
    ) -> None:
        self._client = httpx.Client(
            base_url=f"{api_url}/v1",
            headers={"Authorization": f"Bearer {secret_key}"},
            timeout=httpx.Timeout(timeout, connect=min(timeout, _CONNECT_TIMEOUT)),
            follow_redirects=False,
            # To read the certificates takes a noticeable time, which plain HTTP to this machine has
            # no use for.
            verify=httpx.URL(api_url).scheme != "http",
        )
        self._rate_limit = RateLimit(
            ALLOWED.get(secret_key[:8], ALLOWED["sk_test_"]), WINDOW * pace
        )
        self._patience, self._pace, self._timeout = patience, pace, timeout

    def __enter__(self) -> Self:
        """Connections are made when they are needed."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close them."""
        self._client.close()

    def count_users(self) -> int:
        """How many users there are."""
        counted = self._get("/users/count", _NO_PARAMETERS)
        count = counted.get("total_count") if isinstance(counted, dict) else None
        if not isinstance(count, int) or isinstance(count, bool):
            raise BackendApiError("answer_unusable", "did not answer with a number of users")
        return count

    def list_users(self, created_at_after: int | None, offset: int) -> list[Any]:
        """
        A page of users, oldest first, each as Clerk gives it.

        With *created_at_after* (milliseconds) only those of later; Clerk does not say whether the
        millisecond itself is among them.
        """
        bound = {} if created_at_after is None else {"created_at_after": created_at_after}
        return self._list({"limit": PAGE, "offset": offset, "order_by": "+created_at"} | bound)

    def find_users(self, user_ids: Sequence[str]) -> list[Any]:
        """Those of at most a hundred users who exist, in any order."""
        if len(user_ids) > IDS:
            raise ValueError(f"Clerk takes {IDS} ids at a time.")
        # Without ids Clerk lists everybody, and without a limit ten of those who were asked for.
        return self._list({"limit": IDS, "user_id": list(user_ids)}) if user_ids else []

    def is_gone(self, user_id: str) -> bool:
        """Whether there is no such user, in Clerk's own words: the 404 of a proxy or of a wrong URL proves nothing."""
        return self._patiently(
            lambda: _judge_user(
                self._send(f"/users/{quote(user_id, safe='')}", _NO_PARAMETERS), user_id
            )
        )

    def fetch_date(self) -> datetime | None:
        """What the API's clock says, to the second, whatever else it answers; None where it does not say."""
        return _parse_date(
            self._patiently(lambda: self._send("/users/count", _NO_PARAMETERS)).headers.get(
                "Date", ""
            )
        )

    def _list(self, parameters: Mapping[str, Any]) -> list[Any]:
        users = self._get("/users", parameters)
        if not isinstance(users, list):
            raise BackendApiError("answer_unusable", "did not answer with a list of users")
        return users

    def _get(self, path: str, parameters: Mapping[str, Any]) -> Any:
        return self._patiently(lambda: _judge(self._send(path, parameters)))

    def _patiently(self, ask: Callable[[], T]) -> T:
        attempts = stamina.retry_context(
            on=self._pause_after,
            attempts=None,
            timeout=self._patience * self._pace,
            wait_initial=0.5 * self._pace,
            wait_max=min(15.0, self._patience) * self._pace,
            wait_jitter=0.5 * self._pace,
        )
        for attempt in attempts:
            with attempt:
                return ask()
        raise AssertionError  # pragma: no cover  # the last attempt raises what it met

    def _pause_after(self, error: Exception) -> bool | float:
        """Whether to try again, after a pause that grows; or after how many seconds."""
        if not isinstance(error, _Passing):
            return False
        if not error.retry_after:
            return True
        pause = min(error.retry_after, LONGEST_PAUSE, self._patience) * self._pace
        self._rate_limit.hold(pause)
        return pause

    def _send(self, path: str, parameters: Mapping[str, Any]) -> _Answer:
        self._rate_limit.wait()
        try:
            with self._client.stream("GET", path, params=parameters) as response:
                return _Answer(response.status_code, response.headers, self._read(response))
        # The library's own text is left out: it may quote what was sent or answered.
        except httpx.HTTPError as error:
            raise _Passing("api_unreachable", f"did not answer ({type(error).__name__})") from None

    def _read(self, response: httpx.Response) -> bytes:
        """The whole body. Timeouts begin anew with each byte, so one that only drips is ended here."""
        body, until = bytearray(), time.monotonic() + 2 * self._timeout
        try:
            for piece in response.iter_bytes():
                body += piece
                if len(body) > LARGEST_ANSWER:
                    raise BackendApiError(
                        "answer_unusable", f"answered more than {LARGEST_ANSWER:,} bytes"
                    )
                if time.monotonic() > until:
                    raise _Passing("api_unreachable", "did not answer in time")
        except (httpx.RemoteProtocolError, httpx.DecodingError):
            raise _Passing(
                "answer_unusable", "sent an answer that was cut short or garbled"
            ) from None
        return bytes(body)


def _judge(answer: _Answer) -> Any:
    """What a good answer says."""
    status, what = answer.status, f"answered {answer.status}"
    if status == 200:
        return _parse(answer.body)
    if status == 401:
        raise BackendApiError("secret_key_refused", what)
    if status == 403:
        raise BackendApiError("secret_key_forbidden", what)
    if status == 429:
        raise _Passing("rate_limited", what, _parse_retry_after(answer.headers))
    if status >= 500:
        raise _Passing("api_unreachable", what, _parse_retry_after(answer.headers))
    raise BackendApiError("answer_unusable", what)


def _judge_user(answer: _Answer, user_id: str) -> bool:
    """Whether the user of that id is gone."""
    if answer.status == 404 and _is_not_found(answer.body):
        return True
    user = _judge(answer)
    if not isinstance(user, dict) or user.get("id") != user_id:
        raise BackendApiError("answer_unusable", "did not answer with the user who was asked for")
    return False


def _is_not_found(body: bytes) -> bool:
    try:
        return any(
            error["code"] == "resource_not_found" for error in strict_json.parse(body)["errors"]
        )
    except (ValueError, TypeError, KeyError):
        return False


def _parse(body: bytes) -> Any:
    try:
        return strict_json.parse(body)
    except ValueError:
        raise _Passing("answer_unusable", "answered 200, but no whole JSON") from None


def _parse_retry_after(headers: httpx.Headers) -> float | None:
    """Seconds, from seconds or from a date; by the clock of whoever sent it."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    moment, now = _parse_date(text), _parse_date(headers.get("Date", "")) or datetime.now(UTC)
    return max(0.0, (moment - now).total_seconds()) if moment else None


def _parse_date(text: str) -> datetime | None:
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)

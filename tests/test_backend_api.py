"""Tests of the Backend API client against a fake HTTP API that can misbehave."""

from __future__ import annotations

import gzip
import logging
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clerkhooks.clerk import backend_api
from clerkhooks.clerk.backend_api import BackendApi, RateLimit
from clerkhooks.clerk.fake import clerk_id
from clerkhooks.errors import BackendApiError
from tests.backend import (
    CUT_SHORT,
    HTML,
    SECRET_KEY,
    TRUNCATED,
    Backend,
    Behaviour,
    answering,
    answering_json,
    dripping,
    hanging_up,
    limiting,
    refusing,
    resetting,
    stalling,
    stalling_then_answering,
)
from tests.racing import TIMEOUT, eventually

PACE = 0.001  # pauses take milliseconds, and by default a call ends within 0.13 s
PATIENCE = 20_000  # with PACE, a call ends within 20 s, so that a busy machine does not end it
BORN = 1_700_000_000_000


@pytest.fixture
def api(backend: Backend) -> Iterator[BackendApi]:
    """Create a client with short pauses."""
    with BackendApi(backend.api_url, SECRET_KEY, pace=PACE, patience=PATIENCE) as api:
        yield api


def answering_raw(text: bytes) -> Behaviour:
    """Return a behaviour that sends the bytes *text*, which may be invalid HTTP."""

    def behave(_backend: Backend, request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(text)
        request.close_connection = True

    return behave


def dripping_headers(backend: Backend, request: BaseHTTPRequestHandler) -> None:
    """Send an endless header, one byte at a time."""
    request.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    request.close_connection = True
    until = time.monotonic() + TIMEOUT
    while not backend.released.wait(0.01) and time.monotonic() < until:
        request.wfile.write(b"x")
        request.wfile.flush()


def failure_of(call: Callable[[], object]) -> BackendApiError:
    """Return the error that *call* raises."""
    with pytest.raises(BackendApiError) as caught:
        call()
    return caught.value


def sign_up(backend: Backend, count: int) -> list[str]:
    """Create *count* users, one per millisecond, and return their ids, oldest first."""
    return [backend.sign_up(at=BORN + number) for number in range(count)]


def ids(users: list[Any]) -> list[str]:
    """Return the ids of *users*, in the same order."""
    return [user["id"] for user in users]


def test_counts_the_users(api: BackendApi, backend: Backend) -> None:
    """The number of users is Clerk's total, not the length of a page."""
    sign_up(backend, 11)
    assert api.count_users() == 11


def test_names_the_version_of_the_api(api: BackendApi, backend: Backend) -> None:
    """Every request names the version that the client was written for."""
    [user_id] = sign_up(backend, 1)
    api.count_users()
    api.list_users()
    api.find_users([user_id])
    assert not api.is_gone(user_id)
    assert backend.versions == ["2026-05-12"] * 4


def test_lists_pages_oldest_first(api: BackendApi, backend: Backend) -> None:
    """Users are listed oldest first, after the given user, with up to 500 on a page."""
    ids_ = sign_up(backend, 502)
    assert [ids(api.list_users(cursor)) for cursor in (None, ids_[499], ids_[501])] == [
        ids_[:500],
        ids_[500:],
        [],
    ]
    page = {"limit": ["500"], "order_by": ["+created_at"]}
    assert backend.requests[:2] == [
        ("/v1/users", page),
        ("/v1/users", page | {"starting_after": [ids_[499]]}),
    ]


def test_finds_users_by_their_ids(api: BackendApi, backend: Backend) -> None:
    """A single request finds up to a hundred users. Unknown ids are left out."""
    ids_ = sign_up(backend, 99)
    assert sorted(ids(api.find_users([*ids_, "user_2nobody"]))) == sorted(ids_)
    assert backend.requests[0][1]["limit"] == ["100"]


def test_refuses_more_than_a_hundred_ids(api: BackendApi, backend: Backend) -> None:
    """More than a hundred ids raise ValueError, because Clerk would refuse the request."""
    with pytest.raises(ValueError, match="at most 100 ids"):
        api.find_users([clerk_id("user") for _ in range(101)])
    assert backend.requests == []


def test_finds_no_user_without_ids(api: BackendApi, backend: Backend) -> None:
    """For an empty list of ids, no request is sent, because Clerk would list all users."""
    sign_up(backend, 3)
    assert (api.find_users([]), backend.requests) == ([], [])


def test_returns_odd_users_unchanged(api: BackendApi, backend: Backend) -> None:
    """A malformed user does not make the page fail, because the caller checks each user."""
    odd = [None, 5, {"id": 7}, {}]
    backend.behaviours = [answering_json(200, odd), answering_json(200, odd)]
    assert api.list_users() == api.find_users(["user_2a"]) == odd


def test_confirms_that_a_user_is_gone(api: BackendApi, backend: Backend) -> None:
    """A 404 with Clerk's error code confirms a deletion. A 200 with the user rules it out."""
    user_id = backend.sign_up()
    assert api.is_gone(user_id) is False
    backend.delete(user_id)
    assert api.is_gone(user_id) is True
    assert [path for path, _ in backend.requests] == [f"/v1/users/{user_id}"] * 2


def test_escapes_an_id_in_the_path(api: BackendApi, backend: Backend) -> None:
    """An id is escaped. Otherwise, a 404 for another path could count as proof of a deletion."""
    assert api.is_gone("user_2a/../count?") is True
    assert backend.requests == [("/v1/users/user_2a%2F..%2Fcount%3F", {})]


UNPROVEN: dict[str, Behaviour] = {
    "HTML": answering(404, HTML, Content_Type="text/html"),
    "empty": answering(404),
    "another code": refusing(404, "host_invalid"),
    "another shape": answering_json(404, {"errors": "resource_not_found"}),
    "no object": answering_json(404, ["resource_not_found"]),
    "no errors": answering_json(404, {"errors": []}),
    "null": answering_json(404, {"errors": None}),
    "deep": answering(404, b"[" * 100_000),
    "another status": refusing(410, "resource_not_found"),
    "another user": answering_json(200, {"id": "user_2other"}),
    "a list": answering_json(200, []),
}


@pytest.mark.parametrize("behaviour", UNPROVEN.values(), ids=UNPROVEN)
def test_accepts_no_other_answer_as_proof(
    api: BackendApi, backend: Backend, behaviour: Behaviour
) -> None:
    """A 404 from a proxy or from another API must not cause a deletion."""
    user_id = backend.sign_up()
    backend.behaviours = [behaviour]
    assert failure_of(lambda: api.is_gone(user_id)).reason == "answer_unusable"
    assert len(backend.requests) == 1


FINAL: dict[str, tuple[Behaviour, str, str]] = {
    "401": (
        refusing(401, "clerk_key_invalid"),
        "secret_key_refused",
        "answered 401.\nCLERK_SECRET_KEY is not a key of this instance",
    ),
    "403": (
        refusing(403, "authorization_invalid"),
        "secret_key_forbidden",
        "answered 403.\nCLERK_SECRET_KEY is not allowed to read users",
    ),
    "404": (
        answering(404, HTML),
        "answer_unusable",
        "answered 404.\nThe response is not in Clerk's format. Leave CLERK_API_URL unset",
    ),
    "422": (refusing(422, "form_param_invalid"), "answer_unusable", "answered 422."),
    "redirect": (answering(302, Location="/v1/elsewhere"), "answer_unusable", "answered 302."),
    "moved": (answering(308, b"[]", Location="/v1/elsewhere"), "answer_unusable", "answered 308."),
    "no content": (answering(204), "answer_unusable", "answered 204."),
    "object": (
        answering_json(200, {"data": [], "total_count": 0}),
        "answer_unusable",
        "did not answer with a list of users.",
    ),
    "null": (answering_json(200, None), "answer_unusable", "did not answer with a list of users."),
}


@pytest.mark.parametrize(("behaviour", "reason", "text"), FINAL.values(), ids=FINAL)
def test_does_not_retry_a_permanent_error(
    api: BackendApi, backend: Backend, behaviour: Behaviour, reason: str, text: str
) -> None:
    """The error names a remedy. A redirect also raises an error, and is not followed."""
    backend.behaviours = [behaviour]
    error = failure_of(api.list_users)
    assert (error.reason, len(backend.requests)) == (reason, 1)
    assert str(error).startswith(f"Clerk's Backend API {text}")
    assert len(str(error).splitlines()) == 2


@pytest.mark.parametrize(
    "answer", [[], {}, {"total_count": None}, {"total_count": True}, {"total_count": "7"}]
)
def test_refuses_a_count_that_is_not_a_number(
    api: BackendApi, backend: Backend, answer: object
) -> None:
    """A response without a number raises an error, because Clerk always sends a number."""
    backend.behaviours = [answering_json(200, answer)]
    assert failure_of(api.count_users).reason == "answer_unusable"


PASSING: dict[str, tuple[Behaviour, str]] = {
    "429": (limiting(0), "rate_limited"),
    "429 without a time": (refusing(429, "too_many_requests"), "rate_limited"),
    "429 with an odd time": (limiting("soon"), "rate_limited"),
    "429 with a date": (limiting("Wed, 21 Oct 2099 07:28:00 GMT"), "rate_limited"),
    "500": (refusing(500, "internal_clerk_error"), "api_unreachable"),
    "502": (answering(502, HTML), "api_unreachable"),
    "503": (answering(503, b"[]", Retry_After="0"), "api_unreachable"),
    "hung up": (hanging_up, "api_unreachable"),
    "reset": (resetting, "api_unreachable"),
    "stalled": (stalling, "api_unreachable"),
    "dripping": (dripping, "api_unreachable"),
    "dripping headers": (dripping_headers, "api_unreachable"),
    "no HTTP": (answering_raw(b"SSH-2.0-OpenSSH\r\n\r\n"), "api_unreachable"),
    "truncated": (TRUNCATED, "answer_unusable"),
    "cut short": (CUT_SHORT, "answer_unusable"),
    "HTML": (answering(200, HTML), "answer_unusable"),
    "empty": (answering(200), "answer_unusable"),
    "no UTF-8": (answering(200, b'["\xff"]'), "answer_unusable"),
    "truncated gzip": (
        answering(200, gzip.compress(HTML)[:-12], Content_Encoding="gzip"),
        "answer_unusable",
    ),
    "no gzip": (answering(200, b"[]", Content_Encoding="gzip"), "answer_unusable"),
}


@pytest.mark.parametrize(("behaviour", "reason"), PASSING.values(), ids=PASSING)
def test_retries_a_temporary_error(backend: Backend, behaviour: Behaviour, reason: str) -> None:
    """After one failure, the request is retried. A lasting failure raises an error."""
    ids_ = sign_up(backend, 2)
    with BackendApi(backend.api_url, SECRET_KEY, pace=PACE, timeout=0.2, patience=2000) as api:
        backend.behaviours = [behaviour]
        assert ids(api.list_users()) == ids_
    assert len(backend.requests) == 2
    backend.always = behaviour
    with BackendApi(backend.api_url, SECRET_KEY, pace=PACE, timeout=0.2, patience=40) as api:
        assert failure_of(api.list_users).reason == reason
    assert len(backend.requests) < 30


def test_limits_the_time_of_an_exchange_on_a_kept_connection(backend: Backend) -> None:
    """The deadline applies to every request on a connection, not only to the first one."""
    with BackendApi(backend.api_url, SECRET_KEY, pace=PACE, timeout=0.2, patience=2000) as api:
        api.count_users()
        for behaviour in (dripping_headers, dripping):
            backend.behaviours, start = [behaviour], time.monotonic()
            api.count_users()
            assert 0.15 < time.monotonic() - start < 5
    assert len(backend.requests) == 5


def test_reports_a_refused_connection() -> None:
    """If the connection is refused on every attempt, the API is reported as unreachable."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with BackendApi(f"http://127.0.0.1:{port}", SECRET_KEY, pace=PACE) as api:
        error = failure_of(api.count_users)
    assert (error.reason, error.what) == ("api_unreachable", "did not answer (ConnectError)")


@pytest.mark.parametrize("url", ["https://xn--.com", "https://[v1.x]", f"https://{'a' * 64}.com"])
def test_reports_a_host_that_cannot_be_looked_up(url: str) -> None:
    """An exception from the HTTP library is converted to a BackendApiError."""
    with BackendApi(url, SECRET_KEY, pace=PACE) as api:
        assert failure_of(api.count_users).reason == "api_unreachable"


def test_reads_compressed_answers(api: BackendApi, backend: Backend) -> None:
    """A compressed page is decompressed."""
    backend.behaviours = [answering(200, gzip.compress(b'[{"id": 1}]'), Content_Encoding="gzip")]
    assert api.list_users() == [{"id": 1}]


def test_limits_the_size_of_an_answer(
    api: BackendApi, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size limit applies to the decompressed body."""
    monkeypatch.setattr(backend_api, "MAX_ANSWER", 10_000)
    backend.behaviours = [
        answering(200, gzip.compress(b" " * 1_000_000 + b"[]"), Content_Encoding="gzip")
    ]
    assert failure_of(api.list_users).what == "sent more than 10,000 bytes"


def gaps(backend: Backend) -> list[float]:
    """Return the seconds between consecutive requests."""
    return [later - earlier for earlier, later in pairwise(backend.arrivals)]


def test_retries_with_exponential_backoff(backend: Backend) -> None:
    """The pauses are half a second, then one, two and four seconds, plus jitter."""
    backend.behaviours = [answering(502, HTML)] * 4
    with BackendApi(backend.api_url, SECRET_KEY, pace=0.02) as api:
        api.count_users()
    assert [
        gap >= 0.02 * least for gap, least in zip(gaps(backend), (0.5, 1, 2, 4), strict=True)
    ] == [True] * 4


@pytest.mark.parametrize("status", [429, 503])
def test_honours_retry_after(backend: Backend, status: int) -> None:
    """The pause is never shorter than Retry-After, which is in seconds."""
    backend.behaviours = [refusing(status, "busy", Retry_After="20")]
    with BackendApi(backend.api_url, SECRET_KEY, pace=0.01) as api:
        api.count_users()
    (gap,) = gaps(backend)
    assert 0.2 <= gap < 2


def test_caps_retry_after_at_a_minute(backend: Backend) -> None:
    """A Retry-After of more than a minute is reduced. The call still ends at its timeout."""
    backend.always = limiting("999999999")
    with BackendApi(backend.api_url, SECRET_KEY, pace=0.003) as api:
        assert failure_of(api.count_users).reason == "rate_limited"
    assert len(backend.requests) in (2, 3)
    assert all(60 * 0.003 <= gap < 2 for gap in gaps(backend))


def test_ends_within_the_time_it_is_given(backend: Backend) -> None:
    """If Retry-After is longer than a call's timeout, the call ends at its timeout."""
    backend.always = limiting(50)
    with BackendApi(backend.api_url, SECRET_KEY, patience=10, pace=0.05) as api:
        assert failure_of(api.count_users).reason == "rate_limited"
    assert len(backend.requests) == 2
    assert 0.5 <= gaps(backend)[0] < 2.5


def test_pauses_all_threads(backend: Backend) -> None:
    """Retry-After pauses all threads, because Clerk's rate limit applies to the secret key."""
    backend.behaviours = [limiting(50)]
    with BackendApi(backend.api_url, SECRET_KEY, pace=0.005) as api, ThreadPool(8) as pool:
        first = pool.apply_async(api.count_users)
        backend.wait_for(1)
        eventually(lambda: api._rate_limit._held_until)
        assert pool.map_async(lambda _: api.count_users(), range(7)).get(TIMEOUT) == [0] * 7
        assert first.get(TIMEOUT) == 0
    assert gaps(backend)[0] >= 0.24


def test_serves_threads_at_once(backend: Backend) -> None:
    """Eight requests can run concurrently, and each gets its own response."""
    ids_ = sign_up(backend, 8)
    backend.behaviours = [stalling_then_answering] * 8
    with BackendApi(backend.api_url, SECRET_KEY) as api, ThreadPool(8) as pool:
        found = pool.map_async(lambda user_id: ids(api.find_users([user_id])), ids_)
        backend.wait_for(8)
        backend.released.set()
        assert found.get(TIMEOUT) == [[user_id] for user_id in ids_]


def test_keeps_its_connections(api: BackendApi, backend: Backend) -> None:
    """Requests share a connection, because a TLS handshake takes longer than fetching a page."""
    peers = set()

    def note_peer(backend: Backend, request: BaseHTTPRequestHandler) -> None:
        peers.add(request.client_address)
        backend.answer(request)

    backend.always = note_peer
    for _ in range(5):
        api.count_users()
    assert len(peers) == 1


def test_closes_a_connection_that_is_still_in_use(backend: Backend) -> None:
    """If the client is closed during a request, no thread is left behind after the request."""
    backend.behaviours.append(stalling_then_answering)
    before = set(threading.enumerate())
    with BackendApi(backend.api_url, SECRET_KEY) as api:
        thread = threading.Thread(target=api.count_users)
        thread.start()
        backend.wait_for(1)
    [watcher] = [one for one in threading.enumerate() if "_watch" in one.name and one not in before]
    assert watcher.is_alive()
    backend.released.set()
    thread.join(TIMEOUT)
    eventually(lambda: not watcher.is_alive())


@pytest.mark.parametrize(("kind", "rate"), [("sk_test_", 9), ("sk_live_", 90), ("sk_new_", 9)])
def test_knows_the_limit_of_the_instance(kind: str, rate: int) -> None:
    """Requests are limited to 90% of Clerk's rate limit for the kind of instance."""
    with BackendApi("http://127.0.0.1:9", f"{kind}abc") as api:
        assert api._rate_limit._interval == 1 / rate


def test_keeps_within_the_limit() -> None:
    """Requests to a development instance start at least a ninth of a second apart."""
    key = SECRET_KEY.replace("live", "test")
    with (
        Backend(secret_key=key).open() as backend,
        BackendApi(backend.api_url, key, pace=0.03) as api,
    ):
        for _ in range(91):
            api.count_users()
    assert backend.arrivals[-1] - backend.arrivals[0] >= 0.29


class Clock:
    """A clock that ``sleep`` advances, either by the full time or by less."""

    def __init__(self, wakes_early: bool) -> None:
        self.now = 0
        self._wakes_early = wakes_early

    def monotonic(self) -> int:
        """Return the time in whole seconds."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Advance the clock."""
        assert seconds > 0
        self.now += max(1, int(seconds) // 2) if self._wakes_early else int(seconds)


Step = st.tuples(st.sampled_from(["wait"] * 5 + ["pass", "hold"]), st.integers(0, 30))


@given(st.lists(Step, max_size=60), st.integers(1, 20), st.booleans())
def test_never_exceeds_a_rate(
    steps: list[tuple[str, int]], interval: int, wakes_early: bool
) -> None:
    """A request starts as soon as the rate limit and any ``hold()`` allow, and no sooner."""
    clock, limit = Clock(wakes_early), RateLimit(interval)
    free_at = held_until = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend_api, "time", clock)
        for step, number in steps:
            if step == "pass":
                clock.now += number
            elif step == "hold":
                limit.hold(number)
                held_until = max(held_until, clock.now + number)
            else:
                earliest = max(clock.now, free_at, held_until)
                limit.wait()
                assert clock.now == earliest
                free_at = clock.now + interval


def test_keeps_the_rate_over_all_threads() -> None:
    """If several threads wait at the same time, they are released one interval apart."""
    limit = RateLimit(0.01)
    began: list[float] = []
    guard = threading.Lock()

    def start(_: int) -> None:
        limit.wait()
        with guard:
            began.append(time.monotonic())

    with ThreadPool(8) as pool:
        pool.map_async(start, range(20), chunksize=1).get(TIMEOUT)
    assert max(began) - min(began) >= 0.18


BAD_BODY = b'{"errors": [{"code": "x", "message": "ada@example.org"}]}'
LOUD: dict[str, Behaviour] = {
    "401": answering(401, BAD_BODY),
    "403": answering(403, BAD_BODY),
    "404": answering(404, BAD_BODY),
    "429": answering(429, BAD_BODY),
    "500": answering(500, BAD_BODY),
    "no JSON": answering(200, BAD_BODY + b"x"),
    "no list": answering(200, BAD_BODY),
    "no HTTP": answering_raw(b"HTTP/1.1 ada@example.org\r\n\r\n"),
}


@pytest.mark.parametrize("behaviour", LOUD.values(), ids=LOUD)
def test_shows_neither_the_key_nor_the_answer(
    backend: Backend, behaviour: Behaviour, caplog: pytest.LogCaptureFixture
) -> None:
    """
    Errors, logs and the client's repr contain neither the key nor the response.

    Even the debug log of httpcore does not contain the key.
    """
    caplog.set_level(logging.DEBUG)
    backend.always = behaviour
    with BackendApi(backend.api_url, SECRET_KEY, pace=PACE, patience=500) as api:
        error = failure_of(api.list_users)
    logged = {
        level: [
            f"{vars(record)} {record.getMessage()}"
            for record in caplog.records
            if record.levelno >= level
        ]
        for level in (10, 20)
    }
    errors = [str(error), repr(error), *traceback.format_exception(error)]
    shown = [*errors, repr(api), str(vars(api)), *logged[logging.INFO]]
    assert any("stamina" in text or "HTTP Request" in text for text in logged[logging.INFO])
    assert not [text for text in shown if "ada@example.org" in text]
    assert not [text for text in shown + logged[logging.DEBUG] if SECRET_KEY in text]


def test_prints_nothing_about_a_retry(
    api: BackendApi,
    backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A retry prints nothing, even if the application has not configured logging."""
    monkeypatch.setattr(logging.getLogger("stamina"), "propagate", False)
    backend.behaviours = [answering(502), limiting(1)]
    api.count_users()
    assert capsys.readouterr() == ("", "")


class TestTheFake:
    """The fake API behaves as documented by Clerk. Other tests rely on it."""

    @staticmethod
    def get(backend: Backend, path: str) -> Any:
        """Request *path*; return the ids in the response, or the status if it is not 200."""
        headers = {"Authorization": f"Bearer {backend.secret_key}"}
        url = f"{backend.api_url}/v1{path}"
        response = httpx.get(url, headers=headers, verify=False)  # loading certificates is slow
        return ids(response.json()) if response.status_code == 200 else response.status_code

    def test_ignores_a_limit_over_500(self, backend: Backend) -> None:
        """Without a limit or with one over 500, the newest ten users are returned."""
        newest = sign_up(backend, 501)[::-1]
        rows = [self.get(backend, f"/users?limit={limit}") for limit in (500, 501)]
        assert [*rows, self.get(backend, "/users")] == [newest[:500], newest[:10], newest[:10]]
        after = f"/users?order_by=created_at&limit=2&starting_after={newest[-1]}"
        assert self.get(backend, after) == newest[::-1][1:3]

    def test_refuses_more_than_100_ids(self, backend: Backend) -> None:
        """More than 100 ids cause a 422. Without a limit, ten users are returned."""
        query = [f"user_id={user_id}" for user_id in sign_up(backend, 101)]
        assert self.get(backend, f"/users?limit=100&{'&'.join(query)}") == 422
        assert len(self.get(backend, f"/users?{'&'.join(query[:100])}")) == 10
        assert (
            self.get(backend, "/users?order_by=name") == self.get(backend, "/users?limit=0") == 422
        )

    def test_limits_requests(self) -> None:
        """Above the rate limit, the response is 429 with Retry-After."""
        with (
            Backend(max_requests=2).open() as backend,
            BackendApi(backend.api_url, SECRET_KEY, pace=PACE) as api,
        ):
            assert [self.get(backend, "/users") for _ in range(3)] == [[], [], 429]
            assert failure_of(api.count_users).reason == "rate_limited"

    def test_lists_users_after_another(self, backend: Backend) -> None:
        """Users created in the same millisecond have an order, so none is skipped or repeated."""
        users = {backend.sign_up(at=BORN + number // 4) for number in range(9)}
        oldest_first = self.get(backend, "/users?order_by=%2Bcreated_at")
        assert set(oldest_first) == users
        for order, listed in (("-", oldest_first[::-1]), ("%2B", oldest_first)):
            after = f"/users?order_by={order}created_at&starting_after={listed[3]}"
            assert self.get(backend, after) == listed[4:]
        backend.delete(oldest_first[3])
        assert self.get(backend, after) == 404

    def test_keeps_the_place_of_an_odd_user(self, backend: Backend) -> None:
        """A user without ``created_at`` keeps its position in the list."""
        old, odd, new = (
            backend.sign_up(at=5),
            backend.sign_up(at=6, created_at=None, email_addresses="?"),
            backend.sign_up(first_name="Grace"),
        )
        after = f"/users?order_by=%2Bcreated_at&starting_after={old}"
        assert self.get(backend, after) == [odd, new]
        backend.update(old, first_name="Augusta")
        assert backend.users[old]["updated_at"] > backend.users[new]["updated_at"]

    def test_requires_its_key(self, backend: Backend) -> None:
        """The response to a request without the secret key is 401."""
        assert httpx.get(f"{backend.api_url}/v1/users").status_code == 401

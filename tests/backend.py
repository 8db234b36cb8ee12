"""A Backend API over HTTP that knows users, answers as Clerk does, and misbehaves at will."""

from __future__ import annotations

import json
import math
import os
import random
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from clerkhooks.clerk.fake import clerk_id, user_data

WINDOW = 10.0  # seconds in which requests are counted
# A production instance's: with another the client allows itself no more than 90 requests in ten seconds.
SECRET_KEY = f"sk_live_{secrets.token_hex(20)}"
Query = dict[str, list[str]]
Behaviour = Callable[["Backend", BaseHTTPRequestHandler], None]


def answering(status: int, body: bytes = b"", **headers: str) -> Behaviour:
    """Answer with these bytes."""

    def behave(_backend: Backend | None, request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body)
        request.close_connection |= (
            "Content_Length" in headers
        )  # a body of another length ends with the connection

    return behave


def answering_json(status: int, value: object, **headers: str) -> Behaviour:
    """Answer with *value* as JSON."""
    return answering(status, json.dumps(value).encode(), Content_Type="application/json", **headers)


def refusing(status: int, code: str, **headers: str) -> Behaviour:
    """Answer with an error in Clerk's shape."""
    return answering_json(
        status,
        {
            "errors": [{"message": code, "long_message": code, "code": code}],
            "clerk_trace_id": "trace",
        },
        **headers,
    )


def limiting(retry_after: float | str) -> Behaviour:
    """Answer 429."""
    return refusing(429, "too_many_requests", Retry_After=str(retry_after))


def hanging_up(_backend: Backend, request: BaseHTTPRequestHandler) -> None:
    """Take the request and close the connection."""
    request.close_connection = True


def resetting(_backend: Backend, request: BaseHTTPRequestHandler) -> None:
    """Take the request and reset the connection."""
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(request.connection.detach())
    request.close_connection = True


def stalling(backend: Backend, request: BaseHTTPRequestHandler) -> None:
    """Take the request and say nothing."""
    backend.released.wait(20)
    request.close_connection = True


def stalling_then_answering(backend: Backend, request: BaseHTTPRequestHandler) -> None:
    """Answer as Clerk does, but not before the backend is released."""
    backend.released.wait(20)
    backend.answer(request)


def dripping(backend: Backend, request: BaseHTTPRequestHandler) -> None:
    """Begin an answer and go on with one byte at a time, without an end."""
    request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n[")
    request.close_connection = True
    while not backend.released.wait(0.01):
        request.wfile.write(b" ")
        request.wfile.flush()


HTML = b"<!doctype html><title>Bad gateway</title>"
TRUNCATED = answering(200, b'[{"id": "user_2')
CUT_SHORT = answering(200, b"[]", Content_Length="9999")


class Backend:
    """
    The users of an instance; *requests* holds each path with its query so far, *arrivals* when (monotonic seconds) each came.

    The next requests are answered by *behaviours*, as long as there are any, all further ones by *always*, if it is set.
    *before* is called before a request is answered: it may sign users up, delete them, deliver webhooks, or set behaviours.
    *inclusive*: whether ``created_at_after`` means its own millisecond, too: Clerk does not say. *shuffles_ties*: whether users
    of one millisecond come in another order each time. *max_requests*: how many are answered in ten seconds.
    """

    def __init__(
        self,
        *,
        inclusive: bool = False,
        shuffles_ties: bool = False,
        max_requests: int | None = None,
        secret_key: str = SECRET_KEY,
    ) -> None:
        self.users: dict[str, Any] = {}
        self.behaviours: list[Behaviour] = []
        self.always: Behaviour | None = None
        self.before: Callable[[str, Query], object] = lambda _path, _query: None
        self.inclusive, self.shuffles_ties, self.max_requests = (
            inclusive,
            shuffles_ties,
            max_requests,
        )
        self.requests: list[tuple[str, Query]] = []
        self.arrivals: list[float] = []
        self.released = threading.Event()
        self._arrival = threading.Condition(threading.RLock())
        self._born: dict[str, int] = {}
        self._latest = 0
        self._server = _Server(("127.0.0.1", 0), self._request_handler())
        self.api_url = f"http://127.0.0.1:{self._server.server_port}"
        self.secret_key = secret_key
        self.environ = {"CLERK_SECRET_KEY": self.secret_key, "CLERK_API_URL": self.api_url}

    def sign_up(self, user_id: str | None = None, *, at: int | None = None, **data: Any) -> str:
        """A new user of that time (milliseconds), by default of now; *data* replaces fields, also by what Clerk would never say."""
        with self._arrival:
            user_id = user_id or clerk_id("user")
            at = self._now() if at is None else at
            named = {
                "email": f"{user_id.lower()}@example.org",
                "first_name": "Ada",
                "last_name": "Lovelace",
            }
            named |= {name: data.pop(name) for name in named if name in data}
            self._born[user_id] = at
            self.users[user_id] = user_data(user_id, updated_at=at, **named) | data
        return user_id

    def update(self, user_id: str, **data: Any) -> None:
        """Replace fields of a user; it is updated now, unless *data* says when."""
        with self._arrival:
            self.users[user_id] = self.users[user_id] | {"updated_at": self._now()} | data

    def delete(self, user_id: str) -> None:
        """The user is gone."""
        with self._arrival:
            del self.users[user_id]

    def wait_for(self, count: int) -> None:
        """Return once *count* requests have come."""
        with self._arrival:
            assert self._arrival.wait_for(lambda: len(self.requests) >= count, timeout=15)

    @contextmanager
    def open(self) -> Iterator[Backend]:
        """Serve until the block ends."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            self.released.set()
            self._server.shutdown()
            thread.join()
            self._server.hang_up()
            self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer as Clerk does."""
        url = urlsplit(request.path)
        with self._arrival:
            behave = self._answer_to(request, unquote(url.path), parse_qs(url.query))
        behave(self, request)

    def _respond(self, request: BaseHTTPRequestHandler) -> None:
        url = urlsplit(request.path)
        query = parse_qs(url.query)
        with self._arrival:
            self.requests.append((url.path, query))
            self.arrivals.append(time.monotonic())
            self._arrival.notify_all()
        self.before(url.path, query)
        with self._arrival:
            behave = self.behaviours.pop(0) if self.behaviours else self.always
        if behave is None:
            self.answer(request)
        else:
            behave(self, request)

    def _answer_to(self, request: BaseHTTPRequestHandler, path: str, query: Query) -> Behaviour:
        if request.headers.get("Authorization") != f"Bearer {self.secret_key}":
            return refusing(401, "clerk_key_invalid")
        if self.max_requests is not None and len(self.arrivals) > self.max_requests:
            wait = self.arrivals[-self.max_requests - 1] + WINDOW - time.monotonic()
            if wait > 0:
                return limiting(math.ceil(wait))
        if path == "/v1/users/count":
            return answering_json(200, {"object": "total_count", "total_count": len(self.users)})
        if path == "/v1/users":
            return self._list(query)
        user_id = path.removeprefix("/v1/users/")
        return (
            answering_json(200, self.users[user_id])
            if user_id in self.users
            else refusing(404, "resource_not_found")
        )

    def _list(self, query: Query) -> Behaviour:
        limit, offset = int(query.get("limit", ["10"])[0]), int(query.get("offset", ["0"])[0])
        # The plus of +created_at is a space where nobody encoded it.
        order = query.get("order_by", ["-created_at"])[0].replace(" ", "+")
        if order.lstrip("+-") != "created_at" or limit < 1 or offset < 0:
            return refusing(422, "form_param_value_invalid")
        asked = query.get("user_id")
        if asked is not None and len(asked) > 100:
            return refusing(422, "form_param_max_length_exceeded")
        found = [
            user_id
            for user_id in (self.users if asked is None else set(asked))
            if user_id in self.users
        ]
        if "created_at_after" in query:
            after = int(query["created_at_after"][0]) - self.inclusive
            found = [user_id for user_id in found if self._created_at(user_id) > after]
        if self.shuffles_ties:
            random.shuffle(found)
        found.sort(key=self._created_at, reverse=order.startswith("-"))
        return answering_json(
            200,
            [self.users[user_id] for user_id in found[offset:][: limit if limit <= 500 else 10]],
        )

    def _created_at(self, user_id: str) -> int:
        """When the user signed up, also where the object says nothing or nonsense."""
        data = self.users[user_id]
        created_at = data.get("created_at") if isinstance(data, dict) else None
        return created_at if type(created_at) is int else self._born.get(user_id, 0)

    def _now(self) -> int:
        """Milliseconds, later than any before."""
        self._latest = max(self._latest + 1, int(time.time() * 1000))
        return self._latest

    def _request_handler(self) -> type[BaseHTTPRequestHandler]:
        backend = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # headers and body in one piece: else the client's delayed acknowledgement costs 40 ms

            def do_GET(self) -> None:
                with suppress(ConnectionError):
                    backend._respond(self)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        return Handler


class _Server(ThreadingHTTPServer):
    """One that can end, also with connections that are kept alive."""

    daemon_threads = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, _request: Any, _client_address: Any) -> None:
        """A client that went away, or that was hung up on."""

    def hang_up(self) -> None:
        """End the connections that are open still."""
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

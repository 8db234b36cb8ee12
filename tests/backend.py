"""A fake Backend API over HTTP that can also misbehave."""

from __future__ import annotations

import json
import math
import os
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
from tests.support import membership_data, organization_data, serving_in_thread

WINDOW = 10.0  # the length of the rate limit's window, in seconds
TIMEOUT = 60  # seconds; under load, a process may take ten to send its first request
# A production key. With any other key, the client sends at most 90 requests in ten seconds.
SECRET_KEY = f"sk_live_{secrets.token_hex(20)}"
Query = dict[str, list[str]]
Behaviour = Callable[["Backend", BaseHTTPRequestHandler], None]


def answering(status: int, body: bytes = b"", **headers: str) -> Behaviour:
    """Return a behaviour that responds with *status* and *body*."""

    def behave(_backend: Backend | None, request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body)
        # A response with a wrong Content-Length only ends when the connection is closed.
        request.close_connection |= "Content_Length" in headers

    return behave


def answering_json(status: int, value: object, **headers: str) -> Behaviour:
    """Return a behaviour that responds with *value* as JSON."""
    return answering(status, json.dumps(value).encode(), Content_Type="application/json", **headers)


def refusing(status: int, code: str, **headers: str) -> Behaviour:
    """Return a behaviour that responds with an error in Clerk's format."""
    return answering_json(
        status,
        {
            "errors": [{"message": code, "long_message": code, "code": code}],
            "clerk_trace_id": "trace",
        },
        **headers,
    )


def limiting(retry_after: float | str) -> Behaviour:
    """Return a behaviour that responds with 429."""
    return refusing(429, "too_many_requests", Retry_After=str(retry_after))


def hanging_up(_backend: Backend, request: BaseHTTPRequestHandler) -> None:
    """Read the request and close the connection."""
    request.close_connection = True


def resetting(_backend: Backend, request: BaseHTTPRequestHandler) -> None:
    """Read the request and reset the connection."""
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(request.connection.detach())
    request.close_connection = True


def stalling(backend: Backend, request: BaseHTTPRequestHandler) -> None:
    """Send no response, and close the connection when the backend is released."""
    backend.released.wait(TIMEOUT)
    request.close_connection = True


def stalling_then_answering(backend: Backend, request: BaseHTTPRequestHandler) -> None:
    """Wait until the backend is released, then respond as Clerk does."""
    backend.released.wait(TIMEOUT)
    backend.answer(request)


def dripping(backend: Backend, request: BaseHTTPRequestHandler) -> None:
    """Send a response one byte at a time until the backend is released."""
    request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n[")
    request.close_connection = True
    ends = time.monotonic() + TIMEOUT
    while not backend.released.wait(0.01) and time.monotonic() < ends:
        request.wfile.write(b" ")
        request.wfile.flush()


HTML = b"<!doctype html><title>Bad gateway</title>"
TRUNCATED = answering(200, b'[{"id": "user_2')
CUT_SHORT = answering(200, b"[]", Content_Length="9999")


class Backend:
    """
    A fake Clerk instance and its users.

    *requests* holds the path and query of each request. *arrivals* holds the monotonic time of each
    request in seconds. Each request uses the next behaviour from *behaviours*. Once they have all
    been used, *always* applies if it is set. *before* is called before the response: it may sign
    users up, delete them, deliver webhooks, or set behaviours.

    Requests beyond *max_requests* in ten seconds receive a 429 response. *versions* holds the API
    version of each request, or None. If *retired* is set, it answers every request that names a
    version. *lost_cursor* answers a request for the users after one who does not exist; Clerk does
    not document this response.
    """

    def __init__(
        self,
        *,
        max_requests: int | None = None,
        secret_key: str = SECRET_KEY,
    ) -> None:
        self.users: dict[str, Any] = {}
        self.organizations: dict[str, Any] = {}
        self.memberships: dict[str, Any] = {}
        self.jwks = b'{"keys": []}'
        self.behaviours: list[Behaviour] = []
        self.always: Behaviour | None = None
        self.before: Callable[[str, Query], object] = lambda _path, _query: None
        self.retired: Behaviour | None = None
        self.versions: list[str | None] = []
        self.lost_cursor: Behaviour = refusing(404, "resource_not_found")
        self.max_requests = max_requests
        self.requests: list[tuple[str, Query]] = []
        self.arrivals: list[float] = []
        self.released = threading.Event()
        self._arrived = threading.Condition(threading.RLock())
        self._created_ms: dict[str, int] = {}
        self._latest = 0
        self._server = _Server(("127.0.0.1", 0), self._request_handler())
        self.api_url = f"http://127.0.0.1:{self._server.server_port}"
        self.secret_key = secret_key
        self.environ = {"CLERK_SECRET_KEY": self.secret_key, "CLERK_API_URL": self.api_url}

    def sign_up(self, user_id: str | None = None, *, at: int | None = None, **data: Any) -> str:
        """
        Create a user and return the id. *at* is the sign-up time (milliseconds, default: now).

        *data* replaces fields, and may contain values that Clerk never sends.
        """
        with self._arrived:
            user_id = user_id or clerk_id("user")
            at = self._now() if at is None else at
            named = {
                "email": f"{user_id.lower()}@example.org",
                "first_name": "Ada",
                "last_name": "Lovelace",
            }
            named |= {name: data.pop(name) for name in named if name in data}
            self._created_ms[user_id] = at
            self.users[user_id] = user_data(user_id, updated_at=at, **named) | data
        return user_id

    def found(self, *, at: int | None = None, **data: Any) -> str:
        """Create an organization and return its id."""
        with self._arrived:
            organization_id, at = clerk_id("org"), self._now() if at is None else at
            whole = organization_data(organization_id, updated_at=at)
            self.organizations[organization_id] = whole | data
        return organization_id

    def join(
        self, organization_id: str, user_id: str, *, at: int | None = None, **data: Any
    ) -> str:
        """Create a membership and return its id."""
        with self._arrived:
            membership_id, at = clerk_id("orgmem"), self._now() if at is None else at
            whole = membership_data(membership_id, organization_id, user_id, updated_at=at)
            self.memberships[membership_id] = whole | data
        return membership_id

    def update(self, user_id: str, **data: Any) -> None:
        """Replace fields of a user. ``updated_at`` becomes the current time unless given."""
        with self._arrived:
            self.users[user_id] = self.users[user_id] | {"updated_at": self._now()} | data

    def delete(self, user_id: str) -> None:
        """Delete the user."""
        with self._arrived:
            del self.users[user_id]

    def wait_for(self, count: int) -> None:
        """Wait until *count* requests have arrived."""
        with self._arrived:
            arrived = self._arrived.wait_for(lambda: len(self.requests) >= count, TIMEOUT)
        assert arrived, f"{len(self.requests)} of {count} requests arrived"

    @contextmanager
    def open(self) -> Iterator[Backend]:
        """Serve until the block ends."""
        with serving_in_thread(self._server, self.released):
            yield self

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Respond as Clerk does."""
        url = urlsplit(request.path)
        with self._arrived:
            behave = self._answer_to(request, unquote(url.path), parse_qs(url.query))
        behave(self, request)

    def _respond(self, request: BaseHTTPRequestHandler) -> None:
        url = urlsplit(request.path)
        query = parse_qs(url.query)
        with self._arrived:
            self.requests.append((url.path, query))
            self.arrivals.append(time.monotonic())
            self.versions.append(request.headers.get("Clerk-API-Version"))
            self._arrived.notify_all()
        self.before(url.path, query)
        with self._arrived:
            behave = self.behaviours.pop(0) if self.behaviours else self.always
        if behave is None:
            self.answer(request)
        else:
            behave(self, request)

    def _answer_to(self, request: BaseHTTPRequestHandler, path: str, query: Query) -> Behaviour:
        if request.headers.get("Authorization") != f"Bearer {self.secret_key}":
            return refusing(401, "clerk_key_invalid")
        if self.retired and "Clerk-API-Version" in request.headers:
            return self.retired
        if self.max_requests is not None and len(self.arrivals) > self.max_requests:
            wait = self.arrivals[-self.max_requests - 1] + WINDOW - time.monotonic()
            if wait > 0:
                return limiting(math.ceil(wait))
        if path == "/v1/jwks":
            return answering(200, self.jwks)
        if path == "/v1/users/count":
            return answering_json(200, {"object": "total_count", "total_count": len(self.users)})
        if path == "/v1/users":
            return self._list(query)
        if path.startswith("/v1/organization"):
            return self._answer_about_organizations(path, query)
        user_id = path.removeprefix("/v1/users/")
        return (
            answering_json(200, self.users[user_id])
            if user_id in self.users
            else refusing(404, "resource_not_found")
        )

    def _answer_about_organizations(self, path: str, query: Query) -> Behaviour:
        if path == "/v1/organization_memberships":
            return self._list_by_offset(list(self.memberships.values()), query)
        if path == "/v1/organizations":
            asked = query.get("organization_id", list(self.organizations))
            found = [each for key, each in self.organizations.items() if key in asked]
            return self._list_by_offset(found, query)
        organization_id, _, rest = path.removeprefix("/v1/organizations/").partition("/")
        if organization_id not in self.organizations:
            return refusing(404, "resource_not_found")
        if not rest:
            return answering_json(200, self.organizations[organization_id])
        members = [
            each
            for each in self.memberships.values()
            if each["organization"]["id"] == organization_id
            and each["public_user_data"]["user_id"]
            in query.get("user_id", [each["public_user_data"]["user_id"]])
        ]
        return self._list_by_offset(members, query)

    def _list_by_offset(self, found: list[Any], query: Query) -> Behaviour:
        limit, offset = int(query.get("limit", ["10"])[0]), int(query.get("offset", ["0"])[0])
        order = query.get("order_by", ["-created_at"])[0].replace(" ", "+")
        if order.lstrip("+-") != "created_at" or not 1 <= limit <= 500 or offset < 0:
            return refusing(422, "form_param_value_invalid")
        found.sort(key=lambda each: each["created_at"], reverse=order.startswith("-"))
        page = {"data": found[offset:][:limit], "total_count": len(found)}
        return answering_json(200, page)

    def _list(self, query: Query) -> Behaviour:
        limit, offset = int(query.get("limit", ["10"])[0]), int(query.get("offset", ["0"])[0])
        # The plus sign of +created_at arrives as a space if the client does not encode it.
        order = query.get("order_by", ["-created_at"])[0].replace(" ", "+")
        times = {"created_at": self._created_at, "updated_at": self._updated_at}
        time_of = times.get(order.lstrip("+-"))
        if time_of is None or limit < 1 or offset < 0:
            return refusing(422, "form_param_value_invalid")
        asked = query.get("user_id")
        if asked is not None and len(asked) > 100:
            return refusing(422, "form_param_max_length_exceeded")
        found = [
            user_id
            for user_id in (self.users if asked is None else set(asked))
            if user_id in self.users
        ]
        found.sort(key=lambda id_: (time_of(id_), id_), reverse=order.startswith("-"))
        if "starting_after" in query:
            [cursor] = query["starting_after"]
            if cursor not in found:
                return self.lost_cursor
            found = found[found.index(cursor) + 1 :]
        page = found[offset:][: limit if limit <= 500 else 10]
        return answering_json(200, [self.users[user_id] for user_id in page])

    def _created_at(self, user_id: str) -> int:
        """Return the user's sign-up time, even if the user object contains no valid time."""
        data = self.users[user_id]
        created_at = data.get("created_at") if isinstance(data, dict) else None
        return created_at if type(created_at) is int else self._created_ms.get(user_id, 0)

    def _updated_at(self, user_id: str) -> int:
        data = self.users[user_id]
        updated_at = data.get("updated_at") if isinstance(data, dict) else None
        return updated_at if type(updated_at) is int else self._created_at(user_id)

    def _now(self) -> int:
        """Return the current time in milliseconds, increased if needed so that it is unique."""
        self._latest = max(self._latest + 1, int(time.time() * 1000))
        return self._latest

    def _request_handler(self) -> type[BaseHTTPRequestHandler]:
        backend = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Send headers and body in one packet; otherwise the client's delayed ACK costs 40 ms.
            wbufsize = -1
            timeout = 60  # seconds to wait for a client's next request

            def do_GET(self) -> None:
                with suppress(ConnectionError):
                    backend._respond(self)

            def log_message(self, *_: object) -> None:
                """Log nothing."""

        return Handler


class _Server(ThreadingHTTPServer):
    """A server that can stop while clients keep connections alive."""

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
        """Ignore the error: the client or ``server_close`` has closed the connection."""

    def server_close(self) -> None:
        """Shut down the connections that are still open, and close the server."""
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()

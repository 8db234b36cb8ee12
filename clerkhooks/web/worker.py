"""
A gunicorn worker that idle and slow clients cannot block.

In gunicorn's own gevent worker, idle connections count towards ``worker_connections``, and can
therefore block new clients. That worker sets no deadline for a body. It accepts only one connection
per iteration of the event loop, even if each iteration serves many requests.
"""

from __future__ import annotations

import math
import resource
import ssl
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import lru_cache
from socket import SHUT_RD, SHUT_RDWR
from typing import Any

import gevent
from gevent.socket import socket
from gunicorn import util
from gunicorn.http import errors
from gunicorn.workers.ggevent import GeventWorker

from clerkhooks.web.balance import BalancedServer, OpenConnections

REQUEST_TIMEOUT = 10.0  # seconds to receive a request, or to send one part of a response
MAX_DESCRIPTORS = 65_536  # file descriptors; do not request more, even if more are allowed
CLOSE_IDLE_FROM = 0.9  # share of the connection limit; gunicorn stops accepting at the limit
FEW = 100  # connections; a worker that has more does not pause
INTERVAL = 0.25  # seconds between two checks of the deadlines
MAX_PIECE = 65_536  # bytes per read; gunicorn takes 1 KiB at a time and copies the rest each time
_open_connections = OpenConnections()
_format_date = lru_cache(maxsize=1)(util.http_date)
_UNLIMITED: AbstractContextManager[None] = nullcontext()
_QUOTING = (
    errors.InvalidRequestLine,
    errors.InvalidRequestMethod,
    errors.InvalidHTTPVersion,
    errors.InvalidHeader,
    errors.InvalidHeaderName,
    errors.InvalidChunkSize,
    errors.ChunkMissingTerminator,
    errors.UnsupportedTransferCoding,
)
"""Client errors whose message, which is logged, may contain a token or part of a body."""


def _http_date(timestamp: float | None = None) -> str:
    """Format a Date header once per second, instead of once per response as gunicorn does."""
    return str(_format_date(int(time.time() if timestamp is None else timestamp)))


class _Malformed(errors.InvalidHeader):  # type: ignore[misc]
    """Replaces an error whose message quotes the request."""

    def __str__(self) -> str:
        return f"The request is malformed: {self.hdr}"


class Connection(socket):  # type: ignore[misc]
    """
    A client's connection. *waiting* holds the connections that are waiting for a client.

    A connection is idle until the first byte of a request arrives.
    """

    __slots__ = ("_has_more", "_held", "_waiting", "deadline", "is_idle", "is_sending")

    def __init__(self, accepted: Any, waiting: dict[Connection, None]) -> None:
        """Take over the descriptor of the *accepted* socket."""
        super().__init__(accepted.family, accepted.type, accepted.proto, accepted.detach())
        self._waiting = waiting
        self.is_idle = self.is_sending = self._has_more = False
        self.deadline = math.inf
        self._held: bytes | None = None

    def begin_wait(self, seconds: float) -> None:
        """Expect the next request within *seconds*."""
        self.is_idle, self.deadline = True, time.monotonic() + seconds

    def recv(self, size: int, *flags: int) -> bytes:
        """Receive data. A request must be complete within REQUEST_TIMEOUT of its first byte."""
        size = min(size, MAX_PIECE)
        if self._has_more and time.monotonic() >= self.deadline:
            return b""  # recv does not wait while data is available, so check the deadline here
        self._waiting[self] = None
        try:
            received: bytes = super().recv(size, *flags)
            self._has_more = len(received) == size
            if self._has_more:  # yield to other connections
                gevent.sleep(0.00001)
        finally:
            self._waiting.pop(self, None)
        if self.is_idle:
            self.is_idle, self.deadline = False, time.monotonic() + REQUEST_TIMEOUT
        return received

    def hold_header(self) -> None:
        """Delay the response header, which gunicorn sends next, and send it with the body."""
        self._held = b""

    def flush(self) -> None:
        """Send the delayed header if no body follows."""
        held, self._held = self._held, None
        if held:
            with suppress(OSError):  # the client is gone, or gunicorn has closed the connection
                self.sendall(held)

    def sendfile(self, *arguments: Any, **options: Any) -> Any:
        """Send the delayed header, then the file."""
        self.flush()
        return super().sendfile(*arguments, **options)

    def sendall(self, data: bytes, *flags: int) -> None:
        """Send *data*. The client must read it within REQUEST_TIMEOUT."""
        if self._held == b"":
            self._held = data
            return
        if self._held is not None:
            data, self._held = self._held + data, None
        with suppress(BlockingIOError):  # most responses are sent without waiting
            data = data[self._sock.send(data, *flags) :]
        self.is_idle = False
        if not data:
            return
        before, self.deadline = self.deadline, time.monotonic() + REQUEST_TIMEOUT
        self.is_sending = True
        self._waiting[self] = None
        try:
            super().sendall(data, *flags)
        finally:
            self._waiting.pop(self, None)
            self.is_sending, self.deadline = False, before

    def end_wait(self) -> None:
        """End the wait: ``recv`` returns the received data or EOF, and ``sendall`` fails."""
        self._waiting.pop(self, None)
        with suppress(OSError):  # the client has closed the connection
            # gevent's own shutdown() would raise an error in the waiting greenlet.
            self._sock.shutdown(SHUT_RDWR if self.is_sending else SHUT_RD)


class Worker(GeventWorker):  # type: ignore[misc]
    """
    gunicorn's gevent worker, with a limit on connections and a deadline for each request.

    When a new connection arrives near the limit, the worker closes the connection that has waited
    longest for its client. A stopping worker closes idle connections immediately. TLS connections
    are handled as in gunicorn's own worker.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._connections: dict[Any, Connection] = {}  # by greenlet
        self._waiting: dict[Connection, None] = {}  # the longest-waiting connection is first
        self._open = 0  # connections, including TLS and those that are not in _connections yet

    def init_process(self) -> None:
        """Initialize the forked process, then serve."""
        # gunicorn looks up about 30 settings for each request. Storing them as instance attributes
        # avoids calls to Config.__getattr__, so requests are 5% faster.
        self.cfg.__dict__.update((name, one.get()) for name, one in self.cfg.settings.items())
        util.http_date = _http_date
        super().init_process()

    def run(self) -> None:
        """Serve until the worker is stopped."""
        gevent.spawn(self._watch_deadlines)
        super().run()

    def server_class(self, listener: Any, *, spawn: Any, **options: Any) -> BalancedServer:
        """Return the server that accepts connections; gunicorn calls this like a class."""
        tls = {"ssl_context": options["ssl_context"]} if "ssl_context" in options else {}

        def serve(client: Any, address: Any) -> None:
            self.handle(listener, client, address)

        return BalancedServer(listener, serve, spawn, self, **tls)

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """Serve a connection until it ends."""
        if isinstance(client, ssl.SSLSocket):
            super().handle(listener, client, addr)
            return
        if self._waiting and len(self._connections) >= CLOSE_IDLE_FROM * self.worker_connections:
            next(iter(self._waiting)).end_wait()
        greenlet = gevent.getcurrent()
        connection = self._connections[greenlet] = Connection(client, self._waiting)
        if not self.cfg.keepalive:  # gunicorn calls timeout_ctx only if keep-alive is enabled
            connection.begin_wait(REQUEST_TIMEOUT)
        try:
            super().handle(listener, connection, addr)
        finally:
            del self._connections[greenlet]

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> Any:
        """Respond to a request, sending the header and a short body in one packet."""
        if not isinstance(sock, Connection):
            return super().handle_request(listener_name, req, sock, addr)
        sock.hold_header()
        try:
            return super().handle_request(listener_name, req, sock, addr)
        finally:
            sock.flush()

    def handle_error(self, req: Any, client: Any, addr: Any, exc: Any) -> None:
        """Respond to a malformed request with 400, without logging any part of the request."""
        if type(exc) in _QUOTING:
            exc = _Malformed(type(exc).__name__)
        super().handle_error(req, client, addr, exc)

    def timeout_ctx(self) -> Any:
        """Begin the wait for a request. gunicorn's own worker starts a timer each time instead."""
        connection = self._connections.get(gevent.getcurrent())
        if connection is None:
            return super().timeout_ctx()
        connection.begin_wait(self.cfg.keepalive)
        return _UNLIMITED

    def count_connection(self, change: int) -> None:
        """Add *change* to the number of open connections, and inform the other workers."""
        self._open += change
        self._publish()

    def _publish(self) -> None:
        if self.alive and not self.cfg.reuse_port:  # with reuse_port, each worker has its own queue
            _open_connections.publish(self.age, self._open)
        else:
            _open_connections.withdraw(self.age)

    def should_pause(self) -> bool:
        """
        Return whether another worker should accept the next connection.

        A worker with many connections does not pause. Otherwise, thousands of new connections would
        fill the operating system's queue.
        """
        share = self._open if self.alive else math.inf
        return self._open < FEW and _open_connections.least() < share

    def count_requests(self) -> int:
        """Return the number of requests that are being served."""
        return len(self._connections) - len(self._waiting)

    def _watch_deadlines(self) -> None:
        while True:
            self._publish()
            gevent.sleep(INTERVAL)
            now, is_stopping = time.monotonic(), not self.alive
            for connection in list(self._waiting):
                if connection.deadline <= now or (is_stopping and connection.is_idle):
                    connection.end_wait()


def raise_descriptor_limit() -> int:
    """Raise this process's limit on open files as far as allowed, and return the new limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY:
        return MAX_DESCRIPTORS
    if soft < allowed:
        with suppress(OSError, ValueError):  # macOS may enforce less than the hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

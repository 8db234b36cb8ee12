"""Simulated load: idle or slow connections, a sender like Svix, and new clients."""

from __future__ import annotations

import itertools
import random
import resource
import selectors
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

from tests.support import join

Kind = Literal["silent", "idle", "slow head", "slow body"]
KINDS: tuple[Kind, ...] = ("silent", "idle", "slow head", "slow body")
HEALTHZ = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
SVIX_TIMEOUT = 15.0  # seconds that Svix waits for a response
_BEGUN = {
    "silent": b"",
    "idle": HEALTHZ,
    "slow head": b"POST /webhooks/clerk HTTP/1.1\r\nX: ",
    "slow body": b"POST /webhooks/clerk HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n",
}


def allow_descriptors() -> int:
    """Raise this process's limit on open files to the maximum, and return the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


@contextmanager
def held(port: int, count: int, kind: Kind) -> Iterator[Callable[[], int]]:
    """
    Keep *count* connections of the given *kind* open until the block ends.

    Yield a function that counts the open connections. The slow kinds send one byte per second. If
    the server closes a connection, a new one replaces it.
    """
    ended = threading.Event()
    with ExitStack() as stack:
        connections = [stack.enter_context(_begin(port, kind)) for _ in range(count)]
        is_open = [True] * count

        def hold() -> None:
            while not ended.wait(1):
                for number, connection in enumerate(connections):
                    is_open[number] = _continue(connection, kind)
                    if not is_open[number] and not ended.is_set():
                        connection.close()
                        with suppress(OSError):
                            connections[number] = stack.enter_context(_begin(port, kind))

        thread = threading.Thread(target=hold)
        thread.start()
        try:
            yield lambda: sum(is_open)
        finally:
            ended.set()
            join(thread)


def _begin(port: int, kind: Kind) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(_BEGUN[kind])
    if kind == "idle":
        connection.recv(4096)
    connection.setblocking(False)
    return connection


def _continue(connection: socket.socket, kind: Kind) -> bool:
    """Send the next byte of a slow request; return whether the connection is still open."""
    try:
        if kind.startswith("slow"):
            connection.send(b"x")
        return connection.recv(4096) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


@dataclass
class Sent:
    """
    The results of requests, with latencies in seconds.

    Status 0 means a broken connection; status -1 means a timeout.
    """

    seconds: float = 0.0
    connections: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: dict[int, list[float]] = field(default_factory=dict)

    def add(self, status: int, seconds: float) -> None:
        """Add the result of one request."""
        self.statuses[status] += 1
        self.latencies.setdefault(status, []).append(seconds)

    def quantile(self, share: float, status: int = 200) -> float:
        """
        Return a quantile of the latencies of responses with *status*, in seconds.

        *share* is 0.5 for the median.
        """
        found = sorted(self.latencies[status])
        return found[min(len(found) - 1, int(share * len(found)))]


class Sender:
    """
    Sends *at_once* requests concurrently over persistent connections, as Svix does.

    It sometimes opens a new connection even if another one is idle, but never has more than
    *connections* open.
    """

    def __init__(self, port: int, *, at_once: int, connections: int) -> None:
        self.port, self.at_once, self.connections = port, at_once, connections
        self._selector = selectors.DefaultSelector()
        self._idle: deque[socket.socket] = deque()
        self._begun: dict[socket.socket, tuple[float, bytes]] = {}
        self._received: dict[socket.socket, bytes] = {}
        self._sent = Sent()

    def send(self, requests: Iterable[bytes]) -> Sent:
        """
        Send *requests*, and wait until each one has a response or has timed out.

        *requests* must be finite. A request times out after ``SVIX_TIMEOUT``.
        """
        self._sent, following, began = Sent(), iter(requests), time.monotonic()
        more = True
        while more or self._begun:
            while more and len(self._begun) < self.at_once:
                request = next(following, None)
                if request is None:
                    more = False
                else:
                    self._start(request)
            for key, events in self._selector.select(0.05):
                self._continue(key.fileobj, events)  # type: ignore[arg-type]
            self._abandon_overdue()
        self._sent.seconds = time.monotonic() - began
        self._sent.connections = len(self._idle)
        return self._sent

    def close(self) -> None:
        """Close all connections."""
        for connection in self._idle:
            connection.close()
        self._selector.close()

    def _start(self, request: bytes) -> None:
        opened = len(self._idle) + len(self._begun)
        is_new = opened < self.connections and (not self._idle or random.random() < 0.3)
        if is_new:
            connection = socket.socket()
            connection.setblocking(False)
            connection.connect_ex(("127.0.0.1", self.port))
            self._selector.register(connection, selectors.EVENT_WRITE)
        else:
            connection = self._idle.pop()
            self._selector.modify(connection, selectors.EVENT_WRITE)
        self._begun[connection] = (time.monotonic(), request)

    def _continue(self, connection: socket.socket, events: int) -> None:
        if connection not in self._begun:  # the server has closed an idle connection
            with suppress(ValueError):
                self._idle.remove(connection)
            self._drop(connection)
            return
        began, request = self._begun[connection]
        try:
            if events & selectors.EVENT_WRITE:
                connection.sendall(request)
                self._selector.modify(connection, selectors.EVENT_READ)
                return
            received = connection.recv(65536)
        except OSError:
            received = b""
        answer = self._received.pop(connection, b"") + received
        if received and not is_whole(answer):
            self._received[connection] = answer
            return
        status = int(answer[9:12]) if received else 0
        del self._begun[connection]
        self._sent.add(status, time.monotonic() - began)
        if status:
            self._idle.append(connection)
        else:
            self._drop(connection)

    def _abandon_overdue(self) -> None:
        overdue = time.monotonic() - SVIX_TIMEOUT
        for connection, (began, _) in list(itertools.islice(self._begun.items(), 50)):
            if began < overdue:
                del self._begun[connection]
                self._received.pop(connection, None)
                self._sent.add(-1, SVIX_TIMEOUT)
                self._drop(connection)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()


@contextmanager
def new_clients(port: int, pause: float = 0.05) -> Iterator[Sent]:
    """Request ``/healthz`` repeatedly, on a new connection each time, until the block ends."""
    ended, sent = threading.Event(), Sent()

    def ask() -> None:
        while not ended.wait(pause):
            began = time.monotonic()
            status = 0
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                    connection.sendall(HEALTHZ)
                    status = int(connection.recv(4096)[9:12] or 0)
            except TimeoutError:
                status = -1
            except OSError:
                status = 0
            sent.add(status, time.monotonic() - began)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield sent
    finally:
        ended.set()
        join(thread)


def is_whole(answer: bytes) -> bool:
    """Return whether an HTTP response with a Content-Length has arrived in full."""
    head, _, body = answer.partition(b"\r\n\r\n")
    length = head.lower().partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0]
    return bool(length) and len(body) >= int(length)

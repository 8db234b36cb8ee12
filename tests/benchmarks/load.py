"""Generate load with persistent connections that send prepared requests in sequence."""

from __future__ import annotations

import argparse
import itertools
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from clerkhooks.clerk.fake import FakeClerk, clerk_id, event_body, user_data
from tests.support import join

START = 1_700_000_000_000  # milliseconds


@dataclass
class Result:
    """The result of a load test. Durations are in seconds."""

    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """The number of successful responses (status 200) per second."""
        return self.statuses[200] / self.seconds

    def quantile(self, share: float) -> float:
        """Return the given quantile of the latencies, in milliseconds."""
        return (
            sorted(self.latencies)[min(len(self.latencies) - 1, int(share * len(self.latencies)))]
            * 1000
        )

    @property
    def errors(self) -> int:
        """The number of server errors and of requests without a valid response."""
        return sum(count for status, count in self.statuses.items() if status == 0 or status >= 500)


def raw(method: str, path: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    """Return a request as bytes."""
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Content-Length: {len(body)}",
        *(f"{k}: {v}" for k, v in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def webhooks(clerk: FakeClerk, known: Sequence[str] = ()) -> Iterator[bytes]:
    """Generate deliveries for new users, alternating with *known* users if there are any."""
    for number in itertools.count():
        user_id = known[number % len(known)] if known and number % 2 else clerk_id("user")
        at = int(time.time() * 1000)
        user = user_data(
            user_id, email="ada@example.org", first_name="Ada", last_name="L", updated_at=at
        )
        yield delivery(clerk, user)


def delivery(clerk: FakeClerk, user: dict[str, Any], message_id: str | None = None) -> bytes:
    """Return a signed delivery of a ``user.updated`` event whose data is *user*."""
    body = event_body("user.updated", user, user["updated_at"])
    return raw("POST", "/webhooks/clerk", clerk.headers(body, message_id), body)


def unsigned(_clerk: FakeClerk) -> Iterator[bytes]:
    """Generate requests with well-formed headers and an invalid signature."""
    headers = {
        "svix-id": "msg_x",
        "svix-timestamp": str(int(time.time())),
        "svix-signature": "v1,AAAA",
    }
    return itertools.repeat(raw("POST", "/webhooks/clerk", headers, b"x" * 2000))


def calls(clerk: FakeClerk, users: Iterable[str], each: int = 10) -> Iterator[bytes]:
    """Generate API calls by cycling through *users*; *each* is the number of calls per token."""
    for user_id in itertools.cycle(users):
        token = clerk.session_token(user_id)
        request = raw("GET", "/api/me", {"Authorization": f"Bearer {token}"})
        yield from itertools.repeat(request, each)


def apply_load(
    port: int,
    requests: Iterator[bytes],
    seconds: float,
    connections: int = 8,
    host: str = "127.0.0.1",
) -> Result:
    """Prepare *requests*, then send them over *connections* for *seconds*."""
    prepared = list(itertools.islice(requests, int(seconds * 4000)))
    result, guard, ends = Result(), threading.Lock(), time.monotonic() + seconds
    following = iter(prepared)

    def work() -> None:
        statuses, latencies = Counter[int](), []
        with socket.create_connection((host, port), timeout=30) as connection:
            while time.monotonic() < ends:
                with guard:
                    request = next(following, None)
                if request is None:
                    break
                began = time.monotonic()
                statuses[_ask(connection, request)] += 1
                latencies.append(time.monotonic() - began)
        with guard:
            result.statuses += statuses
            result.latencies += latencies

    began = time.monotonic()
    threads = [threading.Thread(target=work) for _ in range(connections)]
    for thread in threads:
        thread.start()
    join(*threads, seconds=seconds + 60)
    result.seconds = time.monotonic() - began
    return result


def _ask(connection: socket.socket, request: bytes) -> int:
    """Return the status of the response, or 0 if there is no valid response."""
    try:
        connection.sendall(request)
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += connection.recv(65536) or b"\r\n\r\n"
        head, _, body = answer.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
        while len(body) < length:
            piece = connection.recv(65536)
            if not piece:
                return 0
            body += piece
        return int(head[9:12] or 0)
    except (OSError, ValueError):
        return 0


def alternate(
    ports: Sequence[int], requests: Callable[[], Iterator[bytes]], rounds: int, seconds: float
) -> list[list[float]]:
    """Apply the same load to each server by turns. Return each server's rate in each round."""
    rates: list[list[float]] = [[] for _ in ports]
    for _ in range(rounds):
        for own, port in zip(rates, ports, strict=True):
            result = apply_load(port, requests(), seconds)
            assert not result.errors, result.statuses
            own.append(result.rate)
    return rates


def median_ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    """Return the median of the rounds' ratios. The machine's speed may vary between rounds."""
    return statistics.median(a / b for a, b in zip(ours, others, strict=True))


def parse_rounds(description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of a benchmark that alternates rounds: *rounds* and *seconds*."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="of a round")
    return parser.parse_args(argv)

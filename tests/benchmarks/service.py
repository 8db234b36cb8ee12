"""
Measure the service under load and print a table.

    python -m tests.benchmarks.service [--only PART] [--largest 1000000] [--thorough]

The parts are ``scale`` (more users) and ``overload``. The load is generated on the same machine;
ratios compare alternating rounds of one run.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import psycopg

from clerkhooks.clerk.fake import FakeClerk
from tests.benchmarks.disk import USERS
from tests.benchmarks.load import Result, apply_load, calls, median_ratio, unsigned, webhooks
from tests.conftest import migrate, started_postgresql
from tests.server import serving
from tests.support import join

CLERK = FakeClerk()


def line(part: str, what: str, value: str) -> None:
    """Print one line of the table."""
    print(f"{part:9} {what:64} {value}", flush=True)


def measure_scale(largest: int, folder: Path) -> None:
    """Compare the cost of webhooks and calls with 10,000 users and with many more users."""
    counts = [10_000, *(count for count in (1_000_000, 10_000_000) if count <= largest)]
    with started_postgresql() as url, contextlib.ExitStack() as stack:
        servers, known = {}, {}
        for count in counts:
            own = _database(url, f"users_{count}")
            migrate(own, CLERK)
            with psycopg.connect(own, autocommit=True) as connection:
                connection.execute(USERS.encode(), {"users": count})
                connection.execute("VACUUM ANALYZE users")
                known[count] = [
                    row[0]
                    for row in connection.execute("SELECT id FROM users ORDER BY md5(id) LIMIT 500")
                ]
            servers[count] = stack.enter_context(serving(own, CLERK, folder / f"{count}.log"))
        rates: dict[tuple[int, str], list[float]] = {}
        for _ in range(5):
            for count, server in servers.items():
                for name, requests in (
                    ("webhook", webhooks(CLERK, known[count])),
                    ("/api/me", calls(CLERK, known[count])),
                ):
                    result = apply_load(server.port, requests, 3)
                    assert not result.errors, result.statuses
                    rates.setdefault((count, name), []).append(result.rate)
        for count in counts[1:]:
            for name in ("webhook", "/api/me"):
                cost = median_ratio(rates[counts[0], name], rates[count, name])
                line(
                    "scale",
                    f"cost of {name} with {count:,} users, relative to 10,000",
                    f"{cost:.2f}",
                )


def _database(url: str, name: str) -> str:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return url.replace("/postgres?", f"/{name}?")


def measure_overload(folder: Path, seconds: float) -> None:
    """Send four times the usual load, then unsigned requests alongside the usual load."""
    with started_postgresql() as url:
        migrate(url, CLERK)
        with serving(url, CLERK, folder / "overload.log") as server:
            usual = apply_load(server.port, webhooks(CLERK), 4, connections=16)
            heavy = apply_load(server.port, webhooks(CLERK), seconds, connections=64)
            [(stored,)] = server.rows("SELECT count(*) FROM webhook_messages")
            beside, garbage = _together(
                lambda: apply_load(server.port, webhooks(CLERK), 5, connections=16),
                lambda: apply_load(server.port, unsigned(CLERK), 5, connections=16),
            )
    taken = usual.statuses[200] + heavy.statuses[200]
    line(
        "overload",
        f"64 connections for {seconds:.0f} s: errors, 200s, stored messages",
        f"{heavy.errors}, {taken}, {stored}",
    )
    line(
        "overload",
        "p50 and p99, and throughput relative to 16 connections",
        f"{heavy.quantile(0.5):.0f} ms, {heavy.quantile(0.99):.0f} ms, "
        f"{heavy.rate / usual.rate:.2f}",
    )
    share, unsigned_rate = beside.rate / usual.rate, garbage.statuses[401] / garbage.seconds
    line(
        "overload",
        f"deliveries beside {unsigned_rate:,.0f} unsigned ones per second, relative to those alone",
        f"{share:.2f}, errors {beside.errors}",
    )


def _together(first: Callable[[], Result], second: Callable[[], Result]) -> tuple[Result, Result]:
    results: dict[int, Result] = {}
    threads = [
        threading.Thread(target=lambda n=number, work=work: results.update({n: work()}))
        for number, work in enumerate((first, second))
    ]
    for thread in threads:
        thread.start()
    join(*threads, seconds=120)
    return results[0], results[1]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the selected parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["scale", "overload"])
    parser.add_argument("--largest", type=int, default=1_000_000, help="the most users of scale")
    parser.add_argument("--thorough", action="store_true", help="a minute of overload")
    options = parser.parse_args(argv)
    parts: dict[str, Callable[[Path], None]] = {
        "scale": lambda folder: measure_scale(options.largest, folder),
        "overload": lambda folder: measure_overload(folder, 60 if options.thorough else 10),
    }
    for name, measure in parts.items():
        if options.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                measure(Path(folder))


if __name__ == "__main__":
    main()

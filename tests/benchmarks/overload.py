"""
Measure the service at four times the usual load, and during many unsigned requests.

    python -m tests.benchmarks.overload [--seconds 10]

The load is generated on the same machine.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from clerkhooks.clerk.fake import FakeClerk
from tests.benchmarks.load import Result, apply_load, unsigned, webhooks
from tests.conftest import migrate, started_postgresql
from tests.server import serving
from tests.support import join

CLERK = FakeClerk()


def line(what: str, value: str) -> None:
    """Print one line of the table."""
    print(f"{what:72} {value}", flush=True)


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
        f"64 connections for {seconds:.0f} s: errors, 200s, stored messages",
        f"{heavy.errors}, {taken}, {stored}",
    )
    line(
        "p50 and p99, and throughput relative to 16 connections",
        f"{heavy.quantile(0.5):.0f} ms, {heavy.quantile(0.99):.0f} ms, "
        f"{heavy.rate / usual.rate:.2f}",
    )
    share, unsigned_rate = beside.rate / usual.rate, garbage.statuses[401] / garbage.seconds
    line(
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
    """Run both measurements and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10, help="seconds of the heavy load")
    with tempfile.TemporaryDirectory() as folder:
        measure_overload(Path(folder), parser.parse_args(argv).seconds)


if __name__ == "__main__":
    main()

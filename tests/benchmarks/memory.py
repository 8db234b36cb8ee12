"""
Measure the service's start-up time, memory and CPU time; estimate the cost per user.

    python -m tests.benchmarks.memory [--requests 20000] [--price 7] [--dyno-mb 512] ...

It measures two workers on PostgreSQL: first with the default settings, then with metrics, console
and handlers. The monthly cost is calculated from the measured CPU time per request and from
assumptions. Options change these assumptions, which are printed with the results. The cost does not
include the database.
"""

from __future__ import annotations

import argparse
import base64
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clerkhooks.clerk.fake import FakeClerk
from tests.benchmarks.load import apply_load, calls, webhooks
from tests.benchmarks.processes import Memory, cpu_seconds, read_memory, tree, workers
from tests.conftest import migrate, started_postgresql
from tests.server import Server, serving
from tests.support import ThreadPool

CLERK = FakeClerk()
ONE = "user_" + "a" * 27
MONTH = 30 * 86_400  # seconds
ROUND = 2.0  # seconds
SETTLE = 1.0  # seconds; the first worker answers before the second one has started
TOKEN, PASSWORD = "benchmark-token-0123456789", "correct-horse-battery-staple"
OPTIONAL = {"METRICS_TOKEN": TOKEN, "CONSOLE_PASSWORD": PASSWORD}
HANDLERS = ["gunicorn", "tests.benchmarks.with_handlers:app"]


@dataclass
class Measured:
    """
    The measurements of one configuration.

    *ready* is in seconds. *webhook* and *call* are CPU seconds per request, summed over all
    processes.
    """

    ready: float
    idle: Memory
    loaded: Memory
    total: float
    """The sum of all processes' PSS after the load, in MB."""
    webhook: float
    call: float


def measure(url: str, log: Path, requests: int, *, all_on: bool) -> Measured:
    """Start the service, read its memory, apply load, and read it again."""
    began = time.monotonic()
    command, variables = (HANDLERS, OPTIONAL) if all_on else ([], {})
    with serving(url, CLERK, log, command=command, **variables) as server:
        ready, pid = time.monotonic() - began, server.process.pid
        time.sleep(SETTLE)
        idle = read_memory(workers(pid))
        with ThreadPool(1) as pool:
            running = pool.submit(_apply, server, requests, all_on=all_on)
            sizes = [idle]
            while not running.done():
                sizes.append(read_memory(workers(pid)))
                time.sleep(0.25)
            webhook, call = running.result()
        loaded = max(sizes, key=lambda size: size.pss)
        total = sum(read_memory([process]).pss for process in tree(pid))
        return Measured(ready, idle, loaded, total, webhook, call)


def _apply(server: Server, requests: int, *, all_on: bool) -> tuple[float, float]:
    """Send webhooks, then calls; return the CPU seconds per webhook and per call."""
    apply_load(server.port, calls(CLERK, [ONE]), 1)  # create the user and warm up
    webhook = _cpu_per_request(server, requests, lambda: webhooks(CLERK))
    call = _cpu_per_request(server, requests, lambda: calls(CLERK, [ONE]))
    if all_on:
        basic = base64.b64encode(f"operator:{PASSWORD}".encode()).decode()
        for path, scheme in (
            ("/metrics", f"Bearer {TOKEN}"),
            *((page, f"Basic {basic}") for page in ("/console", "/console/messages")),
        ):
            for _ in range(20):
                assert server.request("GET", path, headers={"Authorization": scheme}).status == 200
    return webhook, call


def _cpu_per_request(server: Server, count: int, make: Callable[[], Iterator[bytes]]) -> float:
    done, spent = 0, 0.0
    while done < count:
        before = cpu_seconds(server.process.pid)
        result = apply_load(server.port, make(), ROUND)
        assert result.statuses[200], result.statuses
        spent += cpu_seconds(server.process.pid) - before
        done += result.statuses[200]
    return spent / done


def print_measured(name: str, found: Measured) -> None:
    """Print the measurements of a configuration as a line of the table."""
    print(
        f"{name:24} {found.ready:7.2f} s   "
        f"{found.idle.rss:5.0f} / {found.idle.pss:4.0f}   "
        f"{found.loaded.rss:5.0f} / {found.loaded.pss:4.0f}   "
        f"{found.total:9.0f}   {found.webhook * 1000:10.2f}   {found.call * 1000:7.2f}",
        flush=True,
    )


def print_cost(name: str, found: Measured, options: argparse.Namespace) -> None:
    """Print how many users one dyno can serve, and the price per 1,000 users."""
    spare = options.dyno_mb - found.total
    more = int(max(0, spare) // found.loaded.private)
    per_user = options.messages * found.webhook + options.calls * found.call
    users = options.dyno_cpu * MONTH / options.peak / per_user
    print(
        f"{name:24} {found.total:.0f} MB of {options.dyno_mb} MB, room for {more} more workers; "
        f"{per_user:.2f} CPU seconds per user and month, {users:,.0f} monthly users per dyno: "
        f"${options.price / users * 1000:.4f} per 1,000 users and month",
        flush=True,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=20_000, help="of each kind")
    assumed = parser.add_argument_group("assumptions")
    assumed.add_argument("--price", type=float, default=7.0, help="dollars per dyno and month")
    assumed.add_argument("--dyno-mb", type=int, default=512)
    assumed.add_argument(
        "--dyno-cpu",
        type=float,
        default=0.5,
        help="the dyno's share of one of this machine's cores",
    )
    assumed.add_argument("--messages", type=float, default=10, help="webhooks per user and month")
    assumed.add_argument("--calls", type=float, default=600, help="API calls per user and month")
    assumed.add_argument("--peak", type=float, default=10, help="peak rate over the mean rate")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each configuration, then the assumptions and the costs."""
    options = parse(argv)
    print("Two workers. Memory is the mean of a worker, RSS / PSS in MB; loaded is the maximum.")
    print(
        f"{'':24} {'ready':>9}   {'idle':>12}   {'loaded':>12}   {'total PSS':>9}   "
        f"{'ms/webhook':>10}   {'ms/call':>7}"
    )
    found: dict[str, Measured] = {}
    with started_postgresql() as url, tempfile.TemporaryDirectory() as folder:
        migrate(url, CLERK)
        for name, all_on in (("webhooks, me, health", False), ("all routes, handlers", True)):
            log = Path(folder) / "log"
            found[name] = measure(url, log, options.requests, all_on=all_on)
            print_measured(name, found[name])
    print(
        f"Assumed, not measured: a dyno has {options.dyno_mb} MB and {options.dyno_cpu:g} of "
        f"a core as fast as here, and costs ${options.price:g} a month; a user causes "
        f"{options.messages:g} webhooks and {options.calls:g} calls a month; the peak rate is "
        f"{options.peak:g} times the mean. The database is not included."
    )
    for name, each in found.items():
        print_cost(name, each, options)


if __name__ == "__main__":
    main()

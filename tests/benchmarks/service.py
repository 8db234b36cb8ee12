"""
Measure the service under load and print a table.

    python -m tests.benchmarks.service [--only PART] [--largest 1000000] [--thorough]

The parts are ``scale`` (more users), ``start`` (compared with a bare Flask application), ``memory``
and ``overload``. The load is generated on the same machine; ratios compare alternating rounds of
one run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psycopg

from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.settings import PROJECT
from tests.benchmarks.disk import USERS
from tests.benchmarks.load import Result, apply_load, calls, median_ratio, unsigned, webhooks
from tests.conftest import migrate, started_postgresql
from tests.server import Server, environ, free_port, serving, web_command
from tests.support import join

CLERK = FakeClerk()
ONE = "user_" + "a" * 27
BARE = """
import cryptography.hazmat.primitives.asymmetric.rsa
import dotenv, flask_cors, flask_migrate, flask_sqlalchemy
import httpx, jwt, psycopg, sqlalchemy, standardwebhooks
from flask import Flask
app = Flask("bare")
@app.get("/healthz")
def healthz():
    return {}
"""


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


def measure_start(folder: Path) -> None:
    """Compare the start-up time with the start-up time of a bare Flask application."""
    url = f"sqlite:///{folder}/start.db"
    migrate(url, CLERK)
    (folder / "bare.py").write_text(BARE)
    ours, bare = [], []
    for _ in range(7):
        ours.append(
            _start(
                web_command(),
                PROJECT,
                CLERK.environ | {"DATABASE_URL": url, "WEB_CONCURRENCY": "2"},
            )
        )
        port = free_port()
        options = ["--preload", "-w", "2", "-k", "gevent", "-b", f"127.0.0.1:{port}"]
        bare.append(
            _start([sys.executable, "-m", "gunicorn", *options, "bare:app"], folder, {}, port)
        )
    line(
        "start",
        "start to the first 200, relative to bare Flask with the same imports",
        f"{median_ratio(ours, bare):.2f}",
    )


def _start(
    command: list[str], cwd: Path, variables: dict[str, str], port: int | None = None
) -> float:
    port = port or free_port()
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environ(**variables | {"PORT": str(port)}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    server = Server(process, "", port, Path(os.devnull), CLERK)
    deadline = began + 60
    while True:
        assert time.monotonic() < deadline, "the server did not start within a minute"
        with contextlib.suppress(OSError):
            if server.request("GET", "/healthz").status == 200:
                break
        assert process.poll() is None, "the server has exited"
        time.sleep(0.002)
    took = time.monotonic() - began
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
    return took


def measure_memory(folder: Path, requests: int) -> None:
    """Measure the proportional set size of the workers and its growth."""
    with started_postgresql() as url:
        migrate(url, CLERK)
        with serving(url, CLERK, folder / "memory.log") as server:
            sizes = [_megabytes(server)]
            for count in (10_000, requests):
                done = 0
                while done < count:
                    answered = (
                        apply_load(server.port, webhooks(CLERK), 4).statuses[200]
                        + apply_load(server.port, calls(CLERK, [ONE]), 4).statuses[200]
                    )
                    assert answered, "the server has stopped answering"
                    done += answered
                sizes.append(_megabytes(server))
    line(
        "memory",
        "a worker after its start / after 10,000 requests",
        f"{sizes[0]:.0f} MB / {sizes[1]:.0f} MB",
    )
    line("memory", f"a worker after {requests:,} more", f"{sizes[2]:.0f} MB")


def _megabytes(server: Server) -> float:
    """Return the mean proportional set size of a worker."""
    children = (
        Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    )
    sizes = []
    for pid in children:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        sizes.append(int(rollup.partition("\nPss:")[2].split()[0]) / 1024)
    return statistics.mean(sizes)


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
    parser.add_argument("--only", choices=["scale", "start", "memory", "overload"])
    parser.add_argument("--largest", type=int, default=1_000_000, help="the most users of scale")
    parser.add_argument(
        "--thorough", action="store_true", help="200,000 requests for memory, a minute of overload"
    )
    options = parser.parse_args(argv)
    parts: dict[str, Callable[[Path], None]] = {
        "start": measure_start,
        "scale": lambda folder: measure_scale(options.largest, folder),
        "memory": lambda folder: measure_memory(folder, 200_000 if options.thorough else 20_000),
        "overload": lambda folder: measure_overload(folder, 60 if options.thorough else 10),
    }
    for name, measure in parts.items():
        if options.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                measure(Path(folder))


if __name__ == "__main__":
    main()

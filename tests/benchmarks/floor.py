"""
Compare the service with a minimal application that does the same work.

    python -m tests.benchmarks.floor [--rounds 5] [--seconds 3]

Both run under the same worker class of gunicorn, and the rounds alternate. The load is generated on
the same machine.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from clerkhooks.clerk.fake import FakeClerk
from tests.benchmarks.load import alternate, apply_load, calls, median_ratio, parse_rounds, webhooks
from tests.conftest import migrate, started_postgresql
from tests.server import serving

CLERK = FakeClerk()
ONE = "user_" + "a" * 27
WORKER = ["-w", "2", "-k", "clerkhooks.web.worker.Worker", "--keep-alive", "75"]
# Use a module that sets nothing as the configuration file, because gunicorn.conf.py has hooks.
OPTIONS = ["-c", "python:tests.benchmarks", *WORKER, "--backlog", "4096"]
MINIMAL = [sys.executable, "-m", "gunicorn", *OPTIONS, "tests.benchmarks.minimal:app"]


def measure(
    url: str, requests: Callable[[], Iterator[bytes]], folder: Path, rounds: int, seconds: float
) -> list[list[float]]:
    """Return each round's requests per second for the service and the minimal application."""
    migrate(url, CLERK)
    with (
        serving(url, CLERK, folder / "service.log") as service,
        serving(url, CLERK, folder / "minimal.log", command=MINIMAL) as minimal,
    ):
        apply_load(service.port, calls(CLERK, [ONE]), 1)  # create the user
        return alternate([service.port, minimal.port], requests, rounds, seconds)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each kind of work."""
    options = parse_rounds(__doc__, argv)
    with started_postgresql() as url, tempfile.TemporaryDirectory() as folder:
        sqlite = f"sqlite:///{folder}/floor.db"
        works: tuple[tuple[str, str, Callable[[], Iterator[bytes]]], ...] = (
            ("webhooks on PostgreSQL", url, lambda: webhooks(CLERK)),
            ("calls of /api/me on PostgreSQL", url, lambda: calls(CLERK, [ONE])),
            ("webhooks on SQLite", sqlite, lambda: webhooks(CLERK)),
        )
        for name, database, requests in works:
            rates = measure(database, requests, Path(folder), options.rounds, options.seconds)
            ratio = median_ratio(*rates)
            print(f"{name}, relative to the minimal application: {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()

"""
Compare webhooks on SQLite with the same statements in plain sqlite3, with the same durability.

    python -m tests.benchmarks.bare_sqlite [--rounds 5] [--seconds 3]
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from clerkhooks.clerk.fake import FakeClerk
from tests.benchmarks.load import apply_load, median_ratio, parse_rounds, webhooks
from tests.benchmarks.sqlite_statements import connect, write_message
from tests.conftest import migrate
from tests.server import serving


def measure(file: Path, seconds: float) -> float:
    """Return the transactions per second of one connection."""
    began, count = time.monotonic(), 0
    with closing(connect(file)) as connection:
        while time.monotonic() - began < seconds:
            key = f"{time.monotonic_ns()}{os.urandom(8).hex()}"
            write_message(connection, f"user_{key}", f"msg_{key}")
            count += 1
    return count / (time.monotonic() - began)


def main(argv: Sequence[str] | None = None) -> None:
    """Print both rates and their ratio."""
    options = parse_rounds(__doc__, argv)
    clerk, ours, bare = FakeClerk(), [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in ("service", "bare"):
            migrate(f"sqlite:///{folder}/{file}.db", clerk)
        with serving(f"sqlite:///{folder}/service.db", clerk, folder / "log") as server:
            for _ in range(options.rounds):
                result = apply_load(server.port, webhooks(clerk), options.seconds)
                assert not result.errors, result.statuses
                ours.append(result.rate)
                bare.append(measure(folder / "bare.db", options.seconds))
    print(f"webhooks on SQLite       {statistics.median(ours):8,.0f} /s")
    print(f"statements in sqlite3    {statistics.median(bare):8,.0f} /s")
    print(f"ratio                    {median_ratio(ours, bare):8.2f}")


if __name__ == "__main__":
    main()

"""
Compare webhooks per second with and without the change feed.

    python -m tests.benchmarks.changes [--rounds 5] [--seconds 3]

The rounds alternate. The load is generated on the same machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from clerkhooks.clerk.fake import FakeClerk
from tests.benchmarks.load import alternate, median_ratio, parse_rounds, webhooks
from tests.conftest import migrate, started_postgresql
from tests.server import serving

CLERK = FakeClerk()


def measure(url: str, folder: Path, rounds: int, seconds: float) -> list[list[float]]:
    """Return each round's webhooks per second with and without the feed."""
    migrate(url, CLERK)
    with (
        serving(url, CLERK, folder / "on.log", CLERK_TABLES="changes") as on,
        serving(url, CLERK, folder / "off.log") as off,
    ):
        return alternate([on.port, off.port], lambda: webhooks(CLERK), rounds, seconds)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each database."""
    options = parse_rounds(__doc__, argv)
    with started_postgresql() as url, tempfile.TemporaryDirectory() as folder:
        urls = {"PostgreSQL": url, "SQLite": f"sqlite:///{folder}/changes.db"}
        for name, database in urls.items():
            on, off = measure(database, Path(folder), options.rounds, options.seconds)
            rates = f"{max(on):,.0f} and {max(off):,.0f} webhooks/s at best"
            print(f"{name}: {median_ratio(on, off):.2f} of the rate without ({rates})", flush=True)


if __name__ == "__main__":
    main()

"""
Measure the service with thousands of connections, a sender like Svix, and new clients.

    python -m tests.benchmarks.flood [--messages 50000] [--held 5000]

It first delivers as Svix does: 500 messages at a time over up to 2,400 persistent connections. It
then alternates between rounds with and without additional idle or slow connections. The load is
generated on the same machine.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from clerkhooks.clerk.fake import FakeClerk
from tests.benchmarks.load import webhooks
from tests.conftest import migrate, started_postgresql
from tests.flooding import KINDS, Kind, Sender, Sent, allow_descriptors, held, new_clients
from tests.server import serving

CLERK = FakeClerk()


def line(what: str, sent: Sent, health: Sent, held: int = 0) -> None:
    """Print one line of the table."""
    others = {status: count for status, count in sent.statuses.items() if status != 200}
    failed = health.statuses.total() - health.statuses[200]
    print(
        f"{what:22} {held:6} held {sent.connections:5} kept "
        f"{sent.statuses[200] / sent.seconds:6.0f}/s "
        f"p50 {sent.quantile(0.5) * 1000:5.0f} p99 {sent.quantile(0.99) * 1000:5.0f} ms, "
        f"others {others}; /healthz p99 {health.quantile(0.99) * 1000:5.0f} ms, "
        f"failed {failed} of {health.statuses.total()}",
        flush=True,
    )


def send(port: int, count: int, at_once: int, connections: int) -> tuple[Sent, Sent]:
    """Deliver *count* messages while new clients connect; return both results."""
    requests = list(itertools.islice(webhooks(CLERK), count))
    sender = Sender(port, at_once=at_once, connections=connections)
    with new_clients(port) as health:
        sent = sender.send(requests)
    sender.close()
    return sent, health


@contextmanager
def held_elsewhere(port: int, count: int, kind: Kind) -> Iterator[None]:
    """Hold connections in another process, so that they do not slow down the sender."""
    ready, ended = multiprocessing.Event(), multiprocessing.Event()
    process = multiprocessing.Process(target=_hold, args=(port, count, kind, ready, ended))
    process.start()
    try:
        assert ready.wait(60), "the connections were not opened within a minute"
        yield
    finally:
        ended.set()
        process.join(60)
        process.kill()


def _hold(port: int, count: int, kind: Kind, ready: object, ended: object) -> None:
    with held(port, count, kind) as is_open:
        ready.set()  # type: ignore[attr-defined]
        ended.wait(600)  # type: ignore[attr-defined]
        print(f"{'':22} {is_open()} of {count} are open at the end", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=int, default=50_000)
    parser.add_argument("--held", type=int, default=5_000)
    parser.add_argument("--only", choices=("svix", *KINDS), action="append")
    options = parser.parse_args(argv)
    print(f"{allow_descriptors():,} descriptors are allowed")
    with (
        tempfile.TemporaryDirectory() as folder,
        started_postgresql() as url,
    ):
        migrate(url, CLERK)
        with serving(url, CLERK, Path(folder) / "log") as server:
            if not options.only or "svix" in options.only:
                line("as Svix does", *send(server.port, options.messages, 500, 2400))
            for kind in KINDS:
                if options.only and kind not in options.only:
                    continue
                rates = []
                for _ in range(3):
                    alone = send(server.port, 5000, 16, 16)
                    line("alone", *alone)
                    with held_elsewhere(server.port, options.held, kind):
                        beside = send(server.port, 5000, 16, 16)
                        line(kind, *beside, options.held)
                    rates.append(alone[0].seconds / beside[0].seconds)
                ratio = statistics.median(rates)
                print(f"{kind}: throughput {ratio:.3f} times that without held connections")


if __name__ == "__main__":
    main()

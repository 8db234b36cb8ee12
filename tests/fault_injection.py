"""A server that can be killed and restarted, and the faults that a crash test injects."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil  # type: ignore[import-untyped]

from clerkhooks.clerk.fake import FakeClerk
from tests.dedicated_postgresql import DedicatedPostgreSQL
from tests.server import Response, free_port, start_server, wait_until_healthy


class RestartableServer:
    """The real server, with all tables. It keeps its port and its database when restarted."""

    def __init__(self, database_url: str, clerk: FakeClerk, log: Path) -> None:
        self.database_url, self.clerk, self.log, self.port = database_url, clerk, log, free_port()
        self.start()

    def start(self) -> None:
        """Start the server and wait until it is healthy."""
        url, clerk, tables = self.database_url, self.clerk, "organizations,changes"
        self.server = start_server(url, clerk, self.port, self.log, CLERK_TABLES=tables)
        wait_until_healthy(self.server)

    def kill(self) -> None:
        """Send SIGKILL to the master and its workers at the same time."""
        with suppress(ProcessLookupError):
            os.killpg(self.server.process.pid, signal.SIGKILL)
        self.server.process.wait(10)

    def stop(self) -> None:
        """Send SIGTERM as a platform does, and check that the server exits with status 0."""
        self.server.process.send_signal(signal.SIGTERM)
        assert self.server.process.wait(30) == 0, self.log.read_text()[-5000:]

    def workers(self) -> list[psutil.Process]:
        """Return the worker processes."""
        found: list[psutil.Process] = psutil.Process(self.server.process.pid).children()
        return found

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Response:
        """Send one request to the running server."""
        return self.server.request(method, path, body, headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()


class FaultInjector:
    """Kills, stops or reloads processes at random times, and restarts them if necessary."""

    def __init__(
        self,
        server: RestartableServer,
        postgresql: DedicatedPostgreSQL | None,
        rng: random.Random,
    ) -> None:
        self.server, self.postgresql, self.rng = server, postgresql, rng
        self.faults: dict[str, Callable[[], None]] = {
            "worker": self._kill_worker,
            "server": self._kill_server,
            "stop": self._stop_server,
            "reload": self._reload_server,
        }
        if postgresql:
            self.faults["database"] = self._crash_database

    def inject(self, until: float, at_least: int) -> Iterator[str]:
        """
        Inject faults until the monotonic time *until* (seconds); yield the name of each fault.

        Continue after that time if fewer than *at_least* faults have been injected.
        """
        for count, fault in enumerate(self._sequence()):
            if time.monotonic() >= until and count >= at_least:
                return
            time.sleep(self.rng.uniform(0.1, 0.8))
            self.faults[fault]()
            yield fault

    def _sequence(self) -> Iterator[str]:
        """Yield the names of all faults in random order, and repeat this forever."""
        while True:
            yield from self.rng.sample(list(self.faults), len(self.faults))

    def _kill_worker(self) -> None:
        workers = self.server.workers()
        with suppress(psutil.NoSuchProcess):  # a reload may have ended the worker
            if workers:
                self.rng.choice(workers).kill()

    def _kill_server(self) -> None:
        self.server.kill()
        self.server.start()

    def _stop_server(self) -> None:
        self.server.stop()
        self.server.start()

    def _reload_server(self) -> None:
        self.server.server.process.send_signal(signal.SIGHUP)

    def _crash_database(self) -> None:
        assert self.postgresql
        self.postgresql.crash()
        self.postgresql.start()

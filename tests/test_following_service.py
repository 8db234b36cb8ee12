"""The follower in the real service: no webhook arrives, and workers are killed and frozen."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

import pytest
from sqlalchemy.engine import make_url

from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.clerk.kinds import parse_profile
from clerkhooks.settings import PROJECT
from tests.backend import Backend
from tests.conftest import SLOW_ON_POSTGRESQL, MakeDatabase, migrate
from tests.following import holder_of
from tests.racing import eventually
from tests.server import Server, environ, serving
from tests.support import join, rows

INTERVAL = 0.2  # seconds between two rounds
LIMIT = 20.0  # seconds until a change must be stored, in which a lease of 2 s may end
NEVER_KILLED = {"GUNICORN_CMD_ARGS": "--timeout 60"}  # a worker that hangs


@pytest.fixture(params=SLOW_ON_POSTGRESQL)
def url(request: pytest.FixtureRequest, make_database: MakeDatabase, clerk: FakeClerk) -> str:
    """Return the URL of a new, migrated database."""
    made = make_database(request.param)
    migrate(made, clerk)
    return made


@contextmanager
def following(
    url: str, clerk: FakeClerk, backend: Backend, log: Path, **variables: str
) -> Iterator[Server]:
    """Run the service with a follower."""
    own = backend.environ | {"CLERK_FOLLOW": str(INTERVAL), "LOG_FORMAT": "json"} | variables
    with serving(url, clerk, log, **own) as server:
        yield server


def wait_for_holder(url: str, previous: int | None = None) -> int:
    """Wait until a process other than *previous* holds the lease, and return its id."""
    eventually(lambda: holder_of(url) not in (None, previous))
    holder = holder_of(url)
    assert holder is not None
    return holder


def freeze(process: int, url: str) -> None:
    """Stop a process, but not while it holds SQLite's lock, which would block all writes."""
    while True:
        os.kill(process, signal.SIGSTOP)
        time.sleep(0.05)
        if not url.startswith("sqlite"):
            return
        file = closing(sqlite3.connect(url.removeprefix("sqlite:///"), timeout=1))
        with file as connection, suppress(sqlite3.OperationalError):
            connection.execute("BEGIN IMMEDIATE")
            return
        os.kill(process, signal.SIGCONT)
        time.sleep(0.05)  # in which the process can release the lock


class Changes(Thread):
    """Signs users up and changes them, until it is stopped, and measures the delay of each."""

    def __init__(self, url: str, backend: Backend) -> None:
        super().__init__()
        self._url, self._backend = url, backend
        self.stopping = Event()
        self.delays: list[float] = []
        self.failure: str | None = None
        self._seen = 0

    def run(self) -> None:
        """Change a user, and wait until the change is stored."""
        user_id = self._backend.sign_up()
        while not self.stopping.is_set() and self.failure is None:
            if random.random() < 0.3:
                user_id = self._backend.sign_up()
            else:
                self._backend.update(user_id, first_name=f"Ada {random.random()}")
            self._wait(user_id, parse_profile(self._backend.users[user_id]).name)

    def has_changed(self) -> bool:
        """Return whether three more changes have been stored since the last True."""
        if len(self.delays) < self._seen + 3 and self.failure is None:
            return False
        self._seen = len(self.delays)
        return True

    def _wait(self, user_id: str, name: str) -> None:
        began_at = time.monotonic()
        query = f"SELECT name FROM users WHERE id = '{user_id}'"
        while rows(self._url, query) != [(name,)]:
            if time.monotonic() - began_at > LIMIT:
                self.failure = f"{user_id} is not right after {LIMIT} s"
                return
            time.sleep(0.02)
        self.delays.append(time.monotonic() - began_at)


@contextmanager
def changing(url: str, backend: Backend) -> Iterator[Changes]:
    """Change users during the block. Every change must be stored within LIMIT seconds."""
    changes = Changes(url, backend)
    changes.start()
    try:
        yield changes
    finally:
        changes.stopping.set()
        join(changes)
    assert changes.failure is None


def test_follows_without_webhooks(
    url: str, clerk: FakeClerk, backend: Backend, tmp_path: Path
) -> None:
    """
    Every change is stored soon after it was made at Clerk.

    Another worker takes over from one that dies, and a graceful stop releases the lease.
    """
    earlier = [backend.sign_up(at=1_700_000_000_000 + number) for number in range(250)]
    with following(url, clerk, backend, tmp_path / "log") as server:
        with changing(url, backend) as made:
            eventually(made.has_changed)
            holder = wait_for_holder(url)
            os.kill(holder, signal.SIGKILL)
            wait_for_holder(url, holder)
            eventually(made.has_changed)
        count = f"SELECT count(*) FROM users WHERE id IN {tuple(earlier)}"
        eventually(lambda: rows(url, count) == [(250,)])
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(20)
        events = [line["event"] for line in server.lines()]
    assert holder_of(url) is None
    assert {"lease_taken", "objects_healed"} <= set(events)
    assert "round_failed" not in events


@pytest.mark.slow
def test_takes_over_from_a_process_that_hangs(
    url: str, clerk: FakeClerk, backend: Backend, tmp_path: Path
) -> None:
    """When the process continues, it no longer holds the lease, and waits."""
    with (
        following(url, clerk, backend, tmp_path / "log", **NEVER_KILLED) as server,
        changing(url, backend) as made,
    ):
        holder = wait_for_holder(url)
        eventually(made.has_changed)
        freeze(holder, url)
        other = wait_for_holder(url, holder)
        os.kill(holder, signal.SIGCONT)
        eventually(lambda: "lease_lost" in {line["event"] for line in server.lines()})
        eventually(made.has_changed)
        assert wait_for_holder(url) == other


COMMANDS = {
    "sqlite": ["-m", "clerkhooks", "sync"],
    "postgresql": ["-m", "flask", "--app", "wsgi", "clerk", "sync"],
}


def test_follows_by_command(url: str, clerk: FakeClerk, backend: Backend) -> None:
    """``sync --follow`` prints what it does, and releases the lease when it is terminated."""
    command = COMMANDS[make_url(url).get_backend_name()]
    own = {"DATABASE_URL": url, "CLERK_FOLLOW": str(INTERVAL)}
    process = subprocess.Popen(
        [sys.executable, *command, "--follow", "--json"],
        cwd=PROJECT,
        env=environ(**clerk.environ | backend.environ | own),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        with changing(url, backend) as made:
            eventually(made.has_changed, 30)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    events = [json.loads(line) for line in printed.splitlines()]
    assert process.returncode == 0
    assert [events[0]["event"], events[1]["event"]] == ["lease_taken", "objects_healed"]
    assert holder_of(url) is None

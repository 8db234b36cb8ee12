"""
Block all webhooks while users, organizations and memberships change at Clerk.

Measure how long it takes until the follower has stored each change. With ``--kills``, the process
that follows is killed at random: ``python -m tests.blocked_webhooks --minutes 10 --kills``.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.clerk.kinds import parse_profile
from tests.backend import Backend
from tests.conftest import migrate
from tests.dedicated_postgresql import dedicated_postgresql
from tests.following import holder_of
from tests.server import serving
from tests.support import rows

USERS, ORGANIZATIONS = 60, 20  # at the beginning
PAUSE = 0.3  # seconds between two changes
SETTLE_TIMEOUT = 200.0  # seconds after the last change
DELETED = "deleted"
QUERIES = {
    "user": "SELECT name, deleted_at FROM users",
    "org": "SELECT name, deleted_at FROM organizations",
    "orgmem": "SELECT role, deleted_at FROM organization_memberships",
}


@dataclass
class Report:
    """The delays of all changes in seconds, by kind of object, and what else happened."""

    delays: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    kills: int = 0
    requests: int = 0
    missed: int = 0

    def add(self, object_id: str, value: str, delay: float) -> None:
        """Add the *delay* of a change to *value*, which is DELETED for a deletion."""
        prefix = object_id.partition("_")[0]
        self.delays[f"{prefix} {DELETED}" if value == DELETED else prefix].append(delay)

    @property
    def longest(self) -> float:
        """The longest delay."""
        return max((max(each) for each in self.delays.values()), default=0.0)

    def __str__(self) -> str:
        lines = [f"{self.kills} kills, {self.requests} requests, {self.missed} missed webhooks"]
        for prefix, found in sorted(self.delays.items()):
            p50, p99 = (sorted(found)[int(share * (len(found) - 1))] for share in (0.5, 0.99))
            times = f"p50 {p50:.1f} s, p99 {p99:.1f} s, longest {max(found):.1f} s"
            lines.append(f"{prefix}: {len(found)} changes, {times}")
        return "\n".join(lines)


class Instance:
    """A Clerk instance whose objects change. *pending* has the changes not stored yet."""

    def __init__(self, backend: Backend, url: str, seed: int) -> None:
        self.backend, self.url, self.rng = backend, url, random.Random(seed)
        self.pending: dict[str, list[tuple[str, float]]] = defaultdict(list)
        self.report = Report()
        self._number = 0
        day_ago = int(time.time() * 1000) - 86_400_000
        for number in range(USERS):
            backend.sign_up(at=day_ago + number)
        for number in range(ORGANIZATIONS):
            organization_id = backend.found(at=day_ago + number)
            backend.join(organization_id, self._pick("user"), at=day_ago + number)

    def change(self) -> None:
        """Change an object, or create one. Sometimes delete one."""
        self._number += 1
        names = ["update"] * 10 + ["sign_up"] * 3 + ["join", "promote", "rename", "found"]
        is_deleting = self._number % 100 == 0  # the follower limits deletions
        getattr(self, "_delete" if is_deleting else f"_{self.rng.choice(names)}")()

    def check(self) -> None:
        """Find out which changes have been stored."""
        for object_id, changes in list(self.pending.items()):
            values = [value for value, _ in changes]
            stored = self.find(object_id)
            if stored in values:
                done = values.index(stored) + 1
                for value, at in changes[:done]:
                    self.report.add(object_id, value, time.monotonic() - at)
                del changes[:done]
            if not changes:
                del self.pending[object_id]

    def is_settled(self) -> bool:
        """Return whether all changes have been stored."""
        self.check()
        return not self.pending

    def find(self, object_id: str) -> str:
        """Return what is stored: a name, a role, or DELETED."""
        query = QUERIES[object_id.partition("_")[0]]
        found = rows(self.url, f"{query} WHERE id = '{object_id}'")
        if not found or found[0][1] is not None:  # it may have been deleted before it was read
            return DELETED
        return str(found[0][0])

    def _update(self) -> None:
        user_id = self._pick("user")
        self.backend.update(user_id, first_name=f"Ada {self._number}")
        self._expect(user_id, parse_profile(self.backend.users[user_id]).name)

    def _sign_up(self) -> None:
        user_id = self.backend.sign_up(first_name=f"Grace {self._number}")
        self._expect(user_id, parse_profile(self.backend.users[user_id]).name)

    def _found(self) -> None:
        name = f"Acme {self._number}"
        self._expect(self.backend.found(name=name), name)

    def _rename(self) -> None:
        self._replace("org", name=f"Acme {self._number}")

    def _join(self) -> None:
        role = f"org:role_{self._number}"
        member = self.backend.join(self._pick("org"), self._pick("user"), role=role)
        self._expect(member, role)

    def _promote(self) -> None:
        self._replace("orgmem", role=f"org:role_{self._number}")

    def _replace(self, prefix: str, **data: str) -> None:
        objects, object_id = self._objects(prefix), self._pick(prefix)
        with self.backend._arrived:
            objects[object_id] = objects[object_id] | {"updated_at": self.backend._now()} | data
        [value] = data.values()
        self._expect(object_id, value)

    def _delete(self) -> None:
        prefix = self.rng.choice([*QUERIES])
        object_id = self._pick(prefix)
        with self.backend._arrived:
            ended = [object_id, *self._members_of(object_id)]
            for each in ended:
                del self._objects(each.partition("_")[0])[each]
        # The follower finds deletions of rows that are older than ten minutes.
        for table in ("users", "organizations", "organization_memberships"):
            rows(self.url, f"UPDATE {table} SET created_at = '2020-01-01 00:00:00.000000'")
        for each in ended:
            self.pending.pop(each, None)
            self._expect(each, DELETED)

    def _members_of(self, parent_id: str) -> list[str]:
        return [
            key
            for key, each in self.backend.memberships.items()
            if parent_id in (each["organization"]["id"], each["public_user_data"]["user_id"])
        ]

    def _expect(self, object_id: str, value: str) -> None:
        self.pending[object_id].append((value, time.monotonic()))

    def _objects(self, prefix: str) -> dict[str, dict[str, object]]:
        backend = self.backend
        return {"user": backend.users, "org": backend.organizations}.get(
            prefix, backend.memberships
        )

    def _pick(self, prefix: str) -> str:
        return self.rng.choice(list(self._objects(prefix)))


@contextmanager
def database(kind: str, clerk: FakeClerk, folder: Path) -> Iterator[str]:
    """Create and migrate a database until the block ends."""
    with ExitStack() as stack:
        url = f"sqlite:///{folder / 'clerkhooks.db'}"
        if kind == "postgresql":
            url = stack.enter_context(dedicated_postgresql()).url
        migrate(url, clerk)
        yield url


def run(
    kind: str, seconds: float, seed: int, *, kills: tuple[float, float] | None, interval: float = 60
) -> Report:
    """Change objects for *seconds*, and wait for the last change. *kills* bounds their pauses."""
    clerk = FakeClerk()
    with (
        tempfile.TemporaryDirectory() as folder,
        database(kind, clerk, Path(folder)) as url,
        Backend().open() as backend,
    ):
        instance = Instance(backend, url, seed)
        own = backend.environ | {"CLERK_TABLES": "organizations", "CLERK_FOLLOW": f"{interval:g}"}
        with serving(url, clerk, Path(folder, "log"), **own):
            completed = "SELECT count(*) FROM clerk_leases WHERE completed_at > 0"
            _wait(lambda: rows(url, completed) == [(1,)])
            _run(instance, seconds, kills)
        query = f"SELECT count(*) FROM clerk_awaited_webhooks WHERE due_at <= {time.time() * 1000}"
        instance.report.missed = rows(url, query)[0][0]
        instance.report.requests = len(backend.requests)
        return instance.report


def _run(instance: Instance, seconds: float, kills: tuple[float, float] | None) -> None:
    end = time.monotonic() + seconds
    next_kill = time.monotonic() + (kills[0] if kills else 2 * seconds)
    while time.monotonic() < end:
        instance.change()
        instance.check()
        if kills and time.monotonic() > next_kill:
            instance.report.kills += _kill(instance.url)
            next_kill = time.monotonic() + instance.rng.uniform(*kills)
        time.sleep(PAUSE)
    try:
        _wait(instance.is_settled)
    except TimeoutError as error:
        found = {each: (wanted, instance.find(each)) for each, wanted in instance.pending.items()}
        raise AssertionError(f"not stored: {found}") from error


def _kill(url: str) -> bool:
    """Kill the process that follows, if there is one, and return whether it was killed."""
    holder = holder_of(url)
    if holder is not None:
        with suppress(ProcessLookupError):
            os.kill(holder, signal.SIGKILL)
            return True
    return False


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SETTLE_TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(PAUSE)


def main(arguments: list[str] | None = None) -> None:
    """Run with the command-line options and print the report."""
    parser = argparse.ArgumentParser(prog="python -m tests.blocked_webhooks", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="postgresql")
    parser.add_argument("--kills", action="store_true")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    given = parser.parse_args(arguments)
    kills = (15.0, 60.0) if given.kills else None
    report = run(given.database, given.minutes * 60, given.seed, kills=kills)
    sys.stdout.write(f"{given.database}, seed {given.seed}: {report}\n")


if __name__ == "__main__":
    main()

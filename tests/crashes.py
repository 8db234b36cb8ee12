"""
Deliver messages as Svix does, while killing workers, the whole server and PostgreSQL.

Each message is retried until the response is 200. To run the test for longer: ``python -m
tests.crashes --minutes 5 --database postgresql --seed 1``.
"""

from __future__ import annotations

import argparse
import http.client
import random
import secrets
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from clerkhooks.clerk.fake import FakeClerk
from tests.conftest import TABLES, migrate
from tests.dedicated_postgresql import DedicatedPostgreSQL, dedicated_postgresql
from tests.fault_injection import FaultInjector, RestartableServer
from tests.histories import COLUMNS, Message, expected_row, history
from tests.organizations import Ids, Sent, expected_rows, random_group, stored_rows
from tests.support import ThreadPool, rows

SENDERS = 8
SHARE_OF_GROUPS = 0.25  # of the histories; the others are about one user
MAX_OPEN = 60  # unacknowledged messages; enough to interleave the histories of many users
RETRY_PAUSE = 0.05  # seconds between two attempts; Svix waits 5 seconds
MIN_FAULTS = 3
DRAIN_TIMEOUT = 60  # seconds after the last fault until all messages must be acknowledged


@dataclass
class Report:
    """Counts of a run: messages, attempts by response, calls by response, and faults by kind."""

    messages: int = 0
    attempts: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    crashes: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    seconds: float = 0

    def __str__(self) -> str:
        crashes = ", ".join(f"{kind} {count}" for kind, count in sorted(self.crashes.items()))
        answers = ", ".join(f"{answer} {count}" for answer, count in sorted(self.attempts.items()))
        return (
            f"{self.messages} messages in {self.attempts.total()} attempts ({answers}), "
            f"{self.calls.total()} calls, "
            f"{self.crashes.total()} crashes ({crashes}), lost {self.lost}, {self.seconds:.0f} s"
        )


class Svix:
    """Sends users' histories in random order. Retries each message until the response is 200."""

    def __init__(self, server: RestartableServer, seed: int) -> None:
        self.server, self.rng, self.report = server, random.Random(seed), Report()
        self.created: dict[str, Message | Sent] = {}
        self.groups: list[tuple[Ids, list[Sent]]] = []
        """Users, organizations and memberships that belong together, and their messages."""
        self.acknowledged: dict[str, list[str]] = defaultdict(list)  # outcomes by message id
        self.stopped = threading.Event()
        self.deadline = float("inf")
        self._open: list[Message | Sent] = []
        self._lock = threading.Lock()

    def send(self) -> None:
        """
        Deliver messages until ``stop`` is called and no message is left.

        Several threads run this method.
        """
        while message := self._take():
            if self._call_or_deliver(message):
                continue
            assert time.monotonic() < self.deadline, f"never acknowledged: {message}"
            self._put_back(message)
            time.sleep(RETRY_PAUSE)

    def stop(self) -> None:
        """Stop generating events, and set a deadline for the remaining messages."""
        self.deadline = time.monotonic() + DRAIN_TIMEOUT
        self.stopped.set()

    def _take(self) -> Message | Sent | None:
        with self._lock:
            while len(self._open) < MAX_OPEN and not self.stopped.is_set():
                messages: Sequence[Message | Sent] = history(self.rng)
                if self.rng.random() < SHARE_OF_GROUPS:
                    self.groups.append(random_group(self.rng))
                    messages = self.groups[-1][1]
                self.created |= {message.message_id: message for message in messages}
                self._open += messages
            if not self._open:
                return None
            return self._open.pop(self.rng.randrange(len(self._open)))

    def _put_back(self, message: Message | Sent) -> None:
        with self._lock:
            self._open.append(message)

    def _call_or_deliver(self, message: Message | Sent) -> bool:
        """
        Deliver *message* once and return whether it was acknowledged.

        Before one in five attempts, the user calls the API. One in ten acknowledged messages is
        delivered again.
        """
        with self._lock:
            calls, repeats = self.rng.random() < 0.2, self.rng.random() < 0.1
        if calls and isinstance(message, Message):
            headers = {
                "Authorization": f"Bearer {self.server.clerk.session_token(message.user_id)}"
            }
            self._count(self.report.calls, self._request("GET", "/api/me", None, headers)[0])
        signed = self.server.clerk.headers(message.body, message.message_id)
        answer, outcome = self._request("POST", "/webhooks/clerk", message.body, signed)
        self._count(self.report.attempts, answer)
        if answer != "200":
            return False
        with self._lock:
            self.acknowledged[message.message_id].append(outcome)
        if repeats:
            self._put_back(message)
        return True

    def _request(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[str, str]:
        """Return the status or the connection error's name, and the outcome or an empty string."""
        try:
            answer = self.server.request(method, path, body, headers)
            return str(answer.status), answer.json().get("outcome", "")
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__, ""

    def _count(self, counter: Counter[str], answer: str) -> None:
        with self._lock:
            counter[answer] += 1


class Auditor:
    """Compares the tables with the acknowledged messages."""

    def __init__(self, database_url: str, svix: Svix) -> None:
        self.database_url, self.svix = database_url, svix
        self._seen = 0

    def check_after_fault(self) -> None:
        """Check that all messages that were acknowledged since the last check are in the log."""
        new = list(self.svix.acknowledged)[self._seen :]
        self._seen += len(new)
        ids = ", ".join(f"'{message_id}'" for message_id in new) or "''"
        done = (
            f"SELECT message_id FROM webhook_messages WHERE message_id IN ({ids})"
            " AND outcome IN ('applied', 'stale')"
        )
        lost = set(new) - {message_id for (message_id,) in rows(self.database_url, done)}
        assert not lost, f"answered 200, but not in the log: {lost}"
        self._check_for_orphans()

    def check_at_end(self) -> None:
        """Check that each message was processed once and each row has the newest version."""
        created, acknowledged = self.svix.created, self.svix.acknowledged
        log = dict(rows(self.database_url, "SELECT message_id, outcome FROM webhook_messages"))
        self.svix.report.messages, self.svix.report.lost = (
            len(acknowledged),
            len(acknowledged.keys() - log.keys()),
        )
        assert created.keys() == acknowledged.keys() == log.keys(), (
            f"lost: {acknowledged.keys() - log.keys()}"
        )
        assert set(log.values()) <= {"applied", "stale"}
        for message_id, outcomes in acknowledged.items():
            done = [outcome for outcome in outcomes if outcome != "duplicate"]
            assert done in ([], [log[message_id]]), (message_id, outcomes, log[message_id])
        users: dict[str, list[Message]] = defaultdict(list)
        for message in created.values():
            if isinstance(message, Message):
                users[message.user_id].append(message)
        grouped = {user_id for ids, _ in self.svix.groups for user_id in ids.users}
        found = {
            row[0]: (*row[1:-4], *map(bool, row[-4:]))
            for row in rows(self.database_url, f"SELECT id, {COLUMNS} FROM users")
            if row[0] not in grouped
        }
        expected = {user_id: expected_row(messages) for user_id, messages in users.items()}
        assert found == expected, f"differs from the events: {found.items() ^ expected.items()}"
        for ids, messages in self.svix.groups:
            assert stored_rows(self.database_url, ids) == expected_rows(ids, messages)
        self._check_for_orphans()
        self._check_changes()

    def _check_changes(self) -> None:
        """Check that the change feed has each object once, and ends as the row says."""
        found = rows(self.database_url, CHANGES)
        ends = {object_id: kind == "deleted" for object_id, kind in found}
        created = [object_id for object_id, kind in found if kind == "created"]
        assert len(created) == len(set(created))
        for table in TABLES[:3]:
            query = f"SELECT id, deleted_at IS NOT NULL FROM {table}"
            for object_id, is_deleted in rows(self.database_url, query):
                assert ends.pop(object_id) == bool(is_deleted), object_id
        assert not ends, f"changes of objects without rows: {ends}"

    def _check_for_orphans(self) -> None:
        for query in (ORPHANS, *(LIVE_ORPHANS.format(table=table) for table in TABLES[1:3])):
            orphans = rows(self.database_url, query)
            assert not orphans, f"rows whose message is not in the log: {orphans}"


CHANGES = """
SELECT object_id, kind FROM user_changes WHERE kind IN ('created', 'deleted', 'revived')
ORDER BY transaction_id, sequence
"""

# Select users whose latest message is not logged as applied. The latest message is the one in the
# row's version or, for a tombstone, the user's deletion.
ORPHANS = """
SELECT users.id FROM users WHERE NOT EXISTS (
    SELECT 1 FROM webhook_messages WHERE outcome = 'applied' AND (
        message_id = users.version_message_id
        OR (
            users.deleted_at IS NOT NULL AND clerk_user_id = users.id
            AND event_type = 'user.deleted'
        )
    )
) AND (users.version_message_id IS NOT NULL OR users.deleted_at IS NOT NULL)
"""

LIVE_ORPHANS = """
SELECT id FROM {table} WHERE version_message_id NOT IN (
    SELECT message_id FROM webhook_messages WHERE outcome = 'applied')
"""


def run(
    kind: str, seconds: float, seed: int, postgresql: DedicatedPostgreSQL | None = None
) -> Report:
    """
    Deliver messages and inject faults for *seconds* on a database of *kind*.

    Raises:
        AssertionError: a message was lost or processed twice, or a row is wrong.
    """
    clerk, started = FakeClerk(), time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if kind == "postgresql":
            postgresql = postgresql or stack.enter_context(dedicated_postgresql())
        name = f"crashes_{secrets.token_hex(4)}"
        url = postgresql.make_database(name) if postgresql else f"sqlite:///{folder}/{name}.db"
        migrate(url, clerk)
        server = stack.enter_context(RestartableServer(url, clerk, folder / "server.log"))
        svix = Svix(server, seed)
        faults = FaultInjector(server, postgresql, random.Random(seed + 1))
        auditor = Auditor(url, svix)
        pool = stack.enter_context(ThreadPool(SENDERS))
        senders = [pool.submit(svix.send) for _ in range(SENDERS)]
        try:
            for fault in faults.inject(time.monotonic() + seconds, at_least=MIN_FAULTS):
                svix.report.crashes[fault] += 1
                auditor.check_after_fault()
        finally:
            svix.stop()
        for sender in senders:
            sender.result(2 * DRAIN_TIMEOUT)
        auditor.check_at_end()
        svix.report.seconds = time.monotonic() - started
        return svix.report


def main(arguments: list[str] | None = None) -> None:
    """Run with the command-line options and print the report."""
    parser = argparse.ArgumentParser(prog="python -m tests.crashes", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="postgresql")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    given = parser.parse_args(arguments)
    report = run(given.database, given.minutes * 60, given.seed)
    sys.stdout.write(f"{given.database}, seed {given.seed}: {report}\n")


if __name__ == "__main__":
    main()

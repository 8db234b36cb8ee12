"""
Deliver as Svix does, retrying until 200, while workers, the whole server and PostgreSQL are killed.

For those who doubt: ``python -m tests.crashes --minutes 5 --database postgresql --seed 1``.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from clerkhooks.clerk.fake import FakeClerk
from tests.conftest import migrate
from tests.dedicated_postgresql import DedicatedPostgreSQL, dedicated_postgresql
from tests.fault_injection import FaultInjector, RestartableServer
from tests.histories import Message, expected_row, history
from tests.support import rows

SENDERS = 8
WAITING = 60  # messages that are on their way at once, so that the histories of many users mix
PAUSE = 0.05  # seconds between two attempts; Svix takes 5
DRAIN = (
    60  # seconds within which all that is still open must be taken, once nobody is killed any more
)


@dataclass
class Report:
    """What was delivered, and what it took."""

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
            f"{self.messages} messages in {self.attempts.total()} attempts ({answers}), {self.calls.total()} calls, "
            f"{self.crashes.total()} crashes ({crashes}), lost {self.lost}, {self.seconds:.0f} s"
        )


class Svix:
    """Sends the histories of more and more users, in random order, until each message was answered 200."""

    def __init__(self, server: RestartableServer, seed: int) -> None:
        self.server, self.rng, self.report = server, random.Random(seed), Report()
        self.told: dict[str, Message] = {}
        self.acknowledged: dict[str, list[str]] = defaultdict(list)  # the outcomes, by message id
        self.over = threading.Event()
        self.deadline = float("inf")
        self._open: list[Message] = []
        self._lock = threading.Lock()

    def send(self) -> None:
        """Deliver until it is over and nothing is left. Several threads do so at once."""
        while message := self._take():
            if self._call_or_deliver(message):
                continue
            assert time.monotonic() < self.deadline, f"never taken: {message}"
            self._put_back(message)
            time.sleep(PAUSE)

    def stop(self) -> None:
        """Begin no further history."""
        self.deadline = time.monotonic() + DRAIN
        self.over.set()

    def _take(self) -> Message | None:
        with self._lock:
            while len(self._open) < WAITING and not self.over.is_set():
                messages = history(self.rng)
                self.told |= {message.message_id: message for message in messages}
                self._open += messages
            if not self._open:
                return None
            return self._open.pop(self.rng.randrange(len(self._open)))

    def _put_back(self, message: Message) -> None:
        with self._lock:
            self._open.append(message)

    def _call_or_deliver(self, message: Message) -> bool:
        """One attempt; sometimes with the user's own call just before it, sometimes repeated after a success."""
        with self._lock:
            calls, repeats = self.rng.random() < 0.2, self.rng.random() < 0.1
        if calls:
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
        """The status, or what became of the connection; and the outcome of a delivery that was taken."""
        try:
            answer = self.server.request(method, path, body, headers)
            return str(answer.status), answer.json().get("outcome", "")
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__, ""

    def _count(self, counter: Counter[str], answer: str) -> None:
        with self._lock:
            counter[answer] += 1


class Auditor:
    """Looks into the tables behind the service's back."""

    def __init__(self, database_url: str, svix: Svix) -> None:
        self.database_url, self.svix = database_url, svix
        self._seen = 0

    def after_a_crash(self) -> None:
        """The tables agree with each other, and all that was acknowledged since the last look is in the log."""
        fresh = list(self.svix.acknowledged)[self._seen :]
        self._seen += len(fresh)
        ids = ", ".join(f"'{message_id}'" for message_id in fresh) or "''"
        done = f"SELECT message_id FROM webhook_messages WHERE message_id IN ({ids}) AND outcome IN ('applied', 'stale')"
        lost = set(fresh) - {message_id for (message_id,) in rows(self.database_url, done)}
        assert not lost, f"answered 200, and not in the log: {lost}"
        self._find_orphans()

    def in_the_end(self) -> None:
        """Every message is in the log, each was done once, and every user is what all of the events say."""
        told, acknowledged = self.svix.told, self.svix.acknowledged
        log = dict(rows(self.database_url, "SELECT message_id, outcome FROM webhook_messages"))
        self.svix.report.messages, self.svix.report.lost = (
            len(acknowledged),
            len(acknowledged.keys() - log.keys()),
        )
        assert told.keys() == acknowledged.keys() == log.keys(), (
            f"lost: {acknowledged.keys() - log.keys()}"
        )
        assert set(log.values()) <= {"applied", "stale"}
        for message_id, outcomes in acknowledged.items():
            done = [outcome for outcome in outcomes if outcome != "duplicate"]
            assert done in ([], [log[message_id]]), (message_id, outcomes, log[message_id])
        users: dict[str, list[Message]] = defaultdict(list)
        for message in told.values():
            users[message.user_id].append(message)
        columns = "id, email, name, image_url, version_updated_at, version_timestamp, version_message_id, deleted_at IS NOT NULL"
        found = {
            row[0]: (*row[1:-1], bool(row[-1]))
            for row in rows(self.database_url, f"SELECT {columns} FROM users")
        }
        expected = {user_id: expected_row(messages) for user_id, messages in users.items()}
        assert found == expected, f"not what the events say: {found.items() ^ expected.items()}"
        self._find_orphans()

    def _find_orphans(self) -> None:
        orphans = rows(self.database_url, ORPHANS)
        assert not orphans, f"users whose message is not in the log: {orphans}"


# Users whose message is not in the log as applied: for a tombstone, the one deletion; else the one that names the version.
ORPHANS = """
SELECT users.id FROM users WHERE NOT EXISTS (
    SELECT 1 FROM webhook_messages WHERE outcome = 'applied' AND (
        message_id = users.version_message_id
        OR (users.deleted_at IS NOT NULL AND clerk_user_id = users.id AND event_type = 'user.deleted')
    )
) AND (users.version_message_id IS NOT NULL OR users.deleted_at IS NOT NULL)
"""


def run(
    kind: str, seconds: float, seed: int, postgresql: DedicatedPostgreSQL | None = None
) -> Report:
    """Deliver and kill for *seconds* on a database of *kind*; raises AssertionError for anything lost or wrong."""
    clerk, started = FakeClerk(), time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if kind == "postgresql":
            postgresql = postgresql or stack.enter_context(dedicated_postgresql())
        name = f"crashes_{secrets.token_hex(4)}"
        url = postgresql.make_database(name) if postgresql else f"sqlite:///{folder}/{name}.db"
        migrate(url, clerk)
        server = stack.enter_context(RestartableServer(url, clerk, folder / "server.log"))
        svix, killer = (
            Svix(server, seed),
            FaultInjector(server, postgresql, random.Random(seed + 1)),
        )
        auditor = Auditor(url, svix)
        pool = stack.enter_context(ThreadPoolExecutor(SENDERS))
        senders = [pool.submit(svix.send) for _ in range(SENDERS)]
        try:
            for kind_of_crash in killer.kill(until=time.monotonic() + seconds):
                svix.report.crashes[kind_of_crash] += 1
                auditor.after_a_crash()
        finally:
            svix.stop()
        for sender in senders:
            sender.result()
        auditor.in_the_end()
        svix.report.seconds = time.monotonic() - started
        return svix.report


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.crashes", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="postgresql")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    given = parser.parse_args(arguments)
    sys.stdout.write(
        f"{given.database}, seed {given.seed}: {run(given.database, given.minutes * 60, given.seed)}\n"
    )


if __name__ == "__main__":
    main()

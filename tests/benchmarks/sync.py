"""
Measure the speed and memory use of ``clerkhooks sync`` with a fast Backend API.

    python -m tests.benchmarks.sync [--users 1000000] [--organizations 100000 --memberships 1000000]

The API runs in a separate process and generates objects from templates; the database is PostgreSQL
with fsync on. Because a sync does not delete recent rows, all rows are backdated by a day before
the second sync.
"""

from __future__ import annotations

import argparse
import json
import os
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing import Process
from urllib.parse import parse_qs, urlsplit

import psycopg
from psycopg import sql

from clerkhooks.clerk.fake import FakeClerk, user_data
from clerkhooks.clerk.fake_events import FakeObjects
from clerkhooks.settings import PROJECT
from tests.conftest import migrate, started_postgresql
from tests.server import environ, free_port

TIMEOUT = 3600  # seconds for one sync
START = 1_700_000_000_000  # milliseconds; the users signed up one millisecond apart
ID = "user_" + "0" * 27
USER = json.dumps(
    user_data(ID, email="ada@example.org", first_name="Ada", last_name="Lovelace", updated_at=START)
).encode()
TABLES = ("users", "organizations", "organization_memberships")
_OBJECTS = FakeObjects()
_IDS = (ID, "org_" + "0" * 27, "orgmem_" + "0" * 27)


def _template(event_type: str, object_id: str) -> bytes:
    data = _OBJECTS.event_data(event_type, _IDS[0], _IDS[1], updated_at=START)
    return json.dumps(data | {"id": object_id}).encode()


ORGANIZATION = _template("organization.created", _IDS[1])
MEMBERSHIP = _template("organizationMembership.created", _IDS[2])


class Api(BaseHTTPRequestHandler):
    """Generates objects. An object's number determines the id and the creation time."""

    protocol_version = "HTTP/1.1"
    count, organizations, memberships = 0, 0, 0

    def do_GET(self) -> None:
        """Respond with a page of users, the users with given ids, or the count."""
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        if url.path == "/v1/users/count":
            self._answer(b'{"object": "total_count", "total_count": %d}' % self.count)
            return
        if url.path.startswith("/v1/organization"):
            self._answer_about_organizations(url.path, query)
            return
        if url.path.startswith("/v1/users/"):
            self._answer(_user(int(url.path.rpartition("_")[2])))
            return
        if "user_id" in query:
            numbers = [int(user_id[5:]) for user_id in query["user_id"]]
        else:
            numbers = self._page(query)
        self._answer(b"[%b]" % b",".join(map(_user, numbers)))

    def _answer_about_organizations(self, path: str, query: dict[str, list[str]]) -> None:
        make, total = _organization, self.organizations
        if path == "/v1/organization_memberships":
            make, total = self._membership, self.memberships
        limit, offset = int(query["limit"][0]), int(query.get("offset", ["0"])[0])
        numbers = range(offset, min(offset + limit, total))
        if query.get("order_by") == ["-created_at"]:
            numbers = range(total - 1, max(-1, total - 1 - limit), -1)
        listed = b",".join(make(number) for number in numbers)
        self._answer(b'{"data": [%b], "total_count": %d}' % (listed, total))

    def _membership(self, number: int) -> bytes:
        """Return a membership. Each organization has as many members."""
        numbers = (number % self.count, number % self.organizations, number)
        return _fill(MEMBERSHIP, number, *numbers)

    def _page(self, query: dict[str, list[str]]) -> list[int]:
        limit = int(query["limit"][0])
        if query["order_by"] == ["-created_at"]:
            return list(reversed(range(max(0, self.count - limit), self.count)))
        [cursor] = query.get("starting_after", ["user_-1"])
        first = int(cursor[5:]) + 1
        return list(range(first, min(first + limit, self.count)))

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


class Server(socketserver.ThreadingMixIn, HTTPServer):
    """A server with one thread per connection."""

    daemon_threads = True


def _user(number: int) -> bytes:
    return _fill(USER, number, number, 0, 0)


def _organization(number: int) -> bytes:
    return _fill(ORGANIZATION, number, 0, number, 0)


def _fill(template: bytes, at: int, *numbers: int) -> bytes:
    """Put a time and the numbers of the user, organization and membership into an object."""
    filled = template.replace(b"%d" % START, b"%d" % (START + at))
    for placeholder, number in zip(_IDS, numbers, strict=True):
        own = f"{placeholder.partition('_')[0]}_{number:027}"
        filled = filled.replace(placeholder.encode(), own.encode())
    return filled


def serve(port: int, counts: tuple[int, int, int]) -> None:
    """Serve the Backend API until the process is terminated."""
    Api.count, Api.organizations, Api.memberships = counts
    Server(("127.0.0.1", port), Api).serve_forever()


def main(argv: Sequence[str] | None = None) -> None:
    """Sync into empty tables, then into full ones, and print the figures for both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--organizations", type=int, default=0)
    parser.add_argument("--memberships", type=int, default=0)
    options = parser.parse_args(argv)
    counts = (options.users, options.organizations, options.memberships)
    clerk, port = FakeClerk(), free_port()
    api = Process(target=serve, args=(port, counts), daemon=True)
    api.start()
    with started_postgresql() as url:
        migrate(url, clerk)
        variables = clerk.environ | {
            "DATABASE_URL": url,
            "CLERK_SECRET_KEY": "sk_live_benchmark",
            "CLERK_API_URL": f"http://127.0.0.1:{port}",
            "CLERK_TABLES": "organizations" if options.organizations else "",
        }
        run("empty tables", environ(**variables), sum(counts))
        with psycopg.connect(url, autocommit=True) as connection:
            for table in TABLES:
                connection.execute(
                    sql.SQL("UPDATE {} SET created_at = created_at - interval '1 day'").format(
                        sql.Identifier(table)
                    )
                )
        run("full tables", environ(**variables), sum(counts))
    api.terminate()


def run(state: str, variables: dict[str, str], count: int) -> None:
    """Run one sync in a separate process."""
    began = time.monotonic()
    command = [sys.executable, "-m", "clerkhooks", "sync", "--json"]
    process = subprocess.Popen(
        command,
        cwd=PROJECT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    assert process.stdout
    watchdog = threading.Timer(TIMEOUT, process.kill)
    watchdog.daemon = True
    watchdog.start()
    parts = {}
    for line in process.stderr:  # keep the last progress line of each part of the run
        parts[line.split(":")[0]] = line.strip()
    summary = process.stdout.read().splitlines()[-1]
    _, status, usage = os.wait4(process.pid, 0)
    watchdog.cancel()
    took = time.monotonic() - began
    print(
        f"{state}: {count / took:,.0f} objects per second overall, "
        f"at most {usage.ru_maxrss / 1024:.0f} MB, status {status}"
    )
    for line in parts.values():
        print(f"  {line}")
    print(f"  {summary}", flush=True)


if __name__ == "__main__":
    main()

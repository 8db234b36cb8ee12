"""
Measure the service on PostgreSQL with up to ten million users, and five messages each.

    python -m tests.benchmarks.scale [--users 10000 1000000 10000000] [--only PART]

The parts are ``throughput`` (webhooks and API calls for random users, relative to the smallest
size), ``indexes`` (the cost of each index per delivery), ``churn`` (sizes of tables and indexes
after many updates) and ``prune`` (deliveries while old messages are deleted). All parts except
``throughput`` use only the largest size. The load is generated on the same machine. The rounds of
``throughput`` alternate between the sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg

from clerkhooks import create_app
from clerkhooks.clerk.fake import FakeClerk, user_data
from clerkhooks.settings import PROJECT
from clerkhooks.store.postgresql import LOCK_TIMEOUT
from clerkhooks.web.state import State, disconnect
from tests.benchmarks.load import Result, apply_load, calls, delivery, median_ratio
from tests.conftest import migrate, started_postgresql
from tests.server import Server, environ, serving
from tests.support import ThreadPool, rows

CLERK = FakeClerk()
SIZES = (10_000, 1_000_000, 10_000_000)
MESSAGES = 5  # for each user
PARTS = ("throughput", "churn", "prune", "indexes")
START = 1_600_000_000  # seconds since the epoch; the first user signs up one second later
LOG_HOURS = 2400  # the age of the oldest message
IMAGE = "https://img.clerk.com/" + "eyJ0eXBlIjoicHJveHki" * 5
BATCH = 500  # users per statement in churn and indexes
TRIED = 20_000  # deliveries for each index
MANY = 100_000  # users
GOAL = 1.3

# Clerk's and Svix's ids begin with a timestamp, so new ids go to the end of an index.
USER_ID = "'user_' || lpad(to_hex({start} + n), 8, '0') || substr(md5(n::text), 1, 19)"
MESSAGE_ID = (
    "'msg_' || lpad(to_hex(extract(epoch FROM {at})::bigint), 8, '0')"
    " || substr(md5(random()::text), 1, 19)"
)
PERSON = (
    f"{USER_ID.format(start=START)} AS id, 'somebody.' || n || '@example.org' AS email, "
    f"'Somebody Number ' || n AS name, '{IMAGE}' || n AS image_url"
)
FILL_USERS = f"""
INSERT INTO users (id, email, name, image_url, is_online, last_seen, created_at, updated_at,
    version_updated_at, version_timestamp, version_message_id)
SELECT {PERSON}, false, now() - interval '1 day', to_timestamp({START} + n), now(),
    1700000000000, 1700000000000, 'msg_' || substr(md5(n::text), 1, 27)
FROM generate_series(1, %(users)s) AS n
"""
FILL_MESSAGES = f"""
INSERT INTO webhook_messages (message_id, event_type, clerk_user_id, outcome, attempts,
    occurred_at, received_at, processed_at)
SELECT {MESSAGE_ID.format(at="at")},
    CASE WHEN m <= %(users)s THEN 'user.created' ELSE 'user.updated' END,
    {USER_ID.format(start=START)}, 'applied', 1, at, at, at
FROM (
    SELECT m, m::bigint * 7919 %% %(users)s + 1 AS n,
        now() - make_interval(secs => {LOG_HOURS} * 3600 * (1 - m::float8 / %(messages)s)) AS at
    FROM generate_series(1, %(messages)s) AS m) AS made
"""
INDEXES = """
SELECT relid::regclass, indexrelname, pg_get_indexdef(indexrelid), indisprimary
FROM pg_stat_user_indexes JOIN pg_index USING (indexrelid)
WHERE relname IN ('users', 'webhook_messages') ORDER BY relname, indisprimary DESC, indexrelname
"""
RANDOM_EVENTS = f"""(
SELECT json_agg(event) FROM (
    SELECT {PERSON}, {MESSAGE_ID.format(at="at")} AS message_id, 'user.updated' AS event_type,
        at AS occurred_at, ms AS version_updated_at, ms AS version_timestamp,
        'msg_' || substr(md5(n::text), 1, 27) AS version_message_id
    FROM (
        SELECT DISTINCT floor(random() * %(users)s)::bigint + 1 AS n
        FROM generate_series(1, %(batch)s)) AS chosen,
        (SELECT clock_timestamp() AS at) AS clock,
        LATERAL (SELECT floor(extract(epoch FROM at) * 1000)::bigint AS ms) AS milliseconds
) AS event)"""
TABLE_STATISTICS = """
SELECT relname, pg_table_size(relid), n_live_tup, n_dead_tup, n_tup_upd, n_tup_hot_upd,
    autovacuum_count
FROM pg_stat_user_tables WHERE relname IN ('users', 'webhook_messages') ORDER BY relname
"""
INDEX_SIZES = """
SELECT indexrelname, pg_relation_size(indexrelid) FROM pg_stat_user_indexes
WHERE relname IN ('users', 'webhook_messages') ORDER BY relname, indexrelname
"""


@dataclass(frozen=True)
class Size:
    """A database with this number of users, and the service that uses it."""

    users: int
    server: Server

    @property
    def url(self) -> str:
        """The URL of the database."""
        return self.server.database_url


def user_id(number: int) -> str:
    """Return the id that ``fill`` gives to the user with this number."""
    return f"user_{START + number:08x}{hashlib.md5(str(number).encode()).hexdigest()[:19]}"


def random_users(size: Size) -> Iterator[int]:
    """Yield user numbers chosen at random from the whole table."""
    while True:
        yield random.randint(1, size.users)


def updates(size: Size) -> Iterator[bytes]:
    """Generate updates of random users that change neither email nor image."""
    for number in random_users(size):
        user = user_data(
            user_id(number),
            email=f"somebody.{number}@example.org",
            first_name="Somebody",
            last_name=f"Number {number}",
            updated_at=int(time.time() * 1000),
        )
        message_id = f"msg_{int(time.time()):08x}{secrets.token_hex(10)[:19]}"
        yield delivery(CLERK, user | {"image_url": f"{IMAGE}{number}"}, message_id)


def first_calls(size: Size, each: int = 1) -> Iterator[bytes]:
    """
    Generate *each* API calls for each randomly chosen user.

    The first call of a user updates ``last_seen``.
    """
    if size.users < MANY:  # many of these users have made calls within the last minute
        _execute(size.url, "UPDATE users SET last_seen = last_seen - interval '1 day'")
    chosen = random.sample(range(1, size.users + 1), min(size.users, MANY))
    return calls(CLERK, map(user_id, chosen), each)


def repeated_calls(size: Size) -> Iterator[bytes]:
    """Generate ten API calls for each randomly chosen user."""
    return first_calls(size, 10)


WORKS: dict[str, Callable[[Size], Iterator[bytes]]] = {
    "webhooks": updates,
    "/api/me, once": first_calls,
    "/api/me, ten times": repeated_calls,
}


@contextlib.contextmanager
def prepared(server_url: str, users: int, folder: Path, storage: str = "") -> Iterator[Size]:
    """Fill a new database, serve it until the block ends, and drop it."""
    name = f"scale_{users}"
    _execute(server_url, f"CREATE DATABASE {name}")
    url = server_url.replace("/postgres?", f"/{name}?")
    try:
        migrate(url, CLERK)
        if storage:
            _execute(url, f"ALTER TABLE users SET ({storage})")
        fill(url, users)
        with serving(url, CLERK, folder / f"{name}.log") as server:
            yield Size(users, server)
    finally:
        _execute(server_url, f"DROP DATABASE {name} WITH (FORCE)")


def _execute(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def fill(url: str, users: int) -> None:
    """Insert users and messages in bulk without indexes, then create the indexes."""
    began = time.monotonic()
    counts = {"users": users, "messages": users * MESSAGES}
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET maintenance_work_mem = '1GB'")
        indexes = connection.execute(INDEXES).fetchall()
        for table, name, _, is_primary in indexes:
            drop = (
                f"ALTER TABLE {table} DROP CONSTRAINT {name}"
                if is_primary
                else f"DROP INDEX {name}"
            )
            connection.execute(drop.encode())
        for statement in (FILL_USERS, FILL_MESSAGES):
            connection.execute(statement.encode(), counts)
        for table, name, definition, is_primary in indexes:
            connection.execute(definition.encode())
            if is_primary:
                add = f"ALTER TABLE {table} ADD CONSTRAINT {name} PRIMARY KEY USING INDEX {name}"
                connection.execute(add.encode())
        connection.execute("VACUUM ANALYZE users, webhook_messages")
    print(f"filled with {users:,} users in {time.monotonic() - began:.0f} s", flush=True)


def measure_throughput(sizes: Sequence[Size], rounds: int, seconds: float) -> None:
    """Print each size's requests per second, and the cost relative to the smallest size."""
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for size, (name, work) in itertools.product(sizes, WORKS.items()):
            result = load(size, work(size), seconds)
            rates.setdefault((name, size.users), []).append(result.rate)
    for name, size in itertools.product(WORKS, sizes):
        own = rates[name, size.users]
        cost = median_ratio(rates[name, sizes[0].users], own)
        print(
            f"{name:20} {size.users:>12,} users {statistics.median(own):8,.0f}/s  "
            f"cost {cost:.2f} (goal: below {GOAL})",
            flush=True,
        )


def load(size: Size, requests: Iterator[bytes], seconds: float) -> Result:
    """Apply load to the service; every response must be 200."""
    result = apply_load(size.server.port, requests, seconds)
    assert set(result.statuses) == {200}, result.statuses
    return result


@contextlib.contextmanager
def delivering(url: str, users: int) -> Iterator[Callable[[psycopg.Connection, int], int]]:
    """Yield a function that executes the service's statement with random users."""
    app = create_app(CLERK.environ | {"DATABASE_URL": url})
    state: State = app.extensions["clerkhooks"]
    statement = state.store.statements.apply.text
    assert "CAST(%(rows)s AS json)" in statement
    statement = statement.replace("CAST(%(rows)s AS json)", RANDOM_EVENTS)

    def deliver(connection: psycopg.Connection, batch: int) -> int:
        given = {"now": datetime.now(UTC), "lock_timeout": LOCK_TIMEOUT}
        done = connection.execute(statement.encode(), given | {"users": users, "batch": batch})
        outcomes = Counter(outcome for _, outcome in done)
        assert set(outcomes) <= {"applied", "stale"}, outcomes
        return outcomes.total()

    yield deliver
    disconnect(app)


def measure_indexes(size: Size) -> None:
    """Print the WAL bytes and time per delivery, with each index and after dropping it."""
    with (
        psycopg.connect(size.url, autocommit=True) as connection,
        delivering(size.url, size.users) as deliver,
    ):
        names = [name for _, name, _, is_primary in connection.execute(INDEXES) if not is_primary]
        print(f"{'WAL (bytes) and time (µs) of a delivery':48}  with and without the index")
        for name in names:
            [(length,)] = connection.execute("SELECT pg_relation_size(%s)", [name])
            own = _cost(connection, deliver)
            others = _cost(connection, deliver, f"DROP INDEX {name}")
            print(
                f"{name:48} {own[0]:6.0f} {others[0]:6.0f} B  {own[1]:4.0f} {others[1]:4.0f} µs  "
                f"{length / 1e6:8.1f} MB",
                flush=True,
            )


def _cost(
    connection: psycopg.Connection,
    deliver: Callable[[psycopg.Connection, int], int],
    change: str = "",
) -> tuple[float, float]:
    """Return the WAL bytes and microseconds per delivery after *change*; roll it back."""
    # The first change to a page after a checkpoint writes the whole page to the WAL.
    connection.execute("CHECKPOINT")
    with connection.transaction(force_rollback=True):
        connection.execute(change.encode())
        [(before,)] = connection.execute("SELECT pg_current_wal_insert_lsn()")
        began, done = time.monotonic(), 0
        while done < TRIED:
            done += deliver(connection, BATCH)
        seconds = time.monotonic() - began
        [(wal,)] = connection.execute("SELECT pg_current_wal_insert_lsn() - %s::pg_lsn", [before])
    return float(wal) / done, seconds * 1e6 / done


def measure_churn(size: Size, count: int) -> None:
    """Apply *count* updates of random users; print sizes before and after, and after a VACUUM."""
    _print_sizes(size, "before")
    began = time.monotonic()
    with delivering(size.url, size.users) as deliver, ThreadPool(2) as pool:

        def work(share: int) -> int:
            done = 0
            with psycopg.connect(size.url, autocommit=True) as connection:
                connection.execute("SET synchronous_commit = off")
                while done < share:
                    done += deliver(connection, BATCH)
            return done

        done = sum(pool.map(work, [count // 2] * 2))
    print(f"{done:,} updates in {time.monotonic() - began:.0f} s")
    _print_sizes(size, "after the updates")
    for table in ("users", "webhook_messages"):
        began = time.monotonic()
        _execute(size.url, f"VACUUM {table}")
        print(f"VACUUM of {table}: {time.monotonic() - began:.1f} s")
    _print_sizes(size, "after VACUUM")


def _print_sizes(size: Size, when: str) -> None:
    for table, length, live, dead, updated, hot, vacuums in rows(size.url, TABLE_STATISTICS):
        share = f"{hot / updated:.3f}" if updated else "none"
        print(
            f"{when}: {table} {length / 1e6:,.1f} MB, {live:,} live and {dead:,} dead rows, "
            f"{updated:,} updates, HOT share {share}, autovacuum runs {vacuums}"
        )
    for index, length in rows(size.url, INDEX_SIZES):
        print(f"    {index:48} {length / 1e6:10,.1f} MB", flush=True)


def measure_prune(size: Size, count: int, seconds: float) -> None:
    """Measure deliveries alone, then while *count* messages are pruned."""
    alone = [load(size, updates(size), seconds) for _ in range(3)]
    _print_deliveries("alone", alone)
    hours = LOG_HOURS - round(LOG_HOURS * count / (size.users * MESSAGES))
    command = [sys.executable, "-m", "clerkhooks", "prune", "--older-than", f"{hours}h", "--json"]
    variables = environ(**CLERK.environ, DATABASE_URL=size.url)
    began, beside = time.monotonic(), []
    with subprocess.Popen(command, cwd=PROJECT, env=variables, stdout=subprocess.PIPE) as process:
        while True:
            result = load(size, updates(size), seconds)
            if process.poll() is not None:
                break
            beside.append(result)
        assert process.stdout
        pruned = json.loads(process.stdout.read())["pruned"]
    print(f"pruned {pruned:,} messages within {time.monotonic() - began:.1f} s")
    _print_deliveries("while pruning", beside)
    _print_sizes(size, "after the prune")


def _print_deliveries(when: str, results: Sequence[Result]) -> None:
    latencies = Result(latencies=[each for result in results for each in result.latencies])
    if not results:
        print(f"deliveries {when}: the prune ended too early")
        return
    print(
        f"deliveries {when}: {statistics.median(each.rate for each in results):,.0f}/s, "
        f"p50 {latencies.quantile(0.5):.1f} ms, p99 {latencies.quantile(0.99):.1f} ms, "
        f"max {latencies.quantile(1):.0f} ms",
        flush=True,
    )


def parse(argv: Sequence[str] | None) -> Any:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, nargs="+", default=SIZES, help="one or more sizes")
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="of a round")
    parser.add_argument("--updates", type=int, help="of churn; default: as many as users")
    parser.add_argument("--pruned", type=int, help="messages; default: as many as users")
    parser.add_argument("--storage", default="", help="of users, such as fillfactor=90")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the selected parts."""
    options = parse(argv)
    wanted = options.only or PARTS
    with (
        tempfile.TemporaryDirectory() as folder,
        started_postgresql() as url,
        contextlib.ExitStack() as stack,
    ):
        counts = sorted(options.users) if "throughput" in wanted else [max(options.users)]
        sizes = [
            stack.enter_context(prepared(url, users, Path(folder), options.storage))
            for users in counts
        ]
        largest = sizes[-1]
        parts: dict[str, Callable[[], None]] = {
            "throughput": lambda: measure_throughput(sizes, options.rounds, options.seconds),
            "indexes": lambda: measure_indexes(largest),
            "churn": lambda: measure_churn(largest, options.updates or largest.users),
            "prune": lambda: measure_prune(
                largest, options.pruned or largest.users, options.seconds
            ),
        }
        for name in wanted:
            parts[name]()


if __name__ == "__main__":
    main()

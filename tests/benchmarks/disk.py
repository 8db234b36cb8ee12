"""
Measure the disk space that users and messages use.

    python -m tests.benchmarks.disk [--users 1000000] [--events 10]
"""

from __future__ import annotations

import argparse
import sqlite3
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psycopg

from clerkhooks.clerk.fake import FakeClerk
from tests.conftest import migrate, started_postgresql

USERS = """
INSERT INTO users (id, email, name, image_url, is_online, last_seen, created_at, updated_at,
  version_updated_at, version_timestamp, version_message_id)
SELECT 'user_' || substr(md5(n::text) || md5(n::text), 1, 27),
  'somebody.' || n || '@example.org', 'Somebody Number ' || n,
  'https://img.clerk.com/' || repeat('eyJ0eXBlIjoicHJveHki', 5) || md5(n::text),
  false, now(), now() - make_interval(secs => n * 30), now(),
  1795444335792, 1795444335792, 'msg_' || substr(md5(n::text), 1, 27)
FROM generate_series(1, %(users)s) n ORDER BY md5(n::text || 'order')
"""
MESSAGES = """
INSERT INTO webhook_messages (message_id, event_type, clerk_user_id, outcome, attempts,
  occurred_at, received_at, processed_at)
SELECT 'msg_' || substr(md5(n || '-' || e) || 'abc', 1, 27),
  CASE e WHEN 1 THEN 'user.created' ELSE 'user.updated' END,
  'user_' || substr(md5(n::text) || md5(n::text), 1, 27), 'applied', 1,
  now(), now() - make_interval(secs => n * e), now()
FROM generate_series(1, %(users)s) n, generate_series(1, %(events)s) e ORDER BY n * e
"""
SIZES = """
SELECT relname, reltuples::bigint, pg_table_size(oid), pg_indexes_size(oid) FROM pg_class
WHERE relname IN ('users', 'webhook_messages') ORDER BY relname
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Fill PostgreSQL and a SQLite file in bulk and print the size of each table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--events", type=int, default=10, help="messages for each user")
    arguments = parser.parse_args(argv)
    with started_postgresql() as url, tempfile.TemporaryDirectory() as folder:
        migrate(url, FakeClerk())
        with psycopg.connect(url, autocommit=True) as connection:
            for statement in (USERS, MESSAGES):
                connection.execute(statement, vars(arguments))
            connection.execute("VACUUM ANALYZE")
            for name, rows, table, indexes in connection.execute(SIZES):
                print_line("PostgreSQL", name, rows, table, indexes)
            copy_to_sqlite(connection, Path(folder) / "clerkhooks.db")


def copy_to_sqlite(connection: psycopg.Connection, path: Path) -> None:
    """Copy the rows to a SQLite file and print the size of each table."""
    migrate(f"sqlite:///{path}", FakeClerk())
    file = sqlite3.connect(path)
    for name in ("users", "webhook_messages"):
        before = path.stat().st_size
        with connection.cursor() as cursor:
            for row in cursor.stream(f"SELECT * FROM {name}".encode()):
                marks = ", ".join("?" * len(row))
                file.execute(
                    f"INSERT INTO {name} VALUES ({marks})",
                    [str(value)[:26] if hasattr(value, "tzinfo") else value for value in row],
                )
        file.commit()
        file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        [(rows,)] = file.execute(f"SELECT count(*) FROM {name}")
        print_line("SQLite", name, rows, path.stat().st_size - before, 0)
    file.close()


def print_line(database: str, name: str, rows: int, table: int, indexes: int) -> None:
    """Print a table's rows, bytes per row, and total size."""
    each = (
        f"{table / rows:6.0f} + {indexes / rows:4.0f} bytes per row"
        if indexes
        else f"{table / rows:6.0f} bytes per row with indexes"
    )
    print(f"{database:10}  {name:16}  {rows:>10,} rows  {each}  {(table + indexes) / 1e9:6.2f} GB")


if __name__ == "__main__":
    main()

"""What the console's pages ask of a large PostgreSQL: ``python -m tests.benchmarks.console [--users 1000000] [--explain]``."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from typing import Any

import psycopg
import sqlalchemy as sa
from flask import Flask
from sqlalchemy import event

from clerkhooks import create_app
from clerkhooks.cli.pretend import PretendedClerk
from clerkhooks.logs import logger
from clerkhooks.models import db
from clerkhooks.settings import Settings
from tests.benchmarks.disk import MESSAGES, USERS
from tests.conftest import migrate, started_postgresql

PASSWORD = "correct horse battery staple"
TURNS = 5
VARIETY = (
    "UPDATE webhook_messages SET outcome = 'stale' WHERE message_id LIKE 'msg_a%'",
    "UPDATE webhook_messages SET outcome = 'failed', error = 'OperationalError' WHERE message_id LIKE 'msg_abc%'",
    "UPDATE users SET deleted_at = now(), name = 'Deleted User', email = NULL WHERE id LIKE 'user_b%'",
    "UPDATE users SET version_updated_at = NULL, name = 'New User', email = NULL WHERE id LIKE 'user_c%'",
    "VACUUM ANALYZE",
)


class Clock:
    """The statements of an engine, each with its parameters and seconds."""

    def __init__(self, engine: sa.Engine) -> None:
        self.statements: list[tuple[str, Any, float]] = []
        self._began = 0.0
        event.listen(engine, "before_cursor_execute", self._begin)
        event.listen(engine, "after_cursor_execute", self._end)

    def _begin(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def _end(self, _connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        self.statements.append((statement, parameters, time.perf_counter() - self._began))


def main() -> None:
    """Fill a new PostgreSQL in bulk, and print what each page asks of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--events", type=int, default=10, help="messages for each user")
    parser.add_argument("--explain", action="store_true", help="show how each page's slowest statement is carried out")
    arguments = parser.parse_args()
    with started_postgresql() as url:
        clerk = PretendedClerk()
        migrate(url, clerk)
        with psycopg.connect(url, autocommit=True) as connection:
            for statement in (USERS, MESSAGES):
                connection.execute(statement, vars(arguments))
            for statement in VARIETY:
                connection.execute(statement.encode())
        app = create_app(Settings.from_environ(clerk.environ | {"DATABASE_URL": url, "CONSOLE_PASSWORD": PASSWORD}))
        logger.setLevel(logging.WARNING)
        print(f"{arguments.users:,} users, {arguments.users * arguments.events:,} messages; milliseconds, medians of {TURNS}")
        print(f"{'page':62}  statements  database  in all")
        with app.app_context():
            clock = Clock(db.engine)
            for name, path in pages(app, arguments.users):
                measure(app, clock, name, path, explain=arguments.explain)


def pages(app: Flask, users: int) -> Sequence[tuple[str, str]]:
    """A name and the path of each page, also of those that make it look far."""
    gate = app.extensions["clerkhooks.console"]
    with db.engine.connect() as connection:
        user_id, email = connection.execute(sa.text("SELECT id, email FROM users WHERE email IS NOT NULL LIMIT 1")).one()
        message_id = connection.execute(sa.text("SELECT message_id FROM webhook_messages LIMIT 1")).scalar_one()
        late = connection.execute(sa.text("SELECT min(received_at) + interval '1 day' FROM webhook_messages")).scalar_one()
        old = connection.execute(sa.text("SELECT min(created_at) + interval '1 day' FROM users")).scalar_one()
    searches = ("somebody", "number 7", "number 77", f"somebody number {users}", "nobody", "deleted", "new", "user", email)
    deep, long_ago = f"after={late:%Y-%m-%dT%H:%M:%S}%2B00:00,msg_", f"after={old:%Y-%m-%dT%H:%M:%S}%2B00:00,user_"
    return [
        ("overview", "/console/"),
        *((f"messages {asked}", f"/console/messages?{asked}") for asked in ("", "outcome=failed", "outcome=stale", "outcome=ignored")),
        *(
            (f"messages {asked}", f"/console/messages?{asked}")
            for asked in ("type=user.created", "type=none", f"user={user_id}", "since=24h")
        ),
        *(
            (f"messages {asked}", f"/console/messages?{asked}")
            for asked in ("type=none&outcome=failed", "type=none&since=30d&outcome=stale")
        ),
        *((f"messages deep, {asked}", f"/console/messages?{asked}&{deep}") for asked in ("", "outcome=failed", "type=none")),
        ("a message", f"/console/messages/{message_id}"),
        *((f"users {asked}", f"/console/users?{asked}") for asked in ("", "show=unfilled", "show=deleted")),
        *((f"users deep, {asked}", f"/console/users?{asked}&{long_ago}") for asked in ("", "show=unfilled", "show=deleted")),
        *((f"users searched for {text!r}", f"/console/users?search={gate.seal(text)}") for text in searches),
        ("a user", f"/console/users/{user_id}"),
    ]


def measure(app: Flask, clock: Clock, name: str, path: str, *, explain: bool) -> None:
    """One page's line: how many statements, and their time and the page's."""
    client, turns = app.test_client(), []
    for _ in range(TURNS + 1):
        clock.statements.clear()
        began = time.perf_counter()
        answer = client.get(path, auth=("operator", PASSWORD))
        assert answer.status_code == 200, (path, answer.status_code)
        turns.append((sum(seconds for *_, seconds in clock.statements), time.perf_counter() - began))
    database, whole = sorted(turns[1:])[TURNS // 2]
    print(f"{name:62.62}  {len(clock.statements):10}  {database * 1000:8.1f}  {whole * 1000:6.1f}", flush=True)
    if explain:
        statement, parameters, _ = max(clock.statements, key=lambda each: each[2])
        with db.engine.connect() as connection:
            for (line,) in connection.exec_driver_sql(f"EXPLAIN (ANALYZE, BUFFERS) {statement}", parameters):
                print(f"    {line}")


if __name__ == "__main__":
    main()

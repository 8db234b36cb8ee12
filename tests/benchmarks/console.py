"""
Measure the console's pages on a large PostgreSQL database.

    python -m tests.benchmarks.console [--users 1000000] [--explain]
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psycopg
import sqlalchemy as sa
from flask import Flask
from sqlalchemy import event

from clerkhooks import create_app
from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.web.logs import logger
from clerkhooks.web.state import State
from tests.benchmarks.disk import MESSAGES, USERS
from tests.conftest import migrate, started_postgresql

PASSWORD = "correct-horse-battery-staple"
TURNS = 5
VARIETY = (
    "UPDATE webhook_messages SET outcome = 'stale' WHERE message_id LIKE 'msg_a%'",
    "UPDATE webhook_messages SET outcome = 'failed', error = 'OperationalError' "
    "WHERE message_id LIKE 'msg_abc%'",
    "UPDATE users SET deleted_at = now(), name = 'Deleted User', email = NULL "
    "WHERE id LIKE 'user_b%'",
    "UPDATE users SET version_updated_at = NULL, name = 'New User', email = NULL "
    "WHERE id LIKE 'user_c%'",
    "VACUUM ANALYZE",
)
A_USER = "SELECT id, email FROM users WHERE email IS NOT NULL LIMIT 1"
A_MESSAGE = "SELECT message_id FROM webhook_messages LIMIT 1"
EARLY_MESSAGES = "SELECT min(received_at) + interval '1 day' FROM webhook_messages"
EARLY_USERS = "SELECT min(created_at) + interval '1 day' FROM users"
FILTERS = (
    *("", "outcome=failed", "outcome=stale", "outcome=ignored", "type=user.created", "type=none"),
    *("since=24h", "type=none&outcome=failed", "type=none&since=30d&outcome=stale"),
)
DEEP = ("", "outcome=failed", "type=none")
SHOWN = ("", "show=unfilled", "show=deleted")
SEARCHES = ("somebody", "number 7", "number 77", "nobody", "deleted", "new", "user")


class StatementTimer:
    """Records each statement of an engine with its parameters and duration in seconds."""

    def __init__(self, engine: sa.Engine) -> None:
        self.statements: list[tuple[str, Any, float]] = []
        self._began = 0.0
        event.listen(engine, "before_cursor_execute", self._begin)
        event.listen(engine, "after_cursor_execute", self._end)

    def _begin(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def _end(
        self, _connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any
    ) -> None:
        self.statements.append((statement, parameters, time.perf_counter() - self._began))


def main(argv: Sequence[str] | None = None) -> None:
    """Fill a new PostgreSQL database in bulk and print a line for each page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--events", type=int, default=10, help="messages per user")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="show the plan of each page's slowest statement",
    )
    arguments = parser.parse_args(argv)
    with started_postgresql() as url:
        clerk = FakeClerk()
        migrate(url, clerk)
        fill(url, vars(arguments))
        variables = {"DATABASE_URL": url, "CONSOLE_PASSWORD": PASSWORD}
        app = create_app(clerk.environ | variables)
        logger.setLevel(logging.WARNING)
        print(
            f"{arguments.users:,} users, {arguments.users * arguments.events:,} messages; "
            f"milliseconds, medians of {TURNS}"
        )
        print(f"{'page':62}  statements  database   total")
        state: State = app.extensions["clerkhooks"]
        timer = StatementTimer(state.store.database.engine)
        for page in pages(state, arguments.users):
            measure(app, timer, page, explain=arguments.explain)


def fill(url: str, counts: dict[str, int]) -> None:
    """Insert users and messages in bulk, and change the state of some of them."""
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in (USERS, MESSAGES):
            connection.execute(statement, counts)
        for statement in VARIETY:
            connection.execute(statement.encode())


def pages(state: State, users: int) -> Iterator[tuple[str, str, str | None]]:
    """Yield the name, path and search term of each page, including pages with old rows."""
    with state.store.database.connect() as connection:
        user_id, email = connection.execute(sa.text(A_USER)).one()
        message_id = connection.execute(sa.text(A_MESSAGE)).scalar_one()
        late = connection.execute(sa.text(EARLY_MESSAGES)).scalar_one()
        old = connection.execute(sa.text(EARLY_USERS)).scalar_one()
    deep = f"after={late:%Y-%m-%dT%H:%M:%S}%2B00:00,msg_"
    long_ago = f"after={old:%Y-%m-%dT%H:%M:%S}%2B00:00,user_"
    messages, listed = "/console/messages", "/console/users"
    yield "overview", "/console", None
    for asked in (*FILTERS, f"user={user_id}"):
        yield f"messages {asked}", f"{messages}?{asked}", None
    for asked in DEEP:
        yield f"messages deep, {asked}", f"{messages}?{asked}&{deep}", None
    yield "a message", f"{messages}/{message_id}", None
    for asked in SHOWN:
        yield f"users {asked}", f"{listed}?{asked}", None
        yield f"users deep, {asked}", f"{listed}?{asked}&{long_ago}", None
    for text in (*SEARCHES, f"somebody number {users}", email):
        yield f"users like {text!r}", listed, text
    yield "a user", f"{listed}/{user_id}", None


def measure(
    app: Flask, timer: StatementTimer, page: tuple[str, str, str | None], *, explain: bool
) -> None:
    """Print a page's statement count, the time spent in statements, and the total time."""
    name, path, search = page
    client, turns, auth = app.test_client(), [], ("operator", PASSWORD)
    for _ in range(TURNS + 1):
        timer.statements.clear()
        began = time.perf_counter()
        if search is None:
            answer = client.get(path, auth=auth)
        else:
            answer = client.post(path, data={"search": search}, auth=auth)
        assert answer.status_code in (200, 303), (path, answer.status_code)
        turns.append(
            (sum(seconds for *_, seconds in timer.statements), time.perf_counter() - began)
        )
    database, whole = sorted(turns[1:])[TURNS // 2]
    print(
        f"{name:62.62}  {len(timer.statements):10}  {database * 1000:8.1f}  {whole * 1000:6.1f}",
        flush=True,
    )
    if explain:
        statement, parameters, _ = max(timer.statements, key=lambda each: each[2])
        state: State = app.extensions["clerkhooks"]
        with state.store.database.connect() as connection:
            explained = f"EXPLAIN (ANALYZE, BUFFERS) {statement}"
            for (plan,) in connection.exec_driver_sql(explained, parameters):
                print(f"    {plan}")


if __name__ == "__main__":
    main()

"""Execute the SQL statement of a delivery on PostgreSQL, without the service."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice

import psycopg

from clerkhooks import create_app
from clerkhooks.clerk.events import parse_event
from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.clerk.signatures import verify_signature
from clerkhooks.store.postgresql import LOCK_TIMEOUT
from clerkhooks.web.state import State, disconnect
from tests.benchmarks.load import webhooks
from tests.support import join


class Statements:
    """Parameters for *count* executions of the statement, each with *batch* messages."""

    def __init__(self, url: str, clerk: FakeClerk, batch: int, count: int) -> None:
        app = create_app(clerk.environ | {"DATABASE_URL": url})
        state: State = app.extensions["clerkhooks"]
        self._url, self._statement = url, state.store.statements.apply.text.encode()
        requests = webhooks(clerk)
        self._rows = iter([_encode(state, clerk, requests, batch) for _ in range(count)])
        disconnect(app)

    def execute(self, connections: int, seconds: float) -> float:
        """Execute the statement on several connections; return the messages per second."""
        began, done = time.monotonic(), [0] * connections

        def work(number: int) -> None:
            with psycopg.connect(self._url, autocommit=True) as connection:
                while time.monotonic() < began + seconds and (rows := next(self._rows, None)):
                    values = {"rows": rows, "now": datetime.now(UTC), "lock_timeout": LOCK_TIMEOUT}
                    done[number] += len(connection.execute(self._statement, values).fetchall())

        threads = [threading.Thread(target=work, args=(number,)) for number in range(connections)]
        for thread in threads:
            thread.start()
        join(*threads)
        return sum(done) / (time.monotonic() - began)


def _encode(state: State, clerk: FakeClerk, requests: Iterator[bytes], count: int) -> str:
    bodies = [request.partition(b"\r\n\r\n")[2] for request in islice(requests, count)]
    now = datetime.now(UTC)
    messages = [
        verify_signature(clerk.headers(body), body, state.secrets, time.time()) for body in bodies
    ]
    events = map(parse_event, messages)
    return str(
        state.store.statements.encode(state.deliveries.make_row(event, now) for event in events)
    )

"""
Hold one request at a chosen point while another runs into it.

Races without sleeps, the same each time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any

import psycopg
import sqlalchemy as sa
from flask import Flask
from werkzeug.test import TestResponse

from clerkhooks.events import Handler
from tests.support import Service

Request = Callable[[], TestResponse]
TIMEOUT = 20  # seconds, after which a broken test fails instead of hanging


def eventually(condition: Callable[[], object], seconds: float = TIMEOUT) -> None:
    """Return once *condition* is true; fail if that takes longer than *seconds*."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.001)


class PausePoint:
    """Where the first thread that arrives stays until it is released; later ones pass."""

    def __init__(self) -> None:
        self.reached, self.released = threading.Event(), threading.Event()
        self.taken = threading.Lock()

    def __call__(self, *_: Any, **__: Any) -> None:
        """Stay, or pass: as a handler, or before a statement."""
        if self.taken.acquire(blocking=False):
            self.reached.set()
            assert self.released.wait(TIMEOUT)


class FailingHandler:
    """
    A handler on which the first message fails, or *always* each, after *meanwhile*.

    Later ones call *later*.
    """

    def __init__(
        self,
        meanwhile: PausePoint | None = None,
        later: PausePoint | None = None,
        *,
        always: bool = False,
    ) -> None:
        self.meanwhile, self.later, self.always = meanwhile, later, always
        self.failed = threading.Event()

    def __call__(self, *_: Any, **__: Any) -> None:
        """Handle an event, and raise if it is time to."""
        fails = self.always or not self.failed.is_set()
        hold = self.meanwhile if fails else self.later
        if hold:
            hold()
        if fails:
            self.failed.set()
            raise RuntimeError("this attempt fails")


@contextmanager
def registered_handler(
    app: Flask, handler: Handler, pattern: str = "*", *, after_commit: bool = False
) -> Iterator[None]:
    """Have *handler* registered until the block ends."""
    handlers = app.extensions["clerkhooks"].hooks._handlers
    entry = (pattern, after_commit, handler)
    handlers.add(pattern, handler, after_commit=after_commit)
    try:
        yield
    finally:
        if entry in handlers._registered:
            handlers._registered.remove(entry)


def delivery(service: Service, body: bytes, message_id: str | None = None) -> Request:
    """Return a delivery, by a client of its own."""
    return lambda: _own(service).deliver(body, message_id)


def call(
    service: Service,
    user_id: str,
    method: str = "GET",
    path: str = "/api/me",
    body: object = None,
) -> Request:
    """Return a call of a signed-in user, by a client of its own."""
    return lambda: _own(service).call(user_id, method, path, body=body)


@contextmanager
def paused_before(
    service: Service, beginning: str | tuple[str, ...], *, on_sqlite: str = "BEGIN"
) -> Iterator[PausePoint]:
    """Hold the first statement that begins so, before it reaches the database."""
    if service.database_url.startswith("sqlite"):
        beginning = on_sqlite  # after BEGIN nobody else could write
    hold = PausePoint()
    with on_statement(service, beginning, hold):
        yield hold


@contextmanager
def before_failure_record(service: Service, failing: FailingHandler) -> Iterator[PausePoint]:
    """Let deliveries reach *failing*; hold the first failed one before that is recorded."""
    hold = PausePoint()

    def arrive() -> None:
        if failing.failed.is_set():
            hold()

    beginning = ("INSERT INTO webhook_messages", "BEGIN")
    with registered_handler(service.app, failing), on_statement(service, beginning, arrive):
        yield hold


@contextmanager
def on_statement(
    service: Service, beginning: str | tuple[str, ...], then: Callable[[], object]
) -> Iterator[None]:
    """Call *then* before every statement that begins so, in the thread that executes it."""

    def listen(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.lstrip().startswith(beginning):
            then()

    with ExitStack() as stack:
        for engine in engines_of(service):
            sa.event.listen(engine, "before_cursor_execute", listen)
            stack.callback(sa.event.remove, engine, "before_cursor_execute", listen)
        yield


def engines_of(service: Service) -> tuple[sa.Engine, sa.Engine]:
    """Return the private engine, and the one that handlers write through."""
    extensions = service.app.extensions
    with service.app.app_context():
        return extensions["clerkhooks"].store.database.engine, extensions["sqlalchemy"].engine


@contextmanager
def paused(hold: PausePoint, act: Request) -> Iterator[Future[TestResponse]]:
    """Run *act* in a thread, and go on once it has reached *hold*, which is released in the end."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(act)
        try:
            assert hold.reached.wait(TIMEOUT)
            yield answer
        finally:
            hold.released.set()


@contextmanager
def blocked(service: Service, act: Request) -> Iterator[Future[TestResponse]]:
    """Run *act* in a thread, and go on once it waits for a writer that has not ended."""
    writing = threading.Event()
    writes = ("INSERT", "UPDATE", "WITH", "BEGIN IMMEDIATE")
    with ThreadPoolExecutor(1) as pool, on_statement(service, writes, writing.set):
        answer = pool.submit(act)
        # SQLite does not tell who waits; but a writer gets no further than this.
        assert writing.wait(TIMEOUT)
        wait_until_blocked(service, answer)
        yield answer


def wait_until_blocked(service: Service, answer: Future[TestResponse]) -> None:
    """Return once the request of *answer* waits for a lock, where the database says so."""
    if not service.database_url.startswith("sqlite"):
        query = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        with psycopg.connect(service.database_url, autocommit=True) as connection:
            eventually(lambda: answer.done() or connection.execute(query).fetchone() != (0,))
    assert not answer.done()


def run_contending(
    service: Service, first: Request, second: Request, *, fails: bool = False, plain: bool = False
) -> list[TestResponse]:
    """
    Hold the delivery *first*, written but not committed, until *second* waits for it.

    Then it ends, or *fails*. With *plain*, *second* finds no handler, as in an application without
    any. Returns both answers.
    """
    hold = PausePoint()
    handler = FailingHandler(meanwhile=hold) if fails else hold
    with ExitStack() as registered:
        registered.enter_context(registered_handler(service.app, handler))
        with paused(hold, first) as one:
            if plain:
                registered.close()
            with blocked(service, second) as two:
                hold.released.set()
                return [one.result(TIMEOUT), two.result(TIMEOUT)]


def overtake(hold: PausePoint, first: Request, second: Request) -> list[TestResponse]:
    """Let *first* reach *hold* and stay there while all of *second* runs; return both answers."""
    with paused(hold, first) as one:
        two = second()
        hold.released.set()
        return [one.result(TIMEOUT), two]


@contextmanager
def uncommitted_first_call(service: Service, user_id: str) -> Iterator[Callable[[], None]]:
    """Write the row of a first call in a transaction of its own; yield what commits it."""
    store = service.app.extensions["clerkhooks"].store
    now = datetime.now(UTC)
    moments = dict.fromkeys(("last_seen", "created_at", "updated_at"), now)
    row = {"id": user_id, "name": "New User", "is_online": False} | moments
    _, engine = engines_of(service)
    with engine.connect() as connection:
        connection.execute(sa.insert(store.users).values(row))
        yield connection.commit


def outcomes(answers: list[TestResponse]) -> list[str]:
    """Return the outcome of each delivery; its status if it was refused."""
    return [
        answer.get_json()["outcome"] if answer.status_code == 200 else str(answer.status_code)
        for answer in answers
    ]


def _own(service: Service) -> Service:
    return Service(service.app, service.clerk, service.database_url)

"""Deterministic races: one request is paused at a chosen point while another one runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any

import psycopg
import sqlalchemy as sa
from flask import Flask
from werkzeug.test import TestResponse

from clerkhooks.events import Event, Handler
from tests.support import Service, ThreadPool

Request = Callable[[], TestResponse]
TIMEOUT = 20  # seconds, after which a broken test fails instead of hanging


def eventually(condition: Callable[[], object], seconds: float = TIMEOUT) -> None:
    """Wait until *condition* is true; fail if that takes longer than *seconds*."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition was still false after {seconds} s"
        time.sleep(0.001)


class PausePoint:
    """A point at which the first thread waits for ``released``. Later threads do not wait."""

    def __init__(self) -> None:
        self.reached, self.released = threading.Event(), threading.Event()
        self.taken = threading.Lock()

    def __call__(self, *_: Any, **__: Any) -> None:
        """Wait if this is the first call. Works as a handler and as a callback for statements."""
        if self.taken.acquire(blocking=False):
            self.reached.set()
            assert self.released.wait(TIMEOUT), "the paused request was not released"


class FailingHandler:
    """
    A handler that fails on the first message, or on every message if *always* is true.

    It pauses at *meanwhile* before it raises an exception, and at *later* if it raises no
    exception.
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
        """Wait, then raise RuntimeError if the message must fail."""
        fails = self.always or not self.failed.is_set()
        pause = self.meanwhile if fails else self.later
        if pause:
            pause()
        if fails:
            self.failed.set()
            raise RuntimeError("this attempt fails")


@contextmanager
def registered_handler(
    app: Flask, handler: Handler, pattern: str = "*", *, after_commit: bool = False
) -> Iterator[None]:
    """Register *handler* until the block ends."""
    handlers = app.extensions["clerkhooks"].hooks._handlers
    entry = (pattern, after_commit, handler)
    handlers.add(pattern, handler, after_commit=after_commit)
    try:
        yield
    finally:
        if entry in handlers._registered:
            handlers._registered.remove(entry)


class Told:
    """Handlers that record which users were barred and restored."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        """Record one event."""
        self.events.append(event)

    @property
    def changes(self) -> list[str]:
        """The types of the events."""
        return [event.type for event in self.events]


@contextmanager
def following(service: Service, after_commit: bool = False) -> Iterator[Told]:
    """Register handlers for both changes until the block ends."""
    told = Told()
    with ExitStack() as stack:
        for change in ("user.barred", "user.restored"):
            handler = registered_handler(service.app, told, change, after_commit=after_commit)
            stack.enter_context(handler)
        yield told


def delivery(service: Service, body: bytes, message_id: str | None = None) -> Request:
    """Return a function that delivers *body* through a new client."""
    return lambda: _with_new_client(service).deliver(body, message_id)


def call(
    service: Service,
    user_id: str,
    method: str = "GET",
    path: str = "/api/me",
    body: object = None,
) -> Request:
    """Return a function that calls the API through a new client, as a signed-in user."""
    return lambda: _with_new_client(service).call(user_id, method, path, body=body)


@contextmanager
def paused_before(
    service: Service, beginning: str | tuple[str, ...], *, on_sqlite: str = "BEGIN"
) -> Iterator[PausePoint]:
    """Yield a pause point before the first statement that starts with *beginning*."""
    if service.database_url.startswith("sqlite"):
        beginning = on_sqlite  # after BEGIN, no other connection could write
    point = PausePoint()
    with on_statement(service, beginning, point):
        yield point


@contextmanager
def before_failure_record(service: Service, failing: FailingHandler) -> Iterator[PausePoint]:
    """Register *failing*; yield a pause point between its exception and the failure record."""
    point = PausePoint()

    def arrive() -> None:
        if failing.failed.is_set():
            point()

    beginning = ("INSERT INTO webhook_messages", "BEGIN")
    with registered_handler(service.app, failing), on_statement(service, beginning, arrive):
        yield point


@contextmanager
def on_statement(
    service: Service, beginning: str | tuple[str, ...], then: Callable[[], object]
) -> Iterator[None]:
    """Call *then*, in the same thread, before each statement that starts with *beginning*."""

    def listen(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.lstrip().startswith(beginning):
            then()

    with ExitStack() as stack:
        for engine in engines_of(service):
            sa.event.listen(engine, "before_cursor_execute", listen)
            stack.callback(sa.event.remove, engine, "before_cursor_execute", listen)
        yield


def engines_of(service: Service) -> tuple[sa.Engine, sa.Engine]:
    """Return the private engine and the application's engine. Handlers use the latter."""
    extensions = service.app.extensions
    with service.app.app_context():
        return extensions["clerkhooks"].store.database.engine, extensions["sqlalchemy"].engine


@contextmanager
def paused(point: PausePoint, request: Request) -> Iterator[Future[TestResponse]]:
    """Run *request* in a thread until it reaches *point*; resume it when the block ends."""
    with ThreadPool(1) as pool:
        answer = pool.submit(request)
        try:
            assert point.reached.wait(TIMEOUT), "the request did not reach the pause point"
            yield answer
        finally:
            point.released.set()


@contextmanager
def blocked(service: Service, request: Request) -> Iterator[Future[TestResponse]]:
    """Run *request* in a thread until it is waiting for another transaction's lock."""
    writing = threading.Event()
    writes = ("INSERT", "UPDATE", "WITH", "BEGIN IMMEDIATE", "SELECT pg_advisory")
    with ThreadPool(1) as pool, on_statement(service, writes, writing.set):
        answer = pool.submit(request)
        # SQLite does not show its lock queue, but a blocked writer stops at this statement.
        assert writing.wait(TIMEOUT), "the request wrote nothing"
        wait_until_blocked(service, answer)
        yield answer


def wait_until_blocked(service: Service, answer: Future[TestResponse]) -> None:
    """Wait until PostgreSQL reports a lock wait; fail if *answer* has already arrived."""
    if not service.database_url.startswith("sqlite"):
        query = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        with psycopg.connect(service.database_url, autocommit=True) as connection:
            eventually(lambda: answer.done() or connection.execute(query).fetchone() != (0,))
    assert not answer.done(), "the request did not wait"


def run_contending(
    service: Service, first: Request, second: Request, *, fails: bool = False, plain: bool = False
) -> list[TestResponse]:
    """
    Pause *first* before its commit until it blocks *second*; return both responses.

    After the pause, *first* commits, or rolls back if *fails* is true. If *plain* is true,
    *second* runs without a handler and is executed in a batch.
    """
    point = PausePoint()
    handler = FailingHandler(meanwhile=point) if fails else point
    with ExitStack() as registered:
        registered.enter_context(registered_handler(service.app, handler))
        with paused(point, first) as one:
            if plain:
                registered.close()
            with blocked(service, second) as two:
                point.released.set()
                return [one.result(TIMEOUT), two.result(TIMEOUT)]


def overtake(point: PausePoint, first: Request, second: Request) -> list[TestResponse]:
    """Run *second* to completion while *first* is paused at *point*; return both responses."""
    with paused(point, first) as one:
        two = second()
        point.released.set()
        return [one.result(TIMEOUT), two]


@contextmanager
def uncommitted_first_call(service: Service, user_id: str) -> Iterator[Callable[[], None]]:
    """
    Insert a user's row, as the user's first call does, but do not commit it.

    Yield a function that commits the transaction.
    """
    store = service.app.extensions["clerkhooks"].store
    now = datetime.now(UTC)
    moments = dict.fromkeys(("last_seen", "created_at", "updated_at"), now)
    row = {"id": user_id, "name": "New User", "is_online": False} | moments
    _, engine = engines_of(service)
    with engine.connect() as connection:
        connection.execute(sa.insert(store.users).values(row))
        yield connection.commit


def outcomes(answers: list[TestResponse]) -> list[str]:
    """Return the outcome of each delivery, or the HTTP status if that is not 200."""
    return [
        answer.get_json()["outcome"] if answer.status_code == 200 else str(answer.status_code)
        for answer in answers
    ]


def _with_new_client(service: Service) -> Service:
    return Service(service.app, service.clerk, service.database_url)

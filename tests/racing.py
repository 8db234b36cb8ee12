"""Holds one request at a point of our choice while another runs into it: races that end the same each time, without a sleep."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from werkzeug.test import TestResponse

from clerkhooks.models import PatientConnection, User, db
from clerkhooks.signals import event_processing
from tests.support import Service

Act = Callable[[], TestResponse]


class Hold:
    """Where the first thread to come stays until it is released; later ones pass."""

    def __init__(self) -> None:
        self.reached, self.released, self.taken = threading.Event(), threading.Event(), threading.Lock()

    def __call__(self, *_: Any, **__: Any) -> None:
        """Stay, or pass: as a receiver, or before a statement."""
        if self.taken.acquire(blocking=False):
            self.reached.set()
            assert self.released.wait(20)


class Failing:
    """A receiver on which the first message fails, or *always* each, after *meanwhile*; a later one comes to *later*."""

    def __init__(self, meanwhile: Hold | None = None, later: Hold | None = None, *, always: bool = False) -> None:
        self.meanwhile, self.later, self.always, self.failed = meanwhile, later, always, threading.Event()

    def __call__(self, *_: Any, **__: Any) -> None:
        """Receive, and raise if it is time to."""
        fails = self.always or not self.failed.is_set()
        hold = self.meanwhile if fails else self.later
        if hold:
            hold()
        if fails:
            self.failed.set()
            raise RuntimeError("this attempt fails")


def delivery(service: Service, body: bytes, message_id: str | None = None) -> Act:
    """A delivery, by a client of its own."""
    return lambda: _own(service).deliver(body, message_id)


def call(service: Service, user_id: str, method: str = "GET", path: str = "/api/me", body: object = None) -> Act:
    """A call of a signed-in user, by a client of its own."""
    return lambda: _own(service).call(user_id, method, path, body=body)


@contextmanager
def before(service: Service, beginning: str | tuple[str, ...]) -> Iterator[Hold]:
    """Hold the first statement that begins so, before it reaches the database."""
    hold = Hold()
    with on_statement(service, beginning, hold):
        yield hold


@contextmanager
def before_failure_record(service: Service, failing: Failing) -> Iterator[Hold]:
    """Let deliveries come to *failing*, and hold the first that failed before it records that."""
    hold = Hold()

    def come() -> None:
        if failing.failed.is_set():
            hold()

    with event_processing.connected_to(failing), on_statement(service, "INSERT INTO webhook_messages", come):
        yield hold


@contextmanager
def on_statement(service: Service, beginning: str | tuple[str, ...], then: Callable[[], object]) -> Iterator[None]:
    """Call *then* before every statement that begins so, in the thread that is about to execute it."""

    def listen(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith(beginning):
            then()

    ask = PatientConnection.ask

    def ask_heard(connection: PatientConnection, text: bytes, parameters: Mapping[str, Any]) -> list[Any]:
        listen(None, None, text.decode())  # also what is handed to the driver directly
        return ask(connection, text, parameters)

    with service.app.app_context():
        engine = db.engine
    sa.event.listen(engine, "before_cursor_execute", listen)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PatientConnection, "ask", ask_heard)
            yield
    finally:
        sa.event.remove(engine, "before_cursor_execute", listen)


@contextmanager
def held(hold: Hold, act: Act) -> Iterator[Future[TestResponse]]:
    """Run *act* in a thread, and go on once it has reached *hold*, from which it is released in the end."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(act)
        try:
            assert hold.reached.wait(20)
            yield answer
        finally:
            hold.released.set()


@contextmanager
def blocked(service: Service, act: Act) -> Iterator[Future[TestResponse]]:
    """Run *act* in a thread, and go on once it waits for a writer who has not ended."""
    writing = threading.Event()
    with ThreadPoolExecutor(1) as pool, on_statement(service, ("INSERT", "UPDATE", "WITH"), writing.set):
        answer = pool.submit(act)
        # SQLite tells nobody who waits; but who sets out to write gets no further.
        assert writing.wait(20)
        wait_for_a_waiter(service, answer)
        yield answer


def wait_for_a_waiter(service: Service, answer: Future[TestResponse]) -> None:
    """Return once the request that will give *answer* waits for a lock, where the database says so."""
    if not service.database_url.startswith("sqlite"):
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        with psycopg.connect(service.database_url, autocommit=True) as connection:
            while connection.execute(query).fetchone() == (0,) and not answer.done():
                pass
    assert not answer.done()


def meet(service: Service, first: Act, second: Act, *, fails: bool = False) -> list[TestResponse]:
    """Hold the delivery *first*, written but not committed, until *second* waits for it; then it ends, or *fails*; gives both answers."""
    hold = Hold()
    receiver = Failing(meanwhile=hold) if fails else hold
    with event_processing.connected_to(receiver), held(hold, first) as one, blocked(service, second) as two:
        hold.released.set()
        return [one.result(), two.result()]


def overtake(hold: Hold, first: Act, second: Act) -> list[TestResponse]:
    """Let *first* reach *hold*, and stay there while *second* is done from beginning to end; gives both answers."""
    with held(hold, first) as one:
        two = second()
        hold.released.set()
        return [one.result(), two]


@contextmanager
def uncommitted_first_call(service: Service, user_id: str) -> Iterator[Callable[[], None]]:
    """The row of a first call, written and not committed, in a transaction of its own; gives what commits it."""
    now = datetime.now(UTC)
    row = {"id": user_id, "name": "New User", "is_online": False, "last_seen": now, "created_at": now, "updated_at": now}
    with service.app.app_context(), db.engine.connect() as connection:
        connection.execute(sa.insert(User).values(row))
        yield connection.commit


def outcomes(answers: list[TestResponse]) -> list[str]:
    """What became of each delivery; its status where it was refused."""
    return [answer.get_json()["outcome"] if answer.status_code == 200 else str(answer.status_code) for answer in answers]


def _own(service: Service) -> Service:
    return Service(service.app, service.clerk, service.database_url)

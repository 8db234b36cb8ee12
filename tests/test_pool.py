"""Callers are served in order of arrival, or refused if the wait would be too long."""

from __future__ import annotations

import copy
import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack

import pytest
import sqlalchemy as sa

from clerkhooks import deliveries, users
from clerkhooks.clerk.fake import clerk_id
from clerkhooks.errors import RequestError
from clerkhooks.store.pool import OrderedPool, Overloaded, Slots
from tests.conftest import MakeService
from tests.racing import TIMEOUT, eventually
from tests.support import Service, ThreadPool, user_event


@pytest.fixture
def threads() -> Iterator[ThreadPool]:
    """Start threads for callers."""
    with ThreadPool(20) as pool:
        yield pool


def use(slots: Slots, log: list[int], number: int, seconds: float = 0.0) -> None:
    """Use a slot and log the caller's number."""
    with slots.use():
        log.append(number)
        time.sleep(seconds)


def queue(threads: ThreadPool, slots: Slots, log: list[int], count: int) -> list[Future[None]]:
    """Start *count* callers, each after the previous one has begun to wait."""
    queued = []
    for number in range(count):
        queued.append(threads.submit(use, slots, log, number))
        eventually(lambda: len(slots._waiting) == number + 1)  # noqa: B023  # called at once
    return queued


def test_serves_callers_in_order(threads: ThreadPool) -> None:
    slots, log = Slots(1, TIMEOUT), list[int]()
    with slots.use():
        queued = queue(threads, slots, log, 10)
    for future in queued:
        future.result(TIMEOUT)
    assert log == list(range(10))
    assert len(slots._free) == 1


def test_admits_as_many_as_it_has_slots(threads: ThreadPool) -> None:
    """If there are two slots and both are in use, a third caller waits."""
    slots, log = Slots(2, TIMEOUT), list[int]()
    with slots.use():
        use(slots, log, 0)
        with slots.use():
            [queued] = queue(threads, slots, log, 1)
            assert log == [0]
    queued.result(TIMEOUT)
    assert log == [0, 0]


def test_refuses_a_caller_that_has_waited_too_long() -> None:
    """A caller is refused after the timeout and does not use up a slot."""
    slots = Slots(1, 0.3)
    with slots.use():
        began = time.monotonic()
        with pytest.raises(Overloaded), slots.use():
            pass
        assert 0.2 < time.monotonic() - began < 2
    with slots.use():
        pass


def test_refuses_at_once_if_uses_take_long() -> None:
    """If slots are held for ten seconds, a caller with a timeout of 1 s is refused at once."""
    slots = Slots(1, 1)
    for _ in range(10):
        slots.end(slots.begin() - 10)
    with slots.use():
        began = time.monotonic()
        with pytest.raises(Overloaded), slots.use():
            pass
        assert time.monotonic() - began < 0.5
    with slots.use():  # a free slot is assigned regardless of earlier durations
        pass


def test_refuses_the_last_first(threads: ThreadPool) -> None:
    """If no slot becomes free, the last callers are refused, and the first keeps waiting."""
    slots, log = Slots(1, 1.5), list[int]()
    with slots.use():
        queued = queue(threads, slots, log, 5)
        for future in queued[3:]:
            assert isinstance(future.exception(TIMEOUT), Overloaded)
        assert not queued[0].done()
    queued[0].result(TIMEOUT)
    assert log[0] == 0


class Killed(BaseException):
    """Raised in a caller when its worker stops."""


def test_loses_no_slot_if_a_caller_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No slot is lost if a caller is killed while waiting or just after it gets its turn."""
    slots = Slots(1, TIMEOUT)
    began_at = slots.begin()

    def die(self: Slots, turn: threading.Lock) -> None:
        raise Killed

    def die_late(self: Slots, turn: threading.Lock) -> None:
        self.end(began_at)
        raise Killed

    monkeypatch.setattr(Slots, "_wait", die)
    with pytest.raises(Killed):
        slots.begin()
    assert (len(slots._free), len(slots._waiting)) == (0, 0)
    monkeypatch.setattr(Slots, "_wait", die_late)
    with pytest.raises(Killed):
        slots.begin()
    assert (len(slots._free), len(slots._waiting)) == (1, 0)


def test_passes_a_turn_on_if_its_caller_is_killed(threads: ThreadPool) -> None:
    """If a caller is killed when its turn comes, the next caller gets the turn."""
    slots, log = Slots(1, TIMEOUT), list[int]()
    began_at = slots.begin()
    turn = threading.Lock()
    turn.acquire()
    slots._waiting.append(turn)
    queued = threads.submit(use, slots, log, 1)
    eventually(lambda: len(slots._waiting) == 2)
    slots.end(began_at)
    slots._leave(turn)
    queued.result(TIMEOUT)
    assert len(slots._free) == 1


def test_refuses_more_callers_than_it_has_slots_without_a_timeout() -> None:
    """If the timeout is 0, a caller is refused at once while both slots are in use."""
    slots = Slots(2, 0)
    with slots.use():
        with slots.use(), pytest.raises(Overloaded), slots.use():
            pass
        with slots.use():
            pass


def test_overloaded_is_a_request_error_and_a_database_error() -> None:
    """``Overloaded`` is caught by code that catches database errors, and it can be copied."""
    error = copy.copy(Overloaded())
    assert isinstance(error, RequestError)
    assert isinstance(error, sa.exc.SQLAlchemyError)
    assert (error.reason, error.retry_after) == ("overloaded", 1)


def test_returns_a_slot_if_connecting_fails() -> None:
    """Failed, invalidated, garbage-collected and detached connections free their slots."""
    fails = [True, True, False]

    def connect() -> object:
        if fails and fails.pop(0):
            raise ConnectionRefusedError
        return sa.create_engine("sqlite://").raw_connection().driver_connection

    engine = sa.create_engine(
        "sqlite://",
        creator=connect,
        poolclass=OrderedPool,
        pool_size=1,
        max_overflow=0,
        pool_timeout=0.2,
    )
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            engine.connect()
    with engine.connect() as connection:
        connection.invalidate()
    connection = engine.connect()
    with pytest.raises(Overloaded):
        engine.connect()
    del connection
    gc.collect()
    with engine.connect() as connection:
        connection.detach()
    with engine.connect():
        pass
    engine.dispose()


@pytest.mark.parametrize("limited", ["deliveries", "users"])
def test_answers_503_above_the_bound(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch, limited: str
) -> None:
    """A delivery or call over the limit is refused and counted, but not recorded as failed."""
    monkeypatch.setattr(deliveries, "MAX_DELIVERIES", 1)
    monkeypatch.setattr(users, "MAX_CALLS", 1)
    service = make_service(METRICS_TOKEN="x" * 20)
    bound = getattr(service.app.extensions["clerkhooks"], limited)._slots
    body, user_id = user_event(clerk_id("user")), clerk_id("user")
    with bound.use():
        answers = [service.deliver(body, "msg_1"), service.call(user_id)]
    refused, served = answers if limited == "deliveries" else answers[::-1]
    assert served.status_code == 200
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    assert refused.content_type == "application/problem+json"
    assert refused.get_json()["reason"] == "overloaded"
    assert count(service, "webhook" if limited == "deliveries" else "sessions") == 1
    assert service.deliver(body, "msg_1").status_code == 200
    assert service.call(user_id).status_code == 200


def count(service: Service, what: str) -> float:
    """Return the number of refusals in the metrics."""
    metrics = service.app.extensions["clerkhooks"].metrics
    name = {"webhook": "webhook_refusals", "sessions": "sessions_refused"}[what]
    return float(getattr(metrics, name).labels("overloaded")._value.get())


def test_answers_503_if_no_connection_is_free(make_service: MakeService) -> None:
    """If the pool is exhausted, deliveries and calls get a 503; a later retry succeeds."""
    service = make_service(DATABASE_POOL_SIZE="1")
    database = service.app.extensions["clerkhooks"].store.database
    database.engine.pool._slots.timeout = 0.2
    body = user_event(clerk_id("user"))
    with ExitStack() as stack:
        stack.enter_context(database.connect())
        for answer in (service.deliver(body, "msg_1"), service.call(clerk_id("user"))):
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
            assert answer.get_json()["reason"] == "overloaded"
    assert service.deliver(body, "msg_1").get_json()["outcome"] == "applied"

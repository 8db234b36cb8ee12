"""Concurrent calls are executed as a batch, and each caller gets its own result."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clerkhooks.clerk.fake import clerk_id
from clerkhooks.clerk.kinds import USER
from clerkhooks.settings import PROJECT
from clerkhooks.store import batching
from clerkhooks.store.batching import Batcher
from clerkhooks.web.state import State
from tests.racing import TIMEOUT, call, delivery, eventually, on_statement, paused, paused_before
from tests.support import NOW_MS, Service, ThreadPool, deletion, rows, user_event


class Work:
    """
    A function that executes batches.

    The first batch waits for ``released``. A batch with one of the *bad* items fails.
    """

    def __init__(
        self, bad: tuple[str, ...] = (), error: Callable[[str], BaseException] = ValueError
    ) -> None:
        self.batches: list[list[str]] = []
        self.began, self.released = threading.Event(), threading.Event()
        self.bad, self.error = bad, error

    def __call__(self, items: Sequence[str]) -> list[str]:
        """Execute a batch: return each item in upper case."""
        self.batches.append(list(items))
        if len(self.batches) == 1:
            self.began.set()
            assert self.released.wait(TIMEOUT)
        for item in items:
            if item in self.bad:
                raise self.error(item)
        return [item.upper() for item in items]


def make_batcher(
    work: Callable[[Sequence[str]], Sequence[str]], *, concerns_all: bool = False
) -> Batcher[str, str]:
    """Return a batcher whose items have the same key if their first letters are equal."""
    return Batcher(work, keys=lambda item: (item[0],), concerns_all=lambda _: concerns_all)


def count_callers(batcher: Batcher[Any, Any]) -> Callable[[int], None]:
    """Return a function that waits until a given number of further callers have joined."""
    joined: list[object] = []
    join = batcher._join

    def join_and_count(item: Any) -> Any:
        place = join(item)
        joined.append(item)
        return place

    batcher._join = join_and_count  # type: ignore[method-assign]
    return lambda count: eventually(lambda: len(joined) >= count)


@contextmanager
def called_together(
    batcher: Batcher[str, str], work: Work, *items: str
) -> Iterator[list[Future[str]]]:
    """
    Call *batcher* with "first", and with each of *items* while the first call is running.

    The first call is released at the end of the block.
    """
    wait_for_callers = count_callers(batcher)
    with ThreadPool(len(items) + 1) as pool:
        answers = [pool.submit(batcher, "first")]
        try:
            assert work.began.wait(TIMEOUT)
            for number, item in enumerate(items):
                answers.append(pool.submit(batcher, item))
                wait_for_callers(number + 2)
            yield answers
        finally:
            work.released.set()


@pytest.fixture
def no_overtaking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable overtaking, so that batches wait until a blocked batch is released."""
    monkeypatch.setattr(batching, "MAX_WAIT", TIMEOUT)


pytestmark = pytest.mark.usefixtures("no_overtaking")


def test_executes_waiting_calls_together() -> None:
    """Calls that arrive while the first call is running are executed as one batch."""
    work = Work()
    batcher = make_batcher(work)
    with called_together(batcher, work, "ada", "bea", "cleo") as answers:
        pass
    assert [answer.result(TIMEOUT) for answer in answers] == ["FIRST", "ADA", "BEA", "CLEO"]
    assert work.batches == [["first"], ["ada", "bea", "cleo"]]


def test_keeps_items_of_one_key_apart() -> None:
    """A batch never has two items with the same key."""
    work = Work()
    with called_together(make_batcher(work), work, "ada", "alan", "bea", "anna") as answers:
        pass
    assert [answer.result(TIMEOUT) for answer in answers] == ["FIRST", "ADA", "ALAN", "BEA", "ANNA"]
    assert sorted(work.batches[1:]) == [["ada"], ["alan", "bea"], ["anna"]]


def test_lets_equal_items_share_a_batch_without_keys() -> None:
    """Without keys, a batch can contain the same item several times."""
    work = Work()
    batcher = Batcher(work, concerns_all=lambda _: False)
    with called_together(batcher, work, "ada", "ada", "ada") as answers:
        pass
    assert [answer.result(TIMEOUT) for answer in answers] == ["FIRST", "ADA", "ADA", "ADA"]
    assert work.batches == [["first"], ["ada", "ada", "ada"]]


def test_accepts_none_as_a_result() -> None:
    """None is a valid result, so a user who does not exist is looked up only once."""
    batches: list[Sequence[str]] = []

    def work(items: Sequence[str]) -> list[None]:
        batches.append(items)
        return [None for _ in items]

    assert Batcher(work, concerns_all=lambda _: False)("ada") is None
    assert batches == [["ada"]]


def test_limits_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch has at most MAX_BATCH items."""
    monkeypatch.setattr(batching, "MAX_BATCH", 2)
    work = Work()
    with called_together(make_batcher(work), work, "ada", "bea", "cleo"):
        pass
    assert sorted(work.batches[1:]) == [["ada", "bea"], ["cleo"]]


def test_fails_only_the_failing_item() -> None:
    """
    If a batch fails, each caller retries alone.

    The failing item raises its error, and the other items succeed.
    """
    work = Work(bad=("bea",))
    with called_together(make_batcher(work), work, "ada", "bea", "cleo") as answers:
        pass
    results = [str(answer.exception(TIMEOUT) or answer.result(TIMEOUT)) for answer in answers]
    assert results == ["FIRST", "ADA", "bea", "CLEO"]
    assert sorted(work.batches[2:]) == [["ada"], ["bea"], ["cleo"]]


def test_does_not_retry_an_outage() -> None:
    """If the database is unavailable, callers fail without a second wait."""
    work = Work(bad=("bea",))
    batcher = make_batcher(work, concerns_all=True)
    with called_together(batcher, work, "ada", "bea", "cleo") as answers:
        pass
    assert [str(answer.exception(TIMEOUT)) for answer in answers[1:]] == ["bea"] * 3
    assert len(work.batches) == 2


def test_raises_a_fresh_exception_per_caller() -> None:
    """
    Each caller gets its own exception object.

    If several threads raised the same object, its traceback would contain the frames of all
    threads.
    """
    work = Work(bad=("bea",))
    batcher = make_batcher(work, concerns_all=True)
    names = [first + second for first in "abcdefgh" for second in "abcd"]
    batcher._keys = lambda item: (item,)
    with called_together(batcher, work, "bea", *names) as answers:
        pass
    errors = [answer.exception(TIMEOUT) for answer in answers[1:]]
    assert {type(error) for error in errors} == {ValueError}
    assert {str(error) for error in errors} == {"bea"}
    assert len({id(error) for error in errors}) == len(names) + 1
    lengths = [len(traceback.extract_tb(error.__traceback__)) for error in errors if error]
    assert max(lengths) <= 6, "a traceback has the frames of several callers"


@pytest.mark.parametrize("alone", [True, False])
def test_leaves_no_caller_waiting_if_the_leader_is_killed(alone: bool) -> None:
    """
    If the leader of a batch is killed, the other callers retry without it.

    This happens when a worker is stopped. Later callers also get their results.
    """
    work = Work(bad=("ada",), error=lambda _: SystemExit(1))
    batcher = make_batcher(work)
    others = () if alone else ("bea", "cleo")
    with called_together(batcher, work, "ada", *others) as answers:
        pass
    assert isinstance(answers[1].exception(TIMEOUT), SystemExit)
    assert [answer.result(TIMEOUT) for answer in answers[2:]] == [other.upper() for other in others]
    assert batcher("dora") == "DORA"


def test_leaves_no_caller_waiting_if_the_leader_is_killed_before_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If the leader is killed before it executes the batch, the other callers retry."""
    work, joined = Work(), threading.Event()
    batcher = make_batcher(work)
    work.released.set()

    def die(_seconds: float) -> None:
        assert joined.wait(TIMEOUT)
        raise SystemExit(1)

    monkeypatch.setattr(batching, "sleep", die)
    wait_for_callers = count_callers(batcher)
    with ThreadPool(2) as pool:
        ada = pool.submit(batcher, "ada")
        wait_for_callers(1)
        bea = pool.submit(batcher, "bea")
        wait_for_callers(2)
        joined.set()
        assert isinstance(ada.exception(TIMEOUT), SystemExit)
        assert bea.result(TIMEOUT) == "BEA"
    assert work.batches == [["bea"]]
    assert is_at_rest(batcher)


def is_at_rest(batcher: Batcher[Any, Any]) -> bool:
    """Return whether no batch is open or being executed."""
    return batcher._open is None and not batcher._turn.locked()


def test_overtakes_a_blocked_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """After MAX_WAIT, a batch starts even if an earlier batch is still blocked."""
    monkeypatch.setattr(batching, "MAX_WAIT", 0.001)
    work = Work()
    batcher = make_batcher(work)
    with ThreadPool(2) as pool:
        first = pool.submit(batcher, "first")
        assert work.began.wait(TIMEOUT)
        assert pool.submit(batcher, "ada").result(TIMEOUT) == "ADA"
        assert not first.done()
        work.released.set()
        assert first.result(TIMEOUT) == "FIRST"
    assert is_at_rest(batcher)


@given(
    items=st.lists(st.text("abc", min_size=1, max_size=2), min_size=1, max_size=20),
    bad=st.sets(st.sampled_from("abc")),
    concerns_all=st.booleans(),
)
def test_answers_each_caller(items: list[str], bad: set[str], concerns_all: bool) -> None:
    """
    Each of many concurrent callers gets its own result or an error.

    Afterwards, no batch is open.
    """

    def work(batch: Sequence[str]) -> list[str]:
        assert len({item[0] for item in batch}) == len(batch)
        for item in batch:
            if item[0] in bad:
                raise ValueError(item[0])
        return [item.upper() for item in batch]

    batcher = make_batcher(work, concerns_all=concerns_all)
    with ThreadPool(8) as pool:
        answers = [pool.submit(batcher, item) for item in items]
    for item, answer in zip(items, answers, strict=True):
        error = answer.exception(TIMEOUT)
        if error is None:
            assert answer.result(TIMEOUT) == item.upper()
        else:
            assert str(error) in bad if concerns_all else str(error) == item[0]
    assert is_at_rest(batcher)


def batcher_of(service: Service, *, deliveries: bool) -> Batcher[Any, Any]:
    """Return the batcher for calls, or the one for deliveries about users."""
    state: State = service.app.extensions["clerkhooks"]
    return state.deliveries._batchers[USER] if deliveries else state.users._read


def test_reads_one_user_once_for_many_calls(service: Service) -> None:
    """Eleven calls for two users share one statement if they arrive during another read."""
    user_id, other_id = clerk_id("user"), clerk_id("user")
    for known in (user_id, other_id):
        assert service.call(known).status_code == 200
    wait_for_callers = count_callers(batcher_of(service, deliveries=False))
    counted: list[str] = []
    with (
        ThreadPool(12) as pool,
        paused_before(service, "SELECT", on_sqlite="SELECT") as hold,
        on_statement(service, "SELECT", lambda: counted.append("")),
        paused(hold, call(service, other_id)) as first,
    ):
        called = [other_id, *[user_id] * 10]
        calls = [pool.submit(call(service, who)) for who in called]
        wait_for_callers(12)
        hold.released.set()
        answers = [answer.result(TIMEOUT) for answer in (first, *calls)]
    assert [answer.get_json()["id"] for answer in answers] == [other_id, *called]
    assert len(counted) == 2


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("body_of", [user_event, deletion])
def test_does_not_let_a_locked_row_delay_others(
    service: Service, body_of: Callable[..., bytes]
) -> None:
    """Other deliveries in the batch are completed while the row is still locked."""
    locked_id = clerk_id("user")
    assert service.outcome(user_event(locked_id)) == "applied"
    wait_for_callers = count_callers(batcher_of(service, deliveries=True))
    bodies = [user_event(clerk_id("user")) for _ in range(9)]
    written: list[str] = []
    with psycopg.connect(service.database_url) as other, ThreadPool(10) as pool:
        other.execute("SELECT 1 FROM users WHERE id = %s FOR UPDATE", [locked_id])
        with (
            on_statement(service, "WITH", lambda: written.append("")),
            paused_before(service, "WITH") as hold,
            paused(hold, delivery(service, bodies[0])) as first,
        ):
            waiting = pool.submit(delivery(service, body_of(locked_id, at=NOW_MS + 1)))
            wait_for_callers(2)
            answers = [first, *(pool.submit(delivery(service, body)) for body in bodies[1:])]
            wait_for_callers(10)
            hold.released.set()
            released_at = time.monotonic()
            outcomes = {answer.result(TIMEOUT).get_json()["outcome"] for answer in answers}
            took = time.monotonic() - released_at
        assert not waiting.done(), "answered while the row was locked"
        other.rollback()
        assert waiting.result(TIMEOUT).get_json()["outcome"] == "applied"
    assert outcomes == {"applied"}
    # one statement for the first delivery, one for the batch, nine for its deliveries, one retry
    assert len(written) == 12
    assert took < 1.5, "waited for the lock timeout of two seconds"


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_does_not_let_an_unfinished_insert_delay_others(service: Service) -> None:
    """
    If a batch times out on a row that is being inserted, each delivery is retried alone.

    Queries do not return this row until its transaction commits.
    """
    inserted_id = clerk_id("user")
    wait_for_callers = count_callers(batcher_of(service, deliveries=True))
    bodies = [user_event(clerk_id("user")) for _ in range(4)]
    with psycopg.connect(service.database_url) as other, ThreadPool(5) as pool:
        other.execute(
            "INSERT INTO users (id, name, is_online, last_seen, created_at, updated_at)"
            " VALUES (%s, 'Ada', false, now(), now(), now())",
            [inserted_id],
        )
        with (
            paused_before(service, "WITH") as hold,
            paused(hold, delivery(service, bodies[0])) as first,
        ):
            waiting = pool.submit(delivery(service, user_event(inserted_id)))
            wait_for_callers(2)
            answers = [first, *(pool.submit(delivery(service, body)) for body in bodies[1:])]
            wait_for_callers(5)
            hold.released.set()
            outcomes = {answer.result(TIMEOUT).get_json()["outcome"] for answer in answers}
        assert not waiting.done(), "answered before the insert had ended"
        other.rollback()
        assert waiting.result(TIMEOUT).get_json()["outcome"] == "applied"
    assert outcomes == {"applied"}


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_waits_once_for_a_locked_table(service: Service) -> None:
    """If the whole table is locked, all deliveries in the batch fail without a second wait."""
    wait_for_callers = count_callers(batcher_of(service, deliveries=True))
    bodies = [user_event(clerk_id("user")) for _ in range(4)]
    with psycopg.connect(service.database_url) as other, ThreadPool(5) as pool:
        with (
            paused_before(service, "WITH") as hold,
            paused(hold, delivery(service, bodies[0])) as first,
        ):
            answers = [pool.submit(delivery(service, body)) for body in bodies[1:]]
            wait_for_callers(4)
            other.execute("LOCK TABLE users IN SHARE MODE")
            hold.released.set()
            began_at = time.monotonic()
            statuses = [answer.result(TIMEOUT).status_code for answer in (first, *answers)]
        assert statuses == [500] * 4
        assert time.monotonic() - began_at < 8
        logged = "SELECT DISTINCT outcome, error FROM webhook_messages"
        assert rows(service.database_url, logged) == [("failed", "OperationalError 55P03")]


WITH_GEVENT = """
import gevent.monkey; gevent.monkey.patch_all()
import socket, sys
import gevent
from clerkhooks.store import batching

batching.MAX_IDLE_WAIT = float(sys.argv[1])
batches = []

def execute(items):
    batches.append(list(items))
    return items

batcher = batching.Batcher(execute, concerns_all=lambda error: False)
client, server = socket.socketpair()

def receive_and_call():
    server.recv(1)
    batcher("second")

def stay_busy():
    while len(batches) == 0:
        gevent.sleep(0)

receiver = gevent.spawn(receive_and_call)
gevent.sleep(0.05)
client.send(b"x")
if sys.argv[2:]:
    gevent.spawn(stay_busy)
with gevent.Timeout(20):
    batcher("first")
    receiver.join()
print(batches)
"""


def run_with_gevent(*arguments: str) -> str:
    """
    Run the script WITH_GEVENT and return its output.

    The first argument is MAX_IDLE_WAIT. If the second argument is "busy", the event loop is never
    idle.
    """
    command = [sys.executable, "-c", WITH_GEVENT, *arguments]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_waits_for_a_caller_whose_request_has_arrived() -> None:
    """With gevent, a request that can already be read joins the batch of an earlier request."""
    assert run_with_gevent("10") == "[['first', 'second']]\n"


def test_does_not_wait_for_a_loop_that_is_always_busy() -> None:
    """A batch is executed after MAX_IDLE_WAIT, even if the event loop is never idle."""
    assert "first" in run_with_gevent("0.05", "busy")


PATCHED_LATE = """
import time
from clerkhooks.store import batching

batching.MAX_WAIT = 1
batcher = batching.Batcher(list, keys=lambda item: ("user",), concerns_all=lambda error: False)
import gevent.monkey; gevent.monkey.patch_all()
import gevent

began = time.monotonic()
calls = [gevent.spawn(batcher, item) for item in range(10)]
gevent.joinall(calls, raise_error=True)
assert [call.value for call in calls] == list(range(10))
print(time.monotonic() - began)
"""


def test_does_not_block_an_application_that_was_patched_late() -> None:
    """
    With gunicorn's own gevent worker and preload_app, a batch does not block the process.

    The batcher's locks were created before the monkey-patching. Waiting for one of them would block
    every greenlet, including the one that must release it.
    """
    command = [sys.executable, "-W", "ignore", "-c", PATCHED_LATE]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 5, "nine of the calls waited for MAX_WAIT"

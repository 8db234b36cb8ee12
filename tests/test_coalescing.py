"""Calls that come at one time are made as one, and each caller is answered as if alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clerkhooks import coalescing
from clerkhooks.coalescing import Coalescer


class Work:
    """What is done, a group at a time: the first group stays at work until it is released; those of *bad* items fail."""

    def __init__(self, bad: tuple[str, ...] = (), error: Callable[[str], BaseException] = ValueError) -> None:
        self.groups: list[list[str]] = []
        self.began, self.released, self.bad, self.error = threading.Event(), threading.Event(), bad, error

    def __call__(self, items: Sequence[str]) -> list[str]:
        """Give each item in capitals."""
        self.groups.append(list(items))
        if len(self.groups) == 1:
            self.began.set()
            assert self.released.wait(20)
        for item in items:
            if item in self.bad:
                raise self.error(item)
        return [item.upper() for item in items]


def coalescer(work: Callable[[Sequence[str]], Sequence[str]], *, for_all: bool = False) -> Coalescer[str, str]:
    """Items that begin with one letter are of one key."""
    return Coalescer(work, keys=lambda item: (item[0],), failed_for_all=lambda _: for_all)


def wait_for_places(calls: Coalescer[str, str], count: int) -> None:
    """Return once so many callers stand in line."""
    while len(calls._waiting) < count:
        pass


@contextmanager
def called_together(calls: Coalescer[str, str], work: Work, *items: str) -> Iterator[list[Future[str]]]:
    """Ask for "first", and while that is at work for each of *items*, who stand in line in this order; then let it go on."""
    with ThreadPoolExecutor(len(items) + 1) as pool:
        answers = [pool.submit(calls, "first")]
        assert work.began.wait(20)
        for number, item in enumerate(items):
            answers.append(pool.submit(calls, item))
            wait_for_places(calls, number + 1)
        yield answers
        work.released.set()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody loses patience, unless a test is about that."""
    monkeypatch.setattr(coalescing, "PATIENCE", 20)


def test_does_what_comes_meanwhile_in_one_go() -> None:
    """The first goes alone, for nobody is asked to wait for others; those who come meanwhile go together."""
    work = Work()
    calls = coalescer(work)
    with called_together(calls, work, "ada", "bea", "cleo") as answers:
        pass
    assert [answer.result() for answer in answers] == ["FIRST", "ADA", "BEA", "CLEO"]
    assert work.groups == [["first"], ["ada", "bea", "cleo"]]


def test_keeps_items_of_one_key_apart() -> None:
    """Two of one kind are never in one group."""
    work = Work()
    with called_together(coalescer(work), work, "ada", "alan", "bea", "anna") as answers:
        pass
    assert [answer.result() for answer in answers] == ["FIRST", "ADA", "ALAN", "BEA", "ANNA"]
    assert work.groups == [["first"], ["ada", "bea"], ["alan"], ["anna"]]


def test_limits_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group has an end."""
    monkeypatch.setattr(coalescing, "LARGEST", 2)
    work = Work()
    with called_together(coalescer(work), work, "ada", "bea", "cleo"):
        pass
    assert work.groups == [["first"], ["ada", "bea"], ["cleo"]]


def test_lets_only_the_culprit_fail() -> None:
    """Whose group fails tries alone: the others are done all the same, and the culprit meets its own error."""
    work = Work(bad=("bea",))
    with called_together(coalescer(work), work, "ada", "bea", "cleo") as answers:
        pass
    assert [str(answer.exception()) if answer.exception() else answer.result() for answer in answers] == ["FIRST", "ADA", "bea", "CLEO"]
    assert sorted(work.groups[2:]) == [["ada"], ["bea"], ["cleo"]]


def test_does_not_try_in_vain_what_failed_for_all() -> None:
    """Where the database is away, nobody waits for it a second time."""
    work = Work(bad=("bea",))
    with called_together(coalescer(work, for_all=True), work, "ada", "bea", "cleo") as answers:
        pass
    assert [str(answer.exception()) for answer in answers[1:]] == ["bea"] * 3
    assert len(work.groups) == 2


@pytest.mark.parametrize("alone", [True, False])
def test_leaves_nobody_behind_whose_leader_is_killed(alone: bool) -> None:
    """A worker that stops kills the one who does the work: the others do it without, and who comes later is served."""
    work = Work(bad=("ada",), error=lambda _: SystemExit(1))
    calls = coalescer(work)
    with called_together(calls, work, "ada", *(() if alone else ("bea", "cleo"))) as answers:
        pass
    assert isinstance(answers[1].exception(), SystemExit)
    assert [answer.result() for answer in answers[2:]] == ([] if alone else ["BEA", "CLEO"])
    assert calls("dora") == "DORA"


@pytest.mark.parametrize("promoted", [False, True], ids=["in line", "as it is to lead"])
def test_leaves_nobody_behind_who_is_killed_in_line(monkeypatch: pytest.MonkeyPatch, promoted: bool) -> None:
    """A caller that is killed while it waits gives up its place, and the lead if it has just been given that."""
    work, place, wait = Work(), coalescing._Place, coalescing._Place.wait

    def wait_and_die(self: coalescing._Place[str, str], seconds: float = -1) -> bool:
        woken = not promoted or wait(self, seconds)
        if self.item == "ada":
            raise SystemExit(1)
        return woken if promoted else wait(self, seconds)

    monkeypatch.setattr(place, "wait", wait_and_die)
    calls = coalescer(work)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(calls, "first")
        assert work.began.wait(20)
        ada = pool.submit(calls, "ada")
        if promoted:
            wait_for_places(calls, 1)
        else:
            assert isinstance(ada.exception(), SystemExit)
        bea = pool.submit(calls, "bea")
        wait_for_places(calls, 2 if promoted else 1)
        work.released.set()
        assert (first.result(), bea.result()) == ("FIRST", "BEA")
        assert isinstance(ada.exception(), SystemExit)
    assert calls("dora") == "DORA"
    assert ["ada"] not in work.groups


def test_goes_past_a_group_that_is_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for too long behind somebody's lock leads a group of its own, beside the one that is stuck."""
    monkeypatch.setattr(coalescing, "PATIENCE", 0.001)
    work = Work()
    calls = coalescer(work)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(calls, "first")
        assert work.began.wait(20)
        assert pool.submit(calls, "ada").result(20) == "ADA"
        assert not first.done()
        work.released.set()
        assert first.result() == "FIRST"
    assert calls._leaders == 0


@given(
    items=st.lists(st.text("abc", min_size=1, max_size=2), min_size=1, max_size=20),
    bad=st.sets(st.sampled_from("abc")),
    for_all=st.booleans(),
)
def test_answers_each_caller(items: list[str], bad: set[str], for_all: bool) -> None:
    """Many callers at once, whatever fails: each gets its own answer or an error, nobody waits for ever, and the line is empty."""

    def work(group: Sequence[str]) -> list[str]:
        assert len({item[0] for item in group}) == len(group)
        for item in group:
            if item[0] in bad:
                raise ValueError(item[0])
        return [item.upper() for item in group]

    calls = coalescer(work, for_all=for_all)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(calls, item) for item in items]
    for item, answer in zip(items, answers, strict=True):
        if answer.exception():
            assert str(answer.exception()) in bad if for_all else str(answer.exception()) == item[0]
        else:
            assert answer.result() == item.upper()
    assert (calls._waiting, calls._leaders) == ([], 0)

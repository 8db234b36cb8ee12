"""A lease: one process at a time holds it, whatever its clock says."""

from __future__ import annotations

import time
from threading import Thread
from typing import Any

import pytest

from clerkhooks.store.leases import Held
from clerkhooks.sync.lease import Lease, LeasedLoop, LeaseLost
from tests.racing import eventually
from tests.support import Service, ThreadPool, join
from tests.syncing import store_of

NOTHING = Held(0, None, {})


def test_has_one_holder(service: Service) -> None:
    """The first process holds the lease until it expires. Then another one takes it."""
    store = store_of(service)
    first, second = Lease(store, "work", 0.5), Lease(store, "work", 0.5)
    assert first.acquire() is not None
    assert second.acquire() is None
    assert first.acquire() is not None, "the holder can renew it"
    time.sleep(0.6)
    assert second.acquire() is not None
    assert first.acquire() is None
    with pytest.raises(LeaseLost):
        first.check()


def test_goes_to_one_of_many(service: Service) -> None:
    """If many processes try to take a free lease at once, one of them gets it."""
    store = store_of(service)
    leases = [Lease(store, "work") for _ in range(8)]
    with ThreadPool(8) as pool:
        found = list(pool.map(Lease.acquire, leases))
    assert sum(held is not None for held in found) == 1


def test_is_free_after_a_release(service: Service) -> None:
    """A process that stops releases the lease, and never takes it again."""
    store = store_of(service)
    first, second = Lease(store, "work"), Lease(store, "work")
    first.acquire()
    first.release()
    assert second.acquire() is not None
    second.release()
    assert first.acquire() is None
    with pytest.raises(LeaseLost):
        first.check()


def test_stores_progress_of_the_holder_only(service: Service) -> None:
    """A process that was replaced does not move the position."""
    store = store_of(service)
    first, second = Lease(store, "work"), Lease(store, "work")
    first.acquire()
    first.save({"position": 1}, completed=True)
    service.rows("UPDATE clerk_leases SET expires_at = 0")
    held = second.acquire()
    assert held is not None
    assert held.state == {"position": 1}
    assert 0 <= held.now - (held.completed_at or 0) < 20_000
    with pytest.raises(LeaseLost):
        first.save({"position": 2})
    found = store.leases.find("work")
    assert found is not None
    assert found.state == {"position": 1}


def test_is_renewed_when_it_is_time(service: Service) -> None:
    """Most checks need no query."""
    lease = Lease(store_of(service), "work", 0.6)
    lease.acquire()
    query = "SELECT expires_at FROM clerk_leases"
    before = service.rows(query)
    lease.check()
    assert service.rows(query) == before
    time.sleep(0.25)
    lease.check()
    assert service.rows(query) > before


def test_is_taken_if_the_clock_was_set_back(service: Service) -> None:
    """A lease that ends in the far future does not block others until then."""
    store = store_of(service)
    first, second = Lease(store, "work"), Lease(store, "work")
    first.acquire()
    service.rows("UPDATE clerk_leases SET expires_at = expires_at + 3600000")
    assert second.acquire() is not None


def test_is_independent_of_other_names(service: Service) -> None:
    """Each kind of work has a lease and progress of its own."""
    store = store_of(service)
    first, second = Lease(store, "work"), Lease(store, "other")
    assert first.acquire() is not None
    first.save({"position": 1})
    held = second.acquire()
    assert held is not None
    assert held.state == {}


class Numbers(LeasedLoop):
    """A loop that stores how many rounds were done. The second one fails."""

    def begin(self) -> None:
        """Keep nothing in memory."""

    def work(self, held: Held) -> None:
        """Store the next number."""
        number = held.state.get("number", 0) + 1
        self.lease.save({"number": number}, completed=True)
        if number == 2:
            raise ValueError


def test_carries_other_work_than_the_follower(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round that fails is logged and followed by another one. Each round gets the progress."""
    monkeypatch.setattr("clerkhooks.sync.lease.FIRST_PAUSE", 0.01)
    store, events = store_of(service), list[tuple[str, Any]]()
    loop = Numbers(Lease(store, "numbers"), 0.02, lambda *event: events.append(event))
    thread = Thread(target=loop.run)
    thread.start()
    try:
        eventually(lambda: (store.leases.find("numbers") or NOTHING).state.get("number", 0) > 3)
    finally:
        loop.stop()
        join(thread)
    taken, failed = events
    assert (taken[0], taken[1]["lease"]) == ("lease_taken", "numbers")
    assert (failed[0], failed[1]["error"], failed[1]["retry_in_s"]) == (
        "round_failed",
        "ValueError",
        0.0,
    )


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_ends_even_if_the_interrupt_is_ignored(service: Service) -> None:
    """Python ignores KeyboardInterrupt in a destructor, such as that of a connection."""

    class Loop(LeasedLoop):
        def begin(self) -> None:
            """Do nothing."""

        def work(self, _held: Held) -> None:
            self.interrupt()
            self.lease.check()

    loop = Loop(Lease(store_of(service), "work"), 60.0)
    loop.run()
    loop.stop()
    assert service.rows("SELECT holder FROM clerk_leases") == [(None,)]

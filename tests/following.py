"""Helpers that run rounds of the follower in this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from clerkhooks.clerk.backend_api import BackendApi
from clerkhooks.store.awaited import Missed
from clerkhooks.sync.lease import Lease
from clerkhooks.sync.leased import LeasedSync
from clerkhooks.sync.progress import FOLLOWER, Progress, find_progress
from clerkhooks.sync.rounds import Round
from tests.backend import SECRET_KEY, Backend
from tests.support import Service, rows
from tests.syncing import PACE, make_old, store_of

INTERVAL = 60.0  # seconds between two rounds; the tests do not wait


class Crash(BaseException):
    """The process of the follower is killed."""


class CrashingLease(Lease):
    """A lease whose holder is killed before a request or a write."""

    steps = 10**9

    def check(self) -> None:
        """Crash if it is time, before a request or a write of users."""
        self._step()
        super().check()

    def save(self, state: Mapping[str, Any], *, completed: bool = False) -> None:
        """Crash if it is time, before progress is stored."""
        self._step()
        super().save(state, completed=completed)

    def _step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise Crash


def complete_round(service: Service, *, completed: bool = True, **progress: Any) -> None:
    """Store what a follower stores at the end of a round."""
    lease = Lease(store_of(service), FOLLOWER)
    lease.acquire()
    lease.save(Progress(**progress).state, completed=completed)
    lease.release()


def holder_of(url: str) -> int | None:
    """Return the id of the process that holds the lease."""
    found = rows(url, "SELECT holder FROM clerk_leases WHERE holder IS NOT NULL")
    return int(found[0][0].split(":")[1]) if found else None


@dataclass
class Following:
    """A follower of *backend* in the process of *service*. *events* are the logged events."""

    service: Service
    backend: Backend
    events: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Take the lease, as another process does after a crash."""
        store = store_of(self.service)
        self.service.rows("UPDATE clerk_leases SET holder = NULL")
        self.lease = CrashingLease(store, FOLLOWER, 60.0)
        api = BackendApi(self.backend.api_url, SECRET_KEY, patience=0, pace=PACE)
        handled = self.service.app.extensions["clerkhooks"].deliveries.handled
        leased = LeasedSync(api, store, self.lease, handled, self._tell)
        self.leased, self.rounds = leased, Round(leased, INTERVAL)

    def run(self, rounds: int = 1, steps: int = 10**9) -> None:
        """Run rounds. Crash after *steps* requests and writes."""
        self.lease.steps = steps
        for _ in range(rounds):
            held = self.lease.acquire()
            assert held is not None
            with self.service.app.app_context():
                self.rounds.run(held)

    def sweep(self) -> None:
        """Make all rows old, and compare all users with Clerk."""
        make_old(self.service)
        self.run(2)

    def progress(self) -> Progress:
        """Return the stored progress."""
        found = find_progress(store_of(self.service))
        assert found is not None
        return found[1]

    def change_state(self, **values: Any) -> None:
        """Change the stored progress."""
        self.lease.save(replace(self.progress(), **values).state)

    def missed(self) -> Missed:
        """Return the counts of missed webhooks."""
        return store_of(self.service).awaited.count()

    def names(self) -> list[str]:
        """Return the names of the logged events."""
        return [name for name, _ in self.events]

    def _tell(self, event: str, fields: Mapping[str, Any]) -> None:
        self.events.append((event, dict(fields)))

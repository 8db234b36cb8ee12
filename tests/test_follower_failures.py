"""The follower survives outages of Clerk and of the database, and respects rate limits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread
from threading import enumerate as enumerate_threads
from typing import Any

import pytest
import sqlalchemy as sa

from clerkhooks import Event
from clerkhooks.sync import follower as follower_module
from clerkhooks.sync.follower import Follower
from clerkhooks.sync.progress import find_progress
from clerkhooks.web.background import make_follower, start_background, stop_background
from tests.backend import (
    CUT_SHORT,
    HTML,
    TRUNCATED,
    WINDOW,
    Backend,
    Behaviour,
    answering,
    answering_json,
    hanging_up,
    limiting,
    refusing,
    resetting,
    stalling,
)
from tests.conftest import MakeService
from tests.racing import eventually, registered_handler
from tests.support import Service, join
from tests.syncing import store_of


@dataclass
class Running:
    """A follower in a thread of this process, and the events that it logged."""

    follower: Follower
    events: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    def errors(self) -> list[Any]:
        """Return the reasons of the failures so far."""
        return [fields["error"] for name, fields in self.events if name == "round_failed"]


@contextmanager
def running(service: Service) -> Iterator[Running]:
    """Run a follower until the block ends."""
    state, events = service.app.extensions["clerkhooks"], list[tuple[str, Mapping[str, Any]]]()
    follower = make_follower(state, lambda name, fields: events.append((name, dict(fields))))

    thread = Thread(target=follower.run, args=(service.app.app_context,))
    thread.start()
    try:
        yield Running(follower, events)
    finally:
        follower.stop()
        join(thread)


@pytest.fixture
def quick(make_service: MakeService, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Service:
    """Create a service whose follower makes a round every 0.1 s."""
    monkeypatch.setattr(follower_module, "TIMEOUT", 0.5)
    monkeypatch.setattr(follower_module, "SHARE", 10)  # do not wait for the rate limit
    monkeypatch.setattr(follower_module, "MIN_LIFETIME", 0.6)
    backend.sign_up(at=1_700_000_000_000)
    return make_service(**backend.environ, CLERK_FOLLOW="0.1")


def has_completed(service: Service) -> bool:
    """Return whether a round has been completed."""
    found = find_progress(store_of(service))
    return found is not None and found[0].completed_at is not None


def fault_of(service: Service) -> str | None:
    """Return the stored reason for operators."""
    found = find_progress(store_of(service))
    return None if found is None else found[1].fault


sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
FAILURES: list[tuple[Behaviour, str]] = [
    (answering(500), "api_unreachable"),
    (answering(502, HTML), "api_unreachable"),
    (limiting(0), "rate_limited"),
    (hanging_up, "api_unreachable"),
    (resetting, "api_unreachable"),
    (stalling, "api_unreachable"),
    (answering(200, HTML), "answer_unusable"),
    (answering_json(200, {"data": []}), "answer_unusable"),
    (TRUNCATED, "answer_unusable"),
    (CUT_SHORT, "answer_unusable"),
    (refusing(401, "clerk_key_invalid"), "secret_key_refused"),
    (refusing(403, "forbidden"), "secret_key_forbidden"),
]


@sqlite
@pytest.mark.parametrize(("behaviour", "reason"), FAILURES)
def test_survives_failures_of_clerk(
    quick: Service, backend: Backend, behaviour: Behaviour, reason: str
) -> None:
    """It tries again until Clerk works. Meanwhile, the reason is stored for operators."""
    with running(quick) as run:
        eventually(lambda: has_completed(quick))
        backend.always = behaviour
        eventually(lambda: reason in run.errors())
        eventually(lambda: fault_of(quick) == reason)
        backend.always = None
        user_id = backend.sign_up()
        eventually(lambda: quick.user(user_id) is not None)
        eventually(lambda: fault_of(quick) is None)


@sqlite
def test_starts_without_certificates(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the certificate authorities cannot be loaded, the worker still serves requests."""
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent.pem")
    service = make_service(CLERK_SECRET_KEY="sk_live_" + 40 * "a")
    start_background(service.app)
    stop_background(service.app)
    with running(service) as run:
        eventually(lambda: run.errors() == ["FileNotFoundError"])


@sqlite
def test_waits_as_long_as_clerk_asks(quick: Service, backend: Backend) -> None:
    """After a 429, no request is sent before Retry-After has passed."""
    backend.behaviours.append(limiting(1))
    with running(quick):
        backend.wait_for(2)
    first, second = backend.arrivals[:2]
    assert second - first >= 1
    assert backend.arrivals == sorted(backend.arrivals)


@sqlite
def test_uses_a_tenth_of_the_rate_limit(
    make_service: MakeService, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even while it reads everything, 90% of the limit is left to the application."""
    monkeypatch.setattr("clerkhooks.sync.newest.PAGE", 10)
    for number in range(300):
        backend.sign_up(at=1_700_000_000_000 + number)
    service = make_service(**backend.environ, CLERK_FOLLOW="0.1")
    with running(service):
        backend.wait_for(15)
    seconds = backend.arrivals[14] - backend.arrivals[0]
    assert 14 / seconds <= 1.05 * 1000 / WINDOW / 10


@sqlite
def test_does_not_log_each_attempt_to_renew_the_lease(quick: Service) -> None:
    """In an outage of the database, messages become as rare as rounds."""
    with running(quick) as run:
        eventually(lambda: has_completed(quick))
        run.follower.interval = 60.0
        quick.rows("ALTER TABLE clerk_leases RENAME TO elsewhere")
        try:
            eventually(lambda: len(run.errors()) == 1)
            time.sleep(3)  # the lease would have been renewed 15 times
            assert len(run.errors()) <= 2
        finally:
            quick.rows("ALTER TABLE elsewhere RENAME TO clerk_leases")


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_ends_the_transactions_of_handlers(quick: Service, backend: Backend) -> None:
    """A handler that only reads leaves a transaction open, which the end of the round closes."""
    session, told = quick.app.extensions["clerkhooks"].deliveries.handled._session, list[int]()

    def handle(_event: Event) -> None:
        told.append(session.scalar(sa.text("SELECT 1")))

    with registered_handler(quick.app, handle, "user.barred", after_commit=True), running(quick):
        user_id = backend.sign_up()
        eventually(lambda: quick.user(user_id) is not None)
        backend.update(user_id, banned=True)
        eventually(lambda: told)
        is_open = "state LIKE 'idle in%' AND datname = current_database()"
        eventually(lambda: not quick.rows(f"SELECT 1 FROM pg_stat_activity WHERE {is_open}"))


def test_survives_an_outage_of_the_database(quick: Service, backend: Backend) -> None:
    """It continues when the tables are back."""
    user_id = backend.sign_up()
    with running(quick) as run:
        eventually(lambda: quick.user(user_id) is not None)
        quick.rows("ALTER TABLE clerk_leases RENAME TO elsewhere")
        try:
            eventually(lambda: any("Error" in each for each in run.errors()))
        finally:
            quick.rows("ALTER TABLE elsewhere RENAME TO clerk_leases")
        other = backend.sign_up()
        eventually(lambda: quick.user(other) is not None)


@sqlite
def test_survives_a_mistake_in_its_own_code(
    quick: Service, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unexpected error is logged with its frames, and the next round is attempted."""
    with running(quick) as run:
        eventually(lambda: has_completed(quick))
        with monkeypatch.context() as patch:
            patch.setattr("clerkhooks.sync.rounds.read_newest", None)
            eventually(lambda: "TypeError" in run.errors())
        user_id = backend.sign_up()
        eventually(lambda: quick.user(user_id) is not None)
    [fields] = [fields for name, fields in run.events if fields.get("error") == "TypeError"][:1]
    assert any("rounds.py" in str(frame) for frame in fields["frames"])


def test_waits_while_another_process_follows(quick: Service, backend: Backend) -> None:
    """Only one of several followers sends requests. When it stops, another one continues."""
    with running(quick) as second_waits:
        eventually(lambda: has_completed(quick))
        with running(quick) as waiting:
            time.sleep(0.5)
            assert waiting.events == []
            second_waits.follower.stop()
            user_id = backend.sign_up()
            eventually(lambda: quick.user(user_id) is not None)
            eventually(lambda: "lease_taken" in [name for name, _ in waiting.events])


@sqlite
def test_says_that_it_was_replaced(quick: Service) -> None:
    """A process that has lost the lease waits for it again."""
    with running(quick) as run:
        eventually(lambda: "objects_healed" in [name for name, _ in run.events])
        quick.rows("UPDATE clerk_leases SET holder = 'another'")
        eventually(lambda: "lease_lost" in [name for name, _ in run.events])
        eventually(lambda: [name for name, _ in run.events].count("lease_taken") == 2)


def test_starts_in_a_worker_only_if_it_is_on(make_service: MakeService, backend: Backend) -> None:
    """Without a key or with ``CLERK_FOLLOW=0``, nothing is started, and a stop does nothing."""
    backend.sign_up()
    for variables in ({}, {**backend.environ, "CLERK_FOLLOW": "0"}):
        service = make_service(**variables)
        start_background(service.app)
        stop_background(service.app)
        assert service.app.extensions["clerkhooks"].loops == []
    service = make_service(**backend.environ)
    start_background(service.app)
    try:
        eventually(lambda: service.rows("SELECT count(*) FROM users") == [(1,)])
    finally:
        stop_background(service.app)
        join(*(each for each in enumerate_threads() if each.name == "clerkhooks-follower"))
    assert service.rows("SELECT holder FROM clerk_leases") == [(None,)]


def test_stops_without_a_database(quick: Service) -> None:
    """A worker can exit while the database is away; then the lease ends by itself."""
    with running(quick) as run:
        eventually(lambda: "objects_healed" in [name for name, _ in run.events])
        quick.rows("ALTER TABLE clerk_leases RENAME TO elsewhere")
        try:
            run.follower.stop()
        finally:
            quick.rows("ALTER TABLE elsewhere RENAME TO clerk_leases")

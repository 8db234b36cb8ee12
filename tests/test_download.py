"""Downloads end at their deadline, even if the server or the resolver does not respond."""

from __future__ import annotations

import multiprocessing
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from clerkhooks.clerk.download import Connection, download
from tests.issuer import HTTP, Behaviour, Issuer, answering, dripping
from tests.racing import eventually

GOOD = answering(b"{}")


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    """Run an endpoint that ends stalled requests after ten seconds, so that tests cannot hang."""
    with Issuer().open() as issuer:
        release = threading.Timer(10, issuer.released.set)
        release.daemon = True
        release.start()
        yield issuer
        release.cancel()


@pytest.mark.parametrize(
    "behaviour",
    [dripping(HTTP + b"X: "), dripping(HTTP + b"\r\n{}"), dripping(b"HTTP/1.1 200 O")],
    ids=["headers", "body without a length", "status line"],
)
def test_ends_a_trickling_answer(issuer: Issuer, behaviour: Behaviour) -> None:
    """A trickling response times out, even if the body received so far looks complete."""
    issuer.behaviour, start = behaviour, time.monotonic()
    with pytest.raises(TimeoutError):
        download(issuer.url, {}, timeout=0.2, max_size=1_000_000)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("behaviour", [GOOD, dripping(HTTP + b"X: ")], ids=["good", "trickling"])
def test_counts_the_time_of_the_resolver(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch, behaviour: Behaviour
) -> None:
    """DNS resolution counts towards the timeout, even if the server then responds immediately."""
    resolve = socket.getaddrinfo

    def resolve_slowly(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.4)
        return resolve(*arguments, **options)

    issuer.behaviour, start = behaviour, time.monotonic()
    monkeypatch.setattr(socket, "getaddrinfo", resolve_slowly)
    with pytest.raises(TimeoutError):
        download(issuer.url, {}, timeout=0.1, max_size=1_000_000)
    assert time.monotonic() - start < 5


def test_follows_no_redirect(issuer: Issuer) -> None:
    """A redirect is returned with its status and headers."""
    issuer.behaviour = answering(b"moved", 302, Location="/elsewhere")
    answer = download(issuer.url, {"X-Test": "1"}, timeout=5, max_size=5)
    assert (answer.status, answer.headers["Location"], answer.body) == (302, "/elsewhere", b"moved")
    assert [headers["x-test"] for headers, _ in issuer.requests] == ["1"]


def test_watches_all_exchanges_of_a_connection_in_one_thread(issuer: Issuer) -> None:
    """Each exchange gets the full timeout, and the thread ends with the connection."""
    before = set(threading.enumerate())
    issuer.behaviour = GOOD
    connection = Connection(issuer.url, {}, timeout=1, max_size=5)
    watchers = set()
    for _ in range(3):
        assert connection.get(issuer.url).body == b"{}"
        time.sleep(0.6)
        watchers |= {one for one in threading.enumerate() if "_watch" in one.name} - before
    issuer.behaviour = dripping(HTTP + b"X: ")
    with pytest.raises(TimeoutError):
        connection.get(issuer.url)
    connection.close()
    assert len(watchers) == 1
    eventually(lambda: not any(watcher.is_alive() for watcher in watchers))


def test_watches_a_connection_after_a_fork(issuer: Issuer) -> None:
    """Threads do not survive a fork, so the child starts a thread of its own."""
    with closing(Connection(issuer.url, {}, timeout=0.2, max_size=5)) as connection:
        issuer.behaviour = GOOD
        connection.get(issuer.url)
        issuer.behaviour = dripping(HTTP + b"X: ")

        def expire() -> None:
            with pytest.raises(TimeoutError):
                connection.get(issuer.url)

        child = multiprocessing.get_context("fork").Process(target=expire)
        child.start()
        child.join(5)
        exit_code = child.exitcode
        child.kill()
    assert exit_code == 0

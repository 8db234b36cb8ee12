"""Fetching the keys for session tokens from an endpoint that misbehaves in many ways."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from clerkhooks.clerk import signing_keys
from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.clerk.session_tokens import SessionVerifier, TokenRules
from clerkhooks.clerk.signing_keys import FetchedKeys
from clerkhooks.errors import KeysUnavailable, Unauthenticated
from tests.issuer import (
    MISBEHAVIOURS,
    Behaviour,
    Clock,
    Issuer,
    answering,
    fetched,
    jwk,
    refusal_reason,
    stalling,
    stalling_then_publishing,
    wait_for_fetches,
)
from tests.racing import TIMEOUT
from tests.support import ThreadPool

CLERK, OTHER = FakeClerk(), FakeClerk()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that stands still until a test sets it."""
    clock = Clock()
    monkeypatch.setattr(signing_keys, "time", clock)
    return clock


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    """A JWKS endpoint that publishes CLERK's key."""
    with Issuer(jwk(CLERK)).open() as issuer:
        yield issuer
    wait_for_fetches()


def test_fetches_once_for_many_threads(issuer: Issuer) -> None:
    """Calls during a fetch wait for its result (single flight)."""
    keys, barrier = FetchedKeys(issuer.url), threading.Barrier(17)
    issuer.behaviour = stalling_then_publishing(jwk(CLERK))

    def call(_: int) -> str | None:
        keys.fetch_soon()
        barrier.wait(TIMEOUT)
        return refusal_reason(keys, CLERK)

    with ThreadPool(16) as threads:
        calls = [threads.submit(call, number) for number in range(16)]
        barrier.wait(TIMEOUT)
        issuer.released.set()
        assert {call.result(TIMEOUT) for call in calls} == {None}
    assert len(issuer.requests) == 1


def test_serves_a_known_key_while_a_fetch_is_stalled(issuer: Issuer, clock: Clock) -> None:
    """No call waits for the refresh, not even the call that starts it."""
    keys = fetched(FetchedKeys(issuer.url))
    issuer.behaviour, clock.now = stalling, clock.now + 300
    assert refusal_reason(keys, CLERK) is None
    issuer.wait_for(2)
    assert refusal_reason(keys, CLERK) is None
    fetch = keys.fetch_soon()
    assert fetch is not None
    assert fetch.is_alive()


@pytest.mark.parametrize(("age", "requests"), [(299.9, 1), (300, 2)])
def test_refreshes_in_the_background_after_five_minutes(
    issuer: Issuer, clock: Clock, age: float, requests: int
) -> None:
    """The first call after five minutes starts the refresh; earlier calls do not."""
    keys = fetched(FetchedKeys(issuer.url))
    clock.now += age
    assert refusal_reason(keys, CLERK) is None
    wait_for_fetches()
    assert len(issuer.requests) == requests
    assert keys.age == pytest.approx(0 if requests == 2 else age)


def test_keeps_keys_for_twelve_hours_of_an_outage(issuer: Issuer, clock: Clock) -> None:
    """During an outage, the fetched keys remain in use for twelve hours. Then calls get a 503."""
    keys = fetched(FetchedKeys(issuer.url))
    verifier, token = SessionVerifier(keys, TokenRules()), CLERK.session_token(clerk_id("user"))
    issuer.behaviour, start = answering(b"", 500), clock.now
    verifier.verify(token, time.time())
    clock.now = start + 12 * 3600 - 1
    assert refusal_reason(verifier, CLERK) is None
    wait_for_fetches()
    clock.now += 1
    assert refusal_reason(verifier, CLERK) == "keys_unavailable"
    with pytest.raises(KeysUnavailable, match="keys_unavailable") as raised:
        verifier.verify(token, time.time())
    assert raised.value.retry_after == 29


def test_accepts_a_new_key_without_a_false_401(issuer: Issuer, clock: Clock) -> None:
    """If a key is published five minutes before its first use, no token is refused."""
    keys = fetched(FetchedKeys(issuer.url))
    issuer.publish(jwk(CLERK), jwk(OTHER, "ins_new"))
    for _ in range(11):
        clock.now += 30
        assert refusal_reason(keys, CLERK) is None
        wait_for_fetches()
    assert refusal_reason(keys, OTHER, "ins_new") is None
    assert len(issuer.requests) == 2


@pytest.mark.parametrize("failing", [False, True])
def test_waits_out_the_cooldown_after_a_fetch(issuer: Issuer, clock: Clock, failing: bool) -> None:
    """A sudden rotation is noticed within 30 seconds, even after a failed fetch."""
    keys = fetched(FetchedKeys(issuer.url))
    if failing:
        issuer.behaviour, clock.now = answering(b"", 500), clock.now + 300
        assert refusal_reason(keys, CLERK) is None
        wait_for_fetches()
    before = len(issuer.requests)
    issuer.publish(jwk(OTHER, "ins_new"))
    clock.now += 29.9
    assert refusal_reason(keys, OTHER, "ins_new") == "unknown_key"
    wait_for_fetches()
    assert len(issuer.requests) == before
    clock.now += 0.1
    assert refusal_reason(keys, OTHER, "ins_new") is None


@pytest.mark.parametrize("behaviour", MISBEHAVIOURS.values(), ids=MISBEHAVIOURS)
def test_keeps_good_keys_after_any_bad_answer(
    issuer: Issuer,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    behaviour: Behaviour,
) -> None:
    """Only a valid key set replaces the keys. Any fetch that fails or times out is logged."""
    keys = fetched(FetchedKeys(issuer.url))
    monkeypatch.setattr(signing_keys, "TIMEOUT", 0.6)
    issuer.behaviour, clock.now = behaviour, clock.now + 300
    assert refusal_reason(keys, CLERK) is None
    wait_for_fetches()
    assert len(issuer.requests) == 2
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "signing_keys_not_fetched"
    ]
    assert refusal_reason(keys, CLERK) is None


def test_skips_unusable_keys(issuer: Issuer) -> None:
    """An unusable key does not affect a valid key in the same set."""
    issuer.publish(
        {"kid": "ec", "kty": "EC"},
        jwk(OTHER, "enc", use="enc"),
        jwk(CLERK),
        jwk(OTHER, "short", n="u" * 171),
    )
    keys = fetched(FetchedKeys(issuer.url))
    assert refusal_reason(keys, CLERK) is None
    assert [refusal_reason(keys, OTHER, kid) for kid in ("ec", "enc", "short")] == [
        "unknown_key"
    ] * 3


def test_fetches_once_for_a_flood_of_forged_tokens(issuer: Issuer, clock: Clock) -> None:
    """Calls with unknown keys wait for the running fetch. In the cooldown, they fail at once."""
    keys = fetched(FetchedKeys(issuer.url))
    clock.now += 30
    issuer.behaviour = stalling_then_publishing(jwk(CLERK), jwk(OTHER, "ins_new"))
    with ThreadPool(20) as threads:
        forged = [
            threads.submit(refusal_reason, keys, OTHER, f"ins_{number}") for number in range(19)
        ]
        genuine = threads.submit(refusal_reason, keys, OTHER, "ins_new")
        issuer.wait_for(2)
        issuer.released.set()
        assert {call.result(TIMEOUT) for call in forged} == {"unknown_key"}
        assert genuine.result(TIMEOUT) is None
    clock.now += 29.9
    assert {refusal_reason(keys, OTHER, f"ins_{number}") for number in range(50)} == {"unknown_key"}
    assert len(issuer.requests) == 2


def test_fetches_nothing_for_a_false_signature(issuer: Issuer, clock: Clock) -> None:
    """If the ``kid`` is known but the signature is invalid, no keys are fetched."""
    keys = fetched(FetchedKeys(issuer.url, cooldown=0))
    assert {refusal_reason(keys, OTHER) for _ in range(20)} == {"token_signature_mismatch"}
    wait_for_fetches()
    assert len(issuer.requests) == 1


def test_drops_a_key_that_is_no_longer_published(issuer: Issuer) -> None:
    """Once Clerk removes a leaked key, tokens signed with that key are refused."""
    keys = fetched(FetchedKeys(issuer.url, cooldown=0))
    verifier, token = SessionVerifier(keys, TokenRules()), CLERK.session_token(clerk_id("user"))
    verifier.verify(token, time.time())
    issuer.publish(jwk(OTHER, "ins_new"))
    fetched(keys)
    with pytest.raises(Unauthenticated, match="unknown_key"):
        verifier.verify(token, time.time())


def test_abandons_a_fetch_that_never_ends(
    issuer: Issuer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the cooldown, another fetch starts, and the first one's late result is ignored."""
    monkeypatch.setattr(signing_keys, "TIMEOUT", 20)
    keys = FetchedKeys(issuer.url)
    issuer.behaviour = stalling_then_publishing(jwk(OTHER))
    lost = keys.fetch_soon()
    issuer.wait_for(1)
    clock.now += 29.9
    assert keys.fetch_soon() is lost
    clock.now += 0.1
    issuer.publish(jwk(CLERK))
    second = keys.fetch_soon()
    assert second is not None
    assert second is not lost
    second.join(10)
    assert not second.is_alive()
    issuer.released.set()
    wait_for_fetches()
    assert (refusal_reason(keys, CLERK), refusal_reason(keys, OTHER)) == (
        None,
        "token_signature_mismatch",
    )

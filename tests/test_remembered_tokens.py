"""The cache of verified tokens: a second use is cheap, and whatever can change is checked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.clerk.session_tokens import SessionVerifier, TokenRules
from clerkhooks.errors import Unauthenticated

CLERK = FakeClerk()
NOW = int(time.time())
TIMES: dict[str, Any] = {"iat": NOW, "nbf": NOW, "exp": NOW + 60}


class CountedKeys:
    """The key of CLERK, with a count of lookups and a generation that a test sets."""

    def __init__(self) -> None:
        self.generation: int | None = 0
        self.asked = 0

    def refresh_if_due(self) -> int | None:
        """Return the generation."""
        return self.generation

    def require_any(self) -> None:
        """Return, as there is one."""

    def find(self, _kid: object) -> Sequence[RSAPublicKey]:
        """Return the key for any id."""
        self.asked += 1
        return [CLERK.private_key.public_key()]


@pytest.fixture
def keys() -> CountedKeys:
    """Keys that count lookups."""
    return CountedKeys()


def token(**claims: Any) -> str:
    return CLERK.session_token(clerk_id("user"), **(TIMES | claims))


def test_verifies_a_signature_once(keys: CountedKeys) -> None:
    """A valid token is not verified again, and gives the same session."""
    verifier = SessionVerifier(keys, TokenRules())
    text = token(o={"id": "org_1"}, fva=[1.5, -1], act=None)
    assert verifier.verify(text, NOW) == verifier.verify(text, NOW + 64.9)
    assert keys.asked == 1


def test_checks_expiry_at_each_use(keys: CountedKeys) -> None:
    """A remembered token expires like any other, five seconds after ``exp``."""
    verifier, text = SessionVerifier(keys, TokenRules()), token()
    for now in (NOW, NOW + 64.999):
        verifier.verify(text, now)
    with pytest.raises(Unauthenticated, match="token_expired"):
        verifier.verify(text, NOW + 65)


def test_verifies_again_after_a_change_of_keys(keys: CountedKeys) -> None:
    """A new generation invalidates every entry; without keys nothing is remembered."""
    verifier, text = SessionVerifier(keys, TokenRules()), token()
    asked = []
    for generation in (0, 1, 1, 2, None, None, 2):
        keys.generation = generation
        verifier.verify(text, NOW)
        asked.append(keys.asked)
    assert asked == [1, 2, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("remember", "asked"), [(0, 8), (1, 7), (3, 5), (4, 4)])
def test_bounds_its_size(keys: CountedKeys, remember: int, asked: int) -> None:
    """The oldest entry is dropped first."""
    verifier, texts = SessionVerifier(keys, TokenRules(), remember), [token() for _ in range(4)]
    for text in [*texts, *reversed(texts)]:
        verifier.verify(text, NOW)
    assert keys.asked == asked


def test_remembers_no_refused_token(keys: CountedKeys) -> None:
    """Forged tokens neither fill the cache nor evict good ones."""
    verifier, good = SessionVerifier(keys, TokenRules(), remember=1), token()
    verifier.verify(good, NOW)
    for bad in [
        token(sts="pending"),
        token(exp=NOW - 5),
        *(f"{good[:-9]}{end:09}" for end in range(5)),
    ] * 2:
        with pytest.raises(Unauthenticated):
            verifier.verify(bad, NOW)
    before = keys.asked
    verifier.verify(good, NOW)
    assert keys.asked == before


def test_returns_a_copy_of_the_claims(keys: CountedKeys) -> None:
    """A view may change the claims of its call; the next call gets what was signed."""
    verifier, text = SessionVerifier(keys, TokenRules()), token(o={"id": "org_1", "rol": "member"})
    for _ in range(3):
        claims = verifier.verify(text, NOW).claims
        assert (claims["o"], claims["sts"]) == ({"id": "org_1", "rol": "member"}, "active")
        claims["o"]["rol"] = "admin"
        claims.update(sts="pending")  # type: ignore[attr-defined]
    assert keys.asked == 1


def test_accepts_deeply_nested_claims(keys: CountedKeys) -> None:
    """Such a token is valid, at its first use and later."""
    deep: list[object] = []
    for _ in range(300):
        deep = [deep]
    verifier, text = SessionVerifier(keys, TokenRules()), token(deep=deep)
    for _ in range(2):
        assert verifier.verify(text, NOW).claims["deep"] == deep

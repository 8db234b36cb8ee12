"""The memory of a verifier: a token that was seen before is cheap, and no less checked in what can change."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from clerkhooks.clerk.session_tokens import SessionVerifier, TokenRules
from clerkhooks.cli.pretend import PretendedClerk, clerk_id
from clerkhooks.errors import Unauthenticated

CLERK = PretendedClerk()
NOW = int(time.time())
TIMES: dict[str, Any] = {"iat": NOW, "nbf": NOW, "exp": NOW + 60}


class CountedKeys:
    """The key of CLERK, with a count of those who asked for it. It is another one where *generation* is."""

    def __init__(self) -> None:
        self.generation: int | None = 0
        self.asked = 0

    def refresh_if_due(self) -> int | None:
        """The number of these keys."""
        return self.generation

    def require_any(self) -> None:
        """There is one."""

    def find(self, _kid: object) -> Sequence[RSAPublicKey]:
        """The key, whatever it is called."""
        self.asked += 1
        return [CLERK.private_key.public_key()]


@pytest.fixture
def keys() -> CountedKeys:
    """Keys that count."""
    return CountedKeys()


def token(**claims: Any) -> str:
    return CLERK.session_token(clerk_id("user"), **(TIMES | claims))


def test_asks_for_no_key_again(keys: CountedKeys) -> None:
    """A token that held needs no second verification, and gives the same session."""
    verifier, text = SessionVerifier(keys, TokenRules()), token(o={"id": "org_1"}, fva=[1.5, -1], act=None)
    assert verifier.verify(text, NOW) == verifier.verify(text, NOW + 64.9)
    assert keys.asked == 1


def test_checks_expiry_at_each_use(keys: CountedKeys) -> None:
    """A remembered token ends when any other does: five seconds after ``exp``."""
    verifier, text = SessionVerifier(keys, TokenRules()), token()
    for now in (NOW, NOW + 64.999):
        verifier.verify(text, now)
    with pytest.raises(Unauthenticated, match="token_expired"):
        verifier.verify(text, NOW + 65)


def test_forgets_what_other_keys_have_verified(keys: CountedKeys) -> None:
    """Each change of the keys has every token verified anew; while there are none, nothing is remembered."""
    verifier, text = SessionVerifier(keys, TokenRules()), token()
    asked = []
    for generation in (0, 1, 1, 2, None, None, 2):
        keys.generation = generation
        verifier.verify(text, NOW)
        asked.append(keys.asked)
    assert asked == [1, 2, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("remember", "asked"), [(0, 8), (1, 7), (3, 5), (4, 4)])
def test_remembers_so_many_and_no_more(keys: CountedKeys, remember: int, asked: int) -> None:
    """The oldest goes first, so that the memory is bounded."""
    verifier, texts = SessionVerifier(keys, TokenRules(), remember), [token() for _ in range(4)]
    for text in [*texts, *reversed(texts)]:
        verifier.verify(text, NOW)
    assert keys.asked == asked


def test_remembers_nothing_that_was_refused(keys: CountedKeys) -> None:
    """A forger fills no memory and pushes nobody out of it."""
    verifier, good = SessionVerifier(keys, TokenRules(), remember=1), token()
    verifier.verify(good, NOW)
    for bad in [token(sts="pending"), token(exp=NOW - 5), *(f"{good[:-9]}{end:09}" for end in range(5))] * 2:
        with pytest.raises(Unauthenticated):
            verifier.verify(bad, NOW)
    before = keys.asked
    verifier.verify(good, NOW)
    assert keys.asked == before


def test_gives_each_caller_claims_of_its_own(keys: CountedKeys) -> None:
    """Whatever a view does to the claims of its call, the next call gets what was signed."""
    verifier, text = SessionVerifier(keys, TokenRules()), token(o={"id": "org_1", "rol": "member"})
    for _ in range(3):
        claims = verifier.verify(text, NOW).claims
        assert (claims["o"], claims["sts"]) == ({"id": "org_1", "rol": "member"}, "active")
        claims["o"]["rol"] = "admin"
        claims.update(sts="pending")  # type: ignore[attr-defined]
    assert keys.asked == 1


def test_takes_claims_too_deep_to_be_remembered(keys: CountedKeys) -> None:
    """They hold as any others do."""
    deep: list[object] = []
    for _ in range(300):
        deep = [deep]
    verifier, text = SessionVerifier(keys, TokenRules()), token(deep=deep)
    assert verifier.verify(text, NOW).claims["deep"] == deep == verifier.verify(text, NOW).claims["deep"]

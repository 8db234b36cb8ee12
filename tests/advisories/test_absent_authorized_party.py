"""
A malicious subdomain reads a session cookie that was set for the whole domain.

Clerk's guide warns about this attack ("subdomain cookie leaking"). Clerk's SDKs accept a token that
has no ``azp``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.advisories import CLERK, RULES, refusal, sound_token


@pytest.mark.parametrize(
    "azp",
    [
        "",
        "https://evil.example.com",
        CLERK.authorized_party + "/",
        CLERK.authorized_party.upper(),
    ],
)
@pytest.mark.parametrize("native", [False, True])
def test_refuses_a_token_of_another_origin(azp: str, native: bool) -> None:
    """The ``azp`` of a token must be identical to one of the authorized parties."""
    rules = replace(RULES, native=native)
    assert refusal(sound_token(azp=azp), rules=rules) == "token_authorized_party_mismatch"


def test_refuses_a_token_without_an_origin() -> None:
    """A token without ``azp`` is refused, unless native applications are allowed."""
    assert refusal(sound_token(azp=None)) == "token_authorized_party_missing"

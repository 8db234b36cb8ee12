"""
A session cookie of the whole domain is read by one of its subdomains.

Clerk's guide warns of it ("subdomain cookie leaking"). Its SDKs accept a token without any ``azp``.
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
    """With authorized parties configured, ``azp`` must equal one of them exactly."""
    rules = replace(RULES, native=native)
    assert refusal(sound_token(azp=azp), rules=rules) == "token_authorized_party_mismatch"


def test_refuses_a_token_without_an_origin() -> None:
    """Only ``native`` admits a token without ``azp``."""
    assert refusal(sound_token(azp=None)) == "token_authorized_party_missing"

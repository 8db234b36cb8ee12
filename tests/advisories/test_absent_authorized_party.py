"""
A session cookie of the whole domain, read by one of its subdomains.

Clerk's guide warns of it ("subdomain cookie leaking"); its SDKs let a token pass that has no ``azp`` at all.
"""

from __future__ import annotations

import pytest

from tests.advisories import CLERK, refusal, sound_token


@pytest.mark.parametrize("azp", [None, "", "https://evil.example.com", CLERK.authorized_party + "/", CLERK.authorized_party.upper()])
def test_takes_no_token_of_another_origin_or_of_none(azp: object) -> None:
    """Where parties are configured, one of them must be named, letter by letter."""
    assert refusal(sound_token(azp=azp)) == "token_authorized_party_mismatch"

"""
Valid keys are discarded because a response contains no keys.

This affected PyJWKClient, which clears its cache before the new keys have arrived, and clients that
cached a proxy's error page.
"""

from __future__ import annotations

import pytest

from clerkhooks.clerk.signing_keys import FetchedKeys
from tests.advisories import CLERK, refusal, sound_token
from tests.issuer import Issuer, answering, fetched, jwk, key_set


@pytest.mark.parametrize(
    ("status", "body"), [(500, b""), (200, b"<html>"), (200, key_set()), (429, b'{"errors": []}')]
)
def test_keeps_its_keys_when_a_fetch_fails(status: int, body: bytes) -> None:
    """Users stay signed in while Clerk is unavailable."""
    with Issuer(jwk(CLERK)).open() as issuer:
        fetches: list[bool] = []
        keys = fetched(FetchedKeys(issuer.url, cooldown=0, on_fetch=fetches.append))
        issuer.behaviour = answering(body, status)
        for _ in range(3):
            fetched(keys)
            assert refusal(sound_token(), keys) is None
        assert fetches == [True, False, False, False]

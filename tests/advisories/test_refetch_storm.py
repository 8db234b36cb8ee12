"""
A flood of tokens with invented key ids makes the verifier fetch the keys each time.

This affected users of PyJWKClient, and users of jwks-rsa who had not enabled the rate limit. The
issuer responded with 429, and nobody could sign in.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from clerkhooks.clerk.signing_keys import FetchedKeys
from tests.advisories import ATTACKER, CLERK, refusal, sound_token
from tests.issuer import Issuer, fetched, jwk


def test_fetches_once_for_a_flood_of_forged_tokens() -> None:
    """The keys are not fetched again during the cooldown, and valid tokens are still accepted."""
    with Issuer(jwk(CLERK)).open() as issuer:
        keys = fetched(FetchedKeys(issuer.url))
        forged = [sound_token(ATTACKER, {"kid": f"ins_{number}"}) for number in range(100)]
        with ThreadPoolExecutor(8) as threads:
            assert set(threads.map(lambda token: refusal(token, keys), forged)) == {"unknown_key"}
        assert refusal(sound_token(), keys) is None
        assert len(issuer.requests) == 1

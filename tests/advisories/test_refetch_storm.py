"""
A flood of tokens with invented key ids makes the verifier fetch the keys for each.

Affected users of PyJWKClient, and of jwks-rsa without its rate limit: the issuer returns 429, and
nobody can sign in.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from clerkhooks.clerk.signing_keys import FetchedKeys
from tests.advisories import ATTACKER, CLERK, refusal, sound_token
from tests.issuer import Issuer, fetched, jwk


def test_fetches_once_for_a_flood_of_forged_tokens() -> None:
    """During the cooldown the last key set decides: forged tokens are refused, good ones pass."""
    with Issuer(jwk(CLERK)).open() as issuer:
        keys = fetched(FetchedKeys(issuer.url))
        forged = [sound_token(ATTACKER, {"kid": f"ins_{number}"}) for number in range(100)]
        with ThreadPoolExecutor(8) as threads:
            assert set(threads.map(lambda token: refusal(token, keys), forged)) == {"unknown_key"}
        assert refusal(sound_token(), keys) is None
        assert len(issuer.requests) == 1

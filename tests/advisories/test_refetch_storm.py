"""
A flood of tokens with made-up key ids, each of which has the verifier fetch the keys again.

It bit users of PyJWKClient and jwks-rsa without its rate limit: the issuer answers 429, and then nobody is let in.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from clerkhooks.clerk.signing_keys import FetchedKeys
from tests.advisories import ATTACKER, CLERK, refusal, sound_token
from tests.issuer import Issuer, fetched, jwk


def test_costs_clerk_one_request_however_many_are_forged() -> None:
    """All within one cooldown are refused for what the last answer said, and the good ones pass."""
    with Issuer(jwk(CLERK)).open() as issuer:
        keys = fetched(FetchedKeys(issuer.url))
        forged = [sound_token(ATTACKER, {"kid": f"ins_{number}"}) for number in range(100)]
        with ThreadPoolExecutor(8) as threads:
            assert set(threads.map(lambda token: refusal(token, keys), forged)) == {"unknown_key"}
        assert refusal(sound_token(), keys) is None
        assert len(issuer.requests) == 1

"""
A token's header specifies the key that the verifier should use.

This affected Cisco's node-jose (CVE-2018-0114), which trusted an embedded ``jwk``. In other
libraries, ``jku`` and ``x5u`` made the verifier fetch the attacker's key.
"""

from __future__ import annotations

import pytest

from clerkhooks.clerk.signing_keys import FetchedKeys
from tests.advisories import ATTACKER, CLERK, refusal, sound_token
from tests.issuer import Issuer, jwk


@pytest.mark.parametrize("kid", ["ins_fake", "attacker"])
def test_ignores_a_key_in_the_token(kid: str) -> None:
    """A key in the token is not used, and nothing is fetched from a URL in the token."""
    with Issuer(jwk(CLERK)).open() as issuer, Issuer(jwk(ATTACKER, kid)).open() as trap:
        for member in (
            {"jwk": jwk(ATTACKER, kid)},
            {"jku": trap.url},
            {"x5u": trap.url},
            {"x5c": ["AAAA"]},
        ):
            token = sound_token(ATTACKER, {"kid": kid, **member})
            assert refusal(token) == "token_signature_mismatch"
            reason = "unknown_key" if kid == "attacker" else "token_signature_mismatch"
            assert refusal(token, FetchedKeys(issuer.url)) == reason
        assert trap.requests == []


@pytest.mark.parametrize(
    "kid",
    [
        "../../dev/null",
        "' OR 1=1 --",
        "http://169.254.169.254/",
        "",
        0,
        None,
        ["ins_fake"],
        {},
    ],
)
def test_uses_a_key_id_as_a_name_only(kid: object) -> None:
    """A key id is only used to look up a known key, never as a path, a query or a URL."""
    with Issuer(jwk(CLERK)).open() as issuer:
        assert refusal(sound_token(header={"kid": kid}), FetchedKeys(issuer.url)) == "unknown_key"
        assert [headers[":path"] for headers, _ in issuer.requests] == ["/.well-known/jwks.json"]

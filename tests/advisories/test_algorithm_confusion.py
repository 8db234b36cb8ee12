"""
An attacker signs a token with an HMAC whose secret is the public key.

This affected PyJWT before 2.4 (CVE-2022-29217) and most JWT libraries in 2015. The token's header
specified HS256, and the verifier computed an HMAC with the PEM file of the RSA key.
"""

from __future__ import annotations

import hmac

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.advisories import CLERK, forged_token, refusal

PEM = CLERK.public_key_pem.encode()
DER = CLERK.private_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
OPENSSH = CLERK.private_key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


@pytest.mark.parametrize("secret", [PEM, PEM.strip(), DER, OPENSSH, b""])
@pytest.mark.parametrize(
    ("alg", "reason"),
    [
        ("HS256", "token_algorithm_refused"),
        ("hs256", "token_algorithm_refused"),
        ("RS256", "token_signature_mismatch"),
    ],
)
def test_refuses_an_hmac_with_the_public_key(secret: bytes, alg: str, reason: str) -> None:
    """The verifier, not the token, chooses the algorithm, and it always expects RSA."""
    forged = forged_token({"alg": alg}, lambda signed: hmac.digest(secret, signed, "sha256"))
    assert refusal(forged) == reason
